"""Front end: a `torch.nn.Module` and example inputs become a `Graph`, by way of `torch.export`.

`torch.export` records the aten operators that the module runs. `IMPORTS` says for each supported one which
node it becomes; anything else is carried along as an `Aten` node, so that mask arithmetic can be understood
later (`compiler.passes.masks`) and everything that is really unsupported is reported together.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.nn.utils import parametrize

from algo.modes import evaluating, quiet_export
from algo.nm import NM
from algo.sparsify import pattern_of
from algo.verify import PatternViolation, verify_weight
from compiler.graph import (
    Activation,
    Add,
    Aten,
    CompileError,
    Constant,
    Function,
    Graph,
    Input,
    LayerNorm,
    Linear,
    MatMul,
    Node,
    Norm,
    Operand,
    Scale,
    ScaledDotProduct,
    Softmax,
    View,
)
from compiler.layout import Layout, LayoutError

__all__ = ["FUNCTIONS", "IMPORTS", "trace"]

aten = torch.ops.aten
MASKED = -1000.0
"""An additive mask at or below this removes a key."""


def trace(module: nn.Module, example_inputs: Any) -> Graph:
    """Record what a module computes.

    Parameters
    ----------
    module
        Traced in eval mode, whatever mode it is in; it is not changed. Layers in sparse training count with
        their masked weights.
    example_inputs
        A tensor, a tuple of the positional arguments, or a dict of keyword arguments; they fix the shapes.
        float32 data (rows, C) or (B, S, C), masks (B, S) of bool or an integer type.

    Returns
    -------
    Graph
        At stage ``"trace"``; give it to `compiler.passes.optimise`.

    Raises
    ------
    CompileError
        The module cannot be traced, or uses other dtypes; a weight breaks its N:M pattern (names layer, row
        and group).
    TypeError
        Not a module, or inputs that are no tensors.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"trace takes a torch.nn.Module, not {type(module).__name__}")
    args, kwargs = _arguments(example_inputs)
    _check_parameters(module)
    module = _effective(module)
    return _Importer(module, _export(module, args, kwargs)).graph()


def _arguments(example_inputs: Any) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Positional and keyword arguments, checked."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    else:
        args = tuple(example_inputs)
    named = [(f"argument {i}", value) for i, value in enumerate(args)] + list(kwargs.items())
    for name, value in named:
        if not isinstance(value, Tensor):
            raise TypeError(f"example_inputs must be tensors, not {type(value).__name__} ({name})")
        if value.is_complex() or (value.is_floating_point() and value.dtype != torch.float32):
            raise CompileError(
                f"input {name} is {_dtype(value.dtype)} {tuple(value.shape)}: only float32 can be compiled"
            )
    if not named:
        raise TypeError("example_inputs must hold at least one tensor")
    return args, kwargs


def _check_parameters(module: nn.Module) -> None:
    """Refuse parameters of other dtypes before torch meets them."""
    problems = [
        f"{name}: parameter of {_dtype(value.dtype)} {tuple(value.shape)}"
        for name, value in module.named_parameters()
        if value.is_complex() or (value.is_floating_point() and value.dtype != torch.float32)
    ]
    if problems:
        raise CompileError(_listed("only float32 can be compiled", problems))


def _effective(module: nn.Module) -> nn.Module:
    """The module itself, or a copy without parametrisations that has the effective weights."""
    if not any(parametrize.is_parametrized(part) for part in module.modules()):
        return module
    result = copy.deepcopy(module).eval()
    for part in result.modules():
        if parametrize.is_parametrized(part):
            pattern, names = pattern_of(part), list(cast(Any, part).parametrizations)
            values = {name: getattr(part, name).detach() for name in names}
            # not remove_parametrizations: it would change the class, which the copy shares with the module
            part.__class__ = parametrize.type_before_parametrizations(part)
            del part.parametrizations
            for name, value in values.items():
                setattr(part, name, nn.Parameter(value, requires_grad=False))
            part.nm_pattern = pattern  # type: ignore[assignment]
    return result


def _export(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> ExportedProgram:
    """The module as functional aten operators; linear, layer_norm and attention stay whole."""
    args = tuple(value.clone() for value in args)  # one tensor given twice is two inputs
    kwargs = {name: value.clone() for name, value in kwargs.items()}
    with evaluating(module), quiet_export(), torch.no_grad():
        try:
            return torch.export.export(module, args, kwargs, strict=False).run_decompositions({})
        except Exception as error:  # torch.export raises whatever the module's own code raises
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            if "data-dependent" in first:
                first += (
                    " (what runs depends on values, as with a causal mask given to nn.TransformerEncoder)"
                )
            raise CompileError(
                f"torch.export cannot trace {type(module).__name__} with inputs "
                f"{[tuple(value.shape) for value in (*args, *kwargs.values())]}: {first}"
            ) from error


class _Importer:
    """Turns one exported program into a graph."""

    def __init__(self, module: nn.Module, program: ExportedProgram) -> None:
        self.module = module
        self.program = program
        self.nodes: dict[str, Node] = {}
        self.values: dict[fx.Node, Any] = {}  # Node, or a list of them
        self.problems: list[str] = []

    def graph(self) -> Graph:
        self._placeholders()
        outputs: tuple[str, ...] = ()
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self.values[node] = self._call(node)
            elif node.op == "output":
                outputs = self._outputs(node)
        if self.problems:
            raise CompileError(_listed("only float32 can be compiled", self.problems))
        graph = Graph({}, outputs).rewrite(self.nodes.values())
        users = graph.users()
        unused = [f"{node.name!r} {node.shape}" for node in graph.inputs if not users[node.name]]
        if unused:
            raise CompileError(
                f"the result does not depend on input {', '.join(unused)}: leave it out of example_inputs"
            )
        return graph

    def add(self, node: Node) -> Node:
        """Put a node into the graph under a name of its own."""
        name, count = node.name, 1
        while name in self.nodes:
            count += 1
            name = f"{node.name}.{count}"
        self.nodes[name] = node = replace(node, name=name)
        return node

    def constant(self, node: fx.Node, value: Tensor, source: str) -> Node:
        return self.add(Constant(name=node.name, shape=tuple(value.shape), source=source, value=value))

    def _placeholders(self) -> None:
        by_name = {node.name: node for node in self.program.graph.nodes if node.op == "placeholder"}
        for spec in self.program.graph_signature.input_specs:
            node = by_name[spec.arg.name]
            if spec.kind is InputKind.USER_INPUT:
                value = node.meta["val"]
                if isinstance(value, Tensor):
                    self.values[node] = self.add(
                        Input(name=node.name, shape=tuple(value.shape), dtype=value.dtype)
                    )
                else:
                    self.values[node] = value
                continue
            target = str(spec.target)
            stored = self.program.state_dict if target in self.program.state_dict else self.program.constants
            value = cast(Tensor, stored[target]).detach()
            self.values[node] = self.constant(node, value, target)

    def _outputs(self, node: fx.Node) -> tuple[str, ...]:
        results = zip(cast(Any, node.args[0]), self.program.graph_signature.output_specs, strict=True)
        own = [item for item, spec in results if spec.kind is OutputKind.USER_OUTPUT]  # not changed buffers
        flat: list[Node] = []
        for item in (self.values.get(item) if isinstance(item, fx.Node) else item for item in own):
            if not isinstance(item, Node):
                raise CompileError(f"a compiled module must return tensors, not {type(item).__name__}")
            if isinstance(item, Input | Constant):
                raise CompileError(
                    f"output {item.name!r} {item.shape} does not depend on a computation: nothing to compile"
                )
            flat.append(item)
        return tuple(item.name for item in flat)

    def _call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            return self.values[node.args[0]][node.args[1]]  # type: ignore[index]
        if node.meta.get("val") is None:
            return None  # an assertion about metadata
        self._check_dtype(node)
        operands = [self.values[item] for item in node.all_input_nodes]
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if all(isinstance(item, Constant) for item in operands) and not random:
            return self._fold(node, operands)
        convert = IMPORTS.get(node.target)  # type: ignore[call-overload]
        if convert is not None:
            try:
                made = convert(self, node, self.bound(node))
            except LayoutError:
                made = None
            if made is not None:
                return made
        return self._carry(node)

    def _check_dtype(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not (value.is_complex() or value.is_floating_point()):
            return
        if value.dtype != torch.float32:
            where = self.path(node) or "the module"
            self.problems.append(f"{where}: {node.target} gives {_dtype(value.dtype)} {tuple(value.shape)}")

    def _fold(self, node: fx.Node, operands: list[Constant]) -> Node | list[Node]:
        """Compute what does not depend on any input."""
        values = {item: self.values[item].value for item in node.all_input_nodes}
        args, kwargs = _mapped(node, lambda item: values[item])
        sources = {item.source for item in operands if item.source}
        result, source = cast(Any, node.target)(*args, **kwargs), sources.pop() if len(sources) == 1 else ""
        if isinstance(result, Tensor):
            return self.constant(node, result, source)
        return [self.constant(node, part, source) for part in result]

    def _carry(self, node: fx.Node) -> Any:
        """The operator as an `Aten` node."""
        operands = list(node.all_input_nodes)
        names = tuple(self.values[item].name for item in operands)
        args, kwargs = _mapped(node, lambda item: Operand(operands.index(item)))
        value = node.meta["val"]
        first = value if isinstance(value, Tensor) else value[0]
        made = self.make(
            Aten,
            node,
            names,
            shape=tuple(first.shape),
            target=cast(Any, node.target),
            args=tuple(args),
            kwargs=kwargs,
        )
        return made if isinstance(value, Tensor) else [made] * len(value)

    def bound(self, node: fx.Node) -> dict[str, Any]:
        """Arguments by name, with defaults; fx nodes replaced by ours."""
        schema = cast(Any, node.target)._schema.arguments
        bound = {argument.name: argument.default_value for argument in schema}
        bound.update(zip((argument.name for argument in schema), node.args, strict=False))
        bound.update(node.kwargs)
        return {
            name: self.values[item] if isinstance(item, fx.Node) else item for name, item in bound.items()
        }

    def make(self, kind: type[Node], node: fx.Node, inputs: tuple[str, ...], **fields: Any) -> Node:
        """A node of a kind that stands for an fx node."""
        if "shape" not in fields:
            fields["shape"] = tuple(node.meta["val"].shape)
        fields = {"name": node.name, "source": self.path(node)} | fields
        return self.add(kind(inputs=inputs, **fields))

    def view(self, node: fx.Node, x: Node, layout: Layout, name: str | None = None) -> Node:
        return self.add(
            View(
                name=name or node.name,
                inputs=(x.name,),
                shape=layout.shape,
                source=self.path(node),
                layout=layout,
            )
        )

    @staticmethod
    def path(node: fx.Node) -> str:
        """Path of the innermost module that ran the operator."""
        stack = node.meta.get("nn_module_stack") or {}
        return list(stack.values())[-1][0] if stack else ""

    def pattern(self, weight: Constant) -> tuple[str, NM | None]:
        """Path of the layer that owns a weight, and the N:M pattern it declares (and obeys)."""
        path, _, _ = weight.source.rpartition(".")
        owner = self.module.get_submodule(path) if weight.source else None
        pattern = pattern_of(owner) if owner is not None else None
        if pattern is not None:
            if not isinstance(pattern, NM):
                raise CompileError(f"layer {path!r}: nm_pattern must be an NM or None, not {pattern!r}")
            try:
                verify_weight(weight.value, pattern, layer=path)
            except PatternViolation as error:
                raise CompileError(str(error)) from error
        return path, pattern


Bound = dict[str, Any]
Import = Callable[[_Importer, fx.Node, Bound], Any]
IMPORTS: dict[Any, Import] = {}
"""The node (or list of nodes) that each aten operator becomes; None: not in this form."""


def _imports(*targets: Any) -> Callable[[Import], Import]:
    def register(convert: Import) -> Import:
        IMPORTS.update(dict.fromkeys(targets, convert))
        return convert

    return register


# -- what changes nothing but shape --------------------------------------------------------------------------


@_imports(
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
)
def _same(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    return a["self"]


@_imports(aten.dropout.default)
def _dropout(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    return None if a["train"] and a["p"] > 0 else a["input"]


@_imports(aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.expand.default)
def _same_if_equal(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    value = node.args[0].meta["val"]  # type: ignore[union-attr]
    new = node.meta["val"]
    return a["self"] if value.dtype == new.dtype and value.shape == new.shape else None


@_imports(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
)  # fmt: skip
def _reshape(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    return importer.view(
        node, a["self"], Layout.contiguous(a["self"].shape).reshape(tuple(node.meta["val"].shape))
    )


@_imports(aten.permute.default)
def _permute(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    rank = len(a["self"].shape)
    return importer.view(
        node, a["self"], Layout.contiguous(a["self"].shape).permute(tuple(d % rank for d in a["dims"]))
    )


@_imports(aten.transpose.int, aten.t.default)
def _transpose(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    order = list(range(len(a["self"].shape)))
    if len(order) > 1:
        i, j = a.get("dim0", 0), a.get("dim1", 1)
        order[i], order[j] = order[j], order[i]
    return importer.view(
        node,
        a["self"],
        Layout.contiguous(a["self"].shape).permute(tuple(order[d] for d in range(len(order)))),
    )


@_imports(aten.select.int)
def _select(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    shape = a["self"].shape
    dim = a["dim"] % len(shape)
    return importer.view(node, a["self"], Layout.contiguous(shape).select(dim, a["index"] % shape[dim]))


@_imports(aten.slice.Tensor)
def _slice(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    shape = a["self"].shape
    dim = a["dim"] % len(shape)
    start, stop, step = slice(a["start"], a["end"]).indices(shape[dim])
    if a["step"] != 1:
        return None
    if (start, stop) == (0, shape[dim]):
        return a["self"]
    return importer.view(node, a["self"], Layout.contiguous(shape).narrow(dim, start, stop - start))


@_imports(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
def _split(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    x, start, parts = a["self"], 0, []
    dim = a["dim"] % len(x.shape)
    for i, part in enumerate(node.meta["val"]):
        layout = Layout.contiguous(x.shape).narrow(dim, start, part.shape[dim])
        parts.append(importer.view(node, x, layout, f"{node.name}.{i}"))
        start += part.shape[dim]
    return parts


@_imports(aten.unbind.int)
def _unbind(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    x = a["self"]
    dim = a["dim"] % len(x.shape)
    layout = Layout.contiguous(x.shape)
    return [importer.view(node, x, layout.select(dim, i), f"{node.name}.{i}") for i in range(x.shape[dim])]


# -- products ------------------------------------------------------------------------------------------------


@_imports(aten.linear.default)
def _linear(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    return _make_linear(importer, node, a["input"], a["weight"], a["bias"])


def _make_linear(importer: _Importer, node: fx.Node, x: Node, weight: Node, bias: Node | None) -> Any:
    if isinstance(x, Constant) or not isinstance(weight, Constant) or not isinstance(bias, Constant | None):
        return None
    if weight.value.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    path, pattern = importer.pattern(weight)
    return importer.make(
        Linear, node, (x.name,), name=path or node.name, source=path or importer.path(node),
        weight=weight.value, bias=None if bias is None else bias.value, pattern=pattern,
    )  # fmt: skip


def _transposed(weight: Any) -> Any:
    """A constant (in, out) matrix as the (out, in) weight of a Linear."""
    if not isinstance(weight, Constant) or weight.value.ndim != 2:
        return None
    return Constant(
        name=weight.name, shape=weight.shape[::-1], source=weight.source, value=weight.value.t().contiguous()
    )


@_imports(aten.addmm.default)
def _addmm(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    if a["alpha"] != 1 or a["beta"] != 1:
        return None
    return _make_linear(importer, node, a["mat1"], _transposed(a["mat2"]), a["self"])


@_imports(aten.mm.default, aten.bmm.default)
def _mm(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    return _product(importer, node, a["self"], a["mat2"])


@_imports(aten.matmul.default)
def _matmul(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    return _product(importer, node, a["self"], a["other"])


def _product(importer: _Importer, node: fx.Node, x: Node, y: Node) -> Any:
    if isinstance(y, Constant):
        return _make_linear(importer, node, x, _transposed(y), None)
    if isinstance(x, Constant) or len(x.shape) != len(y.shape) or x.shape[:-2] != y.shape[:-2]:
        return None
    return importer.make(MatMul, node, (x.name, y.name))


@_imports(aten.baddbmm.default)
def _baddbmm(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    if a["alpha"] != 1 or a["beta"] != 1:
        return None
    x, y = a["batch1"], a["batch2"]
    product = importer.make(MatMul, node, (x.name, y.name), name=f"{node.name}.product")
    return importer.make(Add, node, (product.name, a["self"].name))


@_imports(aten.scaled_dot_product_attention.default)
def _attention(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    if a["is_causal"]:
        raise CompileError(
            f"{importer.path(node) or 'the module'}: scaled_dot_product_attention {a['query'].shape} with "
            "is_causal=True: only key padding masks (batch, keys) are supported, causal masks are not"
        )
    if (
        a["dropout_p"]
        or a["enable_gqa"]
        or any(isinstance(a[name], Constant) for name in ("query", "key", "value"))
    ):
        return None
    operands = [a["query"], a["key"], a["value"]] + ([a["attn_mask"]] if a["attn_mask"] is not None else [])
    scale = a["scale"] if a["scale"] is not None else a["query"].shape[-1] ** -0.5
    names, path = tuple(item.name for item in operands), importer.path(node)
    name = f"{path}.attention" if path else node.name
    return importer.make(ScaledDotProduct, node, names, name=name, scale=float(scale))


@_imports(aten.softmax.int, aten._softmax.default)
def _softmax(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    last = a["dim"] in (-1, len(a["self"].shape) - 1)
    return importer.make(Softmax, node, (a["self"].name,)) if last else None


# -- element by element --------------------------------------------------------------------------------------


@_imports(aten.add.Tensor)
def _add(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    x, y = a["self"], a["other"]
    if not isinstance(x, Node) or not isinstance(y, Node):
        return None
    if a["alpha"] != 1:
        y = importer.make(
            Scale, node, (y.name,), name=f"{node.name}.alpha", shape=y.shape, factor=float(a["alpha"])
        )
    return importer.make(Add, node, (x.name, y.name))


@_imports(aten.mul.Tensor, aten.mul.Scalar)
def _mul(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    for x, factor in ((a["self"], a["other"]), (a["other"], a["self"])):
        if (
            isinstance(x, Node)
            and x.shape == tuple(node.meta["val"].shape)
            and (number := _number(factor)) is not None
        ):
            return importer.make(Scale, node, (x.name,), factor=number)
    return None


@_imports(aten.div.Tensor, aten.div.Scalar)
def _div(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    number = _number(a["other"])
    return importer.make(Scale, node, (a["self"].name,), factor=1 / number) if number else None


def _number(value: Any) -> float | None:
    """The number that a scalar argument or a one-element constant stands for."""
    if isinstance(value, Constant) and value.value.numel() == 1:
        return float(value.value)
    return float(value) if isinstance(value, int | float) else None


@_imports(aten.masked_fill.Scalar)
def _masked_fill(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    return _masked(importer, node, a["self"], a["mask"], a["value"], keep=False)


@_imports(aten.masked_fill.Tensor)
def _masked_fill_tensor(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    return _masked(importer, node, a["self"], a["mask"], _number(a["value"]), keep=False)


@_imports(aten.where.self, aten.where.ScalarOther)
def _where(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    return _masked(importer, node, a["self"], a["condition"], _number(a["other"]), keep=True)


def _masked(
    importer: _Importer, node: fx.Node, x: Node, mask: Node, value: float | None, *, keep: bool
) -> Any:
    """Scores of masked keys overwritten with a very low value: the same, for softmax, as adding it."""
    if (
        value is None
        or not value <= MASKED
        or isinstance(x, Constant)
        or x.shape != tuple(node.meta["val"].shape)
    ):
        return None
    numbers = {"zero": torch.tensor(0.0), "value": torch.tensor(float(value))}
    names = [
        importer.add(Constant(name=f"{node.name}.{n}", shape=(), value=v)).name for n, v in numbers.items()
    ]
    bias = importer.make(
        Aten, node, (mask.name, *(names if keep else names[::-1])), name=f"{node.name}.bias",
        shape=mask.shape, target=aten.where.self, args=(Operand(0), Operand(1), Operand(2)), kwargs={},
    )  # fmt: skip
    return importer.make(Add, node, (x.name, bias.name))


@_imports(aten.layer_norm.default)
def _layer_norm(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    return _norm(importer, node, a, a["bias"], rms=False)


@_imports(aten.rms_norm.default)
def _rms_norm(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    return _norm(importer, node, a, None, rms=True)


def _norm(importer: _Importer, node: fx.Node, a: Bound, bias: Node | None, *, rms: bool) -> Any:
    channels, weight = tuple(a["normalized_shape"]), a["weight"]
    if len(channels) != 1 or not isinstance(weight, Constant | None) or not isinstance(bias, Constant | None):
        return None
    gamma = torch.ones(channels) if weight is None else weight.value
    beta = torch.zeros(channels) if bias is None else bias.value
    eps = torch.finfo(torch.float32).eps if a["eps"] is None else float(a["eps"])
    name, norm = importer.path(node) or node.name, Norm(gamma, beta, eps, rms)
    return importer.make(LayerNorm, node, (a["input"].name,), name=name, norm=norm)


FUNCTIONS = (
    aten.relu.default, aten.gelu.default, aten.silu.default, aten.tanh.default, aten.sigmoid.default,
    aten.elu.default, aten.leaky_relu.default, aten.hardswish.default, aten.hardsigmoid.default,
    aten.hardtanh.default, aten.softplus.default, aten.mish.default, aten.relu6.default, aten.selu.default,
    aten.celu.default, aten.erf.default, aten.log_sigmoid.default,
)  # fmt: skip
"""Functions of each element with constant parameters: an activation table holds any of them."""


@_imports(*FUNCTIONS)
def _function(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    name, *_ = cast(Any, node.target)._schema.arguments
    x = a.pop(name.name)
    target, parameters = cast(Any, node.target), dict(a)
    label = target._schema.name.removeprefix("aten::")
    return importer.make(
        Activation, node, (x.name,), function=Function(label, lambda value: target(value, **parameters))
    )


def _mapped(node: fx.Node, change: Callable[[fx.Node], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an fx node, with something else for the nodes among them."""
    return cast(Any, fx.node.map_arg)((node.args, node.kwargs), change)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(reason: str, problems: list[str], shown: int = 5) -> str:
    """One message for several problems."""
    more = f"\n  ... and {len(problems) - shown} more" if len(problems) > shown else ""
    return "\n  ".join([f"{reason}:", *problems[:shown]]) + more
