"""Migration of outliers: the same function, and less noise where channels differ."""

import pytest
import torch
from torch import nn

from compiler.frontend import trace
from compiler.passes import optimise
from compiler.quantise import quantise
from compiler.smooth import migrate, smooth, smoothing_factors
from compiler.verify_network import check_network
from models.bert import BertConfig, BertModel
from sim.reference import dequantise, quantise_inputs, run_reference
from tests.compiler.modules import CASES, Apply, make, stages


def _outputs(graph, inputs):
    return graph.run(graph.bind(inputs)).values()


@pytest.mark.parametrize("name", CASES)
def test_the_function_stays(name):
    graph, (_, inputs) = stages(name)[-1], make(name)
    factors = {key: 3 * value.sqrt() for key, value in smoothing_factors(graph, [inputs], 0.5).items()}
    for changed in (smooth(graph, [inputs], 0.5), migrate(graph, factors)):
        for exact, got in zip(_outputs(graph, inputs), _outputs(changed, inputs), strict=True):
            assert (exact - got).abs().max() <= 1e-5 * exact.abs().max().clamp_min(1.0)


OUTLIERS = [3, 17, 40]


def _with_outliers(norm_first, factor=60.0):
    """As in OPT: a few channels of every norm are many times as large, and the weights that read them as much smaller."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=norm_first, activation="gelu", dropout=0.0)
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with torch.no_grad():
        for part in module.layers:
            for norm in (part.norm1, part.norm2):
                norm.weight[OUTLIERS] *= factor
            readers = (part.self_attn.in_proj_weight, part.linear1.weight)
            for weight in readers if norm_first else readers[1:]:
                weight[:, OUTLIERS] /= factor
            if not norm_first and part is not module.layers[0]:
                readers[0][:, OUTLIERS] /= factor
    return module


def _noise(graph, x, **options):
    network = quantise(graph, [x], **options)
    check_network(network)
    (name,) = network.outputs
    got = dequantise(network, name, run_reference(network, quantise_inputs(network, graph.bind(x)))[name])
    (exact,) = _outputs(graph, x)
    return float(10 * torch.log10(exact.square().sum() / (exact - got).square().sum()))


def test_outliers_before_linear_layers_cost_less():
    graph = optimise(trace(_with_outliers(True), torch.randn(2, 9, 64)))
    x = torch.randn(4, 9, 64)
    plain, better = _noise(graph, x), _noise(graph, x, smooth=0.5)
    assert better > plain + 3, (plain, better)


def test_post_norm_networks_get_a_second_norm_where_channels_are_outliers():
    graph = optimise(trace(_with_outliers(False), torch.randn(2, 9, 64)))
    x = torch.randn(4, 9, 64)
    changed = smooth(graph, [x], 0.5)
    added = set(changed.nodes) - set(graph.nodes)
    assert {name.rpartition(".")[2] for name in added} == {"sum", "smooth"} and len(added) == 6  # the last norm has no reader
    even = optimise(trace(_with_outliers(False, 1.0), torch.randn(2, 9, 64)))
    assert set(smooth(even, [x], 0.5).nodes) == set(even.nodes)


def test_tensors_are_given_back_as_they_were():
    graph = optimise(trace(_with_outliers(True), torch.randn(2, 9, 64)))
    x = torch.randn(4, 9, 64)
    network = quantise(graph, [x], smooth=0.5)
    exact = {}
    graph.run(graph.bind(x), observe=lambda node, operands, value: exact.update({node.name: value}))
    values = run_reference(network, quantise_inputs(network, graph.bind(x)))
    assert sum(key.startswith("divided.") for key in network.meta) >= 6
    for name, wanted in exact.items():
        got = dequantise(network, name, values[name])
        assert torch.cosine_similarity(got.flatten(), wanted.flatten(), dim=0) > 0.99, name


def test_masks_sparse_weights_and_grouped_queries_keep_their_patterns():
    encoder = BertModel(BertConfig(layers=1, hidden=32, heads=4, intermediate=64, vocabulary=9)).encoder
    x, mask = torch.randn(2, 7, 32), torch.ones(2, 7, dtype=torch.int64)
    graph = optimise(trace(encoder.eval(), (x, mask)))
    changed = smooth(graph, [(x, mask)], 1.0)
    for name, node in graph.nodes.items():
        if hasattr(node, "weight"):
            assert torch.equal(node.weight == 0, changed.nodes[name].weight == 0)

    def grouped(m, x):
        q, k, v = (y.unflatten(-1, (n, 8)).transpose(1, 2) for y, n in ((m.q(x), 4), (m.k(x), 2), (m.v(x), 2)))
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return m.o(y.transpose(1, 2).flatten(2))

    module = Apply(grouped, q=nn.Linear(32, 32), k=nn.Linear(32, 16), v=nn.Linear(32, 16), o=nn.Linear(32, 32))
    with torch.no_grad():
        module.v.weight[5] *= 50
    graph = optimise(trace(module, x))
    changed = smooth(graph, [x], 0.5)
    assert not torch.equal(graph.nodes["v"].weight, changed.nodes["v"].weight)
    (exact,), (got,) = _outputs(graph, x), _outputs(changed, x)
    assert torch.allclose(exact, got, atol=1e-5)


def test_alpha_outside_its_range():
    graph, (_, inputs) = stages("linear")[-1], make("linear")
    with pytest.raises(ValueError, match=r"smooth must be in \[0, 1\], not 1.5"):
        quantise(graph, [inputs], smooth=1.5)
