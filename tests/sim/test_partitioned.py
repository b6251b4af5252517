"""Partitioned programs run on every engine, library models included."""

import warnings
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compiler.compile import compile_model
from compiler.partitioned import PartitionedProgram
from compiler.program import Program
from sim.partitioned import bind_inputs
from sim.simulate import simulate
from tests.compiler.networks import library_model, retriever

pytestmark = pytest.mark.filterwarnings("ignore:the host's work")


@cache
def compiled(name: str) -> tuple[Program | PartitionedProgram, dict[str, torch.Tensor], torch.Tensor]:
    module, inputs, wanted = library_model(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compile_model(module, inputs, arch="tiny", calibration=[inputs]), inputs, wanted


@pytest.mark.parametrize("name", ["torch encoder, causal", "bert", "distilbert", "vit", "gpt2", "llama"])
def test_library_models(name: str) -> None:
    program, inputs, wanted = compiled(name)
    reference = simulate(program, inputs, engine="reference")
    isa = simulate(program, inputs, engine="isa")
    assert F.cosine_similarity(reference.outputs[0].flatten(), wanted.flatten(), dim=0) >= 0.99
    assert isa.bit_exact and isa.bytes_checked > 0
    assert isa.outputs_sha256 == reference.outputs_sha256
    assert torch.equal(isa.outputs[0], reference.outputs[0]) and isa.outputs[0].shape == wanted.shape
    assert program.report().macs["host"] == 0


def test_rtl_of_a_causal_network_with_host_parts() -> None:
    program, inputs, _ = compiled("gpt2")
    isa, run = simulate(program, inputs, engine="isa"), simulate(program, inputs)
    assert run.bit_exact and run.outputs_sha256 == isa.outputs_sha256
    cycle = simulate(program, engine="cycle")
    assert cycle.cycles == run.cycles and len(run.stages) == len(cycle.stages) == 1
    assert sum(run.operator_cycles.values()) == run.cycles


def test_sums_of_several_programs() -> None:
    module, inputs = retriever()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = compile_model(module, inputs, arch="tiny", calibration=[inputs])
    run = simulate(program, engine="cycle")
    assert run.cycles == sum(stage.cycles for stage in run.stages) and len(run.stages) == 2
    assert sum(run.operator_cycles.values()) == run.cycles and run.outputs == ()
    assert run.utilisation == pytest.approx(program.effective_macs / (program.arch.macs * run.cycles))
    checked = simulate(program, inputs, engine="isa")
    assert checked.bytes_checked == sum(stage.bytes_checked for stage in checked.stages)
    assert checked.host_s > 0 and checked.to_dict()["host_s"] == checked.host_s


def test_host_parts_see_what_the_accelerator_computed() -> None:
    """argmax on the host is that of the accelerator's scores, to the last bit."""
    module, inputs = retriever()
    program = compile_model(module, inputs, arch="tiny", calibration=[inputs])
    scores, best = simulate(program, inputs, engine="reference").outputs
    assert torch.equal(scores.argmax(-1), best) and best.dtype == torch.int64
    with torch.no_grad():
        assert F.cosine_similarity(scores.flatten(), module(*inputs)[0].flatten(), dim=0) >= 0.99


def test_a_second_batch_of_inputs() -> None:
    module, inputs = retriever()
    program = compile_model(module, inputs, arch="tiny", calibration=[inputs])
    ids = (inputs[0] + 5) % 20
    mask = torch.ones_like(ids)
    mask[0, 2:] = 0
    result = simulate(program, {"ids": ids, "mask": mask}, engine="reference").outputs[0]
    with torch.no_grad():
        assert F.cosine_similarity(result.flatten(), module(ids, mask)[0].flatten(), dim=0) >= 0.97


def test_bad_inputs() -> None:
    program, inputs, _ = compiled("bert")
    assert isinstance(program, PartitionedProgram)
    with pytest.raises(ValueError, match="the engine 'isa' needs inputs: input_ids, attention_mask"):
        simulate(program, engine="isa")
    with pytest.raises(ValueError, match="the program takes 2 inputs .*, not 1"):
        simulate(program, inputs["input_ids"], engine="isa")
    with pytest.raises(ValueError, match="the program's inputs are input_ids, attention_mask, not input_ids"):
        simulate(program, {"input_ids": inputs["input_ids"]}, engine="isa")
    with pytest.raises(ValueError, match=r"input 'input_ids' must be int64 \(2, 6\), not int64 \(2, 5\)"):
        bind_inputs(program.inputs, {**inputs, "input_ids": inputs["input_ids"][:, :5]})
    with pytest.raises(ValueError, match="host operator aten.embedding.default 'embedding' failed"):
        simulate(program, {**inputs, "input_ids": inputs["input_ids"] + 1000}, engine="isa")
    with pytest.raises(ValueError, match="a partitioned program cannot be traced as a whole"):
        simulate(program, inputs, trace="x.fst")


def test_reference_engine_of_a_whole_program() -> None:
    x = torch.randn(5, 12)
    program = compile_model(nn.Linear(12, 6), x, arch="tiny", calibration=[x])
    run = simulate(program, x, engine="reference")
    assert run.cycles is None and run.bit_exact is None
    assert run.outputs_sha256 == simulate(program, x, engine="isa").outputs_sha256
