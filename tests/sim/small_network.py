"""A seeded integer network for the tests of the engines: a sparse layer, and one that adds its input."""

import numpy as np

from algo.nm import NM
from compiler.ops import Linear, QuantNetwork, QuantTensor, Requant, ResidualInput

__all__ = ["random_input", "small_network"]

SHAPE = (2, 9, 21)


def small_network(pattern: str | None = "2:4", seed: int = 0) -> QuantNetwork:
    """(2, 9, 21) -> hidden 13 -> (2, 9, 21); the first weights have the pattern."""
    rng = np.random.default_rng(seed)
    shapes = {"x": SHAPE, "hidden": (2, 9, 13), "y": SHAPE}
    tensors = {name: QuantTensor(name, shape, "int8", 0.5) for name, shape in shapes.items()}
    nm = NM(pattern) if pattern else None
    first = Linear(name="first", x="x", out="hidden", weight=_weight(rng, 13, 21, nm), pattern=nm,
                   requant=_requant(rng, 13))
    second = Linear(name="second", x="hidden", out="y", weight=_weight(rng, 21, 13, None), pattern=None,
                    requant=_requant(rng, 21), residual=ResidualInput("x", 1 << 13, 14))
    return QuantNetwork(tensors=tensors, ops=(first, second), inputs=("x",), outputs=("y",))


def random_input(seed: int = 0) -> np.ndarray:
    """Values of x."""
    return np.random.default_rng(seed).integers(-128, 128, SHAPE).astype(np.int8)


def _weight(rng: np.random.Generator, outputs: int, inputs: int, nm: NM | None) -> np.ndarray:
    weight = rng.integers(-127, 128, (outputs, inputs)).astype(np.int8)
    for start in range(0, inputs, nm.m) if nm else ():
        group = weight[:, start : start + nm.m]
        rank = np.argsort(np.argsort(rng.random(group.shape), axis=1), axis=1)
        group[rank >= nm.n] = 0
    return weight


def _requant(rng: np.random.Generator, channels: int) -> Requant:
    return Requant(
        rng.integers(-1000, 1000, channels).astype(np.int32),
        rng.integers(1 << 13, 1 << 14, channels).astype(np.int16),
        np.full(channels, 22, np.uint8),
    )
