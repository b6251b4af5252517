"""Random integer networks of convolutions, poolings, pointwise operators and linear layers on images."""

from __future__ import annotations

import numpy as np

from algo.nm import NM
from compiler.ops import Conv, LayerNorm, Linear, MaxPool, Op, QuantNetwork, QuantTensor, Requant, ResidualInput, Window
from hw.arch import Arch
from tests.compiler.random_networks import PATTERNS, random_weight

__all__ = ["random_convolutions"]


def random_convolutions(seed: int, arch: Arch, *, ops: int = 4, max_size: int = 9, max_batch: int = 3) -> QuantNetwork:
    """Images of any size; kernels, strides, paddings, dilations and groups of all kinds, every N:M class, residuals, tables,
    norms."""
    return _Builder(np.random.default_rng(seed), arch, max_size, max_batch).network(ops)


class _Builder:
    def __init__(self, rng: np.random.Generator, arch: Arch, max_size: int, max_batch: int) -> None:
        self.rng, self.arch, self.max_size = rng, arch, max_size
        self.batch = int(rng.integers(1, max_batch + 1))
        self.tensors: dict[str, QuantTensor] = {}
        self.ops: list[Op] = []

    def network(self, ops: int) -> QuantNetwork:
        size = (self.integer(1, self.max_size), self.integer(1, self.max_size))
        self.tensor(size, self.integer(1, 2 * self.arch.lanes + 3))
        while len(self.ops) < ops:
            names = [name for name, tensor in self.tensors.items() if tensor.dtype == "int8"]
            x = names[-1] if self.rng.random() < 0.7 else str(self.rng.choice(names))
            kind = self.rng.random()
            if kind < 0.65:
                self.convolution(x)
            elif kind < 0.8:
                self.linear(x)
            else:
                self.pool(x)
        read = {name for op in self.ops for name in (op.x, op.residual.tensor if op.residual else None)}
        outputs = [op.out for op in self.ops if op.out not in read]
        return QuantNetwork(tensors=self.tensors, ops=tuple(self.ops), inputs=("t0",), outputs=tuple(outputs))

    def integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def tensor(self, image: tuple[int, int], channels: int, dtype: str = "int8") -> str:
        name = f"t{len(self.tensors)}"
        self.tensors[name] = QuantTensor(name, (self.batch, image[0] * image[1], channels), dtype, 1.0, image)  # type: ignore[arg-type]
        return name

    def window(self, image: tuple[int, int], *, pool: bool = False) -> tuple[Window, tuple[int, int]]:
        """A window that sees each image it is used on at least in part, and the size of its result."""
        while True:
            kernel, stride, dilation = ((self.integer(1, 3), self.integer(1, 3)) for _ in range(3))
            padding = tuple(self.integer(0, (k - 1) * d // 2 if pool else k) for k, d in zip(kernel, dilation))
            reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation)]
            out = tuple((n + 2 * p - r) // s + 1 for n, p, r, s in zip(image, padding, reach, stride))
            window = Window(kernel=kernel, stride=stride, padding=padding, dilation=dilation)  # type: ignore[arg-type]
            fits = all(n + 2 * p >= r for n, p, r in zip(image, padding, reach))
            if fits and (not pool or (window.sources(image, out) >= 0).any(0).all()):  # type: ignore[arg-type]
                return window, out  # type: ignore[return-value]

    def requant(self, cols: int, k: int) -> Requant:
        target = int(np.log2(max(k, 1)) / 2 + 6 + 14.5)
        return Requant(
            bias=self.rng.integers(-(1 << 12), 1 << 12, cols).astype(np.int32),
            mult=self.rng.integers(1 << 13, 1 << 15, cols).astype(np.int16),
            shift=self.rng.integers(target - 1, target + 2, cols).astype(np.uint8),
        )

    def post(self, image: tuple[int, int], cols: int) -> dict[str, object]:
        same = [name for name, t in self.tensors.items() if t.image == image and t.shape[2] == cols]
        residual, table, dtype = None, None, "int8"
        if same and self.rng.random() < 0.5:
            residual = ResidualInput(str(self.rng.choice(same)), self.integer(1 << 12, (1 << 15) - 1), self.integer(13, 17))
            if residual.mult % 3 == 0:
                residual = ResidualInput(residual.tensor, multiply=True)
        if self.rng.random() < 0.5:
            table = np.sort(self.rng.integers(0, 128, 256)).astype(np.int8)
        elif self.rng.random() < 0.3:
            dtype = "int16"
        out = self.tensor(image, cols, dtype)
        return {"out": out, "residual": residual, "table": table}

    def linear(self, x: str) -> None:
        tensor, cols = self.tensors[x], self.integer(1, 2 * self.arch.lanes + 3)
        pattern = self.pattern()
        weight = random_weight(self.rng, cols, tensor.shape[2], pattern)
        assert tensor.image is not None
        self.ops.append(Linear(
            name=f"linear{len(self.ops)}", x=x, weight=weight, pattern=pattern, requant=self.requant(cols, tensor.shape[2]),
            **self.post(tensor.image, cols),  # type: ignore[arg-type]
        ))  # fmt: skip

    def pattern(self) -> NM | None:
        text = self.rng.choice(np.array(PATTERNS, object))
        return None if text is None else NM(text)

    def convolution(self, x: str) -> None:
        tensor = self.tensors[x]
        assert tensor.image is not None
        window, out = self.window(tensor.image)
        inputs = tensor.shape[2]
        groups = int(self.rng.choice([g for g in range(1, inputs + 1) if inputs % g == 0])) if self.rng.random() < 0.4 else 1
        cols = groups * self.integer(1, max(1, (2 * self.arch.lanes + 3) // groups))
        pattern, (high, wide) = self.pattern(), window.kernel
        weight = random_weight(self.rng, cols * high * wide, inputs // groups, pattern)
        post, norm = self.post(out, cols), None
        centred = window.padding == (0, 0) and self.tensors[str(post["out"])].dtype == "int8"
        if centred and post["table"] is None and cols <= self.arch.row_depth and self.rng.random() < 0.5:
            norm = self.norm(cols)
        conv = Conv(
            name=f"conv{len(self.ops)}", x=x, weight=weight.reshape(cols, high, wide, -1), window=window, groups=groups,
            norm=norm, pattern=pattern, requant=self.requant(cols, high * wide * inputs // groups), **post,  # type: ignore[arg-type]
        )  # fmt: skip
        self.ops.append(conv)

    def norm(self, cols: int) -> LayerNorm:
        return LayerNorm(
            gamma=self.rng.integers(-(1 << 15), 1 << 15, cols).astype(np.int16),
            beta=self.rng.integers(-(1 << 20), 1 << 20, cols).astype(np.int32),
            shift=self.rng.integers(14, 20, cols).astype(np.uint8),
            eps=self.integer(0, 1 << 20),
        )

    def pool(self, x: str) -> None:
        image = self.tensors[x].image
        assert image is not None
        window, size = self.window(image, pool=True)
        out = self.tensor(size, self.tensors[x].shape[2])
        self.ops.append(MaxPool(name=f"pool{len(self.ops)}", x=x, out=out, window=window))
