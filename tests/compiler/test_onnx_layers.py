"""Larger ONNX operators: each equals ONNX's reference evaluator."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator

from compiler.compile import compile_model
from compiler.graph import CompileError
from compiler.onnx_import import load_onnx
from compiler.onnx_layers import LAYERS
from sim.simulate import simulate
from tests.compiler.test_onnx_import import write

RANDOM = np.random.default_rng(0)


def _array(*shape: int) -> Any:
    return RANDOM.standard_normal(shape).astype(np.float32)


def _node(kind: str, *inputs: str, outputs: tuple[str, ...] = ("y",), **attributes: Any) -> list[Any]:
    return [helper.make_node(kind, ["x", *inputs], list(outputs), name="thing", **attributes)]


def _cells(gates: int, directions: int = 1) -> dict[str, Any]:
    return {"w": _array(directions, gates * 5, 4), "r": _array(directions, gates * 5, 5), "b": _array(directions, gates * 10)}


IMAGE = (2, 6, 4, 5)
CASES: dict[str, tuple[list[Any], tuple[int, ...], dict[str, Any]]] = {
    "instances": (_node("InstanceNormalization", "s", "b"), IMAGE, {"s": _array(6), "b": _array(6)}),
    "groups": (_node("GroupNormalization", "s", "b", num_groups=3), IMAGE, {"s": _array(6), "b": _array(6)}),
    "transposed convolution": (
        _node("ConvTranspose", "w", "b", strides=[2, 1], pads=[1, 0, 1, 0]), IMAGE, {"w": _array(6, 4, 3, 2), "b": _array(4)},
    ),
    "resize, nearest": (
        _node("Resize", "", "f", mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"), IMAGE,
        {"f": np.array([1, 1, 2, 3], np.float32)},
    ),
    "resize, linear": (_node("Resize", "", "f", mode="linear"), IMAGE, {"f": np.array([1, 1, 2, 2], np.float32)}),
    "resize, sizes": (_node("Resize", "", "", "n", mode="linear"), IMAGE, {"n": np.array([2, 6, 7, 9])}),
    "resize, corners": (
        _node("Resize", "", "", "n", mode="linear", coordinate_transformation_mode="align_corners"), IMAGE,
        {"n": np.array([2, 6, 7, 9])},
    ),
    "depth to space": (_node("DepthToSpace", blocksize=2), (1, 8, 2, 3), {}),
    "depth to space, CRD": (_node("DepthToSpace", blocksize=2, mode="CRD"), (1, 8, 2, 3), {}),
    "space to depth": (_node("SpaceToDepth", blocksize=2), (1, 3, 4, 6), {}),
    "prelu": (_node("PRelu", "s"), IMAGE, {"s": _array(6, 1, 1)}),
    "largest pixel": (_node("GlobalMaxPool"), IMAGE, {}),
    "einsum": (_node("Einsum", "w", equation="bchw,cd->bhwd"), IMAGE, {"w": _array(6, 3)}),
    "L1": (_node("ReduceL1", "n"), IMAGE, {"n": np.array([1, 3])}),
    "L2": (_node("ReduceL2", "n", keepdims=0), IMAGE, {"n": np.array([-1])}),
    "squares": (_node("ReduceSumSquare"), IMAGE, {}),
    "log sum exp": (_node("ReduceLogSumExp", "n"), IMAGE, {"n": np.array([1])}),
    "selu": (_node("Selu"), IMAGE, {}), "celu": (_node("Celu", alpha=0.7), IMAGE, {}), "mish": (_node("Mish"), IMAGE, {}),
    "softsign": (_node("Softsign"), IMAGE, {}), "threshold": (_node("ThresholdedRelu", alpha=0.5), IMAGE, {}),
    "round": (_node("Round"), IMAGE, {}),
    "lstm": (_node("LSTM", "w", "r", "b", hidden_size=5), (3, 2, 4), _cells(4)),
    "gru": (_node("GRU", "w", "r", "b", hidden_size=5, linear_before_reset=1), (3, 2, 4), _cells(3)),
    "rnn": (_node("RNN", "w", "r", "b", hidden_size=5), (3, 2, 4), _cells(1)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_of_onnx(name: str, tmp_path: Path) -> None:
    nodes, shape, initial = CASES[name]
    path = write(tmp_path / "m.onnx", nodes, {"x": list(shape)}, initial=initial, opset=21)
    module, given = load_onnx(path)
    (wanted, *_) = ReferenceEvaluator(str(path)).run(None, {"x": given["x"].numpy()})
    torch.testing.assert_close(module(**given)[0], torch.from_numpy(np.array(wanted)), atol=2e-5, rtol=1e-4)


def test_groups_of_version_18_have_a_factor_each() -> None:
    x, scale, bias = torch.randn(2, 6, 4), torch.randn(3), torch.randn(3)
    found = LAYERS["GroupNormalization"]({"num_groups": 3}, [x, scale, bias])
    wanted = torch.nn.functional.group_norm(x, 3).unflatten(1, (3, 2)) * scale[:, None, None] + bias[:, None, None]
    torch.testing.assert_close(found, wanted.flatten(1, 2))


@pytest.mark.parametrize("direction", ["reverse", "bidirectional"])
def test_other_directions_are_those_of_torch(direction: str) -> None:
    """The reference evaluator knows forward alone."""
    both = direction == "bidirectional"
    layer, x = torch.nn.LSTM(4, 5, bidirectional=both), torch.randn(3, 2, 4)
    order = [0, 3, 1, 2]  # torch has input, forget, cell, output; ONNX input, output, forget, cell

    def turned(name: str) -> torch.Tensor:
        values = [getattr(layer, f"{name}_l0{end}") for end in (("", "_reverse") if both else ("",))]
        return torch.stack([torch.cat([value.chunk(4)[i] for i in order]) for value in values])

    operands = [x, turned("weight_ih"), turned("weight_hh"), torch.cat([turned("bias_ih"), turned("bias_hh")], 1)]
    states, last, _ = LAYERS["LSTM"]({"hidden_size": 5, "direction": direction}, operands)
    wanted = layer(x if both else x.flip(0))[0].unflatten(-1, (len(last), 5)).transpose(1, 2)
    torch.testing.assert_close(states, wanted if both else wanted.flip(0))


@pytest.mark.parametrize(
    "nodes, initial, message",
    [
        (_node("Resize", "", "f", mode="cubic", antialias=1), {"f": np.array([1, 1, 2, 2], np.float32)}, "with antialias"),
        (_node("Resize", "", "f", mode="nearest"), {"f": np.array([1, 1, 2, 2], np.float32)}, "nearest with half_pixel"),
        (_node("ConvTranspose", "w", pads=[0, 1, 0, 0]), {"w": _array(6, 2, 3, 2)}, "not the same at both ends"),
    ],
)
def test_other_forms_are_refused_by_name(nodes: list[Any], initial: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", nodes, {"x": list(IMAGE)}, initial=initial, opset=21)
    with pytest.raises(CompileError, match=rf"ONNX node 'thing' \(\w+\): .*{message}"):
        load_onnx(path)


@pytest.mark.parametrize("name", ["groups", "resize, linear", "gru"])
def test_they_run_on_the_accelerator(name: str, tmp_path: Path) -> None:
    nodes, shape, initial = CASES[name]
    first = [helper.make_node("MatMul", ["x", "first"], ["product"], name="first")]
    thing = helper.make_node(nodes[0].op_type, ["product", *nodes[0].input[1:]], ["y"], name="thing")
    thing.attribute.extend(nodes[0].attribute)
    width = shape[-1]
    path = write(
        tmp_path / "m.onnx", [*first, thing], {"x": list(shape)}, initial={**initial, "first": _array(width, width)}, opset=21
    )
    module, given = load_onnx(path)
    program = compile_model(path, arch="tiny", host="forbid", calibration=[given])
    run = simulate(program, given, engine="isa")
    (wanted,) = module(**given)[:1]
    assert run.bit_exact, run.mismatches
    assert (run.outputs[0] - wanted).square().mean() / wanted.var() < 10**-2.6
