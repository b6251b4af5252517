"""Random integer networks of operators that move rows, change rows and channels, and multiply activations."""

from __future__ import annotations

import numpy as np

from compiler.ops import (
    Linear,
    Op,
    Pointwise,
    Product,
    QuantNetwork,
    QuantTensor,
    Rearrange,
    Requant,
    ResidualInput,
    RowSource,
    Softmax,
    Transpose,
)
from hw.arch import Arch

__all__ = ["random_rows"]

STEPS = ("rearrange", "rearrange", "transpose", "product", "softmax", "linear", "constant")


class _Maker:
    def __init__(self, seed: int, arch: Arch) -> None:
        self.rng, self.arch = np.random.default_rng(seed), arch
        self.tensors: dict[str, QuantTensor] = {}
        self.ops: list[Op] = []

    def size(self, most: int) -> int:
        return int(self.rng.integers(1, most + 1))

    def tensor(self, shape: tuple[int, int, int], dtype: str = "int8") -> str:
        name = f"t{len(self.tensors)}"
        self.tensors[name] = QuantTensor(name, shape, dtype, 1.0)  # type: ignore[arg-type]
        return name

    def narrow(self) -> str:
        """An int8 tensor that there is."""
        return str(self.rng.choice([name for name, tensor in self.tensors.items() if tensor.dtype == "int8"]))

    def scale(self) -> dict[str, int]:
        return {"mult": int(self.rng.integers(1 << 13, 1 << 15)), "shift": 14}

    def rearrange(self) -> None:
        rows = self.arch.rows
        shape = (self.size(3), self.size(3 * rows), self.size(2 * rows))
        total, sources = shape[0] * shape[1], []
        for _ in range(self.size(3)):
            name = self.narrow()
            x = self.tensors[name].shape
            width = min(self.size(shape[2]), self.size(x[2]))
            start, at = int(self.rng.integers(0, x[2] - width + 1)), int(self.rng.integers(0, shape[2] - width + 1))
            count = self.size(total)
            first = int(self.rng.integers(0, x[0] * x[1]))
            runs = (first + np.arange(count) * int(self.rng.integers(1, 3))) % (x[0] * x[1])
            chosen = runs if self.rng.random() < 0.7 else self.rng.integers(0, x[0] * x[1], count)
            to = np.arange(count) if self.rng.random() < 0.5 else self.rng.permutation(total)[:count]
            sources.append(RowSource(
                tensor=name, rows=chosen.astype(np.int64), to=to.astype(np.int64), start=start, at=at, width=width, **self.scale()
            ))  # fmt: skip
        fill = self.rng.integers(-128, 128, (total, shape[2])).astype(np.int8) if self.rng.random() < 0.5 else None
        out = self.tensor(shape)
        self.ops.append(Rearrange(name=out, out=out, sources=tuple(sources), fill=fill))

    def constant(self) -> None:
        """A 16-bit constant, added to a tensor."""
        x = self.narrow()
        batch, rows, channels = self.tensors[x].shape
        fill = self.rng.integers(-3000, 3000, (batch * rows, channels)).astype(np.int16)
        constant = self.tensor((batch, rows, channels), "int16")
        self.ops.append(Rearrange(name=constant, out=constant, fill=fill))
        out = self.tensor((batch, rows, channels))
        self.ops.append(Pointwise(name=out, x=x, out=out, residual=ResidualInput(constant, 1 << 9, 14), **self.scale()))

    def transpose(self) -> None:
        x = self.narrow()
        batch, rows, channels = self.tensors[x].shape
        out = self.tensor((batch, channels, rows))
        self.ops.append(Transpose(name=out, x=x, out=out))

    def product(self) -> None:
        x = self.narrow()
        batch, rows, channels = self.tensors[x].shape
        y = self.tensor((batch, self.size(3 * self.arch.rows), channels))
        total = batch * self.tensors[y].shape[1]
        source = RowSource(
            tensor=x, rows=self.rng.integers(0, batch * rows, total), to=np.arange(total), start=0, at=0, width=channels,
            **self.scale(),
        )
        self.ops.append(Rearrange(name=y, out=y, sources=(source,)))
        out = self.tensor((batch, rows, self.tensors[y].shape[1]), str(self.rng.choice(["int8", "int16"])))
        self.ops.append(Product(name=out, x=x, y=y, out=out, mult=1 << 14, shift=20))

    def softmax(self) -> None:
        x = str(self.rng.choice(list(self.tensors)))
        if self.tensors[x].shape[2] > self.arch.row_depth:
            return
        out = self.tensor(self.tensors[x].shape)
        self.ops.append(Softmax(
            name=out, x=x, out=out, in_mult=int(self.rng.integers(1, 1 << 15)), in_shift=self.size(14), out_mult=1 << 14,
            out_shift=14,
        ))  # fmt: skip

    def linear(self) -> None:
        x, outputs = self.narrow(), self.size(2 * self.arch.rows)
        batch, rows, channels = self.tensors[x].shape
        weight = self.rng.integers(-127, 128, (outputs, channels)).astype(np.int8)
        requant = Requant(
            np.zeros(outputs, np.int32), np.full(outputs, 1 << 14, np.int16), np.full(outputs, 20, np.uint8)
        )
        out = self.tensor((batch, rows, outputs))
        self.ops.append(Linear(name=out, x=x, out=out, weight=weight, pattern=None, requant=requant))


def random_rows(seed: int, arch: Arch) -> QuantNetwork:
    """A network of up to six steps, of any shapes: multiples of nothing, tails that share tiles."""
    maker = _Maker(seed, arch)
    start = maker.tensor((maker.size(5), maker.size(3 * arch.rows + 1), maker.size(3 * arch.rows)))
    for step in maker.rng.choice(STEPS, 3 + seed % 4):
        getattr(maker, step)()
    read = {name for op in maker.ops for name in _reads(op)}
    outputs = tuple(name for name in maker.tensors if name not in read and name != start)
    return QuantNetwork(tensors=maker.tensors, ops=tuple(maker.ops), inputs=(start,), outputs=outputs)


def _reads(op: Op) -> list[str]:
    if isinstance(op, Rearrange):
        return [part.tensor for part in op.sources]
    names = [op.x] if op.x is not None else []
    names += [op.y] if isinstance(op, Product) else []
    return names + ([op.residual.tensor] if op.residual is not None else [])
