"""Networks of several shapes: each as the module is there, weights and scales once, what cannot vary by name."""

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from compiler.compile import compile_model
from compiler.dynamic import DynamicProgram
from compiler.fake_quantise import FakeQuantised
from compiler.graph import CompileError
from compiler.partitioned import PartitionedProgram
from compiler.program import Program
from compiler.shapes import Dim
from sim.simulate import simulate
from tests.compiler.dynamic_networks import Branching, Causal, Masked, Pixels, Rotary, Scores
from tests.compiler.modules import Apply
from tests.compiler.random_modules import RandomTokens

Make = Callable[..., Any]


def masked(batch: int, length: int) -> dict[str, Tensor]:
    keep = torch.arange(length) < torch.randint(2, length + 1, (batch, 1))
    return {"x": torch.randn(batch, length, 16), "mask": keep.long()}


def tokens(batch: int, length: int) -> dict[str, Tensor]:
    found = masked(batch, length)
    return {"input_ids": torch.randint(0, 50, (batch, length)), "attention_mask": found["mask"]}


def both(*names: str) -> Make:
    return lambda batches, lengths: {name: {0: batches, 1: lengths} for name in names}


class _Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bert = transformers.BertModel(transformers.BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=20,
        ))  # fmt: skip

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        result = self.bert(input_ids=input_ids, attention_mask=attention_mask)
        return result[0], result[1]


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=mask == 0)


CASES: dict[str, tuple[Callable[[], nn.Module], Make, Make, tuple[tuple[int, ...], ...], dict[str, Any]]] = {
    "class token, causal mask, mean": (
        Causal, lambda b, n: torch.randint(0, 50, (b, n)), both("tokens"), ((1, 2), (5, 9)), {},
    ),
    "rotary positions, one token": (Rotary, lambda b, n: torch.randn(b, n, 16), both("x"), ((1,), (1, 5, 9)), {}),
    "masks, smooth, bits16": (Masked, masked, both("x", "mask"), ((1, 3), (7,)), {"smooth": 0.5, "bits16": "auto"}),
    "torch encoder": (_Encoder, masked, both("x", "mask"), ((2,), (4, 9)), {"bits16": "*"}),
    "transformers BERT": (_Bert, tokens, both("input_ids", "attention_mask"), ((1,), (6, 11)), {}),
    "images": (
        Pixels, lambda h, w: torch.randn(2, 3, h, w),
        lambda h, w: {"image": {2: Dim("height", h), 3: Dim("width", w)}}, ((8, 17), (11,)), {},
    ),
    "softmax over the length": (Scores, lambda b, n: torch.randn(b, n, 12), both("x"), ((2,), (4, 11)), {}),
    "other layers for long inputs": (Branching, lambda b, n: torch.randn(b, n, 8), both("x"), ((2,), (4, 7)), {}),
}  # fmt: skip


def compiled(module: nn.Module, example: Any, **options: Any) -> DynamicProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning about host work: the networks are tiny
        program = compile_model(module, example, arch="tiny", **options)
    assert isinstance(program, DynamicProgram)
    return program


@pytest.mark.parametrize("name", CASES)
def test_every_shape_is_the_module_there(name: str) -> None:
    make, inputs, dynamic, values, options = CASES[name]
    torch.manual_seed(0)
    module, combinations = make().eval(), list(itertools.product(*values))
    batches = [inputs(*sizes) for sizes in combinations for _ in range(2)]
    program = compiled(module, batches[0], calibration=batches, dynamic=dynamic(*values), **options)
    assert [tuple(sizes.values()) for sizes, _ in program.variants] == combinations
    for sizes in combinations:
        given = inputs(*sizes)
        with torch.no_grad():
            wanted = module(**given) if isinstance(given, dict) else module(given)
        run = simulate(program, given, engine="isa")
        assert run.bit_exact and tuple(run.sizes.values()) == sizes
        for got, exact in zip(run.outputs, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
            assert isinstance(got, Tensor) and got.shape == exact.shape
            assert F.cosine_similarity(got.flatten(), exact.flatten(), 0) > 0.98


@pytest.mark.parametrize("seed", [4, 24, 29])
def test_random_modules(seed: int) -> None:
    module, lengths = RandomTokens(seed, length=7, blocks=4, host=seed == 24).eval(), (5, 7)

    def inputs(length: int) -> tuple[Tensor, ...]:
        found = masked(2, length)
        return (found["x"], found["mask"]) if module.masked else (found["x"],)

    batches = [inputs(length) for length in lengths for _ in range(3)]
    program = compiled(module, batches[0], calibration=batches, dynamic=[{1: lengths}] * len(batches[0]))
    for length in lengths:
        given = inputs(length)
        with torch.no_grad():
            wanted = module(*given)
        run = simulate(program, given, engine="isa")
        assert run.bit_exact
        for got, exact in zip(run.outputs, wanted, strict=True):
            assert F.cosine_similarity(torch.as_tensor(got).flatten(), exact.flatten(), 0) > 0.99


def test_scales_and_weights_are_those_of_all_batches() -> None:
    torch.manual_seed(0)
    module, loud = Masked().eval(), masked(1, 7)
    loud["x"] *= 5
    program = compiled(module, loud, calibration=[masked(1, 4), loud], dynamic={"x": {1: (4, 7)}, "mask": {1: (4, 7)}})
    small, large = (program.at(x_1=length) for length in (4, 7))
    assert isinstance(small, Program) and isinstance(large, Program)
    assert small.inputs[0].scale == large.inputs[0].scale > 5 / 128
    assert {name: t.scale for name, t in small.network.tensors.items()} == {n: t.scale for n, t in large.network.tensors.items()}
    assert small.constants is large.constants and small.constants_address == large.constants_address
    for a, b in zip(small.network.ops, large.network.ops, strict=True):
        if hasattr(a, "weight"):
            assert a.weight.ctypes.data == b.weight.ctypes.data  # type: ignore[union-attr]


def test_a_length_without_batches_has_the_scales_of_the_others() -> None:
    torch.manual_seed(0)
    program = compiled(Causal().eval(), torch.randint(0, 50, (1, 5)), calibration=[torch.randint(0, 50, (1, 5))] * 2,
                       dynamic={"tokens": {1: (5, 30)}})
    short, long = (program.at(tokens_1=length) for length in (5, 30))
    assert isinstance(short, PartitionedProgram) and isinstance(long, PartitionedProgram)
    scales = [{name: t.scale for name, t in made.programs[0].network.tensors.items()} for made in (short, long)]
    changed = {name for name in scales[0] if scales[0][name] != scales[1][name]}
    assert not changed
    position = next(t for name, t in long.programs[0].network.tensors.items() if name.startswith("slice"))
    assert position.scale * 32767 >= 0.5 * 3  # positions 6 to 29 count, although no batch came there


def test_calibration_batches_of_other_sizes() -> None:
    torch.manual_seed(0)
    lengths = {"x": {1: (4, 7)}, "mask": {1: (4, 7)}}
    assert compiled(Masked().eval(), masked(1, 4), calibration=[masked(3, 6)], dynamic=lengths)
    message = "calibration batch 2: input 'args_0', dimension 1 is 6, but .* and its operators depend on it"
    with pytest.raises(ValueError, match=message):
        placed = Apply(lambda m, args: m.a(args + m.position[: args.shape[1]]), a=nn.Linear(8, 8))
        placed.position = nn.Parameter(torch.randn(9, 8))
        compiled(placed, torch.randn(1, 4, 8), calibration=[torch.randn(1, n, 8) for n in (4, 6)], dynamic=({1: (4, 7)},))
    with pytest.raises(ValueError, match="calibration batch 1: input 'mask', dimension 1 is 4, but .* is 7: both are x_1"):
        unequal = {"x": torch.randn(1, 7, 16), "mask": masked(1, 4)["mask"]}
        compiled(Masked(), masked(1, 4), calibration=[unequal], dynamic=lengths)
    with pytest.raises(ValueError, match="at least one calibration batch"):
        compiled(Masked(), masked(1, 4), calibration=[], dynamic=lengths)


def test_without_calibration_the_example_serves_for_every_shape() -> None:
    with pytest.warns(UserWarning, match="no calibration data"):
        program = compile_model(Branching().eval(), torch.randn(1, 4, 8), arch="tiny", dynamic={"x": {1: (4, 7)}})
    assert simulate(program, torch.randn(1, 7, 8), engine="isa").bit_exact


def test_shapes_with_operators_of_their_own_need_a_batch() -> None:
    options = {"calibration": [torch.randn(1, 4, 8)], "dynamic": {"x": {1: (4, 7)}}}
    with pytest.raises(CompileError, match="calibration: no batch has a value 'long': give one of each shape"):
        compiled(Branching().eval(), torch.randn(1, 4, 8), **options)


def test_divided_differently() -> None:
    """A softmax over the length fits the row unit or not; then the shapes are quantised apart, with the same weights."""
    torch.manual_seed(0)
    layers = {"a": nn.Linear(8, 8), "b": nn.Linear(8, 4)}
    layer = Apply(lambda m, x: m.b(m.a(x).transpose(1, 2).softmax(-1).transpose(1, 2)), **layers).eval()
    lengths, example = (6, 40), torch.randn(1, 6, 8)
    dynamic = ({1: Dim("n", lengths)},)
    with pytest.raises(ValueError, match="no calibration batch has the shapes of n = 40, where the network has other operators"):
        compiled(layer, example, calibration=[example], dynamic=dynamic)
    program = compiled(layer, example, calibration=[torch.randn(1, n, 8) for n in lengths], dynamic=dynamic)
    assert [type(made) for _, made in program.variants] == [Program, PartitionedProgram]
    for length in lengths:
        assert simulate(program, torch.randn(1, length, 8), engine="isa").bit_exact


def test_what_cannot_vary_is_named() -> None:
    fixed = Apply(lambda m, x: m.a(x + m.position), a=nn.Linear(8, 8))
    fixed.position = nn.Parameter(torch.randn(6, 8))
    batch, length = Dim("batch", (1, 2)), Dim("n", (6, 9))
    message = r"the network cannot have n = 9 \(input 'args_0' dimension 1\): torch.* cannot trace Apply .* at test_variants.py:"
    with pytest.raises(CompileError, match=message):
        compiled(fixed, torch.randn(1, 6, 8), dynamic=({0: batch, 1: length},), calibration=[torch.randn(1, 6, 8)])
    with pytest.raises(CompileError, match="the network cannot have n = 4 "):  # and not the batch, which is the example's neither
        compiled(fixed, torch.randn(2, 6, 8), dynamic=({0: batch, 1: Dim("n", (4, 6))},), calibration=[torch.randn(1, 6, 8)])
    with pytest.raises(CompileError, match=r"cannot have n = 6 .*host=\"forbid\", but"):
        tokens = torch.randint(0, 50, (1, 6))
        compiled(Causal(), tokens, dynamic={"tokens": {1: length}}, host="forbid", calibration=[tokens])
    with pytest.raises(TypeError, match="compile takes a torch.nn.Module and example_inputs, not int"):
        compile_model(3, torch.randn(1), dynamic={"x": {0: (1, 2)}})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a FakeQuantised was tuned for the shapes of its example_inputs"):
        example = torch.randn(1, 4, 8)
        compile_model(FakeQuantised(nn.Linear(8, 8), example, [example]), dynamic={"input": {1: (4, 7)}})


def test_onnx_with_open_dimensions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, path, n = Rotary().eval(), tmp_path / "m.onnx", torch.export.Dim("length", min=2, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (torch.randn(1, 5, 16),), path, dynamo=True, verbose=False, dynamic_shapes={"x": {1: n}})
    batches = [torch.randn(1, length, 16) for length in (5, 9)]
    program = compiled(str(path), None, calibration=batches, dynamic={"x": {1: (5, 9)}})  # type: ignore[arg-type]
    for x in batches:
        run = simulate(program, x, engine="isa")
        with torch.no_grad():
            assert run.bit_exact and F.cosine_similarity(run.outputs[0].flatten(), module(x).flatten(), 0) > 0.99  # type: ignore
    with pytest.raises(CompileError, match=r"dimension 0 of input 'x' \(x_0\) is fixed in .*m.onnx"):
        compiled(str(path), None, dynamic={"x": {0: (1, 2), 1: (5, 9)}})  # type: ignore[arg-type]
