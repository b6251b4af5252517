"""ONNX models as torch modules, so that they take the same way as any other.

`OnnxModule` runs the operators of a file with torch functions. Shapes are fixed by the example inputs: what depends on
shapes and initialisers alone is computed once, before the module runs. Each operator is a submodule with the name of
its ONNX node, which is therefore the module path in messages.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compiler.graph import CompileError
from compiler.onnx_layers import LAYERS

__all__ = ["OPSETS", "OnnxModule", "OpenSizes", "example_inputs", "load_onnx", "open_dimensions"]

OPSETS = range(13, 25)
"""Versions of the standard operators that are understood."""

Attributes = dict[str, Any]
Run = Callable[[Attributes, list[Any]], Any]
"""The results of an operator, from its attributes and operands (None: left out)."""

OpenSizes = Mapping[str, Mapping[int, int]]
"""Sizes of dimensions that a file leaves open, by input and number of the dimension."""

_DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip
"""ONNX numbers of element types."""


def load_onnx(
    path: str | os.PathLike[str], inputs: Any = None, *, sizes: OpenSizes | None = None
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A torch module that computes what an ONNX file does.

    Parameters
    ----------
    path
        The file.
    inputs
        Example inputs: a tensor, tensors in the order of the model's inputs, or a dict by name; they fix all shapes. None:
        random ones of the shapes in the file.
    sizes
        Then, what open dimensions are.

    Returns
    -------
    nn.Module, dict
        The module, and the inputs by name (its keyword arguments).

    Raises
    ------
    CompileError
        No ONNX file, an unknown operator or version of operators (names the node), a shape that the file leaves open.
    FileNotFoundError
    """
    model = _read(path)
    found = example_inputs(model, sizes=sizes or {}) if inputs is None else _by_name(model, inputs)
    _check_given(model, found)
    return OnnxModule(model, found), found


def _read(path: str | os.PathLike[str]) -> Any:
    try:
        import onnx
    except ImportError as error:
        raise CompileError("reading ONNX files needs the package onnx: pip install 'nmforge[onnx]'") from error
    if not Path(path).is_file():
        raise FileNotFoundError(f"no ONNX file at {os.fspath(path)}")
    try:
        model = onnx.load(os.fspath(path))
        onnx.checker.check_model(os.fspath(path))  # of the file: a model in memory may not have more than 2 GB
    except Exception as error:  # protobuf and the checker raise kinds of their own
        if type(error).__name__ not in ("DecodeError", "ValidationError") and not isinstance(error, ValueError | OSError):
            raise
        first = next(iter(str(error).splitlines()), type(error).__name__)
        if "No Op registered" not in first and "opset" not in first.lower():  # those are reported below, by node
            raise CompileError(f"{os.fspath(path)} is no ONNX model that can be read: {first}") from error
    return model


def _inputs(model: Any) -> list[Any]:
    initial = {item.name for item in model.graph.initializer}
    return [item for item in model.graph.input if item.name not in initial]


def open_dimensions(path: str | os.PathLike[str]) -> dict[str, dict[int, str]]:
    """Of each input of an ONNX file: the dimensions that it leaves open, and what it calls them (empty: nothing).

    Raises
    ------
    CompileError, FileNotFoundError
        As `load_onnx`.
    """
    return {
        _identifier(item.name): {
            axis: dim.dim_param for axis, dim in enumerate(item.type.tensor_type.shape.dim) if not dim.dim_value
        }
        for item in _inputs(_read(path))
    }


def example_inputs(model: Any, *, sizes: OpenSizes) -> dict[str, Tensor]:
    """Random inputs of the shapes in a model.

    Parameters
    ----------
    sizes
        What open dimensions are.

    Raises
    ------
    CompileError
        An open dimension without a size.
    """
    found = {}
    generator = torch.Generator().manual_seed(0)
    for item in _inputs(model):
        kind = item.type.tensor_type
        shape = []
        for place, dim in enumerate(kind.shape.dim):
            size = dim.dim_value or sizes.get(_identifier(item.name), {}).get(place, 0)
            if not size:
                place_name = f"{_identifier(item.name)}:{place}"
                raise CompileError(
                    f"input {item.name!r} of the ONNX model has an open dimension {place} ({dim.dim_param or '?'}): give "
                    f"example_inputs, or what it may be: dynamic=, or --dynamic {dim.dim_param or place_name}=VALUES"
                )
            shape.append(size)
        dtype = _input_dtype(item)
        found[_identifier(item.name)] = (
            torch.randn(shape, generator=generator) if dtype.is_floating_point else torch.ones(shape, dtype=dtype)
        )
    return found


def _input_dtype(item: Any) -> torch.dtype:
    """dtype of a model's input; of floating-point ones, float32 alone can be compiled."""
    dtype = _dtype(item.type.tensor_type.elem_type, f"input {item.name!r}")
    if dtype.is_floating_point and dtype != torch.float32:
        name = str(dtype).removeprefix("torch.")
        raise CompileError(f"input {item.name!r} of the ONNX model is {name}: only float32 can be compiled, export it so")
    return dtype


def _check_given(model: Any, given: dict[str, Any]) -> None:
    """Refuse inputs of other dtypes, or of other sizes than those that a model fixes."""
    for item in _inputs(model):
        value, dtype = given[_identifier(item.name)], _input_dtype(item)
        sizes = [dim.dim_value or dim.dim_param or "?" for dim in item.type.tensor_type.shape.dim]
        if not isinstance(value, Tensor):
            raise TypeError(f"example_inputs must be tensors, not {type(value).__name__} ({item.name})")
        fits = len(sizes) == value.ndim and all(not isinstance(n, int) or n == m for n, m in zip(sizes, value.shape, strict=True))
        if not fits or value.dtype != dtype:
            wanted, found = (str(kind).removeprefix("torch.") for kind in (dtype, value.dtype))
            raise CompileError(
                f"input {item.name!r} of the ONNX model is {wanted} ({', '.join(map(str, sizes))}), "
                f"not {found} {tuple(value.shape)}"
            )


def _by_name(model: Any, inputs: Any) -> dict[str, Tensor]:
    names = [_identifier(item.name) for item in _inputs(model)]
    if isinstance(inputs, dict):
        if set(inputs) != set(names):
            raise ValueError(f"the ONNX model's inputs are {', '.join(names)}, not {', '.join(inputs)}")
        return {name: inputs[name] for name in names}
    values = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if len(values) != len(names):
        raise ValueError(f"the ONNX model has {len(names)} inputs ({', '.join(names)}), not {len(values)}")
    return dict(zip(names, values, strict=True))


def _identifier(name: str) -> str:
    """The name of an input as a keyword argument."""
    return re.sub(r"\W", "_", name)


def _dtype(number: int, what: str) -> torch.dtype:
    if number not in _DTYPES:
        raise CompileError(f"{what} has ONNX element type {number}, which is not supported")
    return _DTYPES[number]


class _Node(nn.Module):
    """One operator; operands that are known beforehand are part of it."""

    def __init__(self, run: Run, attributes: Attributes, fixed: dict[int, Any], count: int) -> None:
        super().__init__()
        self.run, self.attributes, self.count = run, attributes, count
        self.places: dict[int, Any] = {}
        for place, value in fixed.items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 1:
                setattr(self, f"operand{place}", nn.Parameter(value, requires_grad=False))
            else:
                self.places[place] = value

    def forward(self, *operands: Tensor) -> Any:
        left = iter(operands)
        values = []
        for place in range(self.count):
            if hasattr(self, f"operand{place}"):
                values.append(getattr(self, f"operand{place}"))
            else:
                values.append(self.places[place] if place in self.places else next(left))
        return self.run(self.attributes, values)


class OnnxModule(nn.Module):
    """The graph of an ONNX model for inputs of fixed shapes; takes them by name, gives its outputs in order."""

    def __init__(self, model: Any, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        import onnx.numpy_helper

        _check_opsets(model)
        graph = model.graph
        values: dict[str, Any] = {"": None, **{item.name: inputs[_identifier(item.name)] for item in _inputs(model)}}
        static = {""}
        for item in graph.initializer:
            values[item.name] = _tensor(onnx.numpy_helper.to_array(item))
            static.add(item.name)
        self.steps: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = []
        guards = _softmax_guards(graph)
        same: dict[str, str] = {}
        for number, node in enumerate(graph.node):
            run = _operator(node, number)
            attributes = {item.name: _attribute(item) for item in node.attribute}
            operands = [same.get(name, name) for name in node.input]
            if node.output[0] in guards:
                same[node.output[0]] = operands[-1]
                continue
            name = (node.name or f"{node.op_type}_{number}").strip("/").replace(".", "_").replace("/", "_")
            fixed = {place: values[operand] for place, operand in enumerate(operands) if operand in static}
            if node.op_type == "Resize":  # its numbers are no weights
                fixed = {place: value if place == 0 or value is None else value.tolist() for place, value in fixed.items()}
            step = _Node(run, attributes, fixed, len(operands))
            moving = tuple(operand for operand in operands if operand not in static)
            try:
                with torch.no_grad():
                    made = step(*(values[operand] for operand in moving))
            except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
                first = next(iter(str(error).splitlines()), type(error).__name__)
                raise CompileError(f"ONNX node {_named(node, number)}: not in this form ({first})") from error
            results = made if isinstance(made, tuple) else (made,)
            values.update(zip(node.output, results))
            if not moving or node.op_type in ("Shape", "Size"):
                static.update(node.output)
                continue
            while name in self._modules:
                name += "_"
            self.add_module(name, step)
            self.steps.append((name, moving, tuple(node.output)))
        self.names = {_identifier(item.name): item.name for item in _inputs(model)}
        self.outputs = tuple(same.get(item.name, item.name) for item in graph.output)
        for name in self.outputs:
            if name in static:
                raise CompileError(f"output {name!r} of the ONNX model does not depend on an input")

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        values: dict[str, Any] = {self.names[name]: value for name, value in inputs.items()}
        for name, operands, results in self.steps:
            made = self.get_submodule(name)(*(values[operand] for operand in operands))
            values.update(zip(results, made if isinstance(made, tuple) else (made,)))
        return tuple(values[name] for name in self.outputs)


def _softmax_guards(graph: Any) -> set[str]:
    """Results of ``Where(IsNaN(p), 0, p)`` of a softmax p, which the exporter adds for rows without any key: the
    accelerator's softmax gives 0 there by itself, and so the guard is left out."""
    made = {name: node for node in graph.node for name in node.output}

    def kind(name: str) -> str:
        return made[name].op_type if name in made else ""

    return {
        node.output[0]
        for node in graph.node
        if node.op_type == "Where" and kind(node.input[0]) == "IsNaN" and kind(node.input[2]) == "Softmax"
        and made[node.input[0]].input[0] == node.input[2]
    }  # fmt: skip


def _check_opsets(model: Any) -> None:
    used = {node.domain for node in model.graph.node}
    for item in model.opset_import:
        if item.domain in ("", "ai.onnx") and item.version not in OPSETS:
            raise CompileError(
                f"the ONNX model uses operators of version {item.version}; {OPSETS[0]} to {OPSETS[-1]} are understood: "
                "convert it with onnx.version_converter, or export it again"
            )
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") and node.domain in used and node.op_type not in _OPERATORS:
            _operator(node, 0)


def _named(node: Any, number: int) -> str:
    return f"{node.name or f'number {number}'!r} ({node.domain + '.' if node.domain else ''}{node.op_type})"


def _operator(node: Any, number: int) -> Run:
    if node.domain not in ("", "ai.onnx"):
        raise CompileError(
            f"ONNX node {_named(node, number)}: custom operators of domain {node.domain!r} are not understood: "
            "export the model without them"
        )
    if node.op_type not in _OPERATORS:
        raise CompileError(
            f"ONNX node {_named(node, number)}: operator {node.op_type} is not understood: compile the torch module "
            "instead, or add it to compiler/onnx_import.py"
        )
    return _OPERATORS[node.op_type]


def _attribute(item: Any) -> Any:
    import onnx

    value = onnx.helper.get_attribute_value(item)
    if isinstance(value, onnx.TensorProto):
        return _tensor(onnx.numpy_helper.to_array(value))
    return value.decode() if isinstance(value, bytes) else value


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array))


def _ints(value: Any) -> list[int]:
    """A static operand as numbers."""
    if not isinstance(value, Tensor):
        raise TypeError("an operand that gives shapes or places must not depend on the data")
    numbers = value.tolist()  # as it is: torch.export does not know the values of what an operator makes of it
    return [int(number) for number in (numbers if isinstance(numbers, list) else [numbers])]


def _axes(attributes: Attributes, operands: list[Any], place: int = 1) -> list[int] | None:
    """Axes, an attribute in old versions and an operand in new ones."""
    if len(operands) > place and operands[place] is not None:
        return _ints(operands[place])
    return list(attributes["axes"]) if "axes" in attributes else None


def _reduce(function: Callable[..., Tensor]) -> Run:
    def run(a: Attributes, x: list[Any]) -> Tensor:
        axes = _axes(a, x)
        if axes is None and a.get("noop_with_empty_axes"):
            return x[0]
        return function(x[0], dim=axes if axes is not None else list(range(x[0].ndim)), keepdim=bool(a.get("keepdims", 1)))

    return run


def _reshape(a: Attributes, x: list[Any]) -> Tensor:
    shape = _ints(x[1])
    if not a.get("allowzero"):
        shape = [x[0].shape[i] if size == 0 else size for i, size in enumerate(shape)]
    return x[0].reshape(shape)


def _squeeze(a: Attributes, x: list[Any]) -> Tensor:
    axes = _axes(a, x)
    return x[0].squeeze() if axes is None else x[0].squeeze(tuple(axes))


def _unsqueeze(a: Attributes, x: list[Any]) -> Tensor:
    result, axes = x[0], _axes(a, x) or []
    rank = result.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        result = result.unsqueeze(axis)
    return result


def _slice(a: Attributes, x: list[Any]) -> Tensor:
    starts, ends = _ints(x[1]), _ints(x[2])
    axes = _axes(a, x, 3) or list(range(len(starts)))
    steps = _ints(x[4]) if len(x) > 4 and x[4] is not None else [1] * len(starts)
    result = x[0]
    for start, end, axis, step in zip(starts, ends, axes, steps):
        if step < 0:
            raise ValueError("a slice with a negative step")
        size = result.shape[axis]
        first, last, _ = slice(start, min(end, size), step).indices(size)
        result = result[(slice(None),) * (axis % result.ndim) + (slice(first, last, step),)]
    return result


def _split(a: Attributes, x: list[Any]) -> tuple[Tensor, ...]:
    axis = a.get("axis", 0)
    if len(x) > 1 and x[1] is not None:
        return x[0].split(_ints(x[1]), axis)
    count = a["num_outputs"]
    return x[0].split(-(-x[0].shape[axis] // count), axis)


def _gather(a: Attributes, x: list[Any]) -> Tensor:
    data, index, axis = x[0], x[1], a.get("axis", 0)
    if index.ndim == 0 and _is_plain(index):
        return data.select(axis, int(index))
    index = torch.where(index < 0, index + data.shape[axis], index)
    if axis == 0 and data.ndim == 2 and data.is_floating_point():
        return F.embedding(index, data)
    shape = (*data.shape[:axis], *index.shape, *data.shape[axis % data.ndim + 1 :])
    return data.index_select(axis, index.flatten()).reshape(shape)


def _gather_nd(a: Attributes, x: list[Any]) -> Tensor:
    if a.get("batch_dims"):
        raise ValueError("batch_dims")
    return x[0][tuple(x[1].unbind(-1))]


def _is_plain(value: Tensor) -> bool:
    """Whether a tensor is a number that is known while the module is traced."""
    return type(value) is Tensor


def _gemm(a: Attributes, x: list[Any]) -> Tensor:
    left = x[0].t() if a.get("transA") else x[0]
    weight = x[1] if a.get("transB") else x[1].t()
    alpha, beta = a.get("alpha", 1.0), a.get("beta", 1.0)
    bias = x[2] if len(x) > 2 else None
    if alpha == 1 and beta == 1 and (bias is None or bias.shape == weight.shape[:1]):
        return F.linear(left, weight, bias)
    result = alpha * (left @ weight.t())
    return result if bias is None else result + beta * bias


def _layer_norm(a: Attributes, x: list[Any]) -> Tensor:
    axis = a.get("axis", -1)
    shape = x[0].shape[axis:] if axis < 0 else x[0].shape[axis:]
    bias = x[2] if len(x) > 2 else None
    return F.layer_norm(x[0], tuple(shape), x[1], bias, a.get("epsilon", 1e-5))


def _rms_norm(a: Attributes, x: list[Any]) -> Tensor:
    return F.rms_norm(x[0], tuple(x[0].shape[a.get("axis", -1) :]), x[1], a.get("epsilon", 1e-5))


def _pads(a: Attributes, rank: int) -> tuple[list[int], bool]:
    """Padding at the start of each dimension, and whether it is the same at the end."""
    if a.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise ValueError(f"auto_pad {a['auto_pad']}")
    pads = list(a.get("pads", [0] * 2 * rank))
    return pads, pads[:rank] == pads[rank:]


def _padded(a: Attributes, x: Tensor, value: float = 0.0) -> tuple[Tensor, list[int]]:
    """The tensor with what padding a torch function cannot do itself, and the padding that is left to it."""
    rank = x.ndim - 2
    pads, even = _pads(a, rank)
    if even:
        return x, pads[:rank]
    flat = [amount for i in reversed(range(rank)) for amount in (pads[i], pads[rank + i])]
    return F.pad(x, flat, value=value), [0] * rank


def _conv(a: Attributes, x: list[Any]) -> Tensor:
    data, pads = _padded(a, x[0])
    rank = data.ndim - 2
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[rank]
    bias = x[2] if len(x) > 2 else None
    ones = [1] * rank
    return function(data, x[1], bias, a.get("strides", ones), pads, a.get("dilations", ones), a.get("group", 1))


def _max_pool(a: Attributes, x: list[Any]) -> Tensor:
    data, pads = _padded(a, x[0], -torch.inf)
    function = {1: F.max_pool1d, 2: F.max_pool2d}[data.ndim - 2]
    size = a["kernel_shape"]
    ones = [1] * len(size)
    return function(data, size, a.get("strides", ones), pads, a.get("dilations", ones), bool(a.get("ceil_mode")))


def _average_pool(a: Attributes, x: list[Any]) -> Tensor:
    pads, even = _pads(a, x[0].ndim - 2)
    if not even or a.get("dilations", [1])[0] != 1:
        raise ValueError("uneven or dilated average pooling")
    function: Any = {1: F.avg_pool1d, 2: F.avg_pool2d}[x[0].ndim - 2]
    size = a["kernel_shape"]
    counted = bool(a.get("count_include_pad", 0))
    return function(x[0], size, a.get("strides", [1] * len(size)), pads[: len(size)], bool(a.get("ceil_mode")), counted)


def _clip(a: Attributes, x: list[Any]) -> Tensor:
    low, high = ([float(item) if item is not None else None for item in (*x[1:3], None, None)])[:2]
    return x[0].clamp(low, high)


def _pad(a: Attributes, x: list[Any]) -> Tensor:
    if a.get("mode", "constant") != "constant":
        raise ValueError(f"padding mode {a['mode']}")
    rank, pads = x[0].ndim, _ints(x[1])
    axes = _ints(x[3]) if len(x) > 3 and x[3] is not None else list(range(rank))
    before, after = [0] * rank, [0] * rank
    for i, axis in enumerate(axes):
        before[axis], after[axis] = pads[i], pads[len(axes) + i]
    value = float(x[2]) if len(x) > 2 and x[2] is not None else 0.0
    return F.pad(x[0], [amount for i in reversed(range(rank)) for amount in (before[i], after[i])], value=value)


def _trilu(a: Attributes, x: list[Any]) -> Tensor:
    diagonal = _ints(x[1])[0] if len(x) > 1 and x[1] is not None else 0
    return x[0].triu(diagonal) if a.get("upper", 1) else x[0].tril(diagonal)


def _constant(a: Attributes, x: list[Any]) -> Tensor:
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        if name in a:
            return a[name] if isinstance(a[name], Tensor) else torch.tensor(a[name])
    raise ValueError("a constant of another kind")


def _full(a: Attributes, x: list[Any]) -> Tensor:
    value = a.get("value", torch.zeros(1))
    return torch.full(_ints(x[0]), value.item(), dtype=value.dtype)


def _topk(a: Attributes, x: list[Any]) -> tuple[Tensor, ...]:
    found = x[0].topk(_ints(x[1])[0], a.get("axis", -1), bool(a.get("largest", 1)), bool(a.get("sorted", 1)))
    return found.values, found.indices


def _arg(function: Callable[..., Tensor]) -> Run:
    return lambda a, x: function(x[0], a.get("axis", 0), bool(a.get("keepdims", 1)))


def _all(function: Callable[..., Tensor]) -> Run:
    """A function of one tensor after the other."""

    def run(a: Attributes, x: list[Any]) -> Tensor:
        result = x[0]
        for item in x[1:]:
            result = function(result, item)
        return result

    return run


def _one(function: Callable[..., Tensor]) -> Run:
    return lambda a, x: function(*x)


def _div(a: Attributes, x: list[Any]) -> Tensor:
    return x[0] / x[1] if x[0].is_floating_point() else torch.div(x[0], x[1], rounding_mode="trunc")


_OPERATORS: dict[str, Run] = {
    "Abs": _one(torch.abs), "Add": _one(torch.add), "And": _one(torch.logical_and), "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin), "AveragePool": _average_pool,
    "BatchNormalization": lambda a, x: F.batch_norm(x[0], x[3], x[4], x[1], x[2], False, 0.0, a.get("epsilon", 1e-5)),
    "Cast": lambda a, x: x[0].to(_dtype(a["to"], "a cast")), "CastLike": lambda a, x: x[0].to(x[1].dtype),
    "Ceil": _one(torch.ceil), "Clip": _clip, "Concat": lambda a, x: torch.cat(x, a["axis"]), "Constant": _constant,
    "ConstantOfShape": _full, "Conv": _conv, "Cos": _one(torch.cos),
    "CumSum": lambda a, x: x[0].cumsum(_ints(x[1])[0]), "Div": _div, "Dropout": lambda a, x: x[0],
    "Elu": lambda a, x: F.elu(x[0], a.get("alpha", 1.0)), "Equal": _one(torch.eq), "Erf": _one(torch.erf),
    "Exp": _one(torch.exp), "Expand": lambda a, x: x[0].expand(torch.broadcast_shapes(x[0].shape, tuple(_ints(x[1])))),
    "Flatten": lambda a, x: x[0].reshape(int(np.prod(x[0].shape[: a.get("axis", 1)], dtype=np.int64)), -1),
    "Floor": _one(torch.floor), "Gather": _gather,
    "GatherND": _gather_nd,
    "GatherElements": lambda a, x: x[0].gather(a.get("axis", 0), x[1]),
    "Gelu": lambda a, x: F.gelu(x[0], approximate=a.get("approximate", "none")), "Gemm": _gemm,
    "GlobalAveragePool": lambda a, x: x[0].mean(tuple(range(2, x[0].ndim)), keepdim=True),
    "Greater": _one(torch.gt), "GreaterOrEqual": _one(torch.ge), "HardSwish": _one(F.hardswish),
    "HardSigmoid": lambda a, x: (x[0] * a.get("alpha", 0.2) + a.get("beta", 0.5)).clamp(0, 1),
    "Identity": lambda a, x: x[0], "IsNaN": _one(torch.isnan), "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda a, x: F.leaky_relu(x[0], a.get("alpha", 0.01)), "Less": _one(torch.lt), "LessOrEqual": _one(torch.le),
    "Log": _one(torch.log), "LogSoftmax": lambda a, x: F.log_softmax(x[0], a.get("axis", -1)), "MatMul": _one(torch.matmul),
    "Max": _all(torch.maximum), "MaxPool": _max_pool, "Min": _all(torch.minimum), "Mod": _one(torch.remainder),
    "Mul": _one(torch.mul), "Neg": _one(torch.neg), "Not": _one(torch.logical_not), "Or": _one(torch.logical_or), "Pad": _pad,
    "Pow": lambda a, x: x[0] ** (float(x[1]) if x[1].numel() == 1 and _is_plain(x[1]) else x[1]),
    "RMSNormalization": _rms_norm,
    "Range": lambda a, x: torch.arange(*(item.item() for item in x)), "Reciprocal": _one(torch.reciprocal),
    "ReduceMax": _reduce(torch.amax), "ReduceMean": _reduce(torch.mean), "ReduceMin": _reduce(torch.amin),
    "ReduceSum": _reduce(torch.sum), "Relu": _one(torch.relu), "Reshape": _reshape,
    "Shape": lambda a, x: torch.tensor(x[0].shape[a.get("start", 0) : a.get("end")], dtype=torch.int64),
    "Sigmoid": _one(torch.sigmoid), "Sign": _one(torch.sign), "Sin": _one(torch.sin),
    "Size": lambda a, x: torch.tensor(x[0].numel()), "Slice": _slice, "Softmax": lambda a, x: x[0].softmax(a.get("axis", -1)),
    "Softplus": _one(F.softplus), "Split": _split, "Sqrt": _one(torch.sqrt), "Squeeze": _squeeze, "Sub": _one(torch.sub),
    "Sum": _all(torch.add), "Tanh": _one(torch.tanh), "Tile": lambda a, x: x[0].repeat(_ints(x[1])), "TopK": _topk,
    "Transpose": lambda a, x: x[0].permute(a.get("perm", list(range(x[0].ndim))[::-1])), "Trilu": _trilu,
    "Unsqueeze": _unsqueeze, "Where": _one(torch.where), "Xor": _one(torch.logical_xor), **LAYERS,
}  # fmt: skip
"""What each ONNX operator computes."""
