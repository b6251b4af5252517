"""The quantiser: integer networks against the module in float, and the parts that make the numbers."""

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from algo.nm import NM
from algo.observers import Observer
from algo.sparsify import sparsify
from algo.verify import violations
from compiler.frontend import trace
from compiler.graph import CompileError
from compiler.ops import Attention, Linear, Pointwise, QuantNetwork
from compiler.passes import optimise
from compiler.quantise import quantise, resize
from compiler.verify_network import check_network
from models.bert import BertConfig, BertModel
from sim.reference import dequantise, quantise_inputs, run_reference
from tests.compiler.modules import CASES, Apply, make, stages


def _sqnr(exact: Tensor, approximate: Tensor) -> float:
    """Signal to quantisation noise, dB."""
    return float(10 * torch.log10(exact.square().sum() / (exact - approximate).square().sum()))


def _run(network: QuantNetwork, graph, inputs) -> list[Tensor]:
    values = run_reference(network, quantise_inputs(network, graph.bind(inputs)))
    return [dequantise(network, name, values[name]) for name in network.outputs]


@cache
def _made(name: str):
    graph, (_, inputs) = stages(name)[-1], make(name)
    return graph, inputs, quantise(graph, [inputs])


@pytest.mark.parametrize("name", CASES)
def test_networks_are_legal_and_near_the_float_result(name):
    graph, inputs, network = _made(name)
    check_network(network)
    for result, exact in zip(_run(network, graph, inputs), graph.run(inputs).values(), strict=True):
        assert _sqnr(exact, result.reshape(exact.shape)) > 30


@pytest.mark.parametrize(
    ("norm_first", "bits", "least"), [(False, 8, 31.0), (False, 16, 35.0), (True, 8, 34.0), (True, 16, 34.0)]
)
def test_transformer_encoders_on_fresh_data(norm_first, bits, least):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(96, 4, 192, batch_first=True, norm_first=norm_first, activation="gelu")
    module = nn.TransformerEncoder(
        layer, 3, norm=nn.LayerNorm(96) if norm_first else None, enable_nested_tensor=False
    )
    graph = optimise(trace(module.eval(), torch.randn(2, 5, 96)))
    network = quantise(graph, [torch.randn(4, 17, 96) for _ in range(3)], residual_bits=bits)
    x = torch.randn(4, 30, 96)
    (exact,), (result,) = graph.run(x).values(), _run(network, graph, x)
    assert _sqnr(exact, result) > least
    assert torch.cosine_similarity(exact, result, dim=-1).min() > 0.997


def test_sparse_bert_with_masks():
    torch.manual_seed(0)
    encoder = BertModel(BertConfig(layers=2, hidden=96, heads=4, intermediate=192, vocabulary=9)).encoder
    for parameter in encoder.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.1)
    sparsify(encoder, {"*.up": "2:4", "*.down": "1:4", "*.query": "3:5"}, method="magnitude")
    mask = (torch.arange(9) < torch.tensor([[9], [4], [1]])).long()
    graph = optimise(trace(encoder.eval(), (torch.randn(3, 9, 96), mask)))
    network = quantise(graph, [(torch.randn(3, 9, 96), mask) for _ in range(3)])
    check_network(network)
    patterns = {op.source.rsplit(".")[-1]: op.pattern for op in network.ops if isinstance(op, Linear)}
    assert patterns["up"] == NM("2:4") and patterns["down"] == NM("1:4") and patterns["query"] == NM("3:5")
    assert patterns["key"] is None
    for op in network.ops:
        if isinstance(op, Linear) and op.pattern is not None:
            assert len(violations(torch.from_numpy(op.weight), op.pattern)) == 0
    x = torch.randn(3, 9, 96)
    (exact,), (result,) = graph.run((x, mask)).values(), _run(network, graph, (x, mask))
    keep = mask.bool()
    assert _sqnr(exact[keep], result[keep]) > 29
    other = torch.where(
        keep[:, :, None], x, 5 * torch.randn(3, 9, 96)
    )  # what stands in the padding is no matter
    (again,) = _run(network, graph, (other, mask))
    assert torch.equal(again[keep], result[keep])


# -- which tensors have which dtype --------------------------------------------------------------------------


def _dtypes(network: QuantNetwork) -> list[tuple[str, str]]:
    return [(type(op).__name__, network.tensors[op.out].dtype) for op in network.ops]


def test_post_norm_networks_are_all_int8():
    network = _made("post-LN encoder")[2]
    assert {tensor.dtype for tensor in network.tensors.values()} == {"int8"}
    assert len(network.ops) == 14


def test_16_bit_residuals_cost_an_operator_each():
    module, inputs = make("post-LN encoder")
    network = quantise(trace(module, inputs), [inputs], residual_bits=16)
    copies = [op for op in network.ops if isinstance(op, Pointwise)]
    assert len(network.ops) == 17 and len(copies) == 3  # not for the last norm
    for op in copies:
        assert op.x is None and op.residual.tensor + ".int8" == op.out
        assert (
            network.tensors[op.residual.tensor].dtype == "int16" and network.tensors[op.out].dtype == "int8"
        )


def test_the_residual_stream_of_pre_norm_networks_has_16_bits():
    network = _made("pre-LN encoder, gelu")[2]
    assert _dtypes(network) == [
        ("Pointwise", "int8"),
        *[("Linear", "int8")] * 3,
        ("Attention", "int8"),
        ("Linear", "int16"),
        ("Pointwise", "int8"),
        *[("Linear", "int8")] * 2,
    ]
    norm = network.ops[6]
    assert norm.x is None and norm.residual.tensor == network.ops[5].out and norm.norm is not None


def test_a_stream_that_a_linear_reads_gets_an_8_bit_version_once():
    network = _made("stream read twice")[2]
    assert _dtypes(network) == [
        *[("Linear", "int16"), ("Pointwise", "int8")] * 2,
        ("Linear", "int8"),
    ]
    assert network.ops[2].residual.tensor == network.ops[0].out and network.ops[2].x == network.ops[1].out


def test_names_inputs_masks_and_meta():
    network = _made("pre-LN encoder, mask")[2]
    assert network.inputs == ("src", "src_key_padding_mask")
    assert network.tensors["src_key_padding_mask"].dtype == "keymask"
    assert network.tensors["src_key_padding_mask"].shape == (2, 1, 7)
    assert network.meta["keep.src_key_padding_mask"] == "0"
    assert all(op.mask == "src_key_padding_mask" for op in network.ops if isinstance(op, Attention))
    assert _made("linear")[2].tensors["input"].shape == (1, 9, 24)


def test_only_inner_tensors_have_offsets():
    for name in CASES:
        network = _made(name)[2]
        for tensor in (*network.inputs, *network.outputs):
            assert f"offset.{tensor}" not in network.meta
    assert "offset.layers.0.linear1" in _made("post-LN encoder")[2].meta


def test_every_inner_tensor_is_near_its_float_value():
    graph, inputs, network = _made("post-LN encoder, gelu, mask")
    exact = {}
    graph.run(inputs, observe=lambda node, operands, value: exact.update({node.name: value}))
    values = run_reference(network, quantise_inputs(network, graph.bind(inputs)))
    keep = ~inputs["src_key_padding_mask"]
    for op in network.ops:
        assert _sqnr(exact[op.out][keep], dequantise(network, op.out, values[op.out])[keep]) > 28, op.name


# -- numbers -------------------------------------------------------------------------------------------------


def test_weights_are_exact_where_they_can_be():
    module = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[127.0, -5, 0, 1], [0.0127, 0.0001, -0.0127, 0]]))
    network = quantise(trace(module, torch.ones(1, 4)), [torch.ones(1, 4)])
    assert network.ops[0].weight.tolist() == [[127, -5, 0, 1], [127, 1, -127, 0]]


@pytest.mark.parametrize("bias", [3.0, 1e6])
def test_channels_without_weights_and_large_biases(bias):
    module = nn.Linear(8, 3)
    with torch.no_grad():
        module.weight[0] = 0
        module.weight[1] *= 1e-7
        module.bias.fill_(bias)
    x = torch.randn(20, 8)
    graph = optimise(trace(module, x))
    network = quantise(graph, [x])
    check_network(network)
    (result,) = _run(network, graph, x)
    step = network.tensors[network.outputs[0]].scale
    assert (result[0] - module(x)).abs().max() < 0.6 * step + 0.02 * bias / 127


def test_scores_too_fine_for_the_mask_are_made_coarser():
    torch.manual_seed(0)
    encoder = BertModel(BertConfig(layers=1, hidden=24, heads=3, intermediate=32, vocabulary=9)).encoder
    with torch.no_grad():
        for layer in (encoder.layers[0].attention.query, encoder.layers[0].attention.key):
            layer.weight.mul_(1e-4)
    x, mask = torch.randn(2, 7, 24), torch.ones(2, 7, dtype=torch.int64)
    mask[:, 3:] = 0
    graph = optimise(trace(encoder, (x, mask)))
    network = quantise(graph, [(x, mask)])
    (attention,) = (op for op in network.ops if isinstance(op, Attention))
    assert attention.score_mult * 2.0**-attention.score_shift >= 2.0**-14
    (exact,), (result,) = graph.run((x, mask)).values(), _run(network, graph, (x, mask))
    assert _sqnr(exact[:, :3], result[:, :3]) > 28


# -- options and errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    ["minmax", "percentile", "percentile:99.9", "mse", "entropy", lambda: Observer("percentile", percentile=99.0)],
)
def test_observers(method):
    graph, inputs, _ = _made("mlp with dropout")
    network = quantise(graph, [inputs], observer=method)
    (exact,), (result,) = graph.run(inputs).values(), _run(network, graph, inputs)
    assert _sqnr(exact, result[0]) > (15 if callable(method) else 30)


def test_progress_and_generators():
    graph, inputs, network = _made("linear")
    seen: list[tuple[int, int | None]] = []
    quantise(graph, [inputs] * 3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    again = quantise(
        graph, (inputs for _ in range(2)), progress=lambda done, total: seen.append((done, total))
    )
    assert seen[3:] == [(1, None), (2, None)]
    assert np.array_equal(again.ops[0].weight, network.ops[0].weight)


def test_quantising_is_deterministic():
    graph, inputs, network = _made("post-LN encoder, gelu, mask")
    again = quantise(graph, [inputs])
    assert again.meta == network.meta and again.tensors == network.tensors
    for one, other in zip(network.ops, again.ops, strict=True):
        if isinstance(one, Linear):
            assert np.array_equal(one.requant.bias, other.requant.bias)


def test_resizing():
    network = _made("pre-LN encoder, mask")[2]
    larger = resize(network, batch=5, rows=11)
    check_network(larger)
    assert larger.tensors["src"].shape == (5, 11, 24)
    assert larger.tensors["src_key_padding_mask"].shape == (5, 1, 11)
    assert larger.ops is network.ops
    with pytest.raises(ValueError, match="batch and rows must be >= 1, not 0 and 3"):
        resize(network, batch=0, rows=3)
    with pytest.raises(ValueError, match=r"sequences of several lengths \[5, 7\] cannot be resized"):
        resize(_made("cross attention")[2], batch=1, rows=3)


def test_wrong_options():
    graph, inputs, _ = _made("linear")
    with pytest.raises(ValueError, match="residual_bits must be 8 or 16, not 12"):
        quantise(graph, [inputs], residual_bits=12)
    with pytest.raises(
        ValueError,
        match="observer must be one of minmax, percentile, mse, entropy or a function, not 'max'",
    ):
        quantise(graph, [inputs], observer="max")
    with pytest.raises(ValueError, match="quantise needs at least one calibration batch"):
        quantise(graph, [])
    with pytest.raises(ValueError, match="input 'input' must be float32 like"):
        quantise(graph, [torch.zeros(3, 23)])


def test_values_that_are_not_finite():
    graph, inputs, _ = _made("linear")
    with pytest.raises(CompileError, match="calibration: input has a NaN or an infinity"):
        quantise(graph, [inputs / 0])
    for parameter, message in (("weight", "a: cannot quantise"), ("bias", "a: the bias has a NaN")):
        module = Apply(lambda m, x: m.a(x), a=nn.Linear(24, 4))
        broken = optimise(trace(module, inputs))
        node = broken.nodes["a"]
        getattr(node, parameter).data[0] = float("nan")
        with pytest.raises(CompileError, match=f"calibration: a has a NaN|{message}"):
            quantise(broken, [inputs])


def test_a_mask_of_both_meanings():
    def function(m, x, mask):
        keep = mask[:, None, None, :] != 0
        y = nn.functional.scaled_dot_product_attention(*[m.q(x)[:, None]] * 3, attn_mask=keep)[:, 0]
        return m.k(nn.functional.scaled_dot_product_attention(*[y[:, None]] * 3, attn_mask=~keep)[:, 0])

    module = Apply(function, q=nn.Linear(8, 8), k=nn.Linear(8, 8))
    inputs = (torch.randn(2, 3, 8), torch.tensor([[1, 1, 0], [1, 0, 0]]))
    with pytest.raises(CompileError, match="input 'args_1' is used as a key mask with both meanings"):
        quantise(trace(module, inputs), [inputs])
