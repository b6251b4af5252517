"""Check that weights obey their N:M pattern, and name the layer, row and group of the first that does not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from algo.layers import weight_names
from algo.mask import rows
from algo.nm import NM

__all__ = ["PatternViolation", "verify", "verify_weight", "violations"]


class PatternViolation(ValueError):
    """A weight has a group with more non-zeros than its pattern allows.

    Members
    -------
    layer, row, group, nonzeros, pattern
        Where the first such group is. For a Conv2d the row counts (output channel, kernel row, kernel column)
        in order.
    count
        How many such groups the layer has.
    """

    def __init__(self, *, layer: str, pattern: NM, row: int, group: int, nonzeros: int, count: int) -> None:
        self.layer, self.pattern, self.row, self.group = layer, pattern, row, group
        self.nonzeros, self.count = nonzeros, count
        super().__init__(
            f"layer {layer!r} is not {pattern}: row {row}, group {group} has {nonzeros} non-zeros, "
            f"at most {pattern.n} allowed "
            f"({count} such group{'s' if count > 1 else ''} in the layer): prune it with sparsify()"
        )


@torch.no_grad()
def violations(weight: Tensor, pattern: NM) -> Tensor:
    """Find the groups with too many non-zeros.

    Returns
    -------
    Tensor
        int64 ``(count, 3)``: row, group, non-zeros. Rows are those of `algo.mask.rows`, flattened. A
        remainder group may hold at most N non-zeros like any other.
    """
    matrix = rows(weight) != 0
    matrix = matrix.reshape(-1, matrix.shape[-1])
    groups = F.pad(matrix, (0, -matrix.shape[1] % pattern.m)).reshape(len(matrix), -1, pattern.m)
    found = groups.sum(2)
    where = (found > pattern.n).nonzero()
    return torch.cat([where, found[where[:, 0], where[:, 1]][:, None]], dim=1)


def verify_weight(weight: Tensor, pattern: NM, *, layer: str = "weight") -> None:
    """Check one weight, Linear (O, I) or Conv2d (O, I, kh, kw).

    Raises
    ------
    PatternViolation
        A group has more than N non-zeros.
    """
    found = violations(weight, pattern)
    if len(found):
        row, group, nonzeros = (int(i) for i in found[0])
        raise PatternViolation(
            layer=layer, pattern=pattern, row=row, group=group, nonzeros=nonzeros, count=len(found)
        )


def verify(model: nn.Module, patterns: Mapping[str, NM]) -> None:
    """Check named layers of a model against their patterns, such as `finalize` returns.

    Raises
    ------
    PatternViolation
        The first layer, row and group that breaks its pattern.
    ValueError
        The model has no such layer.
    """
    modules = dict(model.named_modules())
    for name, pattern in patterns.items():
        if name not in modules or not isinstance(getattr(modules[name], weight_names(modules[name])[0], None), Tensor):
            raise ValueError(f"the model has no layer with a weight named {name!r}")
        for weight in weight_names(modules[name]):
            verify_weight(getattr(modules[name], weight).detach(), NM(pattern), layer=name)
