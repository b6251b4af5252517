"""Host parts: they compute what torch computes, survive their file, and run nothing else."""

import json

import pytest
import torch
from torch import nn

from compiler.exported import export
from compiler.frontend import IMPORTS, MOVES
from compiler.graph import CompileError
from compiler.host import OPERATORS, HostOp, HostPart, host_operator, host_part, is_allowed
from tests.compiler.modules import Apply

aten = torch.ops.aten


def whole(module: nn.Module, inputs: object) -> tuple[HostPart, dict[str, torch.Tensor]]:
    exported = export(module.eval(), inputs)
    nodes = [node for node in exported.operators if exported.constant(node) is None]
    return host_part(exported, nodes, exported.inputs, exported.outputs), exported.bind(inputs)


CASES = {
    "convolution and pooling": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        lambda: torch.randn(2, 3, 8, 8),
    ),
    "look-up, top-k, sort": (
        lambda: Apply(lambda m, i: m.e(i).sum(-1).topk(2).values.sort(-1).values, e=nn.Embedding(9, 4)),
        lambda: torch.randint(0, 9, (2, 5)),
    ),
    "split, infinity, dtypes": (
        lambda: Apply(lambda m, x: torch.cat([p.masked_fill(p > 0, float("-inf")).exp().double() for p in x.split(3, -1)])),
        lambda: torch.randn(2, 6),
    ),
    "several results": (lambda: Apply(lambda m, x: torch.max(x, dim=1).values), lambda: torch.randn(2, 6)),
    "constants": (
        lambda: Apply(lambda m, x: x * torch.arange(6.0) + m.b, b=nn.Parameter(torch.ones(6))),
        lambda: torch.randn(2, 6),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_torch_and_survives_its_file(name: str) -> None:
    torch.manual_seed(0)
    module, inputs = CASES[name][0]().eval(), CASES[name][1]()
    part, values = whole(module, inputs)
    with torch.no_grad():
        wanted = module(inputs)
    (result,) = part.run(values).values()
    torch.testing.assert_close(result, wanted)
    again = HostPart.from_bytes(*part.to_bytes())
    assert again.to_bytes() == part.to_bytes()
    assert torch.equal(next(iter(again.run(values).values())), result)


def test_the_list_holds_operators_of_torch() -> None:
    known = {name for name in OPERATORS if hasattr(aten, name)}
    assert sorted(OPERATORS - known) == []
    for name in ("from_file", "save", "rand", "randn", "bernoulli", "set_", "resize_", "empty", "empty_like"):
        assert name not in OPERATORS


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("aten.from_file.default", "none of the operators"),
        ("aten.add_.Tensor", "none of the operators"),
        ("aten.add.nonsense", "none of the operators"),
        ("os.system", "none of the operators"),
        ("aten.add.out", "changes its arguments or depends on chance"),
        ("prims.add.default", "none of the operators"),
    ],
)
def test_what_may_not_run(target: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        host_operator(target)
    op = HostOp(name="y", target=target, args=[{"ref": "x"}], kwargs={})
    part = HostPart(ops=(op,), constants={}, inputs=("x",), outputs=("y",))
    with pytest.raises(ValueError, match=message):
        HostPart.from_bytes(*part.to_bytes())
    with pytest.raises(ValueError, match=message):
        part.run({"x": torch.zeros(2)})


def test_is_allowed() -> None:
    assert is_allowed(aten.add.Tensor) and is_allowed(__import__("operator").getitem)
    assert not is_allowed(aten.rand.default)


def test_chance_is_refused_with_the_line() -> None:
    exported = export(Apply(lambda m, x: x + torch.rand(2, 3)), torch.zeros(2, 3))
    with pytest.raises(CompileError, match=r"the module \(modules.py:\d+\): aten.rand.default .*take it out of the module"):
        host_part(exported, exported.operators, exported.inputs, exported.outputs)


def test_dropout_in_training() -> None:
    op = HostOp(name="y", target="aten.dropout.default", args=[{"ref": "x"}, 0.5, True], kwargs={})
    with pytest.raises(ValueError, match="called as in training, where it depends on chance"):
        HostPart(ops=(op,), constants={}, inputs=("x",), outputs=("y",)).run({"x": torch.zeros(2)})


def test_damaged_parts() -> None:
    part, _ = whole(Apply(lambda m, x: x + 1), torch.zeros(2, 3))
    structure, constants = part.to_bytes()
    body = json.loads(structure)
    for change, message in (
        ({"inputs": []}, "reads 'args_0', which is not there"),
        ({"outputs": ["z"]}, "host output 'z' is not computed"),
    ):
        with pytest.raises(ValueError, match=message):
            HostPart.from_bytes(json.dumps({**body, **change}).encode(), constants)
    with pytest.raises(ValueError, match="constants: "):
        HostPart.from_bytes(structure, b"nothing")


def test_a_failing_operator_names_itself() -> None:
    part, _ = whole(Apply(lambda m, x: m.a(x), a=nn.Embedding(3, 2)), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"a \(.*\): host operator aten.embedding.default 'embedding' failed: index"):
        part.run({"args_0": torch.tensor([7])})


def test_unknown_arguments() -> None:
    op = HostOp(name="y", target="aten.add.Tensor", args=[{"ref": "x"}, {"dtype": "__name__"}], kwargs={})
    with pytest.raises(ValueError, match="unknown argument"):
        HostPart(ops=(op,), constants={}, inputs=("x",), outputs=("y",)).run({"x": torch.zeros(2)})


def test_what_can_be_imported_can_also_run_on_the_host() -> None:
    names = {target._schema.name.removeprefix("aten::") for target in (*IMPORTS, *MOVES)}
    assert names <= OPERATORS and all(hasattr(torch.ops.aten, name) for name in OPERATORS)
