"""The integer reference against plain loops that share nothing with it, and against its own slower paths."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from compiler.ops import (
    Attention,
    LayerNorm,
    Linear,
    Pointwise,
    QuantNetwork,
    QuantTensor,
    Requant,
    ResidualInput,
)
from hw.arch import get_arch
from sim import reference
from sim.reference import dequantise, quantise_inputs, run_reference
from tests.compiler.random_networks import random_inputs, random_network
from tests.sim.oracle import run_oracle
from tests.sim.small_network import random_input, small_network

# -- docs/numerics.md once more, in Python integers ----------------------------------------------------------


def rshr(v: int, s: int) -> int:
    return (v + (1 << (s - 1))) >> s


def sat(v: int, bits: int) -> int:
    return max(-(1 << (bits - 1)), min((1 << (bits - 1)) - 1, v))


def wrap32(v: int) -> int:
    return (v + (1 << 31)) % (1 << 32) - (1 << 31)


def requantise(acc: int, bias: int, mult: int, shift: int) -> int:
    return sat(rshr(wrap32(acc + bias) * mult, shift), 16)


def layernorm(row: list[int], norm: LayerNorm) -> list[int]:
    count = len(row)

    def scaled(numerator: float) -> tuple[int, int]:
        shift = 0
        while round(numerator * 2**shift) < 1 << 15:
            shift += 1
        return min(round(numerator * 2**shift), 65535), shift

    (ln_inv, ln_shift), (row_mult, row_shift) = scaled(64 / count), scaled(count / 8)
    total, squares = sum(row), sum(x * x for x in row)
    mean = 0 if norm.rms else sat(rshr(total * ln_inv, ln_shift), 23)
    variance = max(count * squares - (0 if norm.rms else total * total) + norm.eps, 1 << 14)
    j = 0
    while variance >> (2 * j) >= 1 << 16:
        j += 1
    v = variance >> (2 * j)
    low = 256 * (v >> 8)
    t = round(2**19 / (math.sqrt(low) + math.sqrt(low + 255)))
    u = ((3 << 36) + (1 << 20) - v * t * t) >> 17
    root = min((t * u + (1 << 14)) >> 15, 65535)
    m, s = (root * row_mult) >> 16, min(row_shift + j, 63)
    z = [sat(rshr(((x << 6) - mean) * m, s), 16) for x in row]
    return [
        sat(rshr(z[c] * int(norm.gamma[c]) + int(norm.beta[c]), int(norm.shift[c])), 16) for c in range(count)
    ]


A = (65280, 59854, 54886, 50330, 46152, 42321, 38808, 35586)
B = (5434, 4984, 4572, 4192, 3847, 3529, 3238, 2968)


def attention_row(
    op: Attention, q: list[int], keys: list[list[int]], values: list[list[int]], mask: list[int]
) -> list[int]:
    """One row of one head."""
    scores = []
    for key, keep in zip(keys, mask, strict=True):
        acc = sum(a * b for a, b in zip(q, key, strict=True))
        scores.append(requantise(acc, 0 if keep else -(1 << 30), op.score_mult, op.score_shift))
    top, p = max(scores), []
    for score in scores:
        i, f = (top - score) >> 8, (top - score) & 255
        mantissa = A[f >> 5] - ((B[f >> 5] * (f & 31)) >> 5)
        p.append(0 if score == -32768 or i >= 9 else (mantissa + (1 << (7 + i))) >> (8 + i))
    total = sum(p)
    m, s = 0, 1
    if total:
        e = total.bit_length() - 1
        mantissa = (total << (15 - e)) if e <= 15 else total >> (e - 15)
        m, s = (min((1 << 31) // mantissa, 65535) * op.out_mult) >> 16, min(op.out_shift + e, 63)
    width = len(values[0])
    mixed = [sum(p[k] * values[k][c] for k in range(len(p))) for c in range(width)]
    return [sat(requantise(acc, 0, m, s), 8) for acc in mixed]


# -- operators -----------------------------------------------------------------------------------------------


def _requant(rng: np.random.Generator, cols: int) -> Requant:
    return Requant(
        bias=rng.integers(-5000, 5000, cols).astype(np.int32),
        mult=rng.integers(1 << 14, 1 << 15, cols).astype(np.int16),
        shift=rng.integers(19, 23, cols).astype(np.uint8),
    )


def _norm(rng: np.random.Generator, cols: int, rms: bool) -> LayerNorm:
    return LayerNorm(
        gamma=rng.integers(-(1 << 15), 1 << 15, cols).astype(np.int16),
        beta=rng.integers(-(1 << 24), 1 << 24, cols).astype(np.int32),
        shift=rng.integers(17, 21, cols).astype(np.uint8),
        eps=int(rng.integers(0, 1000)),
        rms=rms,
    )


def _network(*ops, **tensors: tuple[tuple[int, int, int], str]) -> QuantNetwork:
    made = {name: QuantTensor(name, shape, dtype, 0.1) for name, (shape, dtype) in tensors.items()}
    written = {op.out for op in ops}
    return QuantNetwork(
        tensors=made, ops=ops, inputs=tuple(n for n in made if n not in written), outputs=(ops[-1].out,)
    )


@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("kind", ["plain", "residual", "table", "norm", "rms", "all"])
def test_linear_and_pointwise_against_loops(kind, dtype):
    rng = np.random.default_rng(7)
    cols, k, shape = 6, 5, (2, 3, 6)
    residual = ResidualInput("r", 25000, 12) if kind in ("residual", "all") else None
    table = rng.integers(-128, 128, 256).astype(np.int8) if kind in ("table", "all") else None
    norm = _norm(rng, cols, kind == "rms") if kind in ("norm", "rms", "all") else None
    post = {"residual": residual, "table": table, "norm": norm}
    weight = rng.integers(-128, 128, (cols, k)).astype(np.int8)
    linear = Linear(
        name="l", x="x", out="y", weight=weight, pattern=None, requant=_requant(rng, cols), **post
    )
    pointwise = Pointwise(name="p", x="y8", out="z", mult=30000, shift=12, **post)
    network = _network(
        linear,
        pointwise,
        x=((2, 3, k), "int8"),
        y8=(shape, "int8"),
        r=(shape, "int16"),
        y=(shape, dtype),
        z=(shape, dtype),
    )
    inputs = {
        "x": rng.integers(-128, 128, (2, 3, k)).astype(np.int8),
        "y8": rng.integers(-128, 128, shape).astype(np.int8),
        "r": rng.integers(-32768, 32768, shape).astype(np.int16),
    }
    result = run_reference(network, inputs)

    def finish(sums: list[int], r: list[int]) -> list[int]:
        if residual is not None:
            sums = [sat(q + rshr(int(r[c]) * 25000, 12), 16) for c, q in enumerate(sums)]
        if table is not None:
            sums = [int(table[sat(q, 8) + 128]) for q in sums]
        if norm is not None:
            sums = layernorm(sums, norm)
        return [sat(q, 8 if dtype == "int8" else 16) for q in sums]

    requant = linear.requant
    for b in range(2):
        for t in range(3):
            x, y8, r = inputs["x"][b, t], inputs["y8"][b, t], inputs["r"][b, t]
            sums = [
                requantise(sum(int(x[i]) * int(weight[c, i]) for i in range(k)), int(requant.bias[c]),
                           int(requant.mult[c]), int(requant.shift[c]))
                for c in range(cols)
            ]  # fmt: skip
            assert result["y"][b, t].tolist() == finish(sums, r)
            assert result["z"][b, t].tolist() == finish([requantise(int(v), 0, 30000, 12) for v in y8], r)
    assert result["y"].dtype == dtype


@pytest.mark.parametrize("masked", [False, True])
def test_attention_against_loops(masked):
    rng = np.random.default_rng(3)
    batch, rows, heads, width = 2, 5, 2, 3
    shape = (batch, rows, heads * width)
    op = Attention(
        name="a", q="q", k="k", v="v", out="y", heads=heads, mask="m" if masked else None,
        score_mult=20000, score_shift=17, out_mult=20000, out_shift=15,
    )  # fmt: skip
    tensors = {name: (shape, "int8") for name in "qkvy"}
    if masked:
        tensors["m"] = ((batch, 1, rows), "keymask")
    inputs = {name: rng.integers(-128, 128, shape).astype(np.int8) for name in "qkv"}
    mask = np.array([[[1, 1, 0, 1, 0]], [[0, 0, 0, 0, 0]]], np.uint8)  # the second sees nothing
    if masked:
        inputs["m"] = mask
    result = run_reference(_network(op, **tensors), inputs)["y"]
    for b in range(batch):
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            q, k, v = (inputs[name][b, :, part].tolist() for name in "qkv")
            for t in range(rows):
                wanted = attention_row(op, q[t], k, v, mask[b, 0].tolist() if masked else [1] * rows)
                assert result[b, t, part].tolist() == wanted
    if masked:
        assert not result[1].any()


@pytest.mark.parametrize("seed", range(12))
def test_random_networks_against_the_plain_oracle(seed):
    rng = np.random.default_rng(seed)
    network = random_network(seed, get_arch("tiny"), cross=seed % 3 == 0)
    inputs = random_inputs(rng, network)
    wanted = run_oracle(network, inputs)
    result = run_reference(network, inputs)
    assert list(result) == list(wanted)
    for name, values in result.items():
        assert np.array_equal(values, wanted[name]), name
        assert values.dtype == (
            np.uint8 if network.tensors[name].dtype == "keymask" else network.tensors[name].dtype
        )


# -- exactness -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1032, 1033, 3000])
def test_largest_sums_are_exact(k):
    """K * 127 * 128 passes 2^24 between 1032 and 1033: there float64 takes over."""
    weight = np.full((2, k), 127, np.int8)
    weight[1] = -128
    x = np.full((1, 2, k), -128, np.int8)
    x[0, 1, ::2] = 127
    prepared = reference._Weight(weight)
    assert prepared.exact == (torch.float32 if 128 * 128 * k < 1 << 24 else torch.float64)
    wanted = x[0].astype(np.int64) @ weight.T.astype(np.int64)
    assert np.array_equal(prepared.product(torch.from_numpy(x[0])).numpy(), wanted)


def test_sums_wrap_at_32_bits():
    requant = Requant(np.array([2**31 - 1], np.int32), np.array([32767], np.int16), np.array([31], np.uint8))
    op = Linear(name="l", x="x", out="y", weight=np.array([[1]], np.int8), pattern=None, requant=requant)
    network = _network(op, x=((1, 2, 1), "int8"), y=((1, 2, 1), "int16"))
    result = run_reference(network, {"x": np.array([[[0], [1]]], np.int8)})["y"]
    assert (
        result.flatten().tolist() == [requantise(a, 2**31 - 1, 32767, 31) for a in (0, 1)] == [32767, -32767]
    )


def test_requantisation_of_extremes_is_exact():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.integers(-(1 << 31), 1 << 31, 500), [-(1 << 31), (1 << 31) - 1, 0, 1, -1]])
    for shift in (1, 2, 15, 16, 31, 45, 46, 47, 53, 54, 62, 63):
        for mult in (0, 1, 16384, 32767):
            result = reference._requantise(
                torch.from_numpy(values.astype(np.float64)),
                np.zeros(1, np.int32),
                np.array([mult]),
                np.array([shift]),
                0,
            )
            assert result.long().tolist() == [sat(rshr(int(v) * mult, shift), 16) for v in values]


def test_parts_do_not_matter(monkeypatch):
    network = random_network(5, get_arch("tiny"))
    inputs = random_inputs(np.random.default_rng(5), network)
    whole = run_reference(network, inputs)
    monkeypatch.setattr(reference, "_CHUNK", 64)
    for name, values in run_reference(network, inputs).items():
        assert np.array_equal(values, whole[name])


def test_other_batch_sizes_and_lengths():
    network = small_network()
    x = random_input()
    result = run_reference(network, {"x": x})["y"]
    for part in (x[:1], x[:, :4], np.concatenate([x, x])):
        batch, rows = min(2, len(part)), part.shape[1]
        assert np.array_equal(run_reference(network, {"x": part})["y"][:batch, :rows], result[:batch, :rows])


def test_only_what_is_kept_is_returned():
    network = small_network()
    result = run_reference(network, {"x": random_input()}, keep=lambda name: name in network.outputs)
    assert list(result) == ["y"]


# -- inputs and outputs --------------------------------------------------------------------------------------


def _masked() -> QuantNetwork:
    op = Attention(
        name="a",
        q="x",
        k="x",
        v="x",
        out="y",
        heads=2,
        mask="m",
        score_mult=1,
        score_shift=1,
        out_mult=1,
        out_shift=1,
    )
    return _network(op, x=((2, 3, 4), "int8"), m=((2, 1, 3), "keymask"), y=((2, 3, 4), "int8"))


def test_inputs_are_rounded_and_clipped():
    network = _masked()
    x = torch.zeros(2, 3, 4)
    x[0, 0] = torch.tensor([0.26, -0.24, 99.0, -99.0])
    quantised = quantise_inputs(network, {"x": x, "m": torch.tensor([[1, 0, 5], [0, 0, 1]])})
    assert quantised["x"].dtype == np.int8 and quantised["x"][0, 0].tolist() == [3, -2, 127, -128]
    assert quantised["m"].dtype == np.uint8 and quantised["m"].tolist() == [[[1, 0, 1]], [[0, 0, 1]]]


def test_masks_that_mark_what_is_left_out():
    network = replace(_masked(), meta={"keep.m": "0"})
    quantised = quantise_inputs(
        network, {"x": torch.zeros(2, 3, 4), "m": torch.tensor([[True, False, False]] * 2)}
    )
    assert quantised["m"].tolist() == [[[0, 1, 1]]] * 2


def test_two_dimensional_data_is_one_batch():
    network = _network(
        Pointwise(name="p", x="x", out="y", mult=1 << 14, shift=14),
        x=((1, 3, 4), "int8"),
        y=((1, 3, 4), "int8"),
    )
    assert quantise_inputs(network, {"x": torch.ones(3, 4)})["x"].shape == (1, 3, 4)


def test_dequantising_knows_scale_and_offset():
    network = replace(_masked(), meta={"offset.y": "1 2 3 4"})
    values = np.arange(8).reshape(1, 2, 4)
    assert dequantise(network, "x", values)[0, 1, 3] == pytest.approx(0.7)
    assert dequantise(network, "y", values)[0, 1].tolist() == pytest.approx([1.4, 2.5, 3.6, 4.7])


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, ValueError, "the network's inputs are x, m, not x"),
        ({"x": 1, "m": torch.ones(2, 3)}, TypeError, "input 'x' must be a torch.Tensor, not int"),
        (
            {"x": torch.zeros(4), "m": torch.ones(2, 3)},
            ValueError,
            r"'x' must be \(rows, channels\) or .*not \(4,\)",
        ),
        (
            {"x": torch.zeros(2, 3, 5), "m": torch.ones(2, 3)},
            ValueError,
            r"'x' must have a shape like \(2, 3, 4\)",
        ),
        (
            {"x": torch.full((2, 3, 4), math.nan), "m": torch.ones(2, 3)},
            ValueError,
            "'x' has a NaN or an infinity",
        ),
        (
            {"x": torch.zeros(2, 3, 4), "m": torch.ones(3)},
            ValueError,
            r"'m' must be a mask of shape \(batch, keys\)",
        ),
        (
            {"x": torch.zeros(2, 3, 4), "m": torch.ones(2, 4)},
            ValueError,
            r"'m' \(2, 1, 4\) does not fit the other inputs",
        ),
        (
            {"x": torch.zeros(2, 3, 4), "m": torch.ones(1, 3)},
            ValueError,
            r"'m' \(1, 1, 3\) does not fit the other inputs",
        ),
    ],
)
def test_inputs_that_do_not_fit(inputs, error, message):
    with pytest.raises(error, match=message):
        quantise_inputs(_masked(), inputs)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 9, 21)), "input 'x' must be integers like"),
        (np.zeros((9, 21), np.int8), "input 'x' must be integers like"),
        (np.full((2, 9, 21), 128, np.int16), r"input 'x' is int8: values must be in -128..127, not 128..128"),
        (np.zeros((2, 9, 20), np.int8), r"input 'x' must have a shape like \(2, 9, 21\), not \(2, 9, 20\)"),
    ],
)
def test_integers_that_do_not_fit(x, message):
    with pytest.raises(ValueError, match=message):
        run_reference(small_network(), {"x": x})
    with pytest.raises(ValueError, match="the network's inputs are x, not y"):
        run_reference(small_network(), {"y": x})
