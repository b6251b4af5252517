import math

import torch
from transformers import DeformableDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrMultiscaleDeformableAttention,
    MultiScaleDeformableAttention,
)

from models.deformable_attention import DeformableAttention, sample_levels

SIZES = [(5, 7), (3, 4), (2, 2)]
CELLS = sum(height * width for height, width in SIZES)


def inputs(seed=0, *, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(shape, generator=generator, dtype=dtype)
    value, locations = draw(2, CELLS, 4, 6), 1.4 * draw(2, 9, 4, 3, 2, 2) - 0.2  # some outside
    return value, locations, draw(2, 9, 4, 3, 2)


def test_samples_equal_transformers():
    value, locations, weights = inputs()
    shapes = torch.tensor(SIZES)
    expected = MultiScaleDeformableAttention()(value, shapes, SIZES, None, locations, weights, 64)
    assert torch.allclose(sample_levels(value, SIZES, locations, weights), expected, atol=1e-6)


def test_samples_equal_a_loop():
    """Bilinear interpolation written out, zeros around the maps."""
    value, locations, weights = inputs(1, dtype=torch.float64)
    starts = [0, 35, 47]

    def look(batch, head, level, x, y):
        height, width = SIZES[level]
        column, row = x * width - 0.5, y * height - 0.5
        total = torch.zeros(6, dtype=torch.float64)
        for i in (math.floor(row), math.floor(row) + 1):
            for j in (math.floor(column), math.floor(column) + 1):
                if 0 <= i < height and 0 <= j < width:
                    share = (1 - abs(row - i)) * (1 - abs(column - j))
                    total += share * value[batch, starts[level] + i * width + j, head]
        return total

    ours = sample_levels(value, SIZES, locations, weights).view(2, 9, 4, 6)
    for batch, query, head in ((0, 0, 0), (1, 8, 3), (0, 5, 2)):
        expected = torch.zeros(6, dtype=torch.float64)
        for level in range(3):
            for point in range(2):
                place = (batch, query, head, level, point)
                expected += weights[place] * look(batch, head, level, *locations[place].tolist())
        assert torch.allclose(ours[batch, query, head], expected)


def modules():
    config = DeformableDetrConfig(d_model=32, num_feature_levels=3)
    theirs = DeformableDetrMultiscaleDeformableAttention(config, num_heads=4, n_points=2)
    ours = DeformableAttention(32, heads=4, levels=3, points=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in theirs.parameters():
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    names = {"value_proj": "value", "output_proj": "output"}
    state = {}
    for key, value in theirs.state_dict().items():
        layer, _, kind = key.partition(".")
        state[f"{names.get(layer, layer)}.{kind}"] = value
    ours.load_state_dict(state)
    return theirs, ours


def test_module_equals_transformers():
    theirs, ours = modules()
    generator = torch.Generator().manual_seed(4)
    query, memory = torch.randn(2, 9, 32, generator=generator), torch.randn(2, CELLS, 32, generator=generator)
    inside = torch.rand(2, CELLS, generator=generator) > 0.2
    for coordinates in (2, 4):
        reference = torch.rand(2, 9, 3, coordinates, generator=generator)
        expected, _ = theirs(
            query, attention_mask=inside, encoder_hidden_states=memory, reference_points=reference,
            spatial_shapes=torch.tensor(SIZES), spatial_shapes_list=SIZES,
        )  # fmt: skip
        assert torch.allclose(ours(query, reference, memory, SIZES, inside), expected, atol=1e-5)


def test_flip_equivariance():
    """Mirrored maps, references and offsets give the same answer."""
    _, ours = modules()
    generator = torch.Generator().manual_seed(5)
    query, memory = torch.randn(2, 9, 32, generator=generator), torch.randn(2, CELLS, 32, generator=generator)
    reference, inside = torch.rand(2, 9, 3, 2, generator=generator), torch.ones(2, CELLS, dtype=torch.bool)
    before = ours(query, reference, memory, SIZES, inside)
    parts = memory.split([height * width for height, width in SIZES], 1)
    mirrored = torch.cat([part.view(2, *size, 32).flip(2).flatten(1, 2) for part, size in zip(parts, SIZES)], 1)
    with torch.no_grad():
        ours.sampling_offsets.weight[0::2] *= -1
        ours.sampling_offsets.bias[0::2] *= -1
    away = torch.stack([1 - reference[..., 0], reference[..., 1]], -1)
    assert torch.allclose(ours(query, away, mirrored, SIZES, inside), before, atol=1e-5)


def test_gradients():
    value, locations, weights = (part[:, :3] if index else part for index, part in enumerate(inputs(2, dtype=torch.float64)))
    for part in (value, locations, weights):
        part.requires_grad_()
    assert torch.autograd.gradcheck(lambda *parts: sample_levels(parts[0], SIZES, *parts[1:]), (value, locations, weights))


def test_heads_look_apart_at_first():
    offsets = DeformableAttention(32, heads=4, levels=3, points=2).sampling_offsets.bias.view(4, 3, 2, 2)
    assert torch.allclose(offsets[:, 0, 1], 2 * torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]), atol=1e-6)
