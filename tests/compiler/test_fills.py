"""A class token joined with patches keeps its own precision."""

import torch
from torch import nn

from compiler.compile import compile_model
from compiler.frontend import trace
from compiler.graph import Graph, Rearrange
from compiler.passes import run_passes
from sim.compare import compare
from sim.simulate import simulate


class Tokens(nn.Module):
    """Patches of a hundred times the class token's values, behind it; positions are added."""

    def __init__(self, *, also_read: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 8)
        self.token = nn.Parameter(0.01 * torch.randn(1, 1, 16))
        self.positions = nn.Parameter(0.01 * torch.randn(1, 6, 16))
        self.also_read = also_read

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        joined = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1)
        result = self.head(self.norm(joined + self.positions))
        return (result, joined) if self.also_read else result


X = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))


def _stages(module: nn.Module) -> dict[str, Graph]:
    return {graph.stage: graph for graph in run_passes(trace(module, X))}


def _joined(graph: Graph) -> Rearrange:
    (found,) = [node for node in graph.nodes.values() if isinstance(node, Rearrange) and node.parts]
    return found


def test_the_token_moves_to_the_positions_and_the_result_is_the_same():
    module = Tokens().eval()
    stages = _stages(module)
    assert _joined(stages["arrange_rows"]).fill is not None
    assert _joined(stages["move_fills"]).fill is None
    (result,) = stages["move_fills"].run((X,)).values()
    torch.testing.assert_close(result.reshape(2, 6, 8), module(X))


def test_the_token_stays_where_someone_else_reads_it():
    stages = _stages(Tokens(also_read=True).eval())
    assert _joined(stages["move_fills"]).fill is not None


def test_it_has_sixteen_bits():
    """With the patches' scale the token would be 0 or 1 in steps of the grid: about 5 dB."""
    module = Tokens().eval()
    program = compile_model(module, X, arch="tiny", calibration=[X], order="operator")
    assert simulate(program, X, engine="isa", check=True).bit_exact
    (found,) = simulate(program, X, engine="reference").outputs
    wanted = module(X)[:, 0]
    noise = (found[:, 0] - wanted).square().mean() / wanted.square().mean()
    assert noise < 1e-3
    assert min(layer.cosine for layer in compare(program, module, X).layers) > 0.999
