"""Check that weights obey their N:M pattern, and name the layer, row and group of the first that does not; in a model, or in
anybody's checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from algo.layers import weight_names
from algo.mask import rows
from algo.nm import NM

__all__ = [
    "PatternViolation",
    "WeightCheck",
    "check_checkpoint",
    "check_weights",
    "read_weights",
    "verify",
    "verify_weight",
    "violations",
]


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


@dataclass(frozen=True)
class WeightCheck:
    """One weight of a checkpoint: its groups, how many break the pattern, and the first of those (row, group, non-zeros)."""

    name: str
    shape: tuple[int, ...]
    pattern: NM
    groups: int
    broken: int
    first: tuple[int, int, int] | None
    density: float


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint: a ``.safetensors`` file, a ``.pt``, ``.pth`` or ``.bin`` file (a state dict; only tensors are
    unpickled), or a folder with such files (shards).

    Raises
    ------
    FileNotFoundError
        Nothing there.
    ValueError
        Not a checkpoint of a known kind, or damaged.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
        if not files:
            raise FileNotFoundError(f"no .safetensors, .bin, .pt or .pth file in {path}")
        return {name: value for file in files for name, value in read_weights(file).items()}
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    for key in ("state_dict", "model"):  # how training scripts wrap it
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state dict")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def check_checkpoint(path: str | Path, patterns: Mapping[str, str | NM]) -> list[WeightCheck]:
    """Check the weights of a checkpoint whose names match a glob (the first that matches decides), in its order.

    Only floating-point or integer tensors of 2 to 4 dimensions count as weights. ``"dense"`` leaves weights out.

    Raises
    ------
    FileNotFoundError, ValueError
        See `read_weights`; or a glob matches no weight.
    """
    return check_weights(read_weights(path), patterns, str(path))


def check_weights(weights: Mapping[str, Tensor], patterns: Mapping[str, str | NM], where: str) -> list[WeightCheck]:
    """The same for tensors in memory; ``where`` names them in errors."""
    table = {glob: NM(pattern) for glob, pattern in patterns.items()}
    weights = {name: value for name, value in weights.items() if 2 <= value.ndim <= 4}
    if unused := [glob for glob in table if not any(fnmatchcase(name, glob) for name in weights)]:
        raise ValueError(f"no weight in {where} matches {unused[0]!r}: it has {', '.join(list(weights)[:4]) or 'none'}, ...")
    found = []
    for name, weight in weights.items():
        pattern = next((table[glob] for glob in table if fnmatchcase(name, glob)), None)
        if pattern is not None and not pattern.is_dense:
            found.append(_check(name, weight, pattern))
    return found


def _check(name: str, weight: Tensor, pattern: NM) -> WeightCheck:
    broken, width = violations(weight, pattern), rows(weight).shape[-1]
    first = (int(broken[0, 0]), int(broken[0, 1]), int(broken[0, 2])) if len(broken) else None
    groups = weight.numel() // width * -(-width // pattern.m)
    density = int(torch.count_nonzero(weight)) / weight.numel()
    return WeightCheck(name, tuple(weight.shape), pattern, groups, len(broken), first, density)
