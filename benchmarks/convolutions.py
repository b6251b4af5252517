"""Convolutional networks on sta1024, by the cycle engine: cycles and utilisation for one image and for eight.

Weights are random and the statistics of the batch normalisations are set; neither changes a cycle.
"""

import torch
from torch import nn

from algo.sparsify import finalize, sparsify
from benchmarks import Table
from compiler.compile import compile_model
from models.registry import create_model
from sim.simulate import simulate

__all__ = ["CASES", "run"]

CASES = (("resnet18", 64, "dense", 1), ("resnet18", 64, "2:4", 1), ("resnet18", 64, "dense", 8), ("resnet18", 64, "2:4", 8),
         ("mobilenet_v2", 96, "dense", 1), ("mobilenet_v2", 96, "2:4", 1))
"""Model, pixels a side, weights, images."""


def _model(name: str, pattern: str) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(name)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.7, 1.4)
    if pattern != "dense":
        sparsify(model, pattern, method="magnitude")
        finalize(model)
    return model


def _row(name: str, size: int, pattern: str, images: int) -> tuple[str | int | float | None, ...]:
    x = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(1))
    program = compile_model(_model(name, pattern), x, arch="sta1024", host="forbid", calibration=[x])
    run = simulate(program, engine="cycle")
    return name, f"{size} x {size}", pattern, images, program.macs // images, run.cycles, run.cycles // images, run.utilisation


def run() -> list[Table]:
    """One row a network."""
    return [Table("Convolutional networks on sta1024", ("network", "pixels", "weights", "images", "MACs an image", "cycles",
                  "cycles an image", "utilisation"), tuple(_row(*case) for case in CASES),
                  "Memory latency 64 cycles, 64 bytes a cycle shared by reads and writes.")]
