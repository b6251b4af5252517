"""Front end: a `torch.nn.Module` and example inputs become a `Graph`, by way of `torch.export`.

`torch.export` records the aten operators that the module runs. `IMPORTS` says for each supported one which
node it becomes; anything else is carried along as an `Aten` node, so that mask arithmetic can be understood
later (`compiler.passes.masks`) and everything that is really unsupported is reported together.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from algo.nm import NM
from algo.sparsify import pattern_of
from algo.verify import PatternViolation, verify_weight
from compiler.exported import Exported, dtype_name, export, listed, mapped, module_path
from compiler.graph import (
    Activation,
    Add,
    Aten,
    CompileError,
    Constant,
    Fixed,
    Function,
    Gather,
    Graph,
    Input,
    LayerNorm,
    Linear,
    MatMul,
    Move,
    Node,
    Norm,
    Operand,
    Scale,
    ScaledDotProduct,
    Softmax,
    View,
)
from compiler.layout import Layout, LayoutError

__all__ = ["FUNCTIONS", "IMPORTS", "MASKED", "MOVES", "VIEWS", "by_rows", "import_part", "import_whole", "mask_operands", "trace"]

aten = torch.ops.aten
WHERES = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
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
    return import_whole(export(module, example_inputs))


def import_whole(exported: Exported) -> Graph:
    """The graph of a whole exported module."""
    importer = _Importer(exported)
    graph = importer.graph(exported.operators, exported.outputs)
    if importer.problems:
        raise CompileError(listed("only float32 can be compiled", importer.problems))
    for node in (graph.nodes[name] for name in graph.outputs):
        if isinstance(node, Input | Constant):
            raise CompileError(f"output {node.name!r} {node.shape} does not depend on a computation: nothing to compile")
    users = graph.users()
    unused = [f"{node.name!r} {node.shape}" for node in graph.inputs if not users[node.name]]
    if unused:
        raise CompileError(f"the result does not depend on input {', '.join(unused)}: leave it out of example_inputs")
    return graph


def import_part(
    exported: Exported, chosen: Iterable[fx.Node], outputs: Iterable[fx.Node], inlined: frozenset[fx.Node]
) -> tuple[Graph, dict[str, fx.Node]]:
    """The graph of some operators, in execution order.

    What they read from others is an `Input` of the graph; but mask arithmetic (`mask_operands`) that is ``inlined``
    is imported, too, down to the module's own inputs.

    Returns
    -------
    Graph, dict
        The graph, and the exported node behind each of its inputs.
    """
    importer = _Importer(exported, inlined)
    chosen = list(chosen)
    importer.heads = _heads_from_outside(chosen)
    return importer.graph(chosen, outputs), importer.boundary


def by_rows(value: Tensor) -> Tensor:
    """Heads (batch, heads, rows, channels) as rows (batch, rows, heads * channels)."""
    return value.transpose(1, 2).flatten(2)


VIEWS = frozenset({
    aten.clone.default, aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.transpose.int, aten.permute.default, aten.slice.Tensor, aten.select.int,
    aten.flatten.using_ints, aten.alias.default, aten.repeat_interleave.self_int,
})  # fmt: skip
"""Operators of one tensor that move elements."""

MOVES = VIEWS | {
    aten.cat.default, aten.stack.default, aten.roll.default, aten.flip.default, aten.constant_pad_nd.default, aten.pad.default,
    aten.repeat.default, aten.tile.default, aten.repeat_interleave.self_int, aten.index.Tensor, aten.index_select.default,
    aten.upsample_nearest1d.vec, aten.upsample_nearest1d.default, aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default,
    aten._upsample_nearest_exact1d.vec, aten._upsample_nearest_exact2d.vec, aten.reflection_pad1d.default,
    aten.reflection_pad2d.default, aten.replication_pad1d.default, aten.replication_pad2d.default, aten.channel_shuffle.default,
    aten.unfold.default, aten.pixel_shuffle.default, aten.pixel_unshuffle.default, aten.narrow.default, aten.movedim.int,
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.squeeze.default,
    aten.squeeze.dims, aten.unflatten.int, aten.t.default, aten.unsafe_split.Tensor, aten.unsafe_chunk.default,
    aten.unsafe_split_with_sizes.default,
}  # fmt: skip
"""Operators that move elements, of one tensor or several, or put zeros between them."""


def _heads_from_outside(chosen: list[fx.Node]) -> set[fx.Node]:
    """Queries, keys and values (batch, heads, rows, channels) that attention takes from other stages."""
    inside, found = set(chosen), set()
    for node in chosen:
        if node.target is aten.scaled_dot_product_attention.default:
            for item in node.args[:3]:
                while item in inside and cast(fx.Node, item).target in VIEWS:
                    item = cast(fx.Node, item).args[0]
                if isinstance(item, fx.Node) and item not in inside and len(item.meta["val"].shape) == 4:
                    found.add(item)
    return found


def mask_operands(exported: Exported, node: fx.Node) -> list[fx.Node]:
    """What an operator takes as a mask: the mask of an attention, the condition of a masked fill, and what is added
    to a product of activations."""
    target, args = node.target, node.args
    if target is aten.scaled_dot_product_attention.default:
        found = [node.kwargs.get("attn_mask", args[3] if len(args) > 3 else None)]
    elif target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        found = [args[1]]
    elif target in WHERES:
        first = not isinstance(args[1], fx.Node) or exported.constant(args[1]) is not None
        found = [args[0], args[1 if first else 2]]
    elif target is aten.add.Tensor and all(isinstance(item, fx.Node) for item in args[:2]):
        found = [y for x, y in (args[:2], args[1::-1]) if _is_scores(exported, x) and not _is_scores(exported, y)]
    else:
        found = []
    return [item for item in found if isinstance(item, fx.Node)]


_SCORES = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.add.Tensor})
_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default, aten.baddbmm.default})


def _is_scores(exported: Exported, value: Any) -> bool:
    """Whether a value is a scaled product of activations."""
    node = cast(fx.Node, value)
    while node.target in _SCORES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if node.target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        node = cast(fx.Node, node.args[0])
    return node.target in _PRODUCTS and all(exported.constant(item) is None for item in node.all_input_nodes[:2])


def _only_moves(node: fx.Node) -> bool:
    """Whether an operator moves elements by constant indices, and pads with nothing but zeros."""
    if node.target in (aten.constant_pad_nd.default, aten.pad.default):
        rest = [*node.args[2:], *node.kwargs.values()]
        return all(item in ("constant", "reflect", "replicate", "circular", None, 0) for item in rest)
    return node.target in MOVES


class _Importer:
    """Turns operators of one exported program into a graph."""

    def __init__(self, exported: Exported, inlined: frozenset[fx.Node] = frozenset()) -> None:
        self.exported = exported
        self.module = exported.module
        self.inlined = inlined
        self.nodes: dict[str, Node] = {}
        self.values: dict[fx.Node, Any] = {}  # Node, or a list of them
        self.boundary: dict[str, fx.Node] = {}  # what each input stands for
        self.heads: set[fx.Node] = set()  # heads that come from outside: they are taken `by_rows`
        self.problems: list[str] = []

    def graph(self, chosen: Iterable[fx.Node], outputs: Iterable[fx.Node]) -> Graph:
        chosen = list(chosen)
        if set(self.exported.operators) == set(chosen):  # the whole module: keep the order of its arguments
            for node in self.exported.inputs:
                self.value(node)
        for node in chosen:
            for mask in mask_operands(self.exported, node):
                if mask in self.inlined:
                    self._inline(mask)
            self.values[node] = self._call(node)
        made = [self.value(node) for node in outputs]
        return Graph({}, tuple(node.name for node in made)).rewrite(self.nodes.values())

    def _inline(self, node: fx.Node) -> None:
        """Import what a mask is computed from."""
        order, todo = {node}, [node]
        while todo:
            below = [item for item in todo.pop().all_input_nodes if item not in order and item.op == "call_function"]
            order.update(below)
            todo += below
        for item in self.exported.operators:
            if item in order and item not in self.values:
                self.values[item] = self._call(item)

    def value(self, node: fx.Node) -> Any:
        """What stands for an exported node: its own import, a constant, or an input of the graph."""
        if node not in self.values:
            constant = self.exported.constant(node)
            if constant is None:
                value = node.meta["val"]
                made: Any = value
                if isinstance(value, Tensor):
                    made = self._input(node, value)
            elif isinstance(constant[0], Tensor):
                made = self.constant(node, *constant)
            else:
                made = [self.constant(node, part, constant[1]) for part in constant[0]]
            self.values[node] = made
        return self.values[node]

    def _input(self, node: fx.Node, value: Tensor) -> Node:
        shape = tuple(value.shape)
        if node in self.heads:
            shape = (shape[0], shape[2], shape[1] * shape[3])
        made = self.add(Input(name=node.name, shape=shape, dtype=value.dtype, origin=(node.name,)))
        self.boundary[made.name] = node
        if node not in self.heads:
            return made
        batch, heads, rows, width = value.shape
        split = Layout.contiguous((batch, rows, heads, width)).permute((0, 2, 1, 3))
        return self.view(node, made, split, f"{node.name}.heads")

    def add(self, node: Node) -> Node:
        """Put a node into the graph under a name of its own."""
        name, count = node.name, 1
        while name in self.nodes:
            count += 1
            name = f"{node.name}.{count}"
        self.nodes[name] = node = replace(node, name=name)
        return node

    def constant(self, node: fx.Node, value: Tensor, source: str) -> Node:
        made = Constant(name=node.name, shape=tuple(value.shape), source=source, value=value, origin=(node.name,))
        return self.add(made)

    def _call(self, node: fx.Node) -> Any:
        if self.exported.constant(node) is not None:
            return self.value(node)
        if node.target is operator.getitem:
            return self.value(cast(fx.Node, node.args[0]))[node.args[1]]  # type: ignore[index]
        self._check_dtype(node)
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
        if value.dtype not in (torch.float32, torch.complex64):  # complex numbers may be rotations
            where = self.path(node) or "the module"
            self.problems.append(f"{where}: {node.target} gives {dtype_name(value.dtype)} {tuple(value.shape)}")

    def _carry(self, node: fx.Node) -> Any:
        """The operator as an `Aten` node, or a `Move`."""
        operands = list(node.all_input_nodes)
        kind = Move if _only_moves(node) and all(isinstance(self.value(item), Node) for item in operands) else Aten
        names = tuple(self.value(item).name for item in operands)
        args, kwargs = mapped(node, lambda item: Operand(operands.index(item)))
        value = node.meta["val"]
        fields: dict[str, Any] = {"target": cast(Any, node.target), "args": tuple(args), "kwargs": kwargs}
        if isinstance(value, Tensor):
            return self.make(kind, node, names, **fields)
        shapes = [tuple(part.shape) if isinstance(part, Tensor) else () for part in value]
        return [
            self.make(kind, node, names, name=f"{node.name}.{i}", shape=shape, result=i, **fields)
            for i, shape in enumerate(shapes)
        ]

    def bound(self, node: fx.Node) -> dict[str, Any]:
        """Arguments by name, with defaults; fx nodes replaced by ours."""
        schema = cast(Any, node.target)._schema.arguments
        bound = {argument.name: argument.default_value for argument in schema}
        bound.update(zip((argument.name for argument in schema), node.args, strict=False))
        bound.update(node.kwargs)
        return {
            name: self.value(item) if isinstance(item, fx.Node) else item for name, item in bound.items()
        }

    def make(self, kind: type[Node], node: fx.Node, inputs: tuple[str, ...], **fields: Any) -> Node:
        """A node of a kind that stands for an fx node."""
        if "shape" not in fields:
            fields["shape"] = tuple(node.meta["val"].shape)
        fields = {"name": node.name, "source": self.path(node), "origin": (node.name,)} | fields
        return self.add(kind(inputs=inputs, **fields))

    def view(self, node: fx.Node, x: Node, layout: Layout, name: str | None = None) -> Node:
        return self.add(
            View(
                name=name or node.name,
                inputs=(x.name,),
                shape=layout.shape,
                source=self.path(node),
                layout=layout,
                origin=(node.name,),
            )
        )

    @staticmethod
    def path(node: fx.Node) -> str:
        """Path of the innermost module that ran the operator."""
        return module_path(node)

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


@_imports(aten.expand.default)
def _expand(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    old, new = a["self"].shape, tuple(node.meta["val"].shape)
    if old == new:
        return a["self"]
    layout = Layout.contiguous((1,) * (len(new) - len(old)) + old)
    for dim, (before, after) in enumerate(zip(layout.shape, new, strict=True)):
        if before != after:
            layout = layout.expand(dim, after)
    return importer.view(node, a["self"], layout)


@_imports(aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout)
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


@_imports(aten.pad.default, aten.constant_pad_nd.default)
def _pad(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    return None if any(a["pad"]) else a["self"]  # the same shape is not enough: a shift takes off as much as it adds


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


@_imports(aten.repeat_interleave.self_int)
def _repeat_interleave(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    x, repeats = a["self"], a["repeats"]
    if isinstance(x, Constant) or a["dim"] is None or not isinstance(repeats, int):
        return None
    return x if repeats == 1 else importer.view(node, x, Layout.contiguous(x.shape).repeat(a["dim"] % len(x.shape), repeats))


@_imports(aten.index_select.default)
def _index_select(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    x, index = a["self"], a["index"]
    if isinstance(x, Constant) or not isinstance(index, Constant) or a["dim"] not in (-1, len(x.shape) - 1):
        return None
    return importer.make(Gather, node, (x.name,), channels=tuple(index.value.tolist()))


@_imports(
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unsafe_split.Tensor, aten.unsafe_chunk.default,
    aten.unsafe_split_with_sizes.default,
)  # fmt: skip
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
    if isinstance(y, Constant) and y.value.ndim == 2:
        return _make_linear(importer, node, x, _transposed(y), None)
    if isinstance(y, Constant) and not isinstance(x, Constant) and y.value.ndim == len(x.shape) == 4:
        weights = isinstance(x, Softmax) or any(isinstance(importer.nodes[name], Softmax) for name in x.inputs)
        y = _fixed_heads(importer, node, y.value, x.shape[0], "values", turned=not weights)
    if isinstance(x, Constant) and not isinstance(y, Constant) and 2 <= len(x.shape) <= len(y.shape):
        x = _fixed_rows(importer, node, x.value, y.shape[:-2], "rows")
    if isinstance(x, Constant) or len(x.shape) != len(y.shape) or x.shape[:-2] != y.shape[:-2]:
        return None
    return importer.make(MatMul, node, (x.name, y.name))


def _fixed_rows(importer: _Importer, node: fx.Node, value: Tensor, lead: tuple[int, ...], name: str) -> Node:
    """A constant (..., rows, channels) once for each of the leading dimensions: queries that do not depend on data, a matrix that
    mixes rows."""
    whole = value.detach().float().expand(*lead, *value.shape[-2:])
    return importer.make(Fixed, node, (), name=f"{node.name}.{name}", shape=tuple(whole.shape), value=whole)


def _fixed_heads(importer: _Importer, node: fx.Node, value: Tensor, batch: int, name: str, *, turned: bool = False) -> Node:
    """A constant (1 or batch, heads, rows, channels) as a view of rows (batch, rows, heads * channels); ``turned``: keys that
    queries are multiplied with, (1 or batch, heads, channels, rows)."""
    value = value.transpose(-1, -2) if turned else value
    _, heads, rows, width = value.shape
    flat = by_rows(value).expand(batch, -1, -1)
    fixed = importer.make(Fixed, node, (), name=f"{node.name}.{name}", shape=tuple(flat.shape), value=flat)
    split = Layout.contiguous((batch, rows, heads, width)).permute((0, 2, 3, 1) if turned else (0, 2, 1, 3))
    return importer.view(node, fixed, split, f"{node.name}.{name}.heads")


@_imports(aten.baddbmm.default)
def _baddbmm(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    if a["alpha"] != 1 or a["beta"] != 1:
        return None
    x, y = a["batch1"], a["batch2"]
    product = importer.make(MatMul, node, (x.name, y.name), name=f"{node.name}.product")
    return importer.make(Add, node, (product.name, a["self"].name))


@_imports(aten.scaled_dot_product_attention.default)
def _attention(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    if a["dropout_p"] or all(isinstance(a[name], Constant) for name in ("query", "key", "value")):
        return None
    if isinstance(a["query"], Constant):
        lead = (a["value"] if isinstance(a["key"], Constant) else a["key"]).shape[:-2]
        if len(a["query"].shape) == 4:
            a["query"] = _fixed_heads(importer, node, a["query"].value, lead[0], "query")
        else:
            a["query"] = _fixed_rows(importer, node, a["query"].value, lead, "query")
    if a["query"].shape[-1] != a["value"].shape[-1]:
        return _attention_as_products(importer, node, a)
    for name in ("key", "value"):
        if isinstance(a[name], Constant):
            if len(a[name].shape) != 4:
                return None
            a[name] = _fixed_heads(importer, node, a[name].value, a["query"].shape[0], name)
    heads, kv_heads = (a[name].shape[-3] if len(a[name].shape) == 4 else 1 for name in ("query", "key"))
    if heads != kv_heads:
        if not a["enable_gqa"] or heads % kv_heads:
            return None
        for name in ("key", "value"):  # written out, as match_heads knows it
            layout = Layout.contiguous(a[name].shape).repeat(1, heads // kv_heads)
            a[name] = importer.view(node, a[name], layout, f"{node.name}.{name}")
    if a["is_causal"]:
        causal = torch.ones(a["query"].shape[-2], a["key"].shape[-2], dtype=torch.bool).tril()
        made = Constant(name=f"{node.name}.causal", shape=tuple(causal.shape), value=causal, origin=(node.name,))
        a["attn_mask"] = importer.add(made)
    operands = [a["query"], a["key"], a["value"]] + ([a["attn_mask"]] if a["attn_mask"] is not None else [])
    scale = a["scale"] if a["scale"] is not None else a["query"].shape[-1] ** -0.5
    names, path = tuple(item.name for item in operands), importer.path(node)
    name = f"{path}.attention" if path else node.name
    return importer.make(ScaledDotProduct, node, names, name=name, scale=float(scale))


def _attention_as_products(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    """Of values with other widths than the keys, without a mask."""
    q, k, v = (a[name] for name in ("query", "key", "value"))
    alike = len(q.shape) == len(k.shape) == len(v.shape) and q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
    if a["attn_mask"] is not None or a["is_causal"] or not alike or any(isinstance(x, Constant) for x in (k, v)):
        return None
    rank, shape = len(q.shape), (*q.shape[:-1], k.shape[-2])
    keys = importer.view(
        node, k, Layout.contiguous(k.shape).permute((*range(rank - 2), rank - 1, rank - 2)), f"{node.name}.keys"
    )  # fmt: skip
    scores = importer.make(MatMul, node, (q.name, keys.name), name=f"{node.name}.scores", shape=shape)
    scale = a["scale"] if a["scale"] is not None else q.shape[-1] ** -0.5
    scaled = importer.make(Scale, node, (scores.name,), name=f"{node.name}.scaled", shape=shape, factor=float(scale))
    shares = importer.make(Softmax, node, (scaled.name,), name=f"{node.name}.shares", shape=shape)
    return importer.make(MatMul, node, (shares.name, v.name))


@_imports(aten.softmax.int, aten._softmax.default)
def _softmax(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    x, rank = a["self"], len(a["self"].shape)
    order = list(range(rank))
    order[a["dim"]], order[-1] = order[-1], order[a["dim"]]
    if order == list(range(rank)):
        return importer.make(Softmax, node, (x.name,))
    turned = importer.view(node, x, Layout.contiguous(x.shape).permute(tuple(order)), f"{node.name}.turned")
    shares = importer.make(Softmax, node, (turned.name,), name=f"{node.name}.shares", shape=turned.shape)
    return importer.view(node, shares, Layout.contiguous(shares.shape).permute(tuple(order)))


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


@_imports(aten.sub.Tensor)
def _sub(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    x, y = a["self"], a["other"]
    if not isinstance(x, Node) or not isinstance(y, Node) or _number(x) is not None or isinstance(y, Constant):
        return None
    operands = [item.meta["val"] for item in node.all_input_nodes]
    if len(operands) != 2 or any(not value.is_floating_point() or value.shape != node.meta["val"].shape for value in operands):
        return None
    other = importer.make(Scale, node, (y.name,), name=f"{node.name}.negative", shape=y.shape, factor=-float(a["alpha"]))
    return importer.make(Add, node, (x.name, other.name))


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


@_imports(*WHERES)
def _where(importer: _Importer, node: fx.Node, a: Bound) -> Any:
    if _number(a["self"]) is not None:
        return _masked(importer, node, a["other"], a["condition"], _number(a["self"]), keep=False)
    return _masked(importer, node, a["self"], a["condition"], _number(a["other"]), keep=True)


def _masked(
    importer: _Importer, node: fx.Node, x: Node, mask: Node, value: float | None, *, keep: bool
) -> Any:
    """Scores of masked keys overwritten with a very low value: the same, for softmax, as adding it."""
    if (
        value is None
        or not value <= MASKED
        or not isinstance(x, Node)
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
    aten.celu.default, aten.erf.default, aten.log_sigmoid.default, aten.threshold.default, aten.rrelu.default,
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


import compiler.image_imports  # noqa: E402, F401  registers its imports, and needs the functions above
import compiler.norm_imports  # noqa: E402, F401  likewise
import compiler.resampling  # noqa: E402, F401  likewise
