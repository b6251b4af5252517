"""Rotary positions in the forms in which modules write them."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compiler.compile import compile_model
from compiler.frontend import trace
from compiler.graph import Attention, Linear, Pointwise
from compiler.passes import optimise
from compiler.program import Program
from sim.compare import compare
from sim.simulate import simulate

ROWS, HEADS, WIDTH = 9, 3, 8
X = torch.randn(2, ROWS, 24, generator=torch.Generator().manual_seed(0))
ANGLES = torch.arange(ROWS)[:, None] * 10000.0 ** -(torch.arange(0, WIDTH, 2) / WIDTH)


def halves(x: Tensor) -> Tensor:
    cos, sin = (torch.cat([table, table], -1) for table in (ANGLES.cos(), ANGLES.sin()))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def pairs(x: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * ANGLES.cos() - odd * ANGLES.sin(), even * ANGLES.sin() + odd * ANGLES.cos()], -1).flatten(-2)


def numbers(x: Tensor) -> Tensor:
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(ANGLES), ANGLES)
    return torch.view_as_real(turned).flatten(-2)


def original(x: Tensor) -> Tensor:
    """Rows before heads, as in the first LLaMA."""
    x = x.transpose(1, 2)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(ANGLES), ANGLES)[:, None]
    return torch.view_as_real(turned).flatten(3).transpose(1, 2)


def a_part(x: Tensor) -> Tensor:
    cos, sin = ANGLES[:, :2].cos().repeat(1, 2), ANGLES[:, :2].sin().repeat(1, 2)
    turned, rest = x[..., :4], x[..., 4:]
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)


class Rotary(nn.Module):
    """Attention with rotated queries and keys; ``groups`` heads of keys."""

    def __init__(self, rotate, *, groups: int = HEADS) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        torch.manual_seed(1)
        self.rotate, self.groups = rotate, groups
        self.q, self.o = nn.Linear(24, HEADS * WIDTH), nn.Linear(HEADS * WIDTH, 24)
        self.k, self.v = nn.Linear(24, groups * WIDTH), nn.Linear(24, groups * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = self.rotate(q), self.rotate(k)
        k, v = (part.repeat_interleave(HEADS // self.groups, 1) for part in (k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("groups", [HEADS, 1])
@pytest.mark.parametrize("rotate", [halves, pairs, numbers, original, a_part])
def test_rotations_run_on_the_accelerator(rotate, groups: int) -> None:  # type: ignore[no-untyped-def]
    module = Rotary(rotate, groups=groups).eval()
    graph = optimise(trace(module, X))
    with torch.no_grad():
        torch.testing.assert_close(next(iter(graph.run(X).values())), module(X), atol=1e-5, rtol=0)
    assert sum(isinstance(node, Attention) for node in graph.nodes.values()) == 1
    assert sum(isinstance(node, Pointwise) for node in graph.nodes.values()) == 6
    program = compile_model(module, X, arch="tiny", calibration=[X], host="forbid")
    assert isinstance(program, Program)
    assert simulate(program, X, engine="isa").bit_exact
    assert compare(program, module, X).layers[-1].sqnr > 25


def test_neighbours_are_put_apart_in_the_weights() -> None:
    module = Rotary(pairs).eval()
    graph = optimise(trace(module, X))
    query = next(node for node in graph.nodes.values() if isinstance(node, Linear) and node.source == "q")
    assert torch.equal(query.weight[:WIDTH], module.q.weight[[0, 2, 4, 6, 1, 3, 5, 7]])


def test_what_is_no_rotation_is_left_to_others() -> None:
    module = Rotary(lambda x: x * ANGLES.cos().repeat(1, 2) + x.roll(1, -1) * ANGLES.sin().repeat(1, 2)).eval()
    program = compile_model(module, X, arch="tiny", calibration=[X])
    run = simulate(program, X, engine="isa")
    assert run.bit_exact and compare(program, module, X).layers[-1].sqnr > 20
    assert any(row.place == "host" for row in program.report().rows)
