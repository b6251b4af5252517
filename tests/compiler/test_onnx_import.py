"""ONNX files compute what torch and ONNX's own reference do, and take the same way; what is not understood is named."""

import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from compiler.compile import compile_model
from compiler.graph import CompileError
from compiler.onnx_import import OPSETS, load_onnx
from compiler.program import Program
from sim.simulate import simulate
from tests.compiler.networks import retriever

FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


def write(path: Path, nodes: list, shapes: dict, *, initial: dict | None = None, opset: int = 20, domain: str = "") -> Path:
    """A model of some nodes with the inputs `shapes` (float) and the output "y"."""
    inputs = [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in shapes.items()]
    constants = [onnx.numpy_helper.from_array(value, name) for name, value in (initial or {}).items()]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", FLOAT, ["n"])], constants)
    imports = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=9), path)
    return path


W = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
CASES = {
    "Gemm": ([helper.make_node("Gemm", ["x", "w"], ["y"], transA=0, alpha=0.5)], (3, 6), {"w": W}),
    "MatMul and Erf": (
        [
            helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Erf", ["a"], ["b"]),
            helper.make_node("Mul", ["a", "b"], ["y"]),
        ],
        (2, 3, 6), {"w": W},
    ),
    "Reshape by Shape": (
        [
            helper.make_node("Shape", ["x"], ["s"]), helper.make_node("Gather", ["s", "zero"], ["n"]),
            helper.make_node("Concat", ["n", "minus"], ["t"], axis=0), helper.make_node("Reshape", ["x", "t"], ["y"]),
        ],
        (2, 3, 6), {"zero": np.array([0]), "minus": np.array([-1])},
    ),
    "Slice, Pad, Transpose": (
        [
            helper.make_node("Slice", ["x", "a", "b", "c"], ["s"]), helper.make_node("Pad", ["s", "p"], ["q"]),
            helper.make_node("Transpose", ["q"], ["y"], perm=[1, 0]),
        ],
        (4, 6), {"a": np.array([1]), "b": np.array([9]), "c": np.array([1]), "p": np.array([0, 1, 2, 0])},
    ),
    "ReduceMean, Split, Where": (
        [
            helper.make_node("Split", ["x"], ["l", "r"], axis=1, num_outputs=2), helper.make_node("Less", ["l", "r"], ["c"]),
            helper.make_node("Where", ["c", "l", "r"], ["w"]), helper.make_node("ReduceMean", ["w", "ax"], ["y"], keepdims=0),
        ],
        (4, 6), {"ax": np.array([1])},
    ),
    "Conv with uneven pads": (
        [helper.make_node("Conv", ["x", "k"], ["y"], pads=[0, 1, 1, 1], strides=[2, 1])],
        (1, 2, 7, 7), {"k": np.ones((3, 2, 3, 3), np.float32)},
    ),
    "LayerNormalization, Softmax, TopK": (
        [
            helper.make_node("LayerNormalization", ["x", "g"], ["n"]), helper.make_node("Softmax", ["n"], ["p"], axis=0),
            helper.make_node("TopK", ["p", "k"], ["y", "i"], axis=1),
        ],
        (4, 6), {"g": np.arange(6, dtype=np.float32), "k": np.array([2])},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_of_onnx(name: str, tmp_path: Path) -> None:
    nodes, shape, initial = CASES[name]
    path = write(tmp_path / "m.onnx", nodes, {"x": shape}, initial=initial)
    module, inputs = load_onnx(path)
    with torch.no_grad():
        result = module(**inputs)[0].numpy()
    (wanted,) = ReferenceEvaluator(str(path)).run(None, {"x": inputs["x"].numpy()})
    np.testing.assert_allclose(result, wanted, atol=1e-5)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The retriever by torch's own exporter."""
    path = tmp_path_factory.mktemp("onnx") / "retriever.onnx"
    module, inputs = retriever()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, inputs, path, dynamo=True, verbose=False, external_data=False)
    return path


def test_a_model_of_torchs_exporter(exported: Path) -> None:
    module, inputs = retriever()
    named = dict(zip(("ids", "mask"), inputs, strict=True))
    program = compile_model(exported, named, arch="tiny", calibration=[named])
    direct = compile_model(module, inputs, arch="tiny", calibration=[inputs])
    assert program.macs == direct.macs and program.report().macs == direct.report().macs
    run = simulate(program, named, engine="isa")
    wanted = simulate(direct, inputs, engine="isa").outputs
    assert run.bit_exact
    torch.testing.assert_close(run.outputs[0], wanted[0], atol=0.03, rtol=0)
    assert torch.equal(run.outputs[1], wanted[1])


def test_an_encoder_is_a_whole_program(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x, path = torch.randn(2, 6, 16), tmp_path / "e.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), path, dynamo=True, verbose=False, external_data=False)
        program = compile_model(str(path), arch="tiny", host="forbid")  # example inputs come from the file
    assert isinstance(program, Program) and program.inputs[0].shape == (2, 6, 16)


def test_initialisers_in_a_file_of_their_own(tmp_path: Path) -> None:
    weights = np.random.default_rng(1).standard_normal((64, 48)).astype(np.float32)
    path = write(tmp_path / "m.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": (2, 64)}, initial={"w": weights})
    inside, given = load_onnx(path)
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="m.bin", size_threshold=0)
    assert (tmp_path / "m.bin").stat().st_size >= weights.nbytes
    outside, _ = load_onnx(path)
    assert torch.equal(inside(**given)[0], outside(**given)[0])
    (tmp_path / "m.bin").unlink()
    with pytest.raises(CompileError, match=r"m.onnx is no ONNX model that can be read: .*m.bin"):
        load_onnx(path)


class _Gated(nn.Module):
    """RMSNorm written out, rotary positions, causal attention and SwiGLU, as LLaMA has them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16) + 0.5)
        self.qkv, self.out = nn.Linear(16, 48, bias=False), nn.Linear(16, 16, bias=False)
        self.gate, self.up = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)
        self.down = nn.Linear(24, 16, bias=False)

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        q, k, v = self.qkv(self._norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        angle = torch.arange(length)[:, None] / 10.0 ** torch.arange(4)
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        q, k = (part * cos + torch.cat([-part[..., 4:], part[..., :4]], -1) * sin for part in (q, k))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self._norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def test_a_block_of_llama_with_an_open_dimension(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x, path = _Gated().eval(), torch.randn(1, 5, 16), tmp_path / "block.onnx"
    shapes = {"x": {1: torch.export.Dim("length", min=2, max=32)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), path, dynamo=True, verbose=False, external_data=True, dynamic_shapes=shapes)
        with pytest.raises(CompileError, match=r"input 'x' of the ONNX model has an open dimension 1 \(length\)"):
            load_onnx(path)
        program, direct = (compile_model(source, x, arch="tiny", calibration=[x]) for source in (str(path), module))
    assert sum(program.report().macs.values()) == sum(direct.report().macs.values())
    assert isinstance(program, Program)
    assert sum(getattr(op, "norm", None) is not None for op in program.network.ops) == 2
    run = simulate(program, x, engine="isa")
    assert run.bit_exact
    torch.testing.assert_close(run.outputs[0], module(x).detach(), atol=0.15, rtol=0)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_unknown_and_custom_operators_name_the_node(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", [helper.make_node("Unique", ["x"], ["y"], name="mix")], {"x": (2, 3)})
    with pytest.raises(CompileError, match=r"ONNX node 'mix' \(Unique\): operator Unique is not understood: compile the torch"):
        load_onnx(path)
    node = helper.make_node("GRU", ["x", "w", "r"], ["y"], name="memory", hidden_size=2)
    with pytest.raises(CompileError, match=r"ONNX node 'memory' \(GRU\): .*a reset before the product"):
        load_onnx(write(tmp_path / "l.onnx", [node], {"x": (3, 1, 2), "w": (1, 6, 2), "r": (1, 6, 2)}))
    node = helper.make_node("Magic", ["x"], ["y"], name="spell", domain="acme")
    path = write(tmp_path / "n.onnx", [node], {"x": (2, 3)}, domain="acme")
    with pytest.raises(CompileError, match=r"ONNX node 'spell' \(acme.Magic\): custom operators of domain 'acme' are not"):
        load_onnx(path)


def test_unknown_versions(tmp_path: Path) -> None:
    for version in (9, OPSETS[0] - 1, OPSETS[-1] + 1, 99):
        path = write(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])], {"x": (2, 3)}, opset=version)
        message = f"uses operators of version {version}; {OPSETS[0]} to {OPSETS[-1]} are understood: convert"
        with pytest.raises(CompileError, match=message):
            load_onnx(path)
    for version in (OPSETS[0], OPSETS[-1]):
        path = write(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])], {"x": (2, 3)}, opset=version)
        assert load_onnx(path)


def test_open_dimensions(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])], {"x": ("batch", 3)})
    with pytest.raises(CompileError, match=r"input 'x' .* has an open dimension 0 \(batch\): give example_inputs"):
        load_onnx(path)
    module, _ = load_onnx(path, torch.zeros(5, 3))
    assert module(x=torch.ones(5, 3))[0].shape == (5, 3)
    with pytest.raises(ValueError, match=r"the ONNX model has 1 inputs \(x\), not 2"):
        load_onnx(path, (torch.zeros(5, 3), torch.zeros(1)))
    with pytest.raises(ValueError, match="the ONNX model's inputs are x, not z"):
        load_onnx(path, {"z": torch.zeros(5, 3)})


def test_shapes_that_depend_on_data_and_bad_files(tmp_path: Path) -> None:
    nodes = [helper.make_node("Cast", ["x"], ["n"], to=INT), helper.make_node("Reshape", ["z", "n"], ["y"], name="bend")]
    module_path = write(tmp_path / "m.onnx", nodes, {"x": (1,), "z": (2, 3)})
    module, _ = load_onnx(module_path, (torch.tensor([6.0]), torch.zeros(2, 3)))
    with pytest.raises(CompileError, match="torch.export cannot trace OnnxModule"):
        compile_model(module, {"x": torch.tensor([6.0]), "z": torch.zeros(2, 3)}, arch="tiny")
    (tmp_path / "bad.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(CompileError, match="bad.onnx is no ONNX model that can be read"):
        load_onnx(tmp_path / "bad.onnx")
    with pytest.raises(FileNotFoundError, match="no ONNX file at"):
        load_onnx(tmp_path / "none.onnx")
    path = write(tmp_path / "c.onnx", [helper.make_node("Relu", ["w"], ["y"])], {"x": (2, 3)}, initial={"w": W})
    with pytest.raises(CompileError, match="output 'y' of the ONNX model does not depend on an input"):
        load_onnx(path)


def test_inputs_of_other_shapes_and_dtypes_are_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"], name="r")], {"x": ["n", 8]})
    module, given = load_onnx(path, torch.randn(3, 8))
    assert given["x"].shape == (3, 8) and torch.equal(module(**given)[0], given["x"].relu())
    with pytest.raises(CompileError, match=r"input 'x' of the ONNX model is float32 \(n, 8\), not float32 \(3, 7\)"):
        load_onnx(path, torch.randn(3, 7))
    with pytest.raises(CompileError, match=r"input 'x' of the ONNX model is float32 \(n, 8\), not float64 \(3, 8\)"):
        load_onnx(path, torch.randn(3, 8).double())
    with pytest.raises(TypeError, match=r"must be tensors, not list \(x\)"):
        load_onnx(path, [[1.0]])
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.elem_type = model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(model, path)
    with pytest.raises(CompileError, match="input 'x' of the ONNX model is float16: only float32 can be compiled"):
        load_onnx(path, torch.randn(3, 8).half())
