"""Norms over groups of channels, by channel and sample, over several dimensions: on the accelerator, close to float."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compiler.compile import compile_model
from compiler.frontend import trace
from compiler.graph import Gather, Linear, Rearrange, Transpose
from compiler.passes import optimise, run_passes
from sim.simulate import simulate
from tests.compiler.modules import Apply


def _norm(kind: type[nn.Module], *args: object, **options: object) -> nn.Module:
    """A norm whose factors and summands are not those of its start."""
    made = kind(*args, **options)
    for name in ("weight", "running_var"):
        if getattr(made, name, None) is not None:
            nn.init.uniform_(getattr(made, name), 0.5, 1.5)
    for name in ("bias", "running_mean"):
        if getattr(made, name, None) is not None:
            nn.init.normal_(getattr(made, name), 0, 0.3)
    return made


def _between(*norms: nn.Module) -> nn.Module:
    """Convolutions before and behind norms of 8 channels."""
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), *norms, nn.ReLU(), nn.Conv2d(8, 3, 3, 2))


CASES = {
    "groups": (lambda: _between(_norm(nn.GroupNorm, 4, 8)), (2, 4, 6, 5)),
    "groups as lanes": (lambda: _between(_norm(nn.GroupNorm, 2, 8, affine=False)), (1, 4, 6, 4)),
    "one group": (lambda: _between(_norm(nn.GroupNorm, 1, 8)), (3, 4, 4, 5)),
    "a group for each channel": (lambda: _between(_norm(nn.GroupNorm, 8, 8)), (2, 4, 5, 5)),
    "instances": (lambda: _between(_norm(nn.InstanceNorm2d, 8, affine=True)), (2, 4, 7, 5)),
    "instances, running": (lambda: _between(_norm(nn.InstanceNorm2d, 8, affine=True, track_running_stats=True)), (2, 4, 4, 4)),
    "an image": (lambda: _between(_norm(nn.LayerNorm, [8, 4, 5])), (2, 4, 4, 5)),
    "after a function": (lambda: _between(nn.SiLU(), _norm(nn.GroupNorm, 2, 8)), (2, 4, 5, 4)),
    "after groups": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), _norm(nn.GroupNorm, 4, 8)), (2, 4, 6, 6)),
    "lines": (lambda: nn.Sequential(nn.Conv1d(4, 8, 3), _norm(nn.GroupNorm, 2, 8), nn.GELU(), nn.Conv1d(8, 4, 3)), (2, 4, 14)),
    "rows": (lambda: nn.Sequential(nn.Linear(5, 8), _norm(nn.GroupNorm, 2, 8), nn.Linear(8, 4)), (6, 5)),
    "rows and channels": (lambda: nn.Sequential(nn.Linear(5, 8), _norm(nn.LayerNorm, [3, 8]), nn.Linear(8, 4)), (2, 3, 5)),
    "root mean square of both": (lambda: nn.Sequential(nn.Linear(5, 8), _norm(nn.RMSNorm, [3, 8]), nn.Linear(8, 4)), (2, 3, 5)),
    "tokens, channels first": (
        lambda: Apply(lambda s, x: s.b(s.n(s.a(x).mT).mT), a=nn.Linear(5, 8), n=_norm(nn.GroupNorm, 4, 8), b=nn.Linear(8, 4)),
        (2, 7, 5),
    ),
    "read twice": (
        lambda: Apply(lambda s, x: s.n(y := s.a(x)) + y, a=nn.Conv2d(4, 8, 3), n=_norm(nn.GroupNorm, 4, 8)), (2, 4, 5, 5),
    ),
    "channels, written out": (lambda: Apply(_of_channels, c=nn.Conv2d(4, 8, 1), w=_vector(1, 8), b=_vector(0, 8)), (2, 4, 3, 5)),
    "columns, by variance": (lambda: Apply(_of_columns, c=nn.Linear(5, 8), w=_vector(1, 8), b=_vector(0, 8)), (2, 4, 5)),
    "pixels, var_mean": (lambda: Apply(_of_pixels, c=nn.Conv2d(4, 8, 1)), (2, 4, 4, 5)),
    "image, inverse root": (lambda: Apply(_of_images, c=nn.Conv2d(4, 8, 1)), (2, 4, 4, 3)),
}  # fmt: skip


def _vector(mean: float, channels: int) -> nn.Parameter:
    return nn.Parameter(mean + 0.3 * torch.randn(channels))


def _of_channels(s: Apply, x: Tensor) -> Tensor:
    """As ConvNeXt has it, channels first."""
    y = s.c(x)
    mean = y.mean(1, keepdim=True)
    variance = (y - mean).pow(2).mean(1, keepdim=True)
    return s.w[:, None, None] * ((y - mean) / torch.sqrt(variance + 1e-6)) + s.b[:, None, None]


def _of_columns(s: Apply, x: Tensor) -> Tensor:
    y = s.c(x)
    return (y - y.mean(-1, keepdim=True)) * (y.var(-1, unbiased=False, keepdim=True) + 1e-5) ** -0.5 * s.w + s.b


def _of_pixels(s: Apply, x: Tensor) -> Tensor:
    y = s.c(x)
    variance, mean = torch.var_mean(y, (2, 3), correction=0, keepdim=True)
    return (y - mean) / (variance + 1e-5).sqrt()


def _of_images(s: Apply, x: Tensor) -> Tensor:
    y = s.c(x)
    centred = y - y.mean((1, 2, 3), keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean((1, 2, 3), keepdim=True) + 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_norm_is_on_the_accelerator(name: str) -> None:
    torch.manual_seed(0)
    make, shape = CASES[name]
    module, x = make().eval(), torch.randn(shape)
    with torch.no_grad():
        wanted: Tensor = module(x)
    for graph in run_passes(trace(module, x)):
        (value,) = graph.run(x).values()
        torch.testing.assert_close(value.reshape(wanted.shape), wanted, atol=2e-5, rtol=1e-4, msg=graph.stage)
    program = compile_model(module, x, arch="tiny", host="forbid", calibration=[x], order="operator")
    run = simulate(program, x, engine="isa")
    assert run.bit_exact, run.mismatches
    noise = (run.outputs[0] - wanted).square().mean() / wanted.var()
    assert noise < 10**-2.8, f"{-10 * noise.log10():.1f} dB"


@pytest.mark.parametrize("name", ["groups", "instances"])
def test_the_rtl_computes_the_same(name: str) -> None:
    torch.manual_seed(0)
    make, shape = CASES[name]
    x = torch.randn(shape)
    program = compile_model(make().eval(), x, arch="tiny", host="forbid", calibration=[x], order="operator")
    run = simulate(program, x)
    assert run.bit_exact, run.mismatches
    assert simulate(program, engine="cycle").cycles == run.cycles


def test_groups_take_turns_in_the_convolution_before_them() -> None:
    """No copy of single rows or columns: the convolution makes the channels in the order in which the groups' rows follow each
    other, the product behind the norm brings them back."""
    torch.manual_seed(0)
    graph = optimise(trace(_between(_norm(nn.GroupNorm, 4, 8)).eval(), torch.randn(1, 4, 6, 6)))
    kinds = [type(node) for node in graph.nodes.values()]
    assert kinds.count(Transpose) == 2 and Gather not in kinds
    widths = [(part.width, len(part.to)) for node in graph.nodes.values() if isinstance(node, Rearrange) for part in node.parts]
    assert widths and all(4 in (width, rows) or width == 36 for width, rows in widths)
    back = next(node for node in graph.nodes.values() if isinstance(node, Linear) and str(node.pattern) == "1:32")
    assert ((back.weight != 0).sum(0) == 1).all() and ((back.weight != 0).sum(1) == 1).all()


def test_a_norm_whose_factors_depend_on_data_stays_on_the_host() -> None:
    module = Apply(lambda s, x, w: F.group_norm(s.conv(x), 2, w), conv=nn.Conv2d(4, 8, 3)).eval()
    given = (torch.randn(1, 4, 5, 5), torch.rand(8))
    program = compile_model(module, given, arch="tiny", calibration=[given])
    assert [row.operator for row in program.report().rows if row.place == "host"] == ["group_norm.default"]


def test_what_only_looks_like_a_norm_stays_what_it_is() -> None:
    """The mean of other dimensions than the variance, an unbiased variance, eps outside of the root."""
    def other(s: Apply, x: Tensor) -> Tensor:
        y = s.c(x)
        a = (y - y.mean(1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        b = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True) + 1e-5).sqrt()
        c = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True).sqrt() + 1e-5)
        return s.o(a) + s.o(b) + s.o(c)

    torch.manual_seed(0)
    module, x = Apply(other, c=nn.Linear(5, 8), o=nn.Linear(8, 4)).eval(), torch.randn(2, 6, 5)
    program = compile_model(module, x, arch="tiny", calibration=[x])
    run = simulate(program, x, engine="isa")
    assert run.bit_exact and (run.outputs[0] - module(x)).square().mean() / module(x).var() < 10**-2.8
