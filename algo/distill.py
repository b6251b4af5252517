"""Learn from a dense teacher: its opinion of each class, and if wanted its hidden states.

Ref: G. Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531; hidden states as in TinyBERT, X. Jiao et
al., arXiv 1909.10351, without a projection: student and teacher are of one width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from algo.distributed import unwrap
from algo.settings import setting
from algo.train import LossFn

__all__ = ["DistillConfig", "distillation"]


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How much of the loss comes from the teacher: ``(1 - alpha) * task + alpha * T^2 * KL + hidden * MSE``."""

    alpha: float = setting(0.5, "share of the teacher's opinion in the loss, in [0, 1]")
    temperature: float = setting(2.0, "by which both logits are divided, > 0")
    hidden: float = setting(0.0, "weight of the mean squared error of hidden states")
    layers: tuple[str, ...] = setting((), "globs of the modules whose outputs are the hidden states")

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], not {self.alpha!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, not {self.temperature!r}")
        if self.hidden < 0:
            raise ValueError(f"hidden must be >= 0, not {self.hidden!r}")
        if self.hidden and not self.layers:
            raise ValueError("hidden states need layers: globs of module names such as blocks.*")


def distillation(
    teacher: nn.Module,
    logits: Callable[[nn.Module, Any], Tensor],
    labels: Callable[[Any], Tensor],
    config: DistillConfig,
) -> LossFn:
    """Make a loss from a teacher, which is put in eval mode and not trained.

    Parameters
    ----------
    logits, labels
        (model, batch) -> (B, classes), and batch -> (B,).

    Raises
    ------
    ValueError
        No module has a name that ``config.layers`` matches.
    """
    teacher.eval().requires_grad_(False)
    names = _matching(teacher, config.layers) if config.hidden else []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad(), _outputs(teacher, names) as wanted:
            opinion = logits(teacher, batch)
        with _outputs(unwrap(model), names) as given:
            own = logits(model, batch)
        heat = config.temperature
        soft = F.kl_div((own / heat).log_softmax(1), (opinion / heat).log_softmax(1), reduction="batchmean", log_target=True)
        total = (1 - config.alpha) * F.cross_entropy(own, labels(batch)) + config.alpha * heat**2 * soft
        if names:
            errors = [F.mse_loss(given[name], wanted[name]) for name in names]
            total = total + config.hidden * torch.stack(errors).mean()
        return total

    return loss


def _matching(model: nn.Module, globs: Iterable[str]) -> list[str]:
    """Names that a glob matches part by part: ``blocks.*`` are the blocks, not what is in them."""
    names = [name for name, _ in model.named_modules()]
    found = []
    for glob in globs:
        fit = [name for name in names if fnmatchcase(name, glob) and name.count(".") == glob.count(".")]
        if not fit:
            raise ValueError(f"distill.layers: no module matches {glob!r}; there are {', '.join(names[1:9])}, ...")
        found += fit
    return found


@contextmanager
def _outputs(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collect what the named modules give while the context lasts."""
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
