from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from compiler.graph import CompileError
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
from compiler.verify_network import LoweringError, check_network, describe
from hw.arch import PRESETS
from tests.compiler.random_networks import random_network

TINY = PRESETS["tiny"]
SHAPE = (2, 5, 6)


def _network() -> QuantNetwork:
    """x -> linear -> h; attention(h, h, x) with mask -> a; pointwise(a) + residual, norm -> y."""
    requant = Requant(np.zeros(6, np.int32), np.ones(6, np.int16), np.ones(6, np.uint8))
    norm = LayerNorm(np.ones(6, np.int16), np.zeros(6, np.int32), np.ones(6, np.uint8), 1)
    ops = (
        Linear(
            name="linear",
            x="x",
            out="h",
            weight=np.zeros((6, 6), np.int8),
            pattern=None,
            requant=requant,
            source="net.0",
        ),
        Attention(
            name="attention",
            q="h",
            k="h",
            v="x",
            out="a",
            heads=2,
            score_mult=1,
            score_shift=1,
            out_mult=1,
            out_shift=1,
            mask="mask",
        ),
        Pointwise(
            name="pointwise",
            x="a",
            out="y",
            mult=1,
            shift=1,
            residual=ResidualInput("h", 1, 1),
            norm=norm,
            table=np.zeros(256, np.int8),
        ),
    )
    tensors = {name: QuantTensor(name, SHAPE, "int8", 1.0) for name in ("x", "h", "a", "y")}
    tensors["mask"] = QuantTensor("mask", (2, 1, 5), "keymask", 1.0)
    return QuantNetwork(tensors=tensors, ops=ops, inputs=("x", "mask"), outputs=("y",))


def _op(index: int, **changes) -> Callable[[QuantNetwork], QuantNetwork]:
    def change(network: QuantNetwork) -> QuantNetwork:
        ops = list(network.ops)
        ops[index] = replace(ops[index], **changes)
        return replace(network, ops=tuple(ops))

    return change


def _tensor(name: str, /, **changes) -> Callable[[QuantNetwork], QuantNetwork]:
    return lambda network: replace(
        network, tensors={**network.tensors, name: replace(network.tensors[name], **changes)}
    )


def _requant(**changes) -> Callable[[QuantNetwork], QuantNetwork]:
    return lambda network: _op(0, requant=replace(network.ops[0].requant, **changes))(network)  # type: ignore[union-attr]


def _norm(**changes) -> Callable[[QuantNetwork], QuantNetwork]:
    return lambda network: _op(2, norm=replace(network.ops[2].norm, **changes))(network)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_tensor("h", name="g"), "tensor 'h' must have that name"),
        (_tensor("h", shape=(2, 0, 6)), r"numbers >= 1"),
        (_tensor("x", dtype="int16"), r"linear \(net.0\): x \('x'\) must be int8, not int16"),
        (_tensor("h", dtype="keymask"), r"output must be int8 or int16, not keymask"),
        (_tensor("a", dtype="int16"), r"attention: output \('a'\) must be int8"),
        (
            _tensor("mask", shape=(2, 1, 4)),
            r"mask \('mask'\) must have the shape \(2, 1, 5\), not \(2, 1, 4\)",
        ),
        (_tensor("mask", dtype="int8"), "must be keymask, not int8"),
        (_tensor("x", shape=(2, 5, 7)), r"x \(2, 5, 7\) does not fit weight \(6, 6\) and output \(2, 5, 6\)"),
        (_tensor("y", shape=(2, 5, 7)), r"pointwise: x \('a'\) must have the shape \(2, 5, 7\)"),
        (lambda n: replace(n, inputs=("x", "mask", "z")), "input 'z' is no tensor"),
        (lambda n: replace(n, outputs=("z",)), "output 'z' is not written"),
        (lambda n: replace(n, outputs=("mask",)), "output 'mask' is not written"),
        (lambda n: replace(n, inputs=("x",)), "attention: mask 'mask' is not written before it is read"),
        (lambda n: replace(n, ops=n.ops[1:]), "attention: q 'h' is not written before it is read"),
        (lambda n: replace(n, ops=n.ops[:2], outputs=("a",)), "tensor 'y' is neither an input nor written"),
        (_op(2, out="h"), "output 'h' is unknown or written twice"),
        (_op(2, out="nothing"), "output 'nothing' is unknown"),
        (_op(0, weight=np.zeros((6, 6))), r"weight must be int8 \(out, in\), not float64"),
        (_op(0, weight=np.zeros((5, 6), np.int8)), r"output \(2, 5, 6\) does not fit weight \(5, 6\)"),
        (
            _requant(bias=np.zeros(5, np.int32)),
            r"requant.bias must be int32 of shape \(6,\), not int32 \(5,\)",
        ),
        (_requant(mult=np.ones(6, np.int64)), r"requant.mult must be int16 of shape \(6,\), not int64"),
        (_requant(shift=np.zeros(6, np.uint8)), "requant.shift must be in 1..63"),
        (_op(1, heads=4), "6 channels do not divide into 4 heads"),
        (_op(1, score_shift=64), "score_mult, score_shift out of range: 1, 64"),
        (_op(1, out_shift=41), "out_mult, out_shift out of range: 1, 41"),
        (_op(2, x=None, residual=None), "pointwise: neither x nor a residual"),
        (_op(2, mult=1 << 15), "mult, shift out of range: 32768, 1"),
        (_op(2, residual=ResidualInput("mask", 1, 1)), r"residual \('mask'\) must have the shape"),
        (_op(2, x=None, residual=ResidualInput("h", multiply=True)), "a product needs x and a residual"),
        (_op(2, residual=ResidualInput("h", 1, 0)), "residual mult, shift out of range: 1, 0"),
        (_op(2, table=np.zeros(255, np.int8)), "table must be 256 int8 entries"),
        (_norm(gamma=np.ones(5, np.int16)), r"norm.gamma must be int16 of shape \(6,\)"),
        (_norm(shift=np.full(6, 64, np.uint8)), "norm.shift must be in 1..63"),
        (_norm(eps=1 << 32), "norm.eps must fit 32 bits"),
    ],
)
def test_broken_law_is_named(change: Callable[[QuantNetwork], QuantNetwork], message: str) -> None:
    check_network(_network())
    with pytest.raises(LoweringError, match=message) as caught:
        check_network(change(_network()))
    assert isinstance(caught.value, CompileError)


def test_architecture_limits() -> None:
    network = _network()
    check_network(network, TINY)
    arch = replace(PRESETS["tiny"], row_depth=16)
    check_network(network, arch)
    tensors = {n: replace(t, shape=(2, 5, 34)) if n != "mask" else t for n, t in network.tensors.items()}
    wide = QuantNetwork(
        tensors={n: tensors[n] for n in ("x", "y")},
        inputs=("x",),
        outputs=("y",),
        ops=(
            replace(
                network.ops[2],
                x="x",
                residual=None,  # type: ignore[call-arg]
                norm=LayerNorm(np.ones(34, np.int16), np.zeros(34, np.int32), np.ones(34, np.uint8), 0),
            ),
        ),
    )
    check_network(wide)
    with pytest.raises(LoweringError, match="34 columns do not fit row_depth = 32 of tiny"):
        check_network(wide, TINY)


@pytest.mark.parametrize("seed", range(20))
def test_random_networks_are_lawful(seed: int) -> None:
    check_network(random_network(seed, TINY), TINY)


def test_describe() -> None:
    linear, attention, _ = _network().ops
    assert describe(linear) == "linear (net.0)"
    assert describe(attention) == "attention"
