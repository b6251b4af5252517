"""The N:M training methods: how a weight is masked in forward, what gradient it gets, and when its mask changes.

Each method is a torch parametrisation of a weight. The parameter that the optimiser sees stays dense; the layer's own
``weight`` is what this module makes of it. `METHODS` names them all, with their sources.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from algo.mask import magnitude_mask, magnitude_threshold
from algo.nm import NM

__all__ = [
    "METHODS",
    "FixedMask",
    "GradualMask",
    "MethodInfo",
    "NMParametrization",
    "SoftThreshold",
    "StepMask",
    "StraightThrough",
]


class _StraightThrough(torch.autograd.Function):
    """``weight * mask`` with the gradient ``g + decay * (1 - mask) * weight``."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        masked = weight * mask  # two fifths of the time of torch.where; its minus zeros go in `finalize`
        ctx.save_for_backward(weight, masked)
        ctx.decay = decay
        return masked

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight, masked = ctx.saved_tensors
        gradient = gradients[0]
        if ctx.decay:
            pruned = weight - masked  # exactly 0 where the mask keeps
            gradient = torch.add(gradient, pruned, alpha=ctx.decay, out=pruned)
        return gradient, None, None


class _Shrink(torch.autograd.Function):
    """``scale * sign(w) * max(|w| - threshold, 0)``, straight through."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, threshold: Tensor, scale: Tensor) -> Tensor:
        return (weight - weight.clamp(-threshold, threshold)) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


class NMParametrization(nn.Module):
    """Base of the methods: a mask by magnitude at each forward until it is frozen, and ``weight * mask``.

    Parameters
    ----------
    weight
        The weight it will stand before: ``(O, I)``, ``(O, I, k)`` or ``(O, I, kh, kw)``.
    pattern
        The N:M pattern; assign to ``pattern`` to change it.

    Members
    -------
    mask
        bool buffer, the weight's shape: the mask of the latest forward.
    frozen
        bool buffer, one element: while True the mask stays as it is.
    """

    mask: Tensor
    frozen: Tensor

    def __init__(self, weight: Tensor, pattern: NM) -> None:
        super().__init__()
        self.pattern = pattern
        self.register_buffer("mask", magnitude_mask(weight, pattern))
        self.register_buffer("frozen", torch.zeros(1, dtype=torch.bool))
        self.is_frozen = False

    def forward(self, weight: Tensor) -> Tensor:
        if not self.is_frozen:
            # A new tensor, not a copy into the old one: backward may still need the old one.
            self.mask = self.new_mask(weight)
        return self.masked(weight)

    def new_mask(self, weight: Tensor) -> Tensor:
        """The mask for these weights."""
        return magnitude_mask(weight, self.pattern)

    def masked(self, weight: Tensor) -> Tensor:
        """The weight that the layer computes with."""
        return weight * self.mask

    def at(self, weight: Tensor, share: float) -> None:
        """Be told, before a step, which share of all steps is done, in [0, 1): for methods with a schedule."""

    def freeze(self, weight: Tensor) -> None:
        """Take the mask of the present weights and keep it."""
        if not self.is_frozen:
            self.mask = self.new_mask(weight)
            self.set_frozen(True)

    def thaw(self) -> None:
        """Let the mask follow the weights again."""
        self.set_frozen(False)

    def set_frozen(self, frozen: bool) -> None:
        """Note it, in the state dict too."""
        self.frozen.fill_(frozen)
        self.is_frozen = frozen

    def sync(self) -> None:
        """Bring plain attributes up to the buffers, which are what a state dict has: forward must not wait for a device."""
        self.is_frozen = bool(self.frozen.item())

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self.sync()

    def extra_repr(self) -> str:
        return str(self.pattern)


class StraightThrough(NMParametrization):
    """STE and SR-STE: pruned weights get the gradient too, and ``decay`` pulls them towards zero.

    Ref: SR-STE, A. Zhou et al., arXiv 2102.04010; ``decay`` is its lambda_W, 0 the plain straight-through estimator of
    Y. Bengio et al., arXiv 1308.3432.
    """

    def __init__(self, weight: Tensor, pattern: NM, *, decay: float) -> None:
        super().__init__(weight, pattern)
        self.decay = decay

    def masked(self, weight: Tensor) -> Tensor:
        return cast(Tensor, _StraightThrough.apply(weight, self.mask, self.decay))

    def extra_repr(self) -> str:
        return f"{self.pattern}, decay={self.decay}"


class FixedMask(NMParametrization):
    """A mask chosen once; pruned weights get no gradient.

    Ref: the recipe of ASP, A. Mishra et al., arXiv 2104.08378: prune a trained network by magnitude, train on.
    """

    def __init__(self, weight: Tensor, pattern: NM, mask: Tensor | None = None) -> None:
        super().__init__(weight, pattern)
        if mask is not None:
            self.mask = mask
        self.set_frozen(True)

    def thaw(self) -> None:
        pass


class GradualMask(NMParametrization):
    """N falls from M to its target while training goes on; a weight that is pruned stays pruned.

    The density follows M. Zhu and S. Gupta, arXiv 1710.01878: ``target + (1 - target) * (1 - share / end) ** 3``, and N is that
    times M, rounded up. After ``end`` of the steps the mask stays.
    """

    level: Tensor

    def __init__(self, weight: Tensor, pattern: NM, *, end: float) -> None:
        super().__init__(weight, pattern)
        self.end = end
        self.mask.fill_(True)
        self.register_buffer("level", torch.tensor(pattern.m))

    def new_mask(self, weight: Tensor) -> Tensor:
        return self.mask & magnitude_mask(weight * self.mask, NM(int(self.level.item()), self.pattern.m))

    def forward(self, weight: Tensor) -> Tensor:
        return self.masked(weight)

    def at(self, weight: Tensor, share: float) -> None:
        rest = (1 - self.pattern.density) * max(0.0, 1 - share / self.end) ** 3
        # rounded before the ceiling, so that 2.0000001 is 2
        level = min(int(self.level.item()), math.ceil(round(self.pattern.m * (self.pattern.density + rest), 9)))
        if level < int(self.level.item()) and not self.is_frozen:
            self.level.fill_(level)
            self.mask = self.new_mask(weight)

    def freeze(self, weight: Tensor) -> None:
        self.level.fill_(self.pattern.n)
        super().freeze(weight)


class SoftThreshold(NMParametrization):
    """S-STE: the N largest of a group less the largest of the others, so that the weight is a continuous function.

    ``scale * sign(w) * max(|w| - t, 0)``, t the magnitude of rank M-N-1 counted from the smallest; ``scale`` is the factor
    that brings the result nearest to the weights in the mean square, computed at the start. Gradients pass straight
    through.

    Ref: S-STE, Y. Hu et al., arXiv 2409.09099.
    """

    scale: Tensor

    def __init__(self, weight: Tensor, pattern: NM) -> None:
        super().__init__(weight, pattern)
        shrunk = _Shrink.apply(weight.detach(), magnitude_threshold(weight, self.mask, pattern), weight.new_ones(()))
        power = shrunk.square().sum()
        self.register_buffer("scale", torch.where(power > 0, (shrunk * weight.detach()).sum() / power, 1.0))

    def masked(self, weight: Tensor) -> Tensor:
        if self.is_frozen:
            return weight * self.mask
        return cast(Tensor, _Shrink.apply(weight, magnitude_threshold(weight, self.mask, self.pattern), self.scale))

    def freeze(self, weight: Tensor) -> None:
        if not self.is_frozen:
            with torch.no_grad():
                self.mask = self.new_mask(weight)
                weight.copy_(self.masked(weight))  # from now on the weights are what the layer computed with
            self.set_frozen(True)


class StepMask(StraightThrough):
    """STEP: dense until Adam's second moment is known, then masked, straight through.

    The optimiser's half is `algo.step_adam.StepAdamW`, which keeps the second moment from then on.

    Ref: STEP, Y. Lu et al., arXiv 2302.01172.
    """

    dense: Tensor

    def __init__(self, weight: Tensor, pattern: NM, *, precondition: float) -> None:
        super().__init__(weight, pattern, decay=0.0)
        self.precondition = precondition
        self.register_buffer("dense", torch.ones(1, dtype=torch.bool))
        self.is_dense = True

    def new_mask(self, weight: Tensor) -> Tensor:
        return torch.ones_like(weight, dtype=torch.bool) if self.is_dense else super().new_mask(weight)

    def at(self, weight: Tensor, share: float) -> None:
        if share >= self.precondition:
            self._begin()

    def freeze(self, weight: Tensor) -> None:
        self._begin()
        super().freeze(weight)

    def sync(self) -> None:
        super().sync()
        self.is_dense = bool(self.dense.item())

    def _begin(self) -> None:
        self.dense.fill_(False)
        self.is_dense = False


@dataclass(frozen=True)
class MethodInfo:
    """One method: ``at once`` zeroes weights and is done, ``calibrated`` does so from data, ``training`` goes on in training,
    ``family`` trains one level after another (`algo.idp.run_idp`)."""

    kind: Literal["at once", "calibrated", "training", "family"]
    summary: str
    source: str


METHODS: dict[str, MethodInfo] = {
    "sr-ste": MethodInfo("training", "mask by magnitude each step, straight-through; pruned weights decay", "arXiv 2102.04010"),
    "ste": MethodInfo("training", "mask by magnitude at each step, straight-through", "arXiv 1308.3432"),
    "magnitude": MethodInfo("at once", "the N largest magnitudes stay", "arXiv 2104.08378"),
    "fixed": MethodInfo("training", "pruned by magnitude at the start, then the mask stays", "arXiv 2104.08378"),
    "gradual": MethodInfo("training", "N falls from M while training goes on, what is pruned stays pruned", "arXiv 1710.01878"),
    "s-ste": MethodInfo("training", "soft threshold at the largest pruned magnitude, straight-through", "arXiv 2409.09099"),
    "step": MethodInfo("training", "dense until Adam's second moment is known, then masked with it", "arXiv 2302.01172"),
    "wanda": MethodInfo("calibrated", "magnitude times the norm of the weight's input", "arXiv 2306.11695"),
    "sparsegpt": MethodInfo("calibrated", "second order, layer by layer; other weights make up", "arXiv 2301.00774"),
    "idp": MethodInfo("family", "inherited dynamic pruning: one level after another down to N", "arXiv 2208.06118"),
}
"""Every method by name."""
