import pytest
import torch
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss

from models import create_model
from models.detection import DetectionCriterion
from models.matcher import BoxMatcher
from tests.models.detr_reference import OURS, copy_weights, reference, scene


@pytest.fixture(scope="module")
def pair():
    theirs = reference("dab_detr_r50", auxiliary_loss=True)
    return theirs, copy_weights(theirs, create_model("dab_detr_r50", **OURS, queries=9))


def test_published_size():
    with torch.device("meta"):
        assert sum(value.numel() for value in create_model("dab_detr_r50").parameters()) == 43_671_517


@pytest.mark.parametrize("padded", [False, True])
def test_outputs_equal_transformers(pair, padded):
    theirs, ours = pair
    images, mask, _ = scene(padded=padded)
    with torch.no_grad():
        expected, found = theirs(images, pixel_mask=mask.long()), ours(images, mask)
    assert torch.allclose(found.logits, expected.logits, atol=1e-5)
    assert torch.allclose(found.boxes, expected.pred_boxes, atol=1e-5)


def test_losses_and_gradients_equal_transformers(pair):
    theirs, ours = pair
    images, mask, targets = scene()
    labels = [{"class_labels": target.labels, "boxes": target.boxes} for target in targets]
    expected = theirs(images, pixel_mask=mask.long(), labels=labels)
    # transformers weighs classes by 2 in matching and by 1 in the loss
    criterion = DetectionCriterion(matcher=BoxMatcher(focal=True, class_weight=2.0))
    losses = criterion(ours(images, mask), targets)
    assert theirs.loss_function is DeformableDetrForObjectDetectionLoss
    assert sum(losses.values()).item() == pytest.approx(expected.loss.item(), rel=1e-5)
    theirs.zero_grad()
    expected.loss.backward()
    ours.zero_grad()
    sum(losses.values()).backward()
    assert torch.allclose(ours.queries.weight.grad, theirs.model.query_refpoint_embeddings.weight.grad, rtol=1e-3, atol=1e-6)
    assert torch.allclose(ours.box_head.last.weight.grad, theirs.bbox_predictor.layers[-1].weight.grad, rtol=1e-3, atol=1e-5)


def test_every_parameter_learns():
    torch.manual_seed(0)
    model = create_model("dab_detr_tiny").train()
    images, mask, targets = scene(classes=1)
    sum(model.losses(images, targets, mask).values()).backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())


def test_temperature():
    with pytest.raises(ValueError, match="temperature must be > 0, not 0"):
        create_model("dab_detr_tiny", temperature=0)
