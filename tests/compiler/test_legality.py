"""The law of each stage: an illegal graph is refused, with a message that says where and why."""

from dataclasses import replace

import pytest
import torch

from compiler.graph import (
    Activation,
    Add,
    Aten,
    Attention,
    CompileError,
    Constant,
    Convolution,
    Fixed,
    Fold,
    Function,
    Graph,
    Input,
    KeyMask,
    LayerNorm,
    Linear,
    MatMul,
    MaxPool,
    Node,
    Norm,
    Operand,
    Pointwise,
    Post,
    Product,
    Rearrange,
    Scale,
    ScaledDotProduct,
    Softmax,
    Transpose,
    Unfold,
    View,
)
from compiler.layout import Layout
from compiler.legality import LEGAL, check
from compiler.passes import PASSES

X = Input(name="x", shape=(2, 3, 4), dtype=torch.float32)
SHAPE = (2, 3, 4)


def _graph(*nodes: Node, stage: str, outputs: tuple[str, ...] = ()) -> Graph:
    return Graph({node.name: node for node in (X, *nodes)}, outputs or (nodes[-1].name,), stage)


def _node(kind: type[Node], **fields) -> Node:
    return kind(name="n", inputs=("x",), shape=SHAPE, source="layers.3.thing", **fields)


NODES = {
    Aten: _node(Aten, target=torch.ops.aten.sort.default, args=(Operand(0),), kwargs={}),
    Constant: Constant(name="n", shape=(4,), source="layers.3.thing", value=torch.zeros(4)),
    View: _node(View, layout=Layout.contiguous(SHAPE)),
    MatMul: replace(_node(MatMul), inputs=("x", "x")),
    Softmax: _node(Softmax),
    Scale: _node(Scale, factor=2.0),
    Add: replace(_node(Add), inputs=("x", "x")),
    LayerNorm: _node(LayerNorm, norm=Norm(torch.ones(4), torch.zeros(4), 1e-5)),
    Activation: _node(Activation, function=Function("relu", torch.relu)),
    Linear: _node(Linear, weight=torch.zeros(4, 4), bias=None),
    Pointwise: _node(Pointwise, post=Post(function=Function("relu", torch.relu))),
    ScaledDotProduct: replace(_node(ScaledDotProduct, scale=1.0), inputs=("x", "x", "x")),
    Attention: replace(_node(Attention, heads=2, scale=1.0), inputs=("x", "x", "x")),
}


def test_every_pass_has_its_row():
    assert set(LEGAL) == {"trace", *(transform.__name__ for transform in PASSES)}


@pytest.mark.parametrize("stage", LEGAL)
@pytest.mark.parametrize("kind", NODES, ids=lambda kind: kind.__name__)
def test_the_table_decides(kind, stage):
    graph = _graph(NODES[kind], stage=stage)
    if kind in LEGAL[stage]:
        check(graph)
    else:
        with pytest.raises(CompileError, match=rf"cannot compile \(after {stage}\):\n  layers.3.thing"):
            check(graph)


def test_the_last_stage_has_only_what_the_quantiser_takes():
    assert LEGAL["fuse"] == {
        Input, KeyMask, Linear, Convolution, MaxPool, Unfold, Fold, Attention, Pointwise, Rearrange, Transpose, Product, Softmax,
        MatMul, Fixed,
    }  # fmt: skip


def test_message_names_path_operator_and_shapes():
    with pytest.raises(CompileError) as error:
        check(_graph(NODES[Aten], stage="fold_masks"))
    assert str(error.value) == (
        "cannot compile (after fold_masks):\n"
        "  layers.3.thing: aten.sort.default 'n' ((2, 3, 4)) -> (2, 3, 4): this operator is not supported"
    )


def test_only_the_first_few_are_listed():
    nodes = [replace(NODES[Aten], name=f"n{i}") for i in range(9)]
    with pytest.raises(CompileError) as error:
        check(_graph(*nodes, stage="fold_masks"), shown=3)
    lines = str(error.value).splitlines()
    assert len(lines) == 5 and lines[-1] == "  ... and 6 more"


def test_unknown_operators_hide_their_consequences():
    with pytest.raises(CompileError) as error:
        check(_graph(NODES[Aten], replace(NODES[Pointwise], name="m"), stage="fold_masks"))
    assert "'m'" not in str(error.value)


def test_operands_come_first():
    late = replace(NODES[Linear], inputs=("later",))
    with pytest.raises(CompileError, match="reads 'later', which is not computed before it"):
        check(_graph(late, stage="fuse"))
    with pytest.raises(CompileError, match="output 'gone' is not computed"):
        check(_graph(NODES[Linear], stage="fuse", outputs=("gone",)))
    with pytest.raises(CompileError, match="node 'n' is filed under 'other'"):
        check(Graph({"x": X, "other": NODES[Linear]}, ("other",), "fuse"))


def test_sums_do_not_broadcast():
    narrow = replace(NODES[Linear], name="narrow", shape=(2, 1, 4))
    add = Add(name="n", inputs=("x", "narrow"), shape=SHAPE)
    with pytest.raises(CompileError, match="operands must have equal shapes"):
        check(_graph(narrow, add, stage="sink_views"))


def test_a_key_mask_masks_attention_alone():
    mask = Input(name="mask", shape=(2, 3), dtype=torch.int64)
    keep = KeyMask(name="keep", inputs=("mask",), shape=(2, 1, 3), keep=True)
    attention = replace(NODES[Attention], inputs=("x", "x", "x", "keep"))
    check(_graph(mask, keep, attention, stage="fuse"))
    with pytest.raises(CompileError, match="a key mask can only mask attention"):
        check(_graph(mask, keep, replace(attention, inputs=("x", "x", "keep")), stage="fuse"))
    with pytest.raises(CompileError, match="a key mask must be an input"):
        check(_graph(NODES[Linear], replace(keep, inputs=("n",)), replace(attention, name="a"), stage="fuse"))


def test_integers_are_no_data():
    ids = Input(name="ids", shape=SHAPE, dtype=torch.int64)
    with pytest.raises(CompileError, match="input 'ids' of int64 can only be a key mask"):
        check(_graph(ids, replace(NODES[Linear], inputs=("ids",)), stage="sink_views"))


def test_tensors_at_the_end_are_rows_of_channels():
    with pytest.raises(
        CompileError, match=r"tensors must be \(rows, channels\) or \(batch, rows, channels\)"
    ):
        check(_graph(replace(NODES[Linear], shape=(1, 2, 3, 4)), stage="fuse"))
    with pytest.raises(CompileError, match="a residual is the second operand"):
        check(_graph(replace(NODES[Linear], inputs=("x", "x")), stage="fuse"))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf")])
def test_scores_have_a_positive_scale(scale):
    with pytest.raises(CompileError, match="the scale of the scores must be positive"):
        check(_graph(replace(NODES[Attention], scale=scale), stage="fuse"))
