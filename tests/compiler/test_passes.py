"""Every pass keeps what the module computes, and the last one leaves what the quantiser takes."""

import math

import pytest
import torch
from torch import nn

from algo.modes import plain_attention
from compiler.frontend import trace
from compiler.graph import Attention, CompileError, KeyMask, Linear, Pointwise
from compiler.passes import PASSES, optimise, run_passes
from tests.compiler.modules import CASES, Apply, attention_layers, bert_attention, keep_mask, make, stages

INF = float("inf")


def _expected(name: str) -> tuple[torch.Tensor, ...]:
    module, inputs = make(name)
    with torch.no_grad(), plain_attention():
        result = module(**inputs) if isinstance(inputs, dict) else module(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("name", CASES)
def test_every_pass_keeps_the_result(name):
    expected, (_, inputs) = _expected(name), make(name)
    for graph in stages(name):
        results = graph.run(inputs).values()
        for result, wanted in zip(results, expected, strict=True):
            error = (result.reshape(wanted.shape) - wanted).abs().max()
            assert error <= 1e-5, f"after {graph.stage}"


def _operators(name: str) -> list[str]:
    marks = []
    for node in stages(name)[-1].nodes.values():
        if isinstance(node, Linear | Pointwise):
            post = node.post
            parts = (post.residual and "add", post.function and post.function.name, post.norm and "norm")
            marks.append(" ".join([type(node).__name__, *(part for part in parts if part)]))
        elif isinstance(node, Attention):
            marks.append("Attention")
    return marks


LAYER = ["Linear", "Linear", "Linear", "Attention"]


@pytest.mark.parametrize(
    ("name", "operators"),
    [
        ("linear", ["Linear"]),
        ("mlp with dropout", ["Linear relu", "Linear norm"]),
        ("norms", ["Pointwise norm", "Linear norm", "Pointwise tanh"]),
        ("residual", ["Linear gelu", "Linear add"]),
        ("residual and norm", ["Linear gelu", "Linear add norm"]),
        ("activation after residual", ["Linear gelu", "Linear add relu"]),
        ("stream read twice", ["Linear add", "Linear add", "Linear"]),
        ("x + x", ["Pointwise add", "Linear"]),
        ("scaled residual", ["Linear add"]),
        ("weight and bias by hand", ["Linear"]),
        ("rows flattened and back", ["Linear"]),
        ("two outputs", ["Linear", "Linear"]),
        ("timm attention", [*LAYER, "Linear"]),
        ("cross attention", [*LAYER, "Linear"]),
        ("post-LN encoder", [*LAYER, "Linear add norm", "Linear relu", "Linear add norm"] * 2),
        ("post-LN encoder, gelu, mask", [*LAYER, "Linear add norm", "Linear gelu", "Linear add norm"]),
        (
            "pre-LN encoder, gelu",
            ["Pointwise norm", *LAYER, "Linear add", "Pointwise norm", "Linear gelu", "Linear add norm"],
        ),
    ],
)
def test_what_is_fused_into_what(name, operators):
    assert sorted(_operators(name)) == sorted(operators)


def test_arithmetic_of_one_tensor_becomes_one_function():
    kinds = _operators("gelu by hand")
    assert len(kinds) == 2 and kinds[0].startswith("Linear ") and kinds[1] == "Linear"


def test_packed_projection_becomes_three_slices_of_its_weight():
    module, _ = make("post-LN encoder")
    graph = stages("post-LN encoder")[-1]
    packed = module.layers[0].self_attn.in_proj_weight
    names = [f"layers.0.self_attn[{24 * i}:{24 * i + 24}]" for i in range(3)]
    for i, name in enumerate(names):
        assert torch.equal(graph.nodes[name].weight, packed[24 * i : 24 * i + 24])
        assert graph.nodes[name].source == name
    assert graph.nodes["layers.0.self_attn.attention"].inputs == tuple(names)


def test_heads_and_scale_of_attention():
    (attention,) = (
        node for node in stages("timm attention")[-1].nodes.values() if isinstance(node, Attention)
    )
    assert attention.heads == 3
    assert math.isclose(attention.scale, 8**-0.5)


@pytest.mark.parametrize("name", ["post-LN encoder, gelu, mask", "pre-LN encoder, mask"])
def test_a_fused_graph_runs_on_other_shapes(name):
    module, _ = make(name)
    x, mask = torch.randn(3, 11, 24), torch.zeros(3, 11, dtype=torch.bool)
    mask[2, 5:] = True
    with torch.no_grad(), plain_attention():
        wanted = module(x, src_key_padding_mask=mask)
    (result,) = stages(name)[-1].run({"src": x, "src_key_padding_mask": mask}).values()
    torch.testing.assert_close(result, wanted, atol=1e-5, rtol=0)


def test_one_key_mask_for_all_layers():
    graph = stages("pre-LN encoder, mask")[-1]
    (mask,) = (node for node in graph.nodes.values() if isinstance(node, KeyMask))
    assert mask.inputs == ("src_key_padding_mask",) and not mask.keep and mask.shape == (2, 1, 7)
    assert len(graph.users()[mask.name]) == 2


def _bert(masked):
    torch.manual_seed(1)
    return Apply(lambda m, x, mask: bert_attention(m, x, mask, masked), **attention_layers()).eval()


MASKS = {
    "additive -1e4": lambda s, m: s + (1.0 - m[:, None, None, :].float()) * -10000.0,
    "additive least float": lambda s, m: (
        s + (1.0 - m[:, None, None, :].to(s.dtype)) * torch.finfo(s.dtype).min
    ),
    "masked_fill": lambda s, m: s.masked_fill(m[:, None, None, :] == 0, -INF),
    "where": lambda s, m: torch.where(m[:, None, None, :].bool(), s, torch.tensor(-1e9)),
    "where with a number": lambda s, m: torch.where(m[:, None, None, :] > 0, s, -1e9),
    "twice": lambda s, m: (
        s.masked_fill(m[:, None, None, :] == 0, -INF) + (1.0 - m.float())[:, None, None, :] * -1e9
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_ways_to_write_a_padding_mask(name):
    module, x = _bert(MASKS[name]), torch.randn(2, 7, 24)
    graph = optimise(trace(module, (x, keep_mask())))
    (mask,) = (node for node in graph.nodes.values() if isinstance(node, KeyMask))
    assert mask.keep
    with torch.no_grad():
        wanted = module(x, keep_mask())
    (result,) = graph.run((x, keep_mask())).values()
    torch.testing.assert_close(result, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_dtypes_of_a_padding_mask(dtype):
    module, x, mask = _bert(MASKS["masked_fill"]), torch.randn(2, 7, 24), keep_mask().to(dtype)
    graph = optimise(trace(module, (x, mask)))
    with torch.no_grad():
        torch.testing.assert_close(
            next(iter(graph.run((x, mask)).values())), module(x, mask), atol=1e-5, rtol=0
        )


REFUSED = {
    "pairs of tokens": (
        lambda s, m: s.masked_fill((m[:, None, None, :] * m[:, None, :, None]) == 0, -1e9),
        "it depends on the query, the head or several entries",
    ),
    "bias": (
        lambda s, m: s + m[:, None, None, :].float() * 0.5,
        "is no padding mask of keys joined with a constant one",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_masks_that_are_no_key_padding(name):
    masked, message = REFUSED[name]
    with pytest.raises(CompileError, match=message):
        optimise(trace(_bert(masked), (torch.randn(2, 7, 24), keep_mask())))


def test_constant_masks():
    def masked(constant):
        layers = {name: nn.Linear(24, 24) for name in "qkvo"}
        function = lambda m, x: bert_attention(m, x, x, lambda s, _: s + constant)
        return optimise(trace(Apply(function, **layers), torch.randn(2, 7, 24)))

    graph = masked(torch.zeros(7, 7))
    assert not any(isinstance(node, KeyMask) for node in graph.nodes.values())
    assert _biases(masked(torch.full((7, 7), -INF).triu(1)))[0].shape == (1, 1, 7, 7)
    assert torch.equal(_biases(masked(torch.arange(7.0)))[0][0, 0], torch.arange(7.0).expand(7, 7))
    per_head = torch.randn(3, 7, 7)
    assert torch.equal(_biases(masked(per_head))[0], per_head[None])
    with pytest.raises(CompileError, match=r"its mask \(7, 7\) has a NaN"):
        masked(torch.full((7, 7), float("nan")))


def _biases(graph):
    return [node.bias for node in graph.nodes.values() if isinstance(node, Attention)]


def test_rms_norms_written_out():
    graph = stages("RMSNorm written out")[-1]
    assert [type(node) for node in graph.nodes.values()][1:] == [Linear, Linear]
    first, last = (node for node in graph.nodes.values() if isinstance(node, Linear))
    assert first.post.norm.rms and first.post.norm.eps == 1e-6 and last.post.norm is None
    other = Apply(lambda m, x: m.a(x) * torch.rsqrt(m.a(x).mean(-1, keepdim=True) + 1e-6), a=nn.Linear(24, 24))
    with pytest.raises(CompileError, match="aten.rsqrt.default 'rsqrt'"):
        optimise(trace(other, torch.randn(2, 7, 24)))


def test_grouped_queries():
    for name in ("grouped queries", "grouped queries, repeated keys"):
        (node,) = (node for node in stages(name)[-1].nodes.values() if isinstance(node, Attention))
        assert (node.heads, node.kv_heads) == (4, 2), name


@pytest.mark.parametrize("cut", [lambda y: y[:, 0], lambda y: y[:, :3], lambda y: y.flatten(0, 1)[:5]])
def test_a_first_part_is_not_the_whole(cut):
    """The first rows of a tensor lie where the tensor lies, but are fewer."""
    torch.manual_seed(0)
    module, x = Apply(lambda m, x: cut(m.a(x)), a=nn.Linear(24, 24)), torch.randn(1, 7, 24)
    with torch.no_grad():
        wanted = module(x)
    for graph in run_passes(trace(module, x)):
        (result,) = graph.run(x).values()
        torch.testing.assert_close(result.reshape(wanted.shape), wanted, atol=1e-5, rtol=0)


def test_the_passes_are_one_visible_list():
    names = [transform.__name__ for transform in PASSES]
    assert names[0] == "match_norms" and names[-1] == "fuse"
    assert [graph.stage for graph in stages("linear")] == ["trace", *names]


def test_a_view_that_is_a_result_stays_what_others_read():
    module = Apply(lambda m, x: ((y := m.a(x).view(2, 7, 5, 8)), y[:, :, [3]]), a=nn.Linear(24, 40))
    x = torch.randn(2, 7, 24)
    wanted = module(x)
    graph = trace(module, x)
    for after in (graph, *run_passes(graph)):
        for found, right in zip(after.run(x).values(), wanted, strict=True):
            torch.testing.assert_close(found.flatten(), right.flatten())


def test_empty_slices_are_empty():
    """As of a rotation of all channels that is written for one of a part of them."""
    module = Apply(lambda m, x: torch.cat([(y := m.a(x))[..., :8].tanh(), y[..., 8:]], -1), a=nn.Linear(24, 8))
    x = torch.randn(2, 7, 24)
    for after in run_passes(trace(module, x)):
        torch.testing.assert_close(after.run(x)[after.outputs[0]], module(x))
