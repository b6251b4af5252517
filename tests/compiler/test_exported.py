"""What is known of an exported module before any pass."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compiler.exported import export, is_getitem, module_path, source_line
from compiler.graph import CompileError
from tests.compiler.modules import Apply
from tests.compiler.networks import retriever


def test_operators_inputs_outputs_constants() -> None:
    module = Apply(lambda m, x: m.a(x) + torch.arange(4.0) * m.scale, a=nn.Linear(3, 4), scale=nn.Parameter(torch.tensor(2.0)))
    exported = export(module, torch.zeros(2, 3))
    assert [node.name for node in exported.inputs] == ["args_0"]
    assert [node.name for node in exported.outputs] == ["add"]
    constants = {node.name: exported.constant(node) for node in exported.operators}
    assert constants["linear"] is None and constants["add"] is None
    value, source = constants["mul"]
    assert torch.equal(value, torch.arange(4.0) * 2) and source == "scale"
    weight = next(node for node in exported.program.graph.nodes if node.name == "p_a_weight")
    assert exported.constant(weight)[1] == "a.weight"


def test_several_results_of_constants() -> None:
    exported = export(Apply(lambda m, x: x + torch.arange(4.0).split(2)[1]), torch.zeros(2, 2))
    (split,) = (node for node in exported.operators if "split" in node.name)
    assert [part.tolist() for part in exported.constant(split)[0]] == [[0, 1], [2, 3]]
    assert all(exported.constant(node) is not None for node in exported.operators if is_getitem(node))


def test_chance_is_no_constant() -> None:
    exported = export(Apply(lambda m, x: x + torch.rand(2)), torch.zeros(2, 2))
    assert exported.constant(exported.operators[0]) is None


def test_attention_of_constants_is_constant() -> None:
    module = Apply(lambda m, x: x + F.scaled_dot_product_attention(m.q, m.q, m.q), q=nn.Parameter(torch.randn(1, 3, 4)))
    exported = export(module, torch.zeros(1, 3, 4))
    assert exported.constant(exported.operators[0]) is not None
    training = lambda m, x: x + F.scaled_dot_product_attention(m.q, m.q, m.q, dropout_p=0.5)
    exported = export(Apply(training, q=nn.Parameter(torch.randn(1, 3, 4))), torch.zeros(1, 3, 4))
    assert exported.constant(exported.operators[0]) is None


def test_results_that_are_none_are_left_out() -> None:
    exported = export(Apply(lambda m, x: (None, x + 1, {"a": None, "b": x * 2})), torch.zeros(2, 2))
    assert [node.name for node in exported.outputs] == ["add", "mul"]
    with pytest.raises(CompileError, match="a compiled module must return tensors, not int"):
        _ = export(Apply(lambda m, x: (x + 1, 3)), torch.zeros(2, 2)).outputs


@pytest.mark.parametrize("equation", ["bqc,bchw->bqhw", "bqc,bkc->bqk", "bqc,dc->bqd", "bqc->bc"])
def test_einsum_is_written_in_products(equation: str) -> None:
    shapes = {"b": 2, "q": 3, "c": 4, "h": 5, "w": 6, "k": 7, "d": 8}
    operands = [torch.randn([shapes[axis] for axis in part]) for part in equation.split("->")[0].split(",")]
    module = Apply(lambda m, *x: torch.einsum(equation, *x))
    exported = export(module, tuple(operands))
    assert not any("einsum" in str(node.target) for node in exported.operators)
    (result,) = exported.program.module()(*operands),
    torch.testing.assert_close(result, torch.einsum(equation, *operands))


def test_where_an_operator_stands() -> None:
    exported = export(*retriever())
    (node,) = (node for node in exported.operators if node.name == "embedding")
    assert module_path(node) == "embed" and source_line(node).startswith("networks.py:")


def test_bind() -> None:
    exported = export(*retriever())
    ids, mask = retriever()[1]
    assert exported.bind((ids, mask)).keys() == exported.bind({"ids": ids, "mask": mask}).keys() == {"ids", "mask"}
    with pytest.raises(ValueError, match=r"the module has 2 inputs \(ids, mask\), not 1"):
        exported.bind(ids)
    with pytest.raises(ValueError, match="the module's inputs are ids, mask, not ids"):
        exported.bind({"ids": ids})
    with pytest.raises(ValueError, match=r"input 'ids' must be int64 \(2, 6\) as in example_inputs, not int64 \(2, 5\): host"):
        exported.bind((ids[:, :5], mask))
    with pytest.raises(ValueError, match="input 'ids' must be int64 .*, not int32"):
        exported.bind((ids.int(), mask))


X = torch.randn(2, 5, 8)


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda s, x: s.a(x)[x[..., 0] > 0], r"the module \(\w+.py:\d+\): how much aten.\S+ gives depends on values"),
        (lambda s, x: s.a(x) if s.a(x).sum() > 0 else x, r"Eq\(u0, 1\) \(what runs depends .* test_exported.py:\d+$"),
    ],
    ids=["chosen elements", "a branch"],
)  # fmt: skip
def test_what_depends_on_values_is_refused_with_its_line(function: Any, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        export(Apply(function, a=nn.Linear(8, 8)), X)


def test_a_parameter_that_is_no_number_is_named() -> None:
    module = nn.Sequential(nn.Linear(8, 8))
    module[0].bias.data[3] = torch.inf
    with pytest.raises(CompileError, match=r"these have a NaN or an infinity.*\n  parameter 0.bias \(8,\)"):
        export(module, X)


def test_wrong_arguments_do_not_blame_lines_of_python_itself() -> None:
    with pytest.raises(CompileError, match="too many positional arguments$"):
        export(nn.Sequential(nn.Linear(8, 8)), (X, X))
    with pytest.raises(TypeError, match=r"not int \(argument 1\): bind what is none"):
        export(nn.Sequential(nn.Linear(8, 8)), (X, 3))
    with pytest.raises(CompileError, match=r"float16 \(2, 5, 8\): only float32 can be compiled: model.float\(\) and x.float\(\)"):
        export(nn.Sequential(nn.Linear(8, 8)), X.half())


def test_a_module_that_changes_its_buffers_is_warned_of() -> None:
    def counted(s: Apply, x: torch.Tensor) -> torch.Tensor:
        s.count.add_(1)
        return s.a(x) + s.count

    with pytest.warns(UserWarning, match=r"changes its buffers \(count\)"):
        export(Apply(counted, a=nn.Linear(8, 8), count=nn.Buffer(torch.zeros(1))), X)
