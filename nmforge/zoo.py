"""The seed systems: which networks `nmforge report --zoo` measures, and how one of them is measured.

Weights are random, pruned by magnitude at once: they say what a pattern costs and buys in hardware, nothing of accuracy.
Cycles are those of the cycle engine, which has the RTL's count; with ``rtl`` the RTL runs too, and every byte is compared.
"""

from __future__ import annotations

import functools
import hashlib
import json
import resource
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from algo.count import count
from algo.sparsify import finalize, sparsify
from compiler.partitioned import PartitionedProgram
from compiler.program import Program
from hw.arch import Arch
from models.info import Input
from models.registry import create_model, model_info
from nmforge.agreement import rtl_agreement
from nmforge.api import compile
from nmforge.arguments import parse_table
from nmforge.console import write_text
from sim.simulate import simulate

__all__ = [
    "DENSE", "ZOO", "System", "build", "inputs_of", "measure", "measure_network", "pattern_label", "peak_bytes", "point_file",
    "settings", "sources",
]  # fmt: skip

DENSE = "dense"
TRANSFORMER = "*atten*=2:4,*=1:8"
"""A mix: what attention needs keeps more weights."""

PATTERNS = (DENSE, "2:4", "1:8")


@dataclass(frozen=True, kw_only=True)
class System:
    """One row of the table.

    Members
    -------
    label
        What the row is called.
    model
        Name of the registered model.
    size
        Pixels of a side, or tokens, where they are not those of `models.registry.model_info`.
    patterns
        As `nmforge.arguments.parse_table` reads them, and "dense".
    note
        What a reader of the row should know.
    """

    label: str
    model: str
    size: int | None = None
    patterns: tuple[str, ...] = PATTERNS
    note: str = ""


_SYSTEMS = (
    System(label="MiniLM-L6", model="minilm_l6", patterns=(*PATTERNS, TRANSFORMER)),
    System(label="BERT-base", model="bert_base", patterns=(*PATTERNS, TRANSFORMER)),
    System(label="DeiT-T", model="deit_tiny"),
    System(label="CeiT-T", model="ceit_tiny"),
    System(label="Swin-T", model="swin_tiny"),
    System(label="LLaMA + Adapter, small", model="llama_adapter_small", note="prefill"),
    System(label="ResNet-18", model="resnet18", size=64),
    System(label="ResNet-50", model="resnet50", size=128),
    System(label="MobileNetV2", model="mobilenet_v2", size=96),
    System(label="RegNetX-400MF", model="regnet_x_400mf", size=128),
    System(label="ODConv-ResNet-18 4x", model="odconv_resnet18_4x", size=64),
    System(label="DG-Net-ResNet-50", model="dgnet_resnet50", size=128),
    System(label="Deformable-DETR + FeatAug", model="deformable_detr_r50", size=128,
           note="FeatAug transforms features in training alone"),
    System(label="Group R-CNN", model="group_rcnn_r50", size=128, note="the part before the points"),
    System(label="MaskFormer", model="maskformer_r50", size=128),
    System(label="PFT", model="pft_r50", size=128, note="a reconstruction"),
)  # fmt: skip
ZOO: Mapping[str, System] = {system.model: system for system in _SYSTEMS}
"""The systems by the names of their models, in the order of the table."""


def point_file(folder: Path, model: str, pattern: str, *, rtl: bool = False) -> Path:
    """Where one measurement is kept."""
    return folder / f"{model}-{pattern_label(pattern).replace(':', 'of')}{'-rtl' if rtl else ''}.json"


def pattern_label(pattern: str) -> str:
    """N:M, "dense", or "mix"."""
    table = {} if pattern == DENSE else parse_table(pattern)
    return DENSE if not table else str(table["*"]) if set(table) == {"*"} else "mix"


def inputs_of(system: System) -> tuple[Input, ...]:
    """The model's inputs, in the size of the row."""
    given = model_info(system.model).inputs
    if system.size is None:
        return given
    tail = (system.size,) * (2 if len(given[0].shape) == 4 else 1)
    return tuple(Input(item.name, (*item.shape[: -len(tail)], *tail), item.dtype) for item in given)


def build(system: System, pattern: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The network with random weights, pruned to a pattern, and random inputs; the same each time."""
    torch.manual_seed(0)
    info, model = model_info(system.model), create_model(system.model)
    part = model if info.counted is None else info.counted(model).eval()
    generator = torch.Generator().manual_seed(1)
    made = [
        torch.randn(item.shape, generator=generator) if item.dtype.is_floating_point
        else torch.randint(1, 100, item.shape, generator=generator, dtype=item.dtype)
        for item in inputs_of(system)
    ]  # fmt: skip
    if pattern != DENSE:
        sparsify(part, parse_table(pattern), method="magnitude")
        finalize(part)
    _settle(part, made)
    return part, tuple(made)


def _settle(part: nn.Module, inputs: list[Tensor]) -> None:
    """Give batch normalisations the statistics of random inputs: with their first ones, values of random weights grow or vanish
    from layer to layer."""
    norms = [module for module in part.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = None
    if norms:
        with torch.no_grad():
            part(*(torch.cat([x, x.flip(-1)]) for x in inputs))
    for norm in norms:
        norm.eval()


def measure(system: System, pattern: str, arch: str, *, rtl: bool = False) -> dict[str, Any]:
    """Compile one network with one pattern and run it on the cycle engine, or with ``rtl`` on the RTL, checked; JSON values."""
    network, inputs = build(system, pattern)
    return {
        "system": settings(system), "pattern": pattern, "arch": arch, "parameters": _parameters(system),
        "macs_network": count(network, inputs).macs, **measure_network(network, inputs, arch, rtl=rtl),
    }  # fmt: skip


def measure_network(
    network: nn.Module, inputs: Any, arch: str | Arch, *, rtl: bool = False, **options: Any
) -> dict[str, Any]:
    """Compile any network, calibrated on its inputs, and run it on the cycle engine, or with ``rtl`` on the RTL; JSON values.

    With ``rtl`` also: whether every byte agreed, whether the cycle engine has every counter of the RTL, whether the results of
    the RTL are those of the integer reference, and how far they are from the float network's (`nmforge.agreement`).
    ``options`` are those of `nmforge.compile`.
    """
    start, cpu = time.monotonic(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights, calibrated on one random input: what the table says of itself
        program = compile(network, inputs, arch=arch, calibration=[inputs], **options)
    found = {
        "sources": sources(), **_places(program), "compile_s": round(time.monotonic() - start, 1),
        "compile_cpu_s": round(time.process_time() - cpu, 1), "peak_rss_bytes": peak_bytes(),
    }  # fmt: skip
    cycle = simulate(program, engine="cycle")
    found |= {"engine": "cycle", "cycles": cycle.cycles, "utilisation": cycle.utilisation, "memory": cycle.memory.to_dict()}
    return found | rtl_agreement(network, program, inputs, cycle) if rtl else found


def peak_bytes() -> int:
    """Most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def settings(system: System) -> dict[str, Any]:
    """What a kept measurement must agree with to be one of this row."""
    return {name: value for name, value in asdict(system).items() if name in ("model", "size")}


@functools.cache
def sources() -> str:
    """Hash of all that decides cycles: a reader can tell whether two measurements are of one compiler and one accelerator."""
    root, digest = Path(__file__).resolve().parent.parent, hashlib.sha256()
    for folder in ("compiler", "hw", "sim/cpp"):
        for file in sorted(file for file in (root / folder).rglob("*") if file.suffix in (".py", ".hpp", ".cpp")):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _parameters(system: System) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in create_model(system.model).parameters())


def _places(program: Program | PartitionedProgram) -> dict[str, Any]:
    """What of the network is where."""
    report, stages = program.report(), program.stages if isinstance(program, PartitionedProgram) else (program,)
    dense, stored = program.weight_bytes
    return {
        "stages": len(stages), "programs": sum(isinstance(stage, Program) for stage in stages),
        "macs": dict(report.macs), "host_share": report.host_share, "moved": report.moved,
        "weight_bytes_dense": dense, "weight_bytes": stored, "instructions": program.instruction_count,
        "memory_bytes": program.memory_bytes, "effective_macs": program.effective_macs,
    }  # fmt: skip


def _measure_all(request: Mapping[str, Any], done: Callable[[str], None]) -> None:
    """Measure each pattern of a request (`nmforge.zoo_table.collect`) and keep it; ``done`` hears of each."""
    system, folder, rtl = System(**request["system"]), Path(request["folder"]), request["rtl"]
    for pattern in request["patterns"]:
        try:
            found = measure(system, pattern, request["arch"], rtl=rtl)
        except (ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as error:
            # a network that does not compile must not cost the others: its row says so; tools that are missing are another matter
            found = {
                "system": settings(system), "pattern": pattern, "arch": request["arch"],
                "error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}",
            }  # fmt: skip
        write_text(point_file(folder, system.model, pattern, rtl=rtl), json.dumps(found, indent=1) + "\n")
        done(pattern)


if __name__ == "__main__":  # a process of its own for each network: what it needs, and how it ends, is its own affair
    torch.set_num_threads(1)
    _measure_all(json.loads(sys.argv[1]), lambda pattern: print(json.dumps({"pattern": pattern}), flush=True))
