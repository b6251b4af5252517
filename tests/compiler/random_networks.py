"""Random integer networks with odd shapes and every class of N:M pattern, and random inputs for them.

Used by the tests of the compiler, the ISA engine and the RTL: the same seed gives the same network.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from algo.nm import NM
from compiler.ops import (
    Attention,
    LayerNorm,
    Linear,
    Op,
    Pointwise,
    QuantNetwork,
    QuantTensor,
    Requant,
    ResidualInput,
    ScoreBias,
)
from hw.arch import Arch

__all__ = ["PATTERNS", "random_inputs", "random_network", "random_weight"]

PATTERNS = (
    None,
    "1:1",
    "4:4",
    "1:2",
    "2:4",
    "1:4",
    "2:8",
    "1:8",
    "3:5",
    "1:3",
    "5:7",
    "2:3",
    "4:32",
    "1:32",
    "31:32",
    "7:16",
    "32:32",
)
"""Dense, N = M, N = 1, odd M, M = 32, nearly full."""

_DTYPES = ("int8", "int8", "int8", "int16")


def random_weight(rng: np.random.Generator, cols: int, k: int, pattern: NM | None) -> NDArray[np.int8]:
    """int8 (cols, k) that obeys the pattern; some groups have fewer than N non-zeros, some rows none."""
    weight = rng.integers(-128, 128, (cols, k)).astype(np.int8)
    if pattern is not None and pattern.n < pattern.m:
        groups = -(-k // pattern.m)
        order = rng.random((cols, groups, pattern.m)).argsort(2).argsort(2)
        weight[(order >= pattern.n).reshape(cols, -1)[:, :k]] = 0
    if rng.random() < 0.3:
        weight[rng.random((cols, k)) < 0.3] = 0
    return weight


def random_inputs(rng: np.random.Generator, network: QuantNetwork) -> dict[str, NDArray[np.integer]]:
    """One array for each input; key masks keep at least one key, except that now and then all keys of an
    entry are masked."""
    inputs: dict[str, NDArray[np.integer]] = {}
    for name in network.inputs:
        tensor = network.tensors[name]
        if tensor.dtype == "keymask":
            mask = (rng.random(tensor.shape) < 0.7).astype(np.uint8)
            mask[:, 0, rng.integers(tensor.shape[2])] = 1
            if rng.random() < 0.1:
                mask[rng.integers(len(mask))] = 0
            inputs[name] = mask
        else:
            bits = 16 if tensor.dtype == "int16" else 8
            inputs[name] = rng.integers(-(1 << bits - 1), 1 << bits - 1, tensor.shape).astype(tensor.dtype)
    return inputs


@dataclass
class _Builder:
    rng: np.random.Generator
    arch: Arch
    max_channels: int
    max_rows: int
    cross: bool
    masks: bool = False
    products: bool = False
    tensors: dict[str, QuantTensor] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)

    def integer(self, low: int, high: int) -> int:
        """low..high, both included."""
        return int(self.rng.integers(low, high + 1))

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def tensor(self, shape: tuple[int, int, int], dtype: str, *, is_input: bool = False) -> str:
        name = f"{'in' if is_input else 't'}{len(self.tensors)}"
        self.tensors[name] = QuantTensor(name, shape, dtype, float(self.rng.uniform(0.01, 1)))  # type: ignore[arg-type]
        if is_input:
            self.inputs.append(name)
        return name

    def pick(self, shape: tuple[int, int, int], *dtypes: str) -> str | None:
        """An existing tensor of that shape and one of these types."""
        names = [n for n, t in self.tensors.items() if t.shape == shape and t.dtype in dtypes]
        return str(self.rng.choice(names)) if names else None

    def requant(self, cols: int, k: int) -> Requant:
        """Parameters that bring sums of k products into the range of int8, more or less."""
        target = int(np.log2(max(k, 1)) / 2 + 6 + 14.5)
        return Requant(
            bias=self.rng.integers(-(1 << 12), 1 << 12, cols).astype(np.int32),
            mult=self.rng.integers(1 << 13, 1 << 15, cols).astype(np.int16),
            shift=self.rng.integers(target - 1, target + 2, cols).astype(np.uint8),
        )

    def residual(self, shape: tuple[int, int, int], *, needed: bool = False) -> ResidualInput | None:
        name = self.pick(shape, "int8", "int16")
        if self.products and self.chance(0.5):
            name = self.pick(shape, "int16") or name
        if name is None or (not needed and self.chance(0.5)):
            return None
        if self.products and not needed and self.chance(0.7):
            return ResidualInput(name, multiply=True)
        return ResidualInput(name, self.integer(1 << 12, (1 << 15) - 1), self.integer(13, 17))

    def table(self) -> NDArray[np.int8] | None:
        return self.rng.integers(-128, 128, 256).astype(np.int8) if self.chance(0.3) else None

    def norm(self, cols: int) -> LayerNorm | None:
        if cols > self.arch.row_depth or self.chance(0.6):
            return None
        return LayerNorm(
            gamma=self.rng.integers(-(1 << 15), 1 << 15, cols).astype(np.int16),
            beta=self.rng.integers(-(1 << 20), 1 << 20, cols).astype(np.int32),
            shift=self.rng.integers(14, 20, cols).astype(np.uint8),
            eps=self.integer(0, 1 << 20),
            rms=self.chance(0.3),
        )

    def linear(self, x: str, *, cols: int | None = None, dtype: str | None = None) -> str:
        batch, rows, k = self.tensors[x].shape
        cols = cols or self.integer(1, self.max_channels)
        norm = self.norm(cols)
        padded_limit = self.arch.lane_depth - 32
        if k > padded_limit and cols > self.arch.psum_depth:
            norm = None
        pattern = self.rng.choice(np.array(PATTERNS, object))
        nm = None if pattern is None else NM(pattern)
        residual = self.residual((batch, rows, cols))
        out = self.tensor((batch, rows, cols), dtype or str(self.rng.choice(_DTYPES)))
        self.ops.append(
            Linear(
                name=f"linear{len(self.ops)}",
                x=x,
                out=out,
                weight=random_weight(self.rng, cols, k, nm),
                pattern=nm,
                requant=self.requant(cols, k),
                residual=residual,
                table=self.table(),
                norm=norm,
                source=f"layers.{len(self.ops)}",
            )
        )
        return out

    def pointwise(self, x: str | None) -> str:
        names = [n for n, t in self.tensors.items() if t.dtype != "keymask"]
        shape = self.tensors[x or str(self.rng.choice(names))].shape
        residual, norm = self.residual(shape, needed=x is None), self.norm(shape[2])
        out = self.tensor(shape, str(self.rng.choice(_DTYPES)))
        self.ops.append(
            Pointwise(
                name=f"pointwise{len(self.ops)}",
                x=x,
                out=out,
                mult=self.integer(1 << 12, (1 << 15) - 1),
                shift=self.integer(10, 16),
                residual=residual,
                table=self.table(),
                norm=norm,
            )
        )
        return out

    def attention(self, x: str) -> str:
        """Self-attention, or attention to another sequence; query, key and value come from Linears or are
        used as they are."""
        batch, rows, _ = self.tensors[x].shape
        heads = self.integer(1, 3)
        channels = heads * self.integer(1, max(1, min(self.max_channels, 3 * self.arch.lanes) // heads))
        keys = self.integer(1, self.max_rows) if self.cross and self.chance(0.4) else rows
        other = (
            x
            if keys == rows
            else self.tensor((batch, keys, self.integer(1, self.max_channels)), "int8", is_input=True)
        )
        groups = self.groups(heads)
        kv_channels = channels // heads * (groups or heads)
        q = self.linear(x, cols=channels, dtype="int8")
        k = self.linear(other, cols=kv_channels, dtype="int8")
        v = k if self.chance(0.15) else self.linear(other, cols=kv_channels, dtype="int8")
        mask = self.tensor((batch, 1, keys), "keymask", is_input=True) if self.chance(0.5) else None
        out = self.tensor((batch, rows, channels), "int8")
        head_bits = int(np.log2(channels // heads) / 2)
        self.ops.append(
            Attention(
                name=f"attention{len(self.ops)}",
                q=q,
                k=k,
                v=v,
                out=out,
                heads=heads,
                score_mult=self.integer(1 << 14, (1 << 15) - 1),
                score_shift=self.integer(16, 19) + head_bits,
                out_mult=self.integer(1 << 14, (1 << 15) - 1),
                out_shift=self.integer(13, 16),
                mask=mask,
                kv_heads=groups,
                bias=self.score_bias((batch, heads, rows, keys)),
            )
        )
        return out

    def groups(self, heads: int) -> int | None:
        """Heads of keys and values: any divisor of those of the queries; None without `masks`."""
        if not self.masks:
            return None
        return int(self.rng.choice([n for n in range(1, heads + 1) if heads % n == 0]))

    def score_bias(self, shape: tuple[int, int, int, int]) -> ScoreBias | None:
        """Causal, any mask, or numbers with masked places; for all batch entries and heads or each; None without `masks`."""
        if not self.masks or self.chance(0.2):
            return None
        batch, heads, rows, keys = shape
        shape = (batch if self.chance(0.5) else 1, heads if self.chance(0.5) else 1, rows, keys)
        seen = np.broadcast_to(np.tri(rows, keys, self.integer(0, 2), dtype=bool), shape)
        if self.chance(0.4):
            seen = self.rng.random(shape) < 0.6
        if self.chance(0.5):
            return ScoreBias(np.where(seen, 0, -128).astype(np.int8), (1 << 15) - 1, 1)
        values = self.rng.integers(-3000, 3000, shape)
        return ScoreBias(np.where(seen, values, -32768).astype(np.int16), 1 << 14, 13)


def random_network(
    seed: int,
    arch: Arch,
    *,
    ops: int = 6,
    max_batch: int = 3,
    max_rows: int | None = None,
    max_channels: int | None = None,
    cross: bool = False,
    masks: bool = False,
    products: bool = False,
) -> QuantNetwork:
    """A network of about `ops` operators (an attention brings its projections).

    Parameters
    ----------
    seed
        Everything random comes from it.
    arch
        Keeps norms within row_depth; sizes reach over row tiles, column tiles, ring, partial sums and row
        unit.
    cross
        Some attentions look at another sequence, a further input (which `sim.reference` does not take).
    masks
        Attentions have constant masks and biases, and groups of queries share keys.
    products
        Second operands multiply, now and then.
    max_rows, max_channels
        Largest sequence and feature count; by default about three tiles of rows and beyond the ring of small
        architectures.
    """
    rng = np.random.default_rng(seed)
    rows = max_rows or 3 * arch.rows + 1
    channels = max_channels or min(2 * arch.lane_depth + 5, 8 * arch.lanes + 5)
    build = _Builder(rng, arch, channels, rows, cross, masks, products)
    shape = (build.integer(1, max_batch), build.integer(1, rows), build.integer(1, channels))
    build.tensor(shape, "int8", is_input=True)
    if products or build.chance(0.3):
        build.tensor(shape, "int16", is_input=True)
    while len(build.ops) < ops:
        names = [n for n, t in build.tensors.items() if t.dtype == "int8"]
        x = names[-1] if build.chance(0.6) else str(rng.choice(names))
        kind = rng.random() * (1.5 if products else 1)
        if kind < 0.5:
            residual_width = build.tensors[x].shape[2] if build.chance(0.3) else None
            build.linear(x, cols=residual_width)
        elif kind < 0.8 and arch.attention:
            build.attention(x)
        else:
            build.pointwise(x if build.chance(0.8) else None)
    read = {name for op in build.ops for name in _reads(op)}
    written = [op.out for op in build.ops]
    outputs = [name for name in written if name not in read or build.chance(0.1)]
    return QuantNetwork(
        tensors=build.tensors,
        ops=tuple(build.ops),
        inputs=tuple(build.inputs),
        outputs=tuple(outputs or written[-1:]),
        meta={"seed": str(seed)},
    )


def _reads(op: Op) -> list[str]:
    names = [op.q, op.k, op.v] if isinstance(op, Attention) else [op.x]
    if not isinstance(op, Attention) and op.residual is not None:
        names.append(op.residual.tensor)
    return [name for name in names if name is not None]
