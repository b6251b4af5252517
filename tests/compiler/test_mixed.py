"""Which tensors have 16 bits."""

import pytest
import torch
from torch import nn

from compiler.frontend import trace
from compiler.graph import CompileError
from compiler.mixed import candidates, check_patterns
from compiler.passes import optimise
from compiler.quantise import quantise
from compiler.verify_network import check_network
from sim.reference import dequantise, quantise_inputs, run_reference
from tests.compiler.modules import Apply, make, stages


def _wide(network):
    return {name for name, tensor in network.tensors.items() if tensor.dtype == "int16"}


def test_what_can_have_16_bits_and_globs():
    graph, (_, inputs) = stages("post-LN encoder")[-1], make("post-LN encoder")
    found = candidates(graph)
    assert "src" in found and not any("linear1" in name or "attention" in name for name in found)
    network = quantise(graph, [inputs], bits16="*")
    check_network(network)
    assert _wide(network) == set(found)
    one = quantise(graph, [inputs], bits16=["layers.0.linear2"])
    assert _wide(one) == {name for name in found if graph.nodes[name].source == "layers.0.linear2"} != set()


def test_a_glob_that_gives_nothing_16_bits():
    graph, (_, inputs) = stages("post-LN encoder")[-1], make("post-LN encoder")
    for glob in ("layers.0.linear1", "nothing*"):
        named = glob.replace("*", ".")
        with pytest.raises(CompileError, match=rf"bits16: '{named}' names no tensor .* Those that can have 16: src"):
            quantise(graph, [inputs], bits16=["*", glob])
    check_patterns([graph], "auto")


def _noise(graph, network, inputs):
    values = run_reference(network, quantise_inputs(network, graph.bind(inputs)))
    (exact,) = graph.run(graph.bind(inputs)).values()
    got = dequantise(network, network.outputs[0], values[network.outputs[0]]).reshape(exact.shape)
    return float(10 * torch.log10(exact.square().sum() / (exact - got).square().sum()))


def test_auto_finds_the_tensor_that_hurts():
    """One input is added to another layer's result, ten times its size and then divided by ten: its rounding is what is heard."""
    module = Apply(lambda m, x, y: m.c(m.n(m.a(x) * 0.01 + y)), a=nn.Linear(16, 16), c=nn.Linear(16, 16), n=nn.LayerNorm(16))
    torch.manual_seed(0)
    x, y = torch.randn(2, 9, 16), torch.randn(2, 9, 16) * torch.logspace(-2, 0, 16)
    graph = optimise(trace(module, (x, y)))
    plain, auto = (quantise(graph, [(x, y)], bits16=bits) for bits in ((), "auto"))
    (wide,) = [node.name for node in graph.inputs if node.name in _wide(auto)]
    assert wide not in _wide(plain)
    assert _noise(graph, auto, (x, y)) > _noise(graph, plain, (x, y)) + 0.5
    assert len(_wide(auto)) <= len(candidates(graph))
