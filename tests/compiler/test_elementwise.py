"""Products of activations, of constants, and constant tensors that are added."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compiler.compile import compile_model
from compiler.frontend import trace
from compiler.graph import Linear, Pointwise
from compiler.passes import optimise
from compiler.program import Program
from sim.compare import compare
from sim.simulate import simulate
from tests.compiler.modules import Apply

X = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))
ROWS = torch.arange(1.0, 8.0)[:, None]


def _gated() -> nn.Module:
    torch.manual_seed(0)
    layers = {"g": nn.Linear(24, 32), "u": nn.Linear(24, 32), "d": nn.Linear(32, 24)}
    return Apply(lambda m, x: m.d(F.silu(m.g(x)) * m.u(x)), **layers).eval()


def test_the_product_is_a_part_of_the_linear_layer_before_it() -> None:
    module = _gated()
    graph = optimise(trace(module, X))
    assert [node.post.multiply for node in graph.nodes.values() if isinstance(node, Linear)] == [False, True, False]
    assert not any(isinstance(node, Pointwise) for node in graph.nodes.values())
    with torch.no_grad():
        torch.testing.assert_close(next(iter(graph.run(X).values())), module(X), atol=1e-5, rtol=0)


def test_a_gated_network_is_one_program_of_30_db() -> None:
    module = _gated()
    program = compile_model(module, X, arch="tiny", calibration=[X], host="forbid")
    assert isinstance(program, Program)
    assert compare(program, module, X).layers[-1].sqnr > 30
    assert simulate(program, X, engine="isa").bit_exact


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.g(x) * m.h(x) * m.g(x),
        lambda m, x: F.gelu(m.g(x) * m.h(x)),
        lambda m, x: m.h(m.g(x) * ROWS),  # a constant that depends on the row
        lambda m, x: m.g(x) * ROWS + m.h(x) * torch.arange(24.0),
        lambda m, x: m.g(x) + ROWS / 7,
        lambda m, x: m.g(x) * m.one(x),  # a value for each row
        lambda m, x: F.layer_norm(m.g(x) * m.h(x), (24,)),
        lambda m, x: (m.g(x) * x).unflatten(-1, (4, 6)).transpose(1, 2).transpose(1, 2).flatten(2),
    ],
)
def test_products_and_constants(function) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(2)
    module = Apply(function, g=nn.Linear(24, 24), h=nn.Linear(24, 24), one=nn.Linear(24, 1)).eval()
    program = compile_model(module, X, arch="tiny", calibration=[X], host="forbid")
    assert isinstance(program, Program)
    assert simulate(program, X, engine="isa").bit_exact
    assert compare(program, module, X).layers[-1].sqnr > 24
