"""What one measurement of the co-design table says."""

import json

import pytest
import torch

from compiler.compile import compile_model
from models.registry import list_models
from nmforge.zoo import ZOO, System, build, inputs_of, measure, pattern_label, point_file
from sim.simulate import simulate

SMALL = System(label="ViT for digits", model="vit_mnist")


def test_every_network_is_registered_and_has_inputs():
    assert set(ZOO) <= set(list_models())
    for system in ZOO.values():
        assert inputs_of(system) and system.patterns[0] == "dense"


def test_sizes():
    (images,) = inputs_of(System(label="", model="resnet18", size=64))
    assert images.shape == (1, 3, 64, 64)
    tokens = inputs_of(System(label="", model="bert_base", size=16))
    assert [item.shape for item in tokens] == [(1, 16)]


def test_the_same_network_each_time():
    (one, given), (other, again) = build(SMALL, "2:4"), build(SMALL, "2:4")
    assert torch.equal(given[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_labels_and_files(tmp_path):
    assert [pattern_label(text) for text in ("dense", "2:4", "*.a*=2:4,*=1:8")] == ["dense", "2:4", "mix"]
    assert point_file(tmp_path, "x", "2:4", rtl=True) == tmp_path / "x-2of4-rtl.json"


@pytest.mark.parametrize("pattern", ["dense", "2:4"])
def test_a_measurement_says_what_the_parts_say(pattern):
    found = measure(SMALL, pattern, "sta256")
    network, inputs = build(SMALL, pattern)
    program = compile_model(network, inputs, arch="sta256", calibration=[inputs])
    run = simulate(program, engine="cycle")
    assert found["weight_bytes"] == program.weight_bytes[1] and found["parameters"] == 306_826
    assert found["cycles"] <= run.cycles and found["utilisation"] >= run.utilisation  # nf.compile chooses the best order
    assert found["macs"] == dict(program.report().macs) and found["compile_s"] > 0
    json.dumps(found)
