import pytest
import torch
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss

from models import create_model
from models.deformable_detr import CONFIGS
from models.detection import DetectionCriterion, DetectorOutput
from models.matcher import BoxMatcher
from tests.models.detr_reference import OURS, copy_weights, reference, scene

# counted on transformers' models; H-Deformable-DETR: 1800 learned contents of 256 channels more than the wide two-stage one
PARAMETERS = {
    "deformable_detr_r50": 40_069_665,
    "deformable_detr_r50_refine": 40_732_725,
    "deformable_detr_r50_two_stage": 41_181_529,
    "h_deformable_detr_r50": 47_485_273 + 460_800,
}
SAME = ("deformable_detr_r50", "deformable_detr_r50_refine", "deformable_detr_r50_two_stage")


@pytest.fixture(scope="module", params=SAME)
def pair(request):
    theirs = reference(request.param, auxiliary_loss=True)
    return theirs, copy_weights(theirs, create_model(request.param, **OURS, queries=9))


def tiny(**options):
    torch.manual_seed(0)
    model = create_model("h_deformable_detr_tiny", queries=8, many_queries=12, width=4, **options)
    with torch.no_grad():
        for head in [*model.class_head, *(head.last for head in model.box_head)]:
            head.weight.normal_(std=0.3)
    return model


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(name):
    with torch.device("meta"):
        assert sum(value.numel() for value in create_model(name).parameters()) == PARAMETERS[name]


def test_sizes_of_variants():
    def count(name, **options):
        with torch.device("meta"):
            return sum(value.numel() for value in create_model(name, **options).parameters())

    assert count("deformable_detr_r50_two_stage", ffn=2048) == 47_485_273
    # the authors' refinement clones the class head for the other five layers
    assert count("deformable_detr_r50_refine", share_class_head=False) == 40_732_725 + 5 * (256 * 91 + 91)


@pytest.mark.parametrize("padded", [False, True])
def test_outputs_equal_transformers(pair, padded):
    theirs, ours = pair
    images, mask, _ = scene(padded=padded)
    with torch.no_grad():
        expected, found = theirs(images, pixel_mask=mask.long()), ours(images, mask)
    assert torch.allclose(found.logits, expected.logits, atol=1e-4)
    assert torch.allclose(found.boxes, expected.pred_boxes, atol=1e-5)
    if expected.enc_outputs_class is not None:
        assert torch.allclose(found.encoder.logits, expected.enc_outputs_class, atol=1e-4)
        assert torch.allclose(found.encoder.boxes, expected.enc_outputs_coord_logits.sigmoid(), atol=1e-5)


def test_losses_and_gradients_equal_transformers(pair):
    theirs, ours = pair
    images, mask, targets = scene()
    labels = [{"class_labels": target.labels, "boxes": target.boxes} for target in targets]
    expected = theirs(images, pixel_mask=mask.long(), labels=labels)
    assert theirs.loss_function is DeformableDetrForObjectDetectionLoss
    # transformers weighs classes by 1 in matching and loss, and has no loss of the proposals
    criterion = DetectionCriterion(matcher=BoxMatcher(focal=True))
    losses = criterion(DetectorOutput(ours(images, mask).layers), targets)
    assert sum(losses.values()).item() == pytest.approx(expected.loss.item(), rel=1e-4)
    theirs.zero_grad()
    expected.loss.backward()
    ours.zero_grad()
    sum(losses.values()).backward()
    ours_grad, theirs_grad = ours.level_embed.grad, theirs.model.level_embed.grad
    assert theirs_grad.abs().max() > 0
    assert (ours_grad - theirs_grad).abs().max() < 1e-3 * theirs_grad.abs().max()


def test_one_to_many_queries_change_nothing_for_the_others():
    """The mask keeps the groups apart: with the many, and without them as at inference, the first are the same."""
    model = tiny().eval()
    images, mask, _ = scene()
    with torch.no_grad():
        alone = model(images, mask)
        model.train()
        for part in model.backbone.modules():
            part.eval()
        together = model(images, mask)
    assert not alone.many and len(together.many) == 3 and together.many[0].logits.shape[1] == 12
    assert alone.logits.shape[1] == 8 and torch.allclose(together.logits, alone.logits, atol=1e-5)
    assert torch.allclose(together.boxes, alone.boxes, atol=1e-5)


def test_one_to_many_queries_do_not_see_the_others():
    model = tiny().train()
    images, mask, _ = scene()
    output = model(images, mask)
    (grad,) = torch.autograd.grad(sum(layer.logits.sum() for layer in output.many), model.queries.weight)
    assert grad[:8].abs().max() == 0 and grad[8:].abs().max() > 0


def test_many_objects_are_matched_six_times():
    model = tiny()
    assert model.criterion.repeats == 6 and model.criterion.many_weight == 1
    images, mask, targets = scene(classes=1)
    losses = model.train().losses(images, targets, mask)
    assert {name for name in losses if name.startswith("many_")} == {
        f"many_{kind}{layer}" for kind in ("class", "l1", "giou") for layer in ("", "_0", "_1")
    }


@pytest.mark.parametrize("twice", [False, True])
def test_looking_forward_twice_sends_the_gradient_one_layer_back(twice):
    model = tiny(look_twice=twice).eval()
    images, mask, _ = scene()
    output = model(images, mask)
    heads = [head.last.bias for head in model.box_head]
    grads = torch.autograd.grad(output.boxes.sum(), heads, allow_unused=True)
    reached = [grad is not None and bool(grad.abs().max() > 0) for grad in grads]
    assert reached == [False, twice, True, False]  # layers 0 to 2, proposals
    with torch.no_grad():
        again = tiny(look_twice=not twice).eval()(images, mask)
    assert torch.allclose(again.boxes, output.boxes, atol=1e-6)  # only gradients differ


def test_mixed_selection_learns_contents():
    model = tiny().eval()
    images, mask, _ = scene()
    (grad,) = torch.autograd.grad(model(images, mask).logits.sum(), model.queries.weight)
    assert model.queries.weight.shape == (20, 64) and grad[:8].abs().min(1).values.max() > 0
    assert not hasattr(tiny(mixed_selection=False), "queries")


@pytest.mark.parametrize("name", ["deformable_detr_tiny", "h_deformable_detr_tiny"])
def test_every_parameter_learns(name):
    torch.manual_seed(0)
    model = create_model(name, queries=8, **({"many_queries": 12} if name.startswith("h_") else {})).train()
    images, mask, targets = scene(classes=1)
    sum(model.losses(images, targets, mask).values()).backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())


def test_levels():
    for levels in (1, 2, 3, 4, 5):
        model = create_model("deformable_detr_tiny", levels=levels, width=4)
        found = model.extract(torch.zeros(1, 3, 128, 128), torch.ones(1, 128, 128, dtype=torch.bool))
        strides = {1: [32], 2: [16, 32], 3: [8, 16, 32], 4: [8, 16, 32, 64], 5: [8, 16, 32, 64, 128]}[levels]
        assert [128 // level.mask.shape[-1] for level in found] == strides


def test_too_few_cells_for_the_queries():
    with pytest.raises(ValueError, match="21 cells of the feature maps cannot give 60 proposals: use larger images"):
        create_model("h_deformable_detr_tiny")(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"two_stage": True}, "two_stage needs refine=True"),
        ({"mixed_selection": True}, "mixed_selection chooses among proposals: give two_stage=True"),
        ({"look_twice": True}, "look_twice is about refined boxes: give refine=True"),
        ({"refine": True, "two_stage": True, "share_class_head": True}, "each layer and the encoder have their own class head"),
        ({"norm_groups": 24}, "hidden must be a multiple of norm_groups, not 256 with 24 groups"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("deformable_detr_r50", **options)


def test_the_authors_training():
    config = CONFIGS["h_deformable_detr_r50"]
    assert (config.queries, config.many_queries, config.ffn, config.dropout) == (300, 1500, 2048, 0.0)
    assert config.mixed_selection and config.look_twice and config.two_stage and config.levels == config.points == 4
    criterion = create_model("deformable_detr_tiny").criterion
    assert (criterion.class_weight, criterion.l1_weight, criterion.giou_weight, criterion.matcher.alpha) == (2, 5, 2, 0.25)
    assert (criterion.matcher.class_weight, criterion.matcher.l1_weight, criterion.matcher.giou_weight) == (2, 5, 2)
