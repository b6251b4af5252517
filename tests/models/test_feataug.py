import pytest
import torch
from torch import nn

from models import Target, create_model
from models.boxes import cxcywh_to_xyxy
from models.detection import Level
from models.feataug import Copies, crop_level, crop_targets, flip_level, flip_targets, random_windows
from tests.models.detr_reference import scene

KINDS = {
    "detr_tiny": {},
    "dab_detr_tiny": {},
    "deformable_detr_tiny": {},
    "h_deformable_detr_tiny": {"queries": 8, "many_queries": 12},
}


def build(name, **options):
    torch.manual_seed(0)
    return create_model(name, width=4, **KINDS[name], **options)


def padded_level(seed=0, *, hole=0.0):
    """Maps of 6 x 8 and, within the same, 4 x 5; ``hole`` fills the padding."""
    features = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(2, 6, 8, dtype=torch.bool)
    mask[1, 4:] = mask[1, :, 5:] = False
    return Level(torch.where(mask[:, None], features, torch.tensor(hole)), mask)


def test_flip_mirrors_each_image_within_its_padding():
    level = padded_level()
    flipped = flip_level(level)
    assert torch.equal(flipped.features[0], level.features[0].flip(2)) and torch.equal(flipped.mask, level.mask)
    assert torch.equal(flipped.features[1, :, :4, :5], level.features[1, :, :4, :5].flip(2))
    assert torch.equal(flip_level(flipped).features, level.features)


def test_the_whole_as_window_changes_nothing():
    level = padded_level(hole=1e6)
    same = crop_level(level, torch.tensor([[0.0, 0, 1, 1]]).expand(2, 4))
    assert torch.allclose(same.features, level.features, atol=1e-5)


def test_windows_of_linear_maps_are_linear():
    """Bilinear sampling is exact on them, and what lies in the padding is not seen."""
    x = torch.arange(16).float()[None, :] + 0.5 + 100 * torch.arange(12).float()[:, None]
    level = Level(x.expand(1, 1, 12, 16), torch.ones(1, 12, 16, dtype=torch.bool))
    cropped = crop_level(level, torch.tensor([[0.25, 0.25, 0.75, 0.75]])).features[0, 0]
    column, row = torch.arange(16) + 0.5, torch.arange(12) + 0.5
    expected = 4 + column[None] * 0.5 + 100 * (3 + row[:, None] * 0.5 - 0.5)
    assert torch.allclose(cropped, expected, atol=1e-3)
    hidden = padded_level(hole=1e6)
    assert crop_level(hidden, torch.tensor([[0.4, 0.4, 1.0, 1.0]] * 2)).features[1, :, :4, :5].abs().max() < 10


@pytest.mark.parametrize("seed", range(8))
def test_boxes_move_with_what_they_hold(seed):
    """A bright rectangle is after the transforms where its box says."""
    generator = torch.Generator().manual_seed(seed)
    centre, size = 0.4 + 0.2 * torch.rand(2, generator=generator), 0.2 + 0.2 * torch.rand(2, generator=generator)
    target = Target(torch.tensor([0]), torch.cat([centre, size])[None])
    corners = (cxcywh_to_xyxy(target.boxes)[0] * 200).round().int()
    image = torch.zeros(1, 1, 200, 200)
    image[..., corners[1] : corners[3], corners[0] : corners[2]] = 1
    torch.manual_seed(seed)
    windows = random_windows(1, (0.7, 0.9))
    level = flip_level(crop_level(Level(image, torch.ones(1, 200, 200, dtype=torch.bool)), windows))
    (moved,) = flip_targets(crop_targets([target], windows))
    bright = (level.features[0, 0] > 0.5).nonzero()
    if not len(moved.boxes):
        return  # its centre is outside
    found = torch.cat([bright.min(0).values.flip(0), bright.max(0).values.flip(0) + 1]) / 200
    assert torch.allclose(cxcywh_to_xyxy(moved.boxes)[0], found, atol=0.012)


def test_objects_leave_with_their_centre():
    target = Target(torch.tensor([0, 1, 2]), torch.tensor([[0.2, 0.5, 0.2, 0.2], [0.55, 0.5, 0.2, 0.2], [0.8, 0.8, 0.1, 0.1]]))
    (kept,) = crop_targets([target], torch.tensor([[0.5, 0.25, 1.0, 0.75]]))
    assert kept.labels.tolist() == [1]
    assert torch.allclose(kept.boxes, torch.tensor([[0.15, 0.5, 0.3, 0.4]]), atol=1e-6)  # clipped at the left
    (none,) = crop_targets([Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))], torch.tensor([[0.0, 0, 0.5, 0.5]]))
    assert none.boxes.shape == (0, 4)


def test_windows():
    torch.manual_seed(0)
    windows = random_windows(500, (0.5, 0.9))
    sides = windows[:, 2:] - windows[:, :2]
    assert windows.min() >= 0 and windows.max() <= 1 and torch.allclose(sides[:, 0], sides[:, 1], atol=1e-6)
    assert 0.5 - 1e-6 <= sides.min() < 0.51 and 0.89 < sides.max() <= 0.9 + 1e-6


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("options", [{"feataug": "flip"}, {"feataug": ("flip", "flip_crop")}, {"dataaug": "flip_crop"}])
def test_evaluation_is_the_parents_to_the_bit(name, options):
    parent, child = build(name), build(name, **options)
    assert list(parent.state_dict()) == list(child.state_dict())  # no new parameters
    child.load_state_dict(parent.state_dict())
    images, mask, targets = scene(classes=1)
    before, after = parent(images, mask), child(images, mask)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.boxes, after.boxes)
    ours, theirs = parent.losses(images, targets, mask), child.losses(images, targets, mask)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours) and list(ours) == list(theirs)
    for one, other in zip(parent.predict(images, mask), child.predict(images, mask)):
        assert all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize("name", KINDS)
def test_losses_are_the_mean_over_the_copies(name):
    model = build(name, feataug="flip").train()
    images, mask, targets = scene(classes=1)
    found = model.losses(images, targets, mask)
    levels = model.extract(images, mask)
    plain = model.criterion(model.detect(levels), targets)
    mirrored = model.criterion(model.detect([flip_level(level) for level in levels]), flip_targets(targets))
    assert set(found) == set(plain)
    for key in found:
        assert found[key].item() == pytest.approx(((plain[key] + mirrored[key]) / 2).item(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_dataaug_equals_feataug_on_a_backbone_that_commutes_with_mirrors(name):
    """Symmetric kernels on images of 65 x 65, whose strides fall on the middle: mirrored images give mirrored maps."""
    losses = []
    for options in ({"feataug": "flip"}, {"dataaug": "flip"}):
        model = build(name, **options, frozen_norm=True).train()
        for module in model.backbone.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data = (module.weight.data + module.weight.data.flip(3)) / 2
        images = scene()[0][:, :, :65, :65]
        targets = [Target(torch.tensor([0]), torch.tensor([[0.3, 0.4, 0.2, 0.3]])) for _ in images]
        losses.append(model.losses(images, targets))
    for key in losses[0]:
        assert losses[0][key].item() == pytest.approx(losses[1][key].item(), rel=1e-4)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("options", [{"feataug": "flip_crop"}, {"dataaug": ("crop", "flip")}])
def test_every_parameter_learns_and_empty_images_pass(name, options):
    model = build(name, **options).train()
    images, mask, targets = scene(classes=1)
    sum(model.losses(images, targets, mask).values()).backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())
    nothing = [targets[1], targets[1]]
    assert sum(model.losses(images, nothing, mask).values()).isfinite()


def test_the_backbone_runs_once_for_features_and_on_all_copies_for_images():
    seen = []
    for options in ({"feataug": ("flip", "crop")}, {"dataaug": ("flip", "crop")}):
        model = build("detr_tiny", **options).train()
        model.backbone.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
        images, mask, targets = scene(classes=1)
        model.losses(images, targets, mask)
    assert seen == [2, 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"copies": "turn"}, "copies must be of flip, crop, flip_crop, not"),
        ({"copies": ()}, "copies must be of flip, crop, flip_crop, not"),
        ({"scale": (0.9, 0.5)}, r"scale must be \(least, greatest\) in \(0, 1\], not \(0.9, 0.5\)"),
        ({"scale": (0.0, 0.5)}, "scale must be"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Copies(**options)
