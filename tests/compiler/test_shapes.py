"""What may vary: how it is said, what is refused and by which name."""

import numpy as np
import pytest
import torch
from torch import nn

from compiler.shapes import Dim, argument_names, dynamic_shapes, input_shapes, resized, sizes_text

N = Dim("n", (32, 16, 32))


def test_values_are_sorted_and_distinct() -> None:
    assert N.values == (16, 32) and Dim("n", range(2, 9, 3)).values == (2, 5, 8)
    assert N == Dim("n", [16, 32]) and hash(N) == hash(Dim("n", [16, 32]))


@pytest.mark.parametrize(("name", "values", "error", "message"), [
    ("n", (), ValueError, "Dim 'n' has no value: list them, such as"),
    ("n", (0, 4), ValueError, "Dim 'n' may be whole numbers from 1 on, not 0"),
    ("n", (True,), ValueError, "not True"),
    ("n", 16, TypeError, r"Dim 'n' must have the values that it may be, not 16: list them"),
    ("n", "16", TypeError, "not '16'"),
    ("a b", (1,), ValueError, "needs a Python identifier as its name, not 'a b'"),
])  # fmt: skip
def test_bad_dimensions(name: str, values: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Dim(name, values)  # type: ignore[arg-type]


def test_the_dimension_of_torch_has_no_list() -> None:
    with pytest.raises(TypeError, match="input 'x', dimension 1, must have the values that it may be"):
        dynamic_shapes({"x": {1: torch.export.Dim("n", min=1, max=8)}}, ["x"])


def test_combinations_come_smallest_first() -> None:
    shapes = dynamic_shapes({"x": {1: N, 0: (3, 1)}}, ["x"])
    assert [dim.name for dim in shapes.dims] == ["x_0", "n"]
    assert list(shapes.combinations()) == [
        {"x_0": 1, "n": 16}, {"x_0": 1, "n": 32}, {"x_0": 3, "n": 16}, {"x_0": 3, "n": 32},
    ]  # fmt: skip


def test_what_varies_together() -> None:
    same = dynamic_shapes({"x": {1: (4, 8)}, "mask": {1: [8, 4]}}, ["x", "mask"])
    assert len(same.dims) == 1
    assert len(dynamic_shapes({"x": {1: (4, 8)}, "mask": {2: (4, 8)}}, ["x", "mask"]).dims) == 2
    assert len(dynamic_shapes({"x": {1: N}, "mask": {1: N, 2: N}}, ["x", "mask"]).dims) == 1
    apart = dynamic_shapes({"x": {1: Dim("a", (4, 8))}, "y": {1: Dim("b", (4, 8))}}, ["x", "y"])
    assert apart.sizes({"x": (1, 4), "y": (1, 8)}) == {"a": 4, "b": 8}
    assert dynamic_shapes(({1: N}, None), ["x", "y"]).places == (("x", 1, N),)


@pytest.mark.parametrize(("dynamic", "error", "message"), [
    ({"z": {0: (1,)}}, ValueError, "dynamic names 'z', but the inputs are x, mask"),
    ({}, ValueError, "dynamic names no dimension"),
    ({"x": {}}, ValueError, "dynamic names no dimension"),
    ({"x": (4, 8)}, TypeError, r"dynamic\['x'\] must have the numbers of dimensions as keys"),
    ({"x": {-1: (4,)}}, TypeError, "numbers of dimensions as keys"),
    ("x", TypeError, r"dynamic must be a dict by input \(x, mask\)"),
    (({}, {}, {}), TypeError, "dynamic must be a dict by input"),
    ({"x": {1: N}, "mask": {1: Dim("n", (4,))}}, ValueError, r"two dimensions are called 'n', with \(4,\) and \(16, 32\)"),
])  # fmt: skip
def test_bad_descriptions(dynamic: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dynamic_shapes(dynamic, ["x", "mask"])


def test_sizes_of_inputs() -> None:
    shapes = dynamic_shapes({"x": {0: Dim("batch", (1, 8)), 1: N}, "mask": {1: N}}, ["x", "mask"])
    assert shapes.sizes({"x": (8, 16, 4), "mask": (8, 16)}) == {"batch": 8, "n": 16}
    with pytest.raises(ValueError, match="input 'x', dimension 1 is 17, but n may be 16 or 32 in this program"):
        shapes.sizes({"x": (8, 17, 4), "mask": (8, 17)})
    with pytest.raises(ValueError, match="input 'mask', dimension 1 is 32, but input 'x', dimension 1 is 16: both are n"):
        shapes.sizes({"x": (8, 16, 4), "mask": (8, 32)})
    with pytest.raises(ValueError, match=r"input 'x', dimension 1 \(n\) is missing: its shape is \(8,\)"):
        shapes.sizes({"x": (8,), "mask": (8, 16)})
    for given, wanted in (((3, 17), (8, 32)), ((9, 99), (8, 32)), ((1, 1), (1, 16))):
        sizes = shapes.sizes({"x": given, "mask": given}, nearest=True)
        assert tuple(sizes.values()) == wanted
    with pytest.raises(ValueError, match="both are n"):
        shapes.sizes({"x": (8, 16, 4), "mask": (8, 17)}, nearest=True)
    assert shapes.where("n") == "input 'x' dimension 1, input 'mask' dimension 1"


def test_sizes_by_name() -> None:
    shapes = dynamic_shapes({"x": {0: Dim("batch", (1, 8)), 1: N}}, ["x"])
    assert list(shapes.check({"n": 16, "batch": 1})) == ["batch", "n"]
    for wrong, message in (
        ({"n": 16}, "dimensions are batch, n, not n"), ({}, "not none"), ({"n": 17, "batch": 1}, "n may be 16 or 32 .* not 17"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            shapes.check(wrong)
    assert sizes_text({"batch": 1, "n": 16}) == "batch = 1, n = 16"


class _Arguments(nn.Module):
    def forward(self, x, y=None, *rest, **more):  # type: ignore[no-untyped-def]
        return x


def test_names_are_those_of_the_export() -> None:
    inputs = tuple(torch.randn(2) for _ in range(4))
    program = torch.export.export(_Arguments(), inputs, strict=False)
    exported = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    assert argument_names(_Arguments(), inputs) == exported
    assert argument_names(_Arguments(), inputs[0]) == ["x"]
    assert argument_names(_Arguments(), {"a": inputs[0], "x": inputs[1]}) == ["a", "x"]


def test_examples_are_cut_or_repeated_in_their_own_form() -> None:
    shapes = dynamic_shapes({"x": {1: N}}, ["x", "y"])
    x, y = torch.arange(20).view(1, 20), torch.zeros(3)
    small = resized((x, y), ["x", "y"], shapes, {"n": 16})
    assert isinstance(small, tuple) and small[0].tolist() == [list(range(16))] and small[1] is y
    large = resized({"x": x, "y": y}, ["x", "y"], shapes, {"n": 32})
    assert large["x"][0, 18:22].tolist() == [18, 19, 0, 1]
    alone = resized(x, ["x"], dynamic_shapes({"x": {1: N}}, ["x"]), {"n": 16})
    assert isinstance(alone, torch.Tensor) and alone.shape == (1, 16)
    with pytest.raises(ValueError, match=r"input 'x' has no dimension 1 \(n\) in example_inputs: \(3,\)"):
        resized((y, y), ["x", "y"], shapes, {"n": 16})


def test_shapes_of_arrays_and_tensors() -> None:
    assert input_shapes(np.zeros((2, 3)), ["x"], "it") == input_shapes([torch.zeros(2, 3)], ["x"], "it") == {"x": (2, 3)}
    with pytest.raises(ValueError, match="it has 1 inputs"):
        input_shapes([torch.zeros(2), torch.zeros(2)], ["x"], "it")
