"""The contract of design.md, section 3: the names a user types."""

import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import nmforge as nf


def test_every_public_name_is_there() -> None:
    for name in nf.__all__:
        assert getattr(nf, name) is not None, name
    wanted = {"NM", "create_model", "list_models", "sparsify", "finalize", "sparsity_report", "verify", "compile",
              "Program", "load", "simulate", "verilog", "Arch", "get_arch", "FisherPruner", "channel_groups", "prune_channels",
              "load_pruned", "count", "UntraceableError"}  # fmt: skip
    assert wanted <= set(nf.__all__) <= set(dir(nf))
    with pytest.raises(AttributeError, match="module 'nmforge' has no attribute 'frobnicate'"):
        _ = nf.frobnicate


def test_importing_does_not_load_torch() -> None:
    code = "import sys, nmforge, nmforge.cli; sys.exit('torch' in sys.modules or 'amaranth' in sys.modules)"
    start = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert time.monotonic() - start < 10  # a fraction of a second on an idle machine


def test_the_contract_in_python(tmp_path) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 12))
    assert nf.NM("2:4").density == 0.5
    nf.sparsify(model, "2:4", method="sr-ste")
    nf.finalize(model)
    assert [str(row.pattern) for row in nf.sparsity_report(model)] == ["2:4", "2:4"]
    nf.verify(model)
    x = torch.randn(2, 5, 16)
    program = nf.compile(model, x, arch="tiny", calibration=[x])
    program.save(tmp_path / "x.nmf")
    run = nf.simulate(nf.load(tmp_path / "x.nmf"), x, engine="isa")
    assert run.bit_exact and run.outputs[0].shape == (2, 5, 12) and run.outputs[0].dtype == torch.float32
    assert float((run.outputs[0] - model(x).detach()).abs().max()) < 0.1


def test_fewer_channels_then_sparse_then_compiled() -> None:
    torch.manual_seed(0)
    sizes = {"layers": 1, "hidden": 16, "heads": 2, "intermediate": 48, "vocabulary": 30, "positions": 16}
    encoder = nf.create_model("tinybert_4", **sizes).encoder
    x = torch.randn(2, 8, 16)
    pruner = nf.FisherPruner(encoder, x, target=0.7, interval=1, units=4)
    while not pruner.done:
        encoder(x).square().mean().backward()
        pruner.step()
    pruner.finish()
    assert nf.count(encoder, x).macs < 0.7 * nf.count(nf.create_model("tinybert_4", **sizes).encoder, x).macs
    nf.sparsify(encoder, "2:4", method="magnitude")
    nf.verify(encoder)
    run = nf.simulate(nf.compile(encoder, x, arch="tiny", calibration=[x]), x, engine="isa")
    assert run.bit_exact and float((run.outputs[0] - encoder(x).detach()).abs().max()) < 0.3


def test_compile_warns_without_calibration() -> None:
    model, x = nn.Linear(8, 8), torch.randn(1, 4, 8)
    with pytest.warns(UserWarning, match="no calibration data"):
        nf.compile(model, x, arch="tiny")
