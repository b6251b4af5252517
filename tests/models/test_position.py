import pytest
import torch
from transformers.models.dab_detr.modeling_dab_detr import encode_sinusoidal_position_embedding
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrSinePositionEmbedding
from transformers.models.detr.modeling_detr import DetrSinePositionEmbedding

from models.position import encode_coordinates, inverse_sigmoid, sine_position


@pytest.mark.parametrize(("kind", "offset"), [(DetrSinePositionEmbedding, 0.0), (DeformableDetrSinePositionEmbedding, -0.5)])
def test_cells_equal_transformers(kind, offset):
    mask = torch.ones(2, 5, 7, dtype=torch.bool)
    mask[1, 3:] = mask[1, :, 4:] = False
    expected = kind(8, normalize=True)(torch.Size([2, 16, 5, 7]), "cpu", torch.float32, mask)
    assert torch.allclose(sine_position(mask, 16, offset=offset), expected, atol=1e-6)


def test_padding_does_not_move_the_cells_of_the_image():
    whole = torch.ones(1, 3, 4, dtype=torch.bool)
    padded = torch.nn.functional.pad(whole, (0, 3, 0, 2))
    assert torch.equal(sine_position(padded, 8)[..., :3, :4], sine_position(whole, 8))


def test_boxes_equal_transformers():
    boxes = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
    expected = encode_sinusoidal_position_embedding(boxes, num_pos_feats=8)  # y before x
    assert torch.allclose(encode_coordinates(boxes[..., [1, 0, 2, 3]], 8), expected, atol=1e-6)


def test_inverse_sigmoid():
    logits = torch.linspace(-8, 8, 9)
    assert torch.allclose(inverse_sigmoid(logits.sigmoid()), logits, atol=1e-2)
    assert inverse_sigmoid(torch.tensor([-1.0, 0.0, 1.0, 2.0])).isfinite().all()


def test_channels():
    with pytest.raises(ValueError, match="channels must be a multiple of 4, not 6"):
        sine_position(torch.ones(1, 2, 2, dtype=torch.bool), 6)
