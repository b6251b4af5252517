"""What the front end reads from a module, and what it refuses."""

import io
import re
from contextlib import redirect_stderr

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from algo.nm import NM
from algo.sparsify import finalize, sparsify
from compiler.compile import compile_model
from compiler.frontend import trace
from compiler.graph import Activation, Attention, CompileError, Input, LayerNorm, Linear, Rearrange
from compiler.passes import optimise, run_passes
from models.bert import BertConfig, BertModel
from sim.simulate import simulate
from tests.compiler.modules import Apply, attention_layers, keep_mask, split_heads

X = torch.randn(2, 7, 24)


def _linears(graph):
    return {node.name: node for node in graph.nodes.values() if isinstance(node, Linear)}


def test_names_sources_and_parameters():
    module = nn.Sequential(nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 4, bias=False))
    graph = trace(module, X)
    assert list(_linears(graph)) == ["0", "2"]
    first, last = _linears(graph).values()
    assert first.source == "0" and torch.equal(first.weight, module[0].weight)
    assert torch.equal(first.bias, module[0].bias)
    assert last.bias is None and last.pattern is None
    assert graph.stage == "trace" and graph.inputs[0].shape == (2, 7, 24)


def test_a_bare_layer_and_a_shared_layer():
    assert len(_linears(trace(nn.Linear(24, 4), X))) == 1
    shared = nn.Linear(24, 24)
    names = list(_linears(trace(Apply(lambda m, x: m.a(F.relu(m.a(x))), a=shared), X)))
    assert names == ["a", "a.2"]


def test_inputs_have_the_arguments_names_and_dtypes():
    encoder = BertModel(BertConfig(layers=1, hidden=24, heads=3, intermediate=32, vocabulary=9)).encoder
    for inputs in ((X, keep_mask()), {"hidden_states": X, "attention_mask": keep_mask()}):
        graph = trace(encoder, inputs)
        assert [(i.name, i.dtype) for i in graph.inputs] == [
            ("hidden_states", torch.float32),
            ("attention_mask", torch.int64),
        ]


def test_bert_encoder():
    encoder = BertModel(
        BertConfig(layers=2, hidden=24, heads=3, intermediate=32, vocabulary=9)
    ).encoder.eval()
    graph = optimise(trace(encoder, (X, keep_mask())))
    with torch.no_grad():
        wanted = encoder(X, keep_mask())
    torch.testing.assert_close(graph.run((X, keep_mask()))["layers.1.down"], wanted, atol=1e-5, rtol=0)
    assert len(_linears(graph)) == 12


def test_training_mode_is_left_as_it_was():
    module = nn.Sequential(nn.Linear(24, 24), nn.Dropout(0.5))
    module[0].eval()
    graph = trace(module, X)
    assert module.training and module[1].training and not module[0].training
    assert len(graph.nodes) == 2  # no dropout
    assert torch.backends.mha.get_fastpath_enabled()


def test_patterns_come_from_the_layers():
    module = nn.Sequential(nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 4))
    sparsify(module, {"0": "2:4"}, method="magnitude")
    first, last = _linears(trace(module, X)).values()
    assert first.pattern == NM("2:4") and last.pattern is None


def test_layers_in_sparse_training_count_with_their_masked_weights():
    module = nn.Sequential(nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 4))
    sparsify(module, "2:8")
    before = [name for name, _ in module.named_parameters()]
    training = _linears(trace(module, X))
    assert [name for name, _ in module.named_parameters()] == before  # untouched
    finalize(module)
    for name, node in _linears(trace(module, X)).items():
        assert torch.equal(node.weight, training[name].weight)
        assert node.pattern == training[name].pattern == NM("2:8")


def test_other_parametrisations():
    module = parametrizations.weight_norm(nn.Linear(24, 6))
    (node,) = _linears(trace(module, X)).values()
    torch.testing.assert_close(node.weight, module.weight)


def test_packed_projection_obeys_the_pattern_of_its_module():
    module = nn.TransformerEncoderLayer(24, 3, 32, batch_first=True)
    attention = module.self_attn
    with torch.no_grad():
        attention.in_proj_weight.view(-1, 2)[:, 0] = 0
    attention.nm_pattern = NM("1:2")
    patterns = {name: node.pattern for name, node in _linears(optimise(trace(module, X))).items()}
    assert [name for name, pattern in patterns.items() if pattern == NM("1:2")] == [
        f"self_attn[{24 * i}:{24 * i + 24}]" for i in range(3)
    ]


def test_weights_that_break_their_pattern():
    module = nn.Sequential(nn.Linear(24, 12), nn.Linear(12, 4))
    sparsify(module, "2:4", method="magnitude")
    with torch.no_grad():
        module[1].weight[3, 4:8] = 1.0
    with pytest.raises(CompileError, match="layer '1' is not 2:4: row 3, group 1 has 4 non-zeros"):
        trace(module, X)
    module[1].nm_pattern = "2:4"
    with pytest.raises(CompileError, match="layer '1': nm_pattern must be an NM or None, not '2:4'"):
        trace(module, X)


def test_norms_without_parameters():
    graph = trace(nn.LayerNorm(24, elementwise_affine=False, eps=1e-3), X)
    (norm,) = (node.norm for node in graph.nodes.values() if isinstance(node, LayerNorm))
    assert norm.gamma.tolist() == [1.0] * 24 and norm.beta.tolist() == [0.0] * 24 and norm.eps == 1e-3


@pytest.mark.parametrize(
    "function",
    [
        nn.ReLU(),
        nn.GELU(),
        nn.GELU("tanh"),
        nn.SiLU(),
        nn.Tanh(),
        nn.Sigmoid(),
        nn.Hardswish(),
        nn.ELU(),
        nn.LeakyReLU(0.2),
    ],
    ids=str,
)
def test_activations_keep_their_parameters(function):
    (node,) = (n for n in trace(function, X).nodes.values() if isinstance(n, Activation))
    torch.testing.assert_close(node.function.apply(X), function(X))


def test_buffers_that_change_are_no_outputs():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(24, 4)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls.add_(1)
            return self.layer(x)

    assert trace(Counting(), X).outputs == ("layer",)


def test_constants_are_computed_once():
    module = Apply(
        lambda m, x: F.linear(x, m.w.view(4, 24) * 2, m.b[:4]),
        w=nn.Parameter(torch.randn(96)),
        b=nn.Parameter(torch.randn(6)),
    )
    (node,) = _linears(trace(module, X)).values()
    torch.testing.assert_close(node.weight, module.w.view(4, 24) * 2)
    torch.testing.assert_close(node.bias, module.b[:4])


# -- what is refused -----------------------------------------------------------------------------------------


def _refused(module, *inputs) -> str:
    with pytest.raises(CompileError) as error:
        optimise(trace(module, inputs))
    return str(error.value)


def test_unsupported_operators_are_all_named_with_path_and_shapes():
    module = nn.Sequential(nn.LogSoftmax(1), nn.Linear(24, 4), nn.LogSoftmax(2))
    assert _refused(module, X).splitlines() == [
        "cannot compile (after fold_masks):",
        "  0: aten.log_softmax.int 'log_softmax' ((2, 7, 24)) -> (2, 7, 24): this operator is not supported",
        "  2: aten.log_softmax.int 'log_softmax_1' ((2, 7, 4)) -> (2, 7, 4): this operator is not supported",
    ]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: m.a(x).mean(-1, keepdim=True), r"aten.mean.dim 'mean' \(\(2, 7, 24\)\) -> \(2, 7, 1\)"),
        (lambda m, x: m.a(x).flip(0) ** x, r"aten.pow.Tensor_Tensor 'pow_1' \(\(2, 7, 24\), \(2, 7, 24\)\)"),
        (lambda m, x: F.dropout(m.a(x), 0.5, True), "aten.dropout|aten.native_dropout|aten.bernoulli"),
        (lambda m, x: F.silu(m.a(x)) * 2 + m.a(x).cumsum(1), r"aten.cumsum.default 'cumsum'"),
    ],
)
def test_operators_that_are_not_supported(function, message):
    assert re.search(message, _refused(Apply(function, a=nn.Linear(24, 24)), X))


def test_several_outputs_of_an_unsupported_operator():
    module = Apply(lambda m, x: m.a(x).topk(3)[0], a=nn.Linear(24, 24))
    assert "aten.topk.default 'topk.0'" in _refused(module, torch.randn(9, 24))


def test_embeddings_stay_on_the_host():
    message = _refused(nn.Sequential(nn.Embedding(10, 24), nn.Linear(24, 4)), keep_mask())
    assert "0: aten.embedding.default 'embedding' ((10, 24), (2, 7)) -> (2, 7, 24)" in message


def test_causal_attention():
    def function(m, x):
        mixed = F.scaled_dot_product_attention(
            *(split_heads(layer(x)) for layer in (m.q, m.k, m.v)), is_causal=True
        )
        return m.o(mixed.transpose(1, 2).flatten(2))

    graph = optimise(trace(Apply(function, **attention_layers()), X))
    (node,) = (node for node in graph.nodes.values() if isinstance(node, Attention))
    assert node.bias.shape == (1, 1, 7, 7)
    assert torch.equal(node.bias.isneginf()[0, 0], torch.ones(7, 7).triu(1).bool())


def test_sequence_first_attention():
    """Rows of one sequence lie apart: a copy of the rows brings them together."""
    module = Apply(lambda m, x: m.a(x, x, x, need_weights=False)[0], a=nn.MultiheadAttention(24, 3)).eval()
    graph = optimise(trace(module, X))
    assert [node.shape for node in graph.nodes.values() if isinstance(node, Attention)] == [(7, 2, 24)]
    assert sum(isinstance(node, Rearrange) for node in graph.nodes.values()) == 2  # into attention, and back
    (value,) = graph.run(X).values()
    torch.testing.assert_close(value.reshape(2, 7, 24), module(X), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex64])
def test_other_dtypes_of_inputs(dtype):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(
        CompileError, match=rf"input argument 0 is {name} \(2, 24\): only float32 can be compiled"
    ):
        trace(nn.Linear(24, 4), torch.zeros(2, 24, dtype=dtype))


def test_other_dtypes_inside():
    assert "  weight: parameter of float64 (4, 24)" in _refused(nn.Linear(24, 4).double(), torch.zeros(2, 24))
    message = _refused(Apply(lambda m, x: m.a(x.double().float()), a=nn.Linear(24, 4)), X)
    assert message.startswith("only float32 can be compiled:") and "gives float64 (2, 7, 24)" in message


def test_control_flow_on_values_is_refused_quietly():
    log = io.StringIO()
    with redirect_stderr(log):
        message = _refused(Apply(lambda m, x: m.a(x) if x.sum() > 0 else x, a=nn.Linear(24, 4)), X)
    assert message.startswith(
        "torch.export cannot trace Apply with inputs [(2, 7, 24)]: Could not guard on data-dependent"
    )
    assert log.getvalue() == ""
    assert "use torch.where, or take the branch out of the module" in message and " at test_frontend.py:" in message


def test_errors_of_the_module_itself():
    assert "torch.export cannot trace Linear with inputs [(2, 7, 23)]" in _refused(
        nn.Linear(24, 4), X[..., :23]
    )


def test_nothing_to_compile():
    assert (
        _refused(nn.Identity(), X)
        == "output 'input' (2, 7, 24) does not depend on a computation: nothing to compile"
    )
    message = _refused(Apply(lambda m, x, y: m.a(x), a=nn.Linear(24, 4)), X, X)
    assert (
        message == "the result does not depend on input 'args_1' (2, 7, 24): leave it out of example_inputs"
    )
    with pytest.raises(CompileError, match="the module returns no tensor: nothing to compile"):
        trace(Apply(lambda m, x: None, a=nn.Linear(24, 4)), X)


def test_wrong_arguments():
    with pytest.raises(TypeError, match="trace takes a torch.nn.Module, not function"):
        trace(lambda x: x, X)
    with pytest.raises(TypeError, match=r"example_inputs must be tensors, not int \(argument 1\)"):
        trace(nn.Linear(24, 4), (X, 3))
    with pytest.raises(TypeError, match="example_inputs must hold at least one tensor"):
        trace(nn.Linear(24, 4), ())


def test_random_constants_are_not_frozen():
    assert "aten.rand" in _refused(Apply(lambda m, x: m.a(x) + torch.rand(2, 7, 24), a=nn.Linear(24, 24)), X)


def test_every_input_is_an_input_node():
    assert all(isinstance(node, Input) for node in trace(nn.Linear(24, 4), X).inputs)


@pytest.mark.parametrize("pad", [(0, 0, 1, -1), (0, 0, -2, 2), (1, -1), (0, 0)])
def test_a_pad_that_keeps_the_shape_still_shifts(pad: tuple[int, ...]) -> None:
    module, x = Apply(lambda m, x: m.b(F.pad(m.a(x), pad)), a=nn.Linear(6, 8), b=nn.Linear(8, 4)), torch.randn(2, 5, 6)
    for graph in run_passes(trace(module, x)):
        (value,) = graph.run(x).values()
        torch.testing.assert_close(value, module(x), atol=1e-5, rtol=1e-5, msg=graph.stage)


def _masked_first(m: Apply, x: torch.Tensor) -> torch.Tensor:
    """-inf where a condition holds, written before the scores, as exporters do."""
    q, k, v = (split_heads(part) for part in m.qkv(x).chunk(3, -1))
    later = torch.ones(7, 7, dtype=torch.bool).triu(1)
    scores = torch.where(later, torch.tensor(-torch.inf), q @ k.transpose(-1, -2) * 0.3)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_the_value_of_masked_scores_may_come_first() -> None:
    module, x = Apply(_masked_first, qkv=nn.Linear(24, 72)).eval(), torch.randn(2, 7, 24)
    graph = optimise(trace(module, x))
    assert any(isinstance(node, Attention) and node.bias is not None for node in graph.nodes.values())
    (value,) = graph.run(x).values()
    torch.testing.assert_close(value, module(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["latents", "latents, weights wanted", "rows mixed"])
def test_constants_before_data_in_a_product(name: str) -> None:
    """Queries that do not depend on data; a constant matrix that mixes rows."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(24, 4, batch_first=True)
    latents, mixing = nn.Parameter(torch.randn(1, 3, 24)), nn.Parameter(torch.rand(7, 7))

    def run(m: Apply, x: torch.Tensor) -> torch.Tensor:
        if name == "rows mixed":
            return m.mixing @ torch.relu(m.mixing @ m.a(x))
        return m.layer(m.latents.expand(len(x), -1, -1), x, x, need_weights="weights" in name)[0]

    module, x = Apply(run, layer=layer, latents=latents, mixing=mixing, a=nn.Linear(24, 16)).eval(), torch.randn(2, 7, 24)
    program = compile_model(module, x, arch="tiny", host="forbid", calibration=[x], order="operator")
    result = simulate(program, x, engine="isa")
    assert result.bit_exact, result.mismatches
    wanted = module(x)
    assert (result.outputs[0] - wanted).square().mean() / wanted.var() < 10**-2.8
