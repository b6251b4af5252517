"""Every pass keeps what random modules compute; so does the partition of those with parts for the host."""

from functools import cache

import pytest
import torch
from torch import Tensor

from algo.modes import plain_attention
from compiler.exported import export
from compiler.frontend import trace
from compiler.graph import Graph
from compiler.partition import partition
from compiler.passes import PASSES, run_passes
from hw.arch import get_arch
from tests.compiler.random_modules import random_case
from tests.compiler.test_partition import run_float

SEEDS = range(24)


@cache
def _stages(seed: int) -> tuple[Graph, ...]:
    module, inputs = random_case(seed)
    graph = trace(module, inputs)
    return (graph, *run_passes(graph))


def _wanted(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    with torch.no_grad(), plain_attention():
        found = module(*inputs)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_pass_keeps_the_result_of_a_random_module(seed):
    module, inputs = random_case(seed)
    wanted = _wanted(module, inputs)
    for graph in _stages(seed):
        for result, right in zip(graph.run(inputs).values(), wanted, strict=True):
            torch.testing.assert_close(
                result.reshape(right.shape), right, atol=2e-4 * float(right.abs().max()), rtol=0, msg=f"after {graph.stage}"
            )


ELSEWHERE = {"fold_gathers", "hoist_rows", "move_fills"}
"""Passes that need more than chance builds here: see test_rotations.py, test_token_networks.py and test_fills.py."""


def test_every_pass_has_something_to_do():
    """A pass that changes none of these graphs would be checked by none of them."""
    idle = {number for number, _ in enumerate(PASSES)}
    for seed in SEEDS:
        stages = _stages(seed)
        idle -= {number for number in idle if _shape(stages[number]) != _shape(stages[number + 1])}
    assert {PASSES[number].__name__ for number in idle} <= ELSEWHERE


def _shape(graph: Graph) -> list[tuple[object, ...]]:
    return [(type(node), node.name, node.inputs, node.shape) for node in graph.nodes.values()] + [graph.outputs]


@pytest.mark.parametrize("seed", range(12))
def test_partitions_of_random_modules(seed):
    module, inputs = random_case(seed, host=True)
    exported = export(module, inputs)
    found = partition(exported, get_arch("tiny"))
    assert found.segments
    for result, right in zip(run_float(found, exported.bind(inputs)), _wanted(module, inputs), strict=True):
        torch.testing.assert_close(result, right, atol=2e-4 * float(right.abs().max()), rtol=0)
