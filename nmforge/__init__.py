"""nmforge: from a PyTorch network to N:M sparse silicon, proven byte for byte.

    import nmforge as nf
    model = nf.create_model("minilm_l6", pretrained=True)
    nf.sparsify(model, "2:4", method="magnitude")
    program = nf.compile(model.encoder, example_inputs, arch="sta1024", calibration=batches)
    run = nf.simulate(program, inputs)

Names are imported when they are first used, so that ``import nmforge`` and ``nmforge --help`` do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from algo.capture import UntraceableError
    from algo.channels import ChannelGraph, channel_groups
    from algo.compressed import from_semi_structured, load_compressed, save_compressed, to_semi_structured
    from algo.count import count
    from algo.fisher import FisherPruner
    from algo.flips import FlipTracker
    from algo.idp import IDPConfig, run_idp
    from algo.methods import METHODS
    from algo.nm import NM
    from algo.permute import permute_channels
    from algo.sparsify import advance, finalize, freeze_masks, sparsify, sparsity_report
    from algo.surgery import load_pruned, prune_channels
    from compiler.dynamic import DynamicProgram, load
    from compiler.fake_quantise import FakeQuantised
    from compiler.partitioned import PartitionedProgram
    from compiler.program import Program
    from compiler.shapes import Dim
    from hw.arch import PRESETS, Arch, get_arch
    from hw.verilog import verilog
    from models import MaskTarget, PointTarget, Target, create_model, generate, list_models, model_info, pad_images
    from nmforge.api import compile, verify
    from sim.compare import compare
    from sim.handle import Dut
    from sim.memory import MemoryModel
    from sim.simulate import Run, simulate
    from sim.trace import Trace

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "NM",
    "PRESETS",
    "Arch",
    "ChannelGraph",
    "Dim",
    "Dut",
    "DynamicProgram",
    "FakeQuantised",
    "FisherPruner",
    "FlipTracker",
    "IDPConfig",
    "MaskTarget",
    "MemoryModel",
    "PartitionedProgram",
    "PointTarget",
    "Program",
    "Run",
    "Target",
    "Trace",
    "UntraceableError",
    "advance",
    "channel_groups",
    "compare",
    "compile",
    "count",
    "create_model",
    "finalize",
    "freeze_masks",
    "from_semi_structured",
    "generate",
    "get_arch",
    "list_models",
    "load",
    "load_compressed",
    "load_pruned",
    "model_info",
    "pad_images",
    "permute_channels",
    "prune_channels",
    "run_idp",
    "save_compressed",
    "simulate",
    "sparsify",
    "sparsity_report",
    "to_semi_structured",
    "verify",
    "verilog",
]

_HOMES = {
    "Arch": "hw.arch:Arch",
    "ChannelGraph": "algo.channels:ChannelGraph",
    "Dim": "compiler.shapes:Dim",
    "Dut": "sim.handle:Dut",
    "DynamicProgram": "compiler.dynamic:DynamicProgram",
    "FakeQuantised": "compiler.fake_quantise:FakeQuantised",
    "FisherPruner": "algo.fisher:FisherPruner",
    "FlipTracker": "algo.flips:FlipTracker",
    "IDPConfig": "algo.idp:IDPConfig",
    "METHODS": "algo.methods:METHODS",
    "MaskTarget": "models:MaskTarget",
    "MemoryModel": "sim.memory:MemoryModel",
    "NM": "algo.nm:NM",
    "PRESETS": "hw.arch:PRESETS",
    "PartitionedProgram": "compiler.partitioned:PartitionedProgram",
    "PointTarget": "models:PointTarget",
    "Program": "compiler.program:Program",
    "Run": "sim.simulate:Run",
    "Target": "models:Target",
    "Trace": "sim.trace:Trace",
    "UntraceableError": "algo.capture:UntraceableError",
    "advance": "algo.sparsify:advance",
    "channel_groups": "algo.channels:channel_groups",
    "compare": "sim.compare:compare",
    "compile": "nmforge.api:compile",
    "count": "algo.count:count",
    "create_model": "models:create_model",
    "finalize": "algo.sparsify:finalize",
    "freeze_masks": "algo.sparsify:freeze_masks",
    "from_semi_structured": "algo.compressed:from_semi_structured",
    "generate": "models:generate",
    "get_arch": "hw.arch:get_arch",
    "list_models": "models:list_models",
    "load": "compiler.dynamic:load",
    "load_compressed": "algo.compressed:load_compressed",
    "load_pruned": "algo.surgery:load_pruned",
    "model_info": "models:model_info",
    "pad_images": "models:pad_images",
    "permute_channels": "algo.permute:permute_channels",
    "prune_channels": "algo.surgery:prune_channels",
    "run_idp": "algo.idp:run_idp",
    "save_compressed": "algo.compressed:save_compressed",
    "simulate": "sim.simulate:simulate",
    "sparsify": "algo.sparsify:sparsify",
    "sparsity_report": "algo.sparsify:sparsity_report",
    "to_semi_structured": "algo.compressed:to_semi_structured",
    "verify": "nmforge.api:verify",
    "verilog": "hw.verilog:verilog",
}
"""Where each public name lives: ``module:attribute``."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nmforge' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
