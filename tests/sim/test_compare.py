"""Layer by layer: float against integers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compiler.compile import compile_model
from sim.compare import Comparison, _layer, compare
from sim.simulate import simulate
from tests.compiler.networks import library_model, retriever

pytestmark = pytest.mark.filterwarnings("ignore:the host's work")


def _mlp() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12), nn.LayerNorm(12)).eval(), torch.randn(9, 12)


def test_figures_are_those_of_the_outputs() -> None:
    module, x = _mlp()
    program = compile_model(module, x, arch="tiny", calibration=[x])
    found = compare(program, module, x)
    assert [layer.source for layer in found.layers] == ["0", "2"]
    wanted, got = module(x).detach().double(), simulate(program, x, engine="isa").outputs[0].double()
    last = found.layers[-1]
    assert last.sqnr == pytest.approx(float(10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum())), rel=1e-4)
    assert last.cosine == pytest.approx(float(torch.cosine_similarity(wanted.flatten(), got.flatten(), dim=0)), rel=1e-6)
    assert last.error == pytest.approx(float((wanted - got).abs().max() / wanted.abs().max()), rel=1e-4)
    assert all(layer.sqnr > 25 for layer in found.layers)


def test_a_bad_layer_is_the_worst(tmp_path: Path) -> None:
    """A layer calibrated on other data than it sees clips, and stands out."""
    module, x = _mlp()
    program = compile_model(module, x / 8, arch="tiny", calibration=[x / 8])
    good = compare(compile_model(module, x, arch="tiny", calibration=[x]), module, x)
    bad = compare(program, module, x)
    assert bad.worst(1)[0].sqnr < good.worst(1)[0].sqnr - 10
    assert "<- worst" in str(bad) and "SQNR" in str(bad)
    bad.plot(tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    bad.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="a plot is written to .svg or .png, not to 'plot.jpg'"):
        bad.plot(tmp_path / "plot.jpg")


def test_smoothed_layers_are_compared_with_what_they_were(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 12)).eval()
    with torch.no_grad():
        module[0].weight[3] *= 40
        module[1].weight[:, 3] /= 40
    x = torch.randn(9, 12)
    plain, smoothed = (
        compare(compile_model(module, x, arch="tiny", calibration=[x], smooth=alpha), module, x) for alpha in (None, 0.5)
    )
    assert len(smoothed.layers) == len(plain.layers)
    assert smoothed.layers[-1].sqnr > plain.layers[-1].sqnr + 3
    assert min(layer.sqnr for layer in smoothed.layers) > 20


def test_parts_of_a_partitioned_program() -> None:
    module, inputs, wanted = library_model("bert")
    program = compile_model(module, inputs, arch="tiny", calibration=[inputs])
    found = compare(program, module, inputs)
    assert len({layer.name for layer in found.layers}) == len(found.layers) >= 16
    assert min(layer.cosine for layer in found.layers) > 0.98
    got = simulate(program, inputs, engine="reference").outputs[0]
    assert float(torch.cosine_similarity(got.flatten(), wanted.flatten(), dim=0)) > 0.99


def test_another_model() -> None:
    module, inputs = retriever()
    program = compile_model(module, inputs, arch="tiny", calibration=[inputs])
    other, x = _mlp()
    with pytest.raises(ValueError, match="the program has 2 parts, the model 1|the program has 2 parts, the model 0"):
        compare(program, other, x)


def test_equal_and_empty_tensors() -> None:
    ones = np.ones(3)
    assert _layer("a", "", "o", ones, ones).sqnr == np.inf
    zero = _layer("a", "", "o", 0 * ones, 0 * ones)
    assert (zero.sqnr, zero.cosine, zero.error) == (np.inf, 1.0, 0.0)
    assert _layer("a", "", "o", 0 * ones, ones).sqnr == -np.inf
    assert Comparison((zero,)).worst() == (zero,)


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 3, 32, batch_first=True, dropout=0.0).eval()
    x, padding = torch.randn(2, 7, 24), torch.arange(7) >= torch.tensor([[7], [3]])
    program = compile_model(layer, {"src": x, "src_key_padding_mask": padding}, arch="tiny",
                            calibration=[{"src": x, "src_key_padding_mask": padding}])
    noisy = torch.where(padding[..., None], 50 * torch.randn(2, 7, 24), x)
    plain, noise = (compare(program, layer, {"src": y, "src_key_padding_mask": padding}) for y in (x, noisy))
    assert [one.sqnr for one in plain.layers] == pytest.approx([one.sqnr for one in noise.layers], abs=1e-3)
    assert min(one.sqnr for one in plain.layers) > 25
