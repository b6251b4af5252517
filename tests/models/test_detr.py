import pytest
import torch
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

from models import create_model
from models.backbone import register_backbone
from models.detr import CONFIGS, Detr
from tests.models.detr_reference import OURS, copy_weights, reference, scene


@pytest.fixture(scope="module")
def pair():
    theirs = reference("detr_r50")
    return theirs, copy_weights(theirs, create_model("detr_r50", **OURS, queries=9))


def labels(targets):
    return [{"class_labels": target.labels, "boxes": target.boxes} for target in targets]


def test_published_size():
    with torch.device("meta"):
        model = create_model("detr_r50")
    assert sum(value.numel() for value in model.parameters()) == 41_524_768
    assert sum(value.numel() for value in model.backbone.parameters()) == 23_454_912


@pytest.mark.parametrize("padded", [False, True])
def test_outputs_equal_transformers(pair, padded):
    theirs, ours = pair
    images, mask, _ = scene(padded=padded)
    with torch.no_grad():
        expected, found = theirs(images, pixel_mask=mask.long()), ours(images, mask)
    assert expected.logits.std(1).mean() > 0.01  # the queries differ
    assert torch.allclose(found.logits, expected.logits, atol=1e-5)
    assert torch.allclose(found.boxes, expected.pred_boxes, atol=1e-5)


def test_losses_equal_transformers(pair):
    theirs, ours = pair
    images, mask, targets = scene()
    output = ours(images, mask)
    losses = ours.criterion(output, targets)
    theirs.config.auxiliary_loss = True
    logits, boxes = (torch.stack([layer[part] for layer in output.layers]) for part in (0, 1))
    total, parts, _ = ForObjectDetectionLoss(logits[-1], labels(targets), "cpu", boxes[-1], theirs.config, logits, boxes)
    theirs.config.auxiliary_loss = False
    assert sum(losses.values()).item() == pytest.approx(total.item(), rel=1e-5)
    weights = {"class": ("loss_ce", 1), "l1": ("loss_bbox", 5), "giou": ("loss_giou", 2)}
    for name, value in losses.items():
        kind, _, layer = name.partition("_")
        other, weight = weights[kind]
        assert value.item() == pytest.approx(weight * parts[f"{other}_{layer}" if layer else other].item(), rel=1e-5)


def test_padding_changes_nothing(pair):
    """The second image alone, unpadded, gives what it gives in the padded batch."""
    _, ours = pair
    images, mask, _ = scene()
    with torch.no_grad():
        batch, alone = ours(images[:, :, :64, :96], mask[:, :64, :96]), ours(images[1:, :, :64, :96])
    assert mask[1, :64, :90].all()
    assert (batch.logits[1] - alone.logits[0]).abs().max() < 0.2  # cells at the rim see the padding's zeros
    masked = ours.detect([type(level)(level.features.where(level.mask[:, None], 7.0), level.mask) for level in
                          ours.extract(images, mask)])  # fmt: skip
    with torch.no_grad():
        plain = ours(images, mask)
    assert torch.allclose(masked.logits, plain.logits, atol=1e-5)  # whatever the padding holds


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.endswith("tiny")])
def test_every_parameter_learns(name):
    torch.manual_seed(0)
    model = create_model(name).train()
    images, mask, targets = scene(classes=1)
    sum(model.losses(images, targets, mask).values()).backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())


def test_predict_counts_pixels_of_the_image_not_the_padding():
    torch.manual_seed(0)
    model = create_model("detr_tiny", width=4)
    images, mask, _ = scene()
    found = model.predict(images, mask, top=5)
    boxes = model(images, mask).boxes.detach()
    assert len(found) == 2 and all(len(one.scores) == 5 for one in found)
    widths = (found[1].boxes[:, 2] - found[1].boxes[:, 0]) / 90
    assert all(((boxes[1, :, 2] - width).abs() < 1e-5).any() for width in widths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 30}, "hidden must be a multiple of 4 and of heads, not 30 with 8 heads"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), not 1.0"),
        ({"queries": 0}, "queries must hold integers >= 1, not 0"),
        ({"frozen_stages": -1}, "frozen_stages must hold integers >= 0, not -1"),
        ({"backbone": "resnet5"}, "unknown backbone 'resnet5': did you mean"),
        ({"layers": 3}, "detr_r50 has no option 'layers': it has feataug, dataaug, backbone"),
        ({"feataug": "flip", "dataaug": "flip"}, "give feataug or dataaug, not both"),
        ({"pretrained": True}, "no installable package carries weights of detr_r50"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("detr_r50", **options)


class Blocks(torch.nn.Module):
    """One map of 5 channels."""

    channels, strides = (5,), (16,)

    def __init__(self):
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 5, 16, 16)

    def forward(self, images):
        return [self.patches(images)]


@register_backbone("blocks_of_the_test")
def blocks(name, **options):
    return Blocks()


def test_another_backbone_can_be_plugged_in():
    model = create_model("detr_tiny", backbone="blocks_of_the_test")
    assert isinstance(model, Detr) and model(torch.zeros(1, 3, 64, 64)).logits.shape == (1, 40, 2)
