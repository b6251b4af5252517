import pytest
import torch
from torch import nn

from algo.capture import UntraceableError, capture, module_path, where


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        x = self.layer(x)
        if x.sum() > 0:
            return x
        return 2 * x


def line_of(text):
    return next(number for number, line in enumerate(open(__file__), 1) if text in line)


def test_refusal_names_module_and_line():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Branch()))
    message = r"Branch '1.0' cannot be traced at .*test_capture.py:\d+, \"if x.sum\(\) > 0:\": what runs next depends on values"
    with pytest.raises(UntraceableError, match=message) as refused:
        capture(model, torch.randn(2, 4))
    assert refused.value.module == "1.0" and refused.value.file == __file__
    assert refused.value.line == line_of("if x.sum() > 0:")
    assert isinstance(refused.value, ValueError)


def helper(x):
    raise KeyError("no such scale")  # a fault in a function that a module calls


class Calls(nn.Module):
    def forward(self, x):
        return helper(x)


def test_refusal_names_the_line_of_a_helper():
    with pytest.raises(UntraceableError, match="Calls cannot be traced at .*no such scale") as refused:
        capture(Calls(), torch.randn(2, 4))
    assert refused.value.line == line_of("a fault in a function")


def test_wrong_input_shape_is_said():
    with pytest.raises(UntraceableError, match="Linear cannot be traced.*"):
        capture(nn.Linear(3, 4), torch.randn(2, 5))


def test_nodes_know_line_and_module():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(self.inner(x)) + 1  # marked

    nodes = [node for node in capture(Outer(), torch.randn(2, 4)).graph.nodes if node.op == "call_function"]
    assert [module_path(node) for node in nodes] == ["inner", "inner", ""]
    assert where(nodes[-1]) == f"test_capture.py:{line_of('# marked')}"


def test_wrong_kinds():
    with pytest.raises(TypeError, match="a torch.nn.Module is needed, not function"):
        capture(helper, torch.randn(2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="inputs must be a tensor, a tuple or a dict of them, not str"):
        capture(nn.Linear(3, 4), "x")
