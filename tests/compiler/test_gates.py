"""Products of two activations as quarter squares."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compiler.compile import compile_model
from compiler.frontend import trace
from compiler.graph import CompileError, Pointwise
from compiler.passes import optimise
from compiler.program import Program
from sim.compare import compare
from sim.simulate import simulate
from tests.compiler.modules import Apply

X = torch.randn(2, 7, 24)


def _gated() -> nn.Module:
    torch.manual_seed(0)
    layers = {"g": nn.Linear(24, 32), "u": nn.Linear(24, 32), "d": nn.Linear(32, 24)}
    return Apply(lambda m, x: m.d(F.silu(m.g(x)) * m.u(x)), **layers).eval()


def test_the_graph_computes_the_product() -> None:
    module = _gated()
    graph = optimise(trace(module, X))
    assert sum(isinstance(node, Pointwise) for node in graph.nodes.values()) == 4
    with torch.no_grad():
        torch.testing.assert_close(next(iter(graph.run(X).values())), module(X), atol=1e-5, rtol=0)


def test_a_gated_network_is_one_program_of_25_db() -> None:
    module = _gated()
    program = compile_model(module, X, arch="tiny", calibration=[X], host="forbid")
    assert isinstance(program, Program)
    assert compare(program, module, X).layers[-1].sqnr > 22
    assert simulate(program, X, engine="isa").bit_exact


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.g(x) * torch.arange(7.0)[:, None],  # a constant that depends on the row
        lambda m, x: m.g(x) * m.g(x).mean(-1, keepdim=True),  # broadcast
    ],
)
def test_other_products_are_left(function) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(CompileError, match="aten.mul.Tensor"):
        optimise(trace(Apply(function, g=nn.Linear(24, 24)), X))
