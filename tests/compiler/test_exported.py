"""What is known of an exported module before any pass."""

import pytest
import torch
from torch import nn

from compiler.exported import export, is_getitem, module_path, source_line
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
