"""How far a simulated network agrees: to the bit with integer reference and cycle engine, nearly with the float network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compiler.partitioned import PartitionedProgram
from compiler.program import Program
from sim.simulate import Run, simulate

__all__ = ["NOISE", "float_agreement", "rtl_agreement"]

NOISE = 0.01
"""Noise by which the float network's own stability is told, as a part of a layer's output: what rounding normally distributed
values to 8 bits makes (41 dB)."""


def rtl_agreement(network: nn.Module, program: Program | PartitionedProgram, inputs: Any, cycle: Run) -> dict[str, Any]:
    """A checked run of the RTL beside the cycle engine's, the integer reference's and the float network's; JSON values."""
    run, reference = simulate(program, inputs), simulate(program, inputs, engine="reference")
    return {
        "engine": run.engine, "cycles": run.cycles, "utilisation": run.utilisation, "bit_exact": run.bit_exact,
        "bytes_checked": run.bytes_checked, "counters_equal": run.counters == cycle.counters,
        "results_equal": all(map(torch.equal, _tensors(run.outputs), _tensors(reference.outputs))),
        "outputs_sha256": run.outputs_sha256, "simulated_s": round(run.wall_s, 1),
        **float_agreement(network, inputs, run.outputs),
    }  # fmt: skip


@torch.no_grad()
def float_agreement(network: nn.Module, inputs: Any, outputs: Sequence[Any]) -> dict[str, Any]:
    """``cosine``: least of a network's results with those of its float arithmetic; ``cosine_noisy``: the same of its float
    results with those it has when the output of every Linear layer and convolution is disturbed by `NOISE`. Where that is small,
    the network itself makes much of little, and integers cannot do better."""
    given = (dict(inputs), ()) if isinstance(inputs, Mapping) else ({}, (inputs,) if isinstance(inputs, Tensor) else inputs)
    exact = _tensors(tree_leaves(network(*given[1], **given[0])))
    with _disturbed(network):
        noisy = _tensors(tree_leaves(network(*given[1], **given[0])))
    return {"cosine": _least_cosine(exact, _tensors(outputs)), "cosine_noisy": _least_cosine(exact, noisy)}


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Results; a program leaves out those that are None."""
    return [torch.as_tensor(value) for value in values if value is not None]


def _least_cosine(exact: list[Tensor], got: list[Tensor]) -> float:
    pairs = [(a.double().flatten(), b.double().flatten()) for a, b in zip(exact, got, strict=True)]
    return min(float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs)


@contextmanager
def _disturbed(network: nn.Module) -> Iterator[None]:
    """While open, the outputs of Linear layers and convolutions carry noise, the same each time."""
    generator = torch.Generator().manual_seed(0)

    def disturb(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return output + NOISE * output.std(correction=0) * torch.randn(output.shape, generator=generator)

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    hooks = [module.register_forward_hook(disturb) for module in network.modules() if isinstance(module, kinds)]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # which would pass the hooks of `nn.TransformerEncoderLayer` by
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for hook in hooks:
            hook.remove()
