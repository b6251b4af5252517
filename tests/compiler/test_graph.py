"""Graphs as values: running, binding inputs, rewriting."""

import pytest
import torch
from torch import nn

from compiler.graph import (
    Activation,
    Add,
    Attention,
    Function,
    Graph,
    Input,
    KeyMask,
    LayerNorm,
    Linear,
    Norm,
    Post,
    ScaledDotProduct,
)


def _graph() -> Graph:
    torch.manual_seed(0)
    nodes = [
        Input(name="x", shape=(2, 3), dtype=torch.float32),
        Linear(name="a", inputs=("x",), shape=(2, 3), weight=torch.randn(3, 3), bias=torch.randn(3)),
        Linear(name="dead", inputs=("x",), shape=(2, 3), weight=torch.randn(3, 3), bias=None),
        Add(name="y", inputs=("a", "x"), shape=(2, 3)),
    ]
    return Graph({node.name: node for node in nodes}, ("y",))


def test_run_evaluates_in_order_and_returns_the_outputs():
    graph, x, seen = _graph(), torch.randn(2, 3), []
    result = graph.run(x, observe=lambda node, operands, value: seen.append(node.name))
    linear = graph.nodes["a"]
    assert list(result) == ["y"]
    torch.testing.assert_close(result["y"], x @ linear.weight.T + linear.bias + x)
    assert seen == ["a", "dead", "y"]


def test_inputs_come_as_tensor_sequence_or_dict():
    graph, x = _graph(), torch.randn(2, 3)
    outputs = [graph.run(given)["y"] for given in (x, (x,), [x], {"x": x})]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.zeros(2, 3),) * 2, r"the graph has 1 inputs \(x\), not 2"),
        ({"y": torch.zeros(2, 3)}, "the graph's inputs are x, not y"),
        ({}, "the graph's inputs are x, not none"),
        ({"x": "text"}, "input 'x' must be a tensor, not str"),
        (torch.zeros(2, 3, 4), r"input 'x' must be float32 like \(2, 3\), not float32 \(2, 3, 4\)"),
        (torch.zeros(2, 4), r"input 'x' must be float32 like \(2, 3\), not float32 \(2, 4\)"),
        (torch.zeros(2, 3).double(), r"input 'x' must be float32 like \(2, 3\), not float64 \(2, 3\)"),
    ],
)
def test_wrong_inputs(given, message):
    with pytest.raises(ValueError, match=message):
        _graph().run(given)


def test_rewrite_renames_drops_the_dead_and_keeps_inputs():
    graph = _graph()
    shorter = graph.rewrite([n for n in graph.nodes.values() if n.name != "y"], renamed={"y": "a"})
    assert list(shorter.nodes) == ["x", "a"]
    assert shorter.outputs == ("a",)
    assert [node.name for node in graph.users()["x"]] == ["a", "dead", "y"]


def test_printing_shows_operators_shapes_and_operands():
    text = str(_graph())
    assert text.startswith("graph after trace:")
    assert "Linear" in text and "2x3" in text and "(a, x)" in text and "outputs: y" in text


def test_post_runs_residual_function_norm_in_this_order():
    norm = Norm(torch.tensor([2.0, 1.0]), torch.tensor([0.0, 1.0]), 1e-5)
    post = Post(residual=True, function=Function("relu", torch.relu), norm=norm)
    x, r = torch.tensor([[1.0, -3.0]]), torch.tensor([[1.0, 1.0]])
    stages = dict(post.stages(x, r))
    assert stages["sum"].tolist() == [[2.0, -2.0]]
    assert stages["function"].tolist() == [[2.0, 0.0]]
    torch.testing.assert_close(
        stages["norm"], nn.functional.layer_norm(torch.tensor([[2.0, 0.0]]), (2,), norm.gamma, norm.beta)
    )
    assert torch.equal(post.apply(x, r), stages["norm"])
    assert Post().is_empty and not post.is_empty


def test_rms_norm():
    x = torch.randn(4, 6)
    norm = Norm(torch.rand(6), torch.zeros(6), 1e-6, rms=True)
    node = LayerNorm(name="n", inputs=("x",), shape=(4, 6), norm=norm)
    torch.testing.assert_close(node.evaluate(x), nn.functional.rms_norm(x, (6,), norm.gamma, 1e-6))


@pytest.mark.parametrize("keep", [True, False])
def test_attention_equals_its_heads_written_out(keep):
    batch, rows, heads, width = 2, 5, 3, 4
    q, k, v = torch.randn(3, batch, rows, heads * width)
    mask = (
        torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]) if keep else torch.tensor([[0, 0, 0, 9, 9], [0] * 5])
    )
    key_mask = KeyMask(name="m", inputs=("i",), shape=(2, 1, 5), keep=keep).evaluate(mask)
    whole = Attention(name="a", inputs=("q", "k", "v", "m"), shape=q.shape, heads=heads, scale=0.3)
    split = [x.view(batch, rows, heads, width).transpose(1, 2) for x in (q, k, v)]
    scores = (split[0] @ split[1].transpose(-1, -2) * 0.3).masked_fill(~key_mask[:, None], float("-inf"))
    wanted = (scores.softmax(-1) @ split[2]).transpose(1, 2).reshape(q.shape)
    torch.testing.assert_close(whole.evaluate(q, k, v, key_mask), wanted)
    for parts in (split, [x.flatten(0, 1) for x in split]):
        core = ScaledDotProduct(name="s", shape=tuple(parts[0].shape), scale=0.3, key_mask=True)
        result = core.evaluate(*parts, key_mask).reshape(batch, heads, rows, width)
        torch.testing.assert_close(result.transpose(1, 2).reshape(q.shape), wanted)


def test_activation_applies_its_function():
    node = Activation(name="a", inputs=("x",), shape=(3,), function=Function("square", torch.square))
    assert node.evaluate(torch.tensor([1.0, 2.0, 3.0])).tolist() == [1.0, 4.0, 9.0]
    assert node.operator == "Activation"
