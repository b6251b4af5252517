"""Norms of wider rows than the row unit holds: divided, joined by their statistics, as precise as narrow ones."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from compiler.compile import compile_model
from compiler.frontend import trace
from compiler.graph import Pointwise
from compiler.partition import fitted
from compiler.passes import optimise
from compiler.passes.wide_norms import norm_parts, split_norms
from hw.arch import PRESETS
from sim.simulate import simulate

TINY = PRESETS["tiny"]  # row_depth 32
LARGE = replace(PRESETS["ecp5"], row_depth=1024)


class Normed(nn.Module):
    """A product, perhaps a sum, a norm over 96 columns, a product."""

    def __init__(self, kind: type[nn.Module], *, added: bool = False, columns: int = 96, eps: float = 1e-5) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(12, columns), kind(columns, eps=eps), nn.Linear(columns, 8)
        self.c = nn.Linear(12, columns) if added else None
        nn.init.normal_(self.norm.weight, 1, 0.3)
        if getattr(self.norm, "bias", None) is not None:
            nn.init.normal_(self.norm.bias)
        nn.init.normal_(self.a.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(self.norm(y if self.c is None else y + torch.relu(self.c(x))))


@pytest.mark.parametrize("columns, depth, parts", [(32, 32, 1), (64, 32, 2), (99, 32, 9), (37, 32, None), (8192, 32, None)])
def test_how_a_norm_is_divided(columns: int, depth: int, parts: int | None) -> None:
    assert norm_parts(columns, depth) == parts


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("added, eps", [(False, 1e-5), (True, 1e-5), (True, 0.5)])
def test_the_parts_make_the_norm(kind: type[nn.Module], added: bool, eps: float) -> None:
    """In float, to the eps of the parts."""
    torch.manual_seed(0)
    module, x = Normed(kind, added=added, eps=eps).eval(), torch.randn(2, 5, 12)
    graph = fitted(optimise(trace(module, x)), TINY)
    norms = [node.post.norm for node in graph.nodes.values() if isinstance(node, Pointwise) and node.post.norm is not None]
    assert sorted((norm.groups, norm.width) for norm in norms) == [(1, 3 if kind is nn.RMSNorm else 6), (3, 32), (3, 32)]
    (value,) = graph.run(x).values()
    torch.testing.assert_close(value, module(x), atol=2e-4, rtol=2e-4)
    assert list(split_norms(graph, TINY.row_depth).nodes) == list(graph.nodes)


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_it_is_as_precise_as_a_narrow_norm(kind: type[nn.Module], spread: float) -> None:
    """Also for rows of magnitudes from 1 to 100 in one tensor."""
    torch.manual_seed(0)
    module = Normed(kind, added=True).eval()
    x = torch.randn(2, 9, 12) * torch.logspace(-spread, spread, 9)[:, None]
    wanted = module(x)
    noise = []
    for arch in (TINY, LARGE):
        program = compile_model(module, x, arch=arch, host="forbid", calibration=[x], order="operator")
        run = simulate(program, x, engine="isa")
        assert run.bit_exact, run.mismatches
        noise.append(10 * (run.outputs[0] - wanted).square().sum().log10())
    assert noise[0] - noise[1] < 1.5, noise  # dB


def test_a_group_norm_wider_than_the_row_unit_on_the_rtl() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 3, 1)).eval()
    x = torch.randn(1, 3, 6, 4)
    program = compile_model(module, x, arch="tiny", host="forbid", calibration=[x], order="operator")
    run = simulate(program, x)
    assert run.bit_exact, run.mismatches
    assert simulate(program, engine="cycle").cycles == run.cycles
    wanted = module(x)
    assert (run.outputs[0] - wanted).square().mean() / wanted.var() < 10**-2.8


def test_a_norm_of_no_equal_parts_is_on_the_host_and_says_so() -> None:
    x = torch.randn(2, 5, 12)
    program = compile_model(Normed(nn.LayerNorm, columns=37).eval(), x, arch="tiny", calibration=[x])
    (row,) = [row for row in program.report().rows if row.operator == "layer_norm.default"]
    assert row.place == "host"
    assert row.reason == "a norm over 37 columns does not fit row_depth 32 of tiny, nor do equal parts of them"
