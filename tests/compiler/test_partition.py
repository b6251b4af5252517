"""Which operators go where, and that the parts together compute what the whole does."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional as F

from compiler.exported import Exported, export
from compiler.graph import CompileError
from compiler.host import host_part
from compiler.partition import HostStage, Partition, Segment, describe_host, partition
from hw.arch import get_arch
from tests.compiler.modules import Apply, split_heads
from tests.compiler.networks import library_model, retriever

TINY = get_arch("tiny")


def run_float(found: Partition, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The outputs of a partition: host stages as torch operators, segments as their optimised graphs."""
    values: dict[str, Tensor] = dict(inputs)
    for stage in found.stages:
        if isinstance(stage, HostStage):
            below = {item for node in stage.nodes for item in node.all_input_nodes if item.name in values}
            values |= host_part(found.exported, stage.nodes, list(below), list(stage.nodes)).run(values)
            continue
        taken = {}
        for name, node in stage.inputs.items():
            shape = stage.graph.nodes[name].shape
            value = values[node.name]
            taken[name] = value if tuple(value.shape) == shape else value.transpose(1, 2).flatten(2)
        made = stage.graph.run(taken)
        values |= {node.name: made[name].reshape(node.meta["val"].shape) for node, name in stage.outputs}
    return [values[node.name] for node in found.exported.outputs]


def kinds(found: Partition) -> list[str]:
    return ["host" if isinstance(stage, HostStage) else "accelerator" for stage in found.stages]


def _parted(module: nn.Module, inputs: object) -> tuple[Exported, Partition]:
    exported = export(module.eval(), inputs)
    return exported, partition(exported, TINY)


def test_look_up_encoder_pooling_head_argmax() -> None:
    module, inputs = retriever()
    exported, found = _parted(module, inputs)
    assert kinds(found) == ["host", "accelerator", "host", "accelerator", "host"]
    assert [node.name for node in found.stages[0].nodes][0] == "embedding"
    assert found.reasons["embedding"] == "a look-up, no arithmetic"
    assert found.reasons["argmax"] == "a choice, no arithmetic"
    with torch.no_grad():
        wanted = module(*inputs)
    results = run_float(found, exported.bind(inputs))
    torch.testing.assert_close(results[0], wanted[0], atol=1e-5, rtol=0)
    assert torch.equal(results[1], wanted[1])


@pytest.mark.parametrize(
    ("name", "stages", "products_on_host"),
    [("vit", 1, 0), ("llama", 2, 0)],
)
def test_library_models(name: str, stages: int, products_on_host: int) -> None:
    module, inputs, wanted = library_model(name)
    exported, found = _parted(module, inputs)
    assert len(found.stages) == stages
    products = [node for node in found.host if str(node.target).split(".")[1] in ("linear", "conv2d", "addmm")
                or "attention" in str(node.target)]
    assert len(products) == products_on_host
    torch.testing.assert_close(run_float(found, exported.bind(inputs))[0], wanted, atol=1e-4, rtol=0)


STEPS = ["linear", "cumsum", "relu", "norm", "gate", "rotate", "residual", "attention"]


@settings(max_examples=6, deadline=None, derandomize=True)
@given(steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=6))
def test_random_networks_equal_the_whole(steps: list[str]) -> None:
    torch.manual_seed(len(steps))
    layers: dict[str, nn.Module] = {f"l{i}": nn.Linear(24, 24) for i in range(len(steps))}
    layers["n"] = nn.LayerNorm(24)

    def function(m: nn.Module, x: Tensor) -> Tensor:
        first = x = m.l0(x)
        for i, step in enumerate(steps):
            layer = getattr(m, f"l{i}")
            x = {
                "linear": lambda x, layer=layer: layer(x),
                "cumsum": lambda x: x.cumsum(1) / 7,
                "relu": F.relu,
                "norm": m.n,
                "gate": lambda x, layer=layer: F.silu(layer(x)) * x,
                "rotate": lambda x: torch.cat([-x[..., 12:], x[..., :12]], -1),
                "residual": lambda x, layer=layer: first + layer(x),
                "attention": lambda x, layer=layer: F.scaled_dot_product_attention(
                    split_heads(layer(x)), split_heads(x), split_heads(first), is_causal=True
                ).transpose(1, 2).reshape(2, 7, 24),
            }[step](x)
        return x

    module, inputs = Apply(function, **layers).eval(), torch.randn(2, 7, 24)
    exported, found = _parted(module, inputs)
    with torch.no_grad():
        wanted = module(inputs)
    torch.testing.assert_close(run_float(found, exported.bind(inputs))[0], wanted, atol=1e-4, rtol=1e-4)
    assert set(found.reasons) == {node.name for node in found.host}
    assert all(before != after for before, after in zip(kinds(found), kinds(found)[1:]))


def test_what_is_not_worth_the_way_stays() -> None:
    _, found = _parted(Apply(lambda m, x: F.relu(x + 1).cumsum(1) * 2), torch.randn(2, 7, 24))
    assert kinds(found) == ["host"] and not found.segments


def test_limits_of_the_architecture() -> None:
    wide = nn.Sequential(nn.Linear(24, 47), nn.LayerNorm(47), nn.Linear(47, 24))
    _, found = _parted(wide, torch.randn(9, 24))
    assert found.reasons == {"layer_norm": "a norm over 47 columns does not fit row_depth 32 of tiny, nor do equal parts of them"}
    module = Apply(
        lambda m, x: m.o(F.scaled_dot_product_attention(*[split_heads(m.q(x))] * 3).transpose(1, 2).flatten(2)),
        q=nn.Linear(24, 24), o=nn.Linear(24, 24),
    )  # fmt: skip
    exported = export(module, torch.randn(2, 7, 24))
    found = partition(exported, get_arch("gemv256"))
    assert "needs as many rows as lanes" in found.reasons["scaled_dot_product_attention"]
    assert kinds(found) == ["accelerator", "host", "accelerator"]


def test_other_dtypes_run_on_the_host() -> None:
    exported, found = _parted(
        Apply(lambda m, x: m.b((m.a(x).double() * 2).float()), a=nn.Linear(24, 24), b=nn.Linear(24, 8)), torch.randn(2, 7, 24)
    )
    assert found.reasons["mul"] == "works on float64: the accelerator takes float32"
    assert kinds(found) == ["accelerator", "host", "accelerator"]


def test_an_unused_input() -> None:
    with pytest.raises(CompileError, match=r"the result does not depend on input 'args_1' \(2, 7, 24\)"):
        _parted(Apply(lambda m, x, y: m.a(x).cumsum(1), a=nn.Linear(24, 4)), (torch.randn(2, 7, 24), torch.randn(2, 7, 24)))


def test_a_line_about_an_operator() -> None:
    _, found = _parted(*retriever())
    (node,) = (node for node in found.host if node.name == "embedding")
    line = describe_host(node, "why")
    assert line.startswith("embed (") and line.endswith(
        "aten.embedding.default 'embedding' ((20, 16), (2, 6)) -> (2, 6, 16): why"
    )
    assert "networks.py:" in line


def test_segments_are_legal_programs() -> None:
    _, found = _parted(*retriever())
    assert all(stage.graph.stage == "fuse" for stage in found.stages if isinstance(stage, Segment))


@pytest.mark.parametrize("last", [torch.log, torch.reciprocal, lambda x: 1 / x, lambda x: torch.ones_like(x) / x])
def test_what_must_not_become_zero_stays_on_the_host(last) -> None:
    """A probability of 1e-5 is 0 in 8 bits, and its logarithm infinite."""
    module = Apply(lambda m, x: last(m.a(x).sigmoid().clamp(min=1e-5)[:, :2].flip(0)), a=nn.Linear(8, 4))
    exported, found = _parted(module, torch.randn(3, 8))
    assert kinds(found) == ["accelerator", "host"]
    assert [node.target for node in found.segments[0].nodes] == [torch.ops.aten.linear.default]
    assert found.reasons["clamp"].startswith("a logarithm or a quotient on the host needs it")
