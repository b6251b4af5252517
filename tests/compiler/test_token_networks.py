"""Token networks go wholly to the accelerator, and compute what torch computes."""

from functools import cache

import pytest
import torch
from torch.nn import functional as F

import nmforge
from compiler.exported import Exported, export
from compiler.frontend import import_whole
from compiler.ops import Rearrange
from compiler.passes import run_passes
from hw.arch import Arch
from sim.simulate import simulate
from tests.compiler.token_networks import NETWORKS, token_network

SMALL = Arch(name="small", rows=8, lanes=8, lane_depth=128, row_depth=64, psum_depth=64, bus_bytes=16, fifo_beats=32)


@cache
def _exported(name: str) -> Exported:
    """Most of the time of these tests."""
    return export(*token_network(name))


def _compiled(name: str, arch: Arch | str, monkeypatch: pytest.MonkeyPatch) -> nmforge.Program:
    module, inputs = token_network(name)
    monkeypatch.setattr("compiler.variants.export", lambda *_: _exported(name))
    return nmforge.compile(module, inputs, arch=arch, calibration=[inputs], host="forbid", order="operator")


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_is_left_to_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass keeps the values; the integer network comes close to them."""
    module, inputs = token_network(name)
    with torch.no_grad():
        wanted = module(inputs)
    for graph in run_passes(import_whole(_exported(name))):
        (value,) = graph.run(inputs).values()
        torch.testing.assert_close(value.reshape(wanted.shape), wanted, atol=2e-5, rtol=1e-4, msg=graph.stage)
    run = simulate(_compiled(name, SMALL, monkeypatch), inputs, engine="isa")
    assert run.bit_exact, run.mismatches
    assert run.outputs[0].shape == wanted.shape
    assert F.cosine_similarity(run.outputs[0].flatten(), wanted.flatten(), dim=0) > 0.998


@pytest.mark.parametrize("name", ["swin", "mixer", "vit, token", "linear attention"])
def test_the_rtl_computes_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = _compiled(name, "tiny", monkeypatch)
    run = simulate(program, token_network(name)[1])
    assert run.bit_exact, run.mismatches
    assert simulate(program, engine="cycle").cycles == run.cycles


def test_windows_are_copied_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of rows of one tensor has its scale: no rounding."""
    network = _compiled("swin", SMALL, monkeypatch).network
    copies = [op for op in network.ops if isinstance(op, Rearrange) and len({part.tensor for part in op.sources}) == 1]
    scales = [(network.tensors[op.out].scale, network.tensors[op.sources[0].tensor].scale) for op in copies]
    assert len(scales) >= 6 and all(out == given for out, given in scales)


def test_queries_keys_and_values_share_their_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are chosen before they are multiplied: two copies for each block, one for merged patches."""
    network = _compiled("swin", SMALL, monkeypatch).network
    assert sum(isinstance(op, Rearrange) for op in network.ops) == 2 * 3 + 1
