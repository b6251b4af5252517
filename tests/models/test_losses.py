import pytest
import torch
from transformers.loss import loss_for_object_detection as reference

from models.losses import box_l1_loss, check_finite, class_loss, dice_loss, giou_loss, sigmoid_focal_loss


def masks(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 30, generator=generator), (torch.rand(4, 30, generator=generator) > 0.7).float()


@pytest.mark.parametrize("alpha", [0.25, 0.6, -1.0])
def test_focal_loss_equals_transformers(alpha):
    logits, targets = masks(0)
    ours = sigmoid_focal_loss(logits, targets, alpha=alpha).mean(1).sum() / 3
    assert ours.item() == pytest.approx(reference.sigmoid_focal_loss(logits, targets, 3, alpha=alpha).item(), rel=1e-6)


def test_dice_loss_equals_transformers():
    logits, targets = masks(1)
    assert dice_loss(logits, targets).sum().item() / 3 == pytest.approx(reference.dice_loss(logits, targets, 3).item(), rel=1e-6)
    certain = torch.where(targets > 0, 40.0, -40.0)
    assert dice_loss(certain, targets).abs().max() < 1e-6


def test_no_object_has_its_weight():
    logits, labels = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 1.0]]), torch.tensor([0, 2])
    each = -logits.log_softmax(-1)[[0, 1], labels]
    expected = (each[0] + 0.1 * each[1]) / 1.1
    assert class_loss(logits[None], labels[None]).item() == pytest.approx(expected.item())


def test_box_losses():
    box, other = torch.tensor([[0.5, 0.5, 0.2, 0.2]]), torch.tensor([[0.6, 0.5, 0.2, 0.4]])
    assert box_l1_loss(box, other).item() == pytest.approx(0.3)
    assert giou_loss(box, box).item() == pytest.approx(0, abs=1e-6)
    # intersection .1 x .2, union .04 + .08 - .02, hull .3 x .4
    assert giou_loss(box, other).item() == pytest.approx(1 - (0.02 / 0.10 - (0.12 - 0.10) / 0.12), abs=1e-6)


@pytest.mark.parametrize("loss", [sigmoid_focal_loss, dice_loss])
def test_gradients(loss):
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), logits)


def test_losses_that_are_no_numbers_are_refused():
    check_finite({"boxes": torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"the loss 'boxes' is not finite \(nan\): lower the learning rate"):
        check_finite({"classes": torch.tensor(0.0), "boxes": torch.tensor(float("nan"))})
