"""The co-design table: kept, continued, and shown."""

import json

import pytest

from hw.arch import get_arch
from nmforge.errors import BadInputError
from nmforge.zoo import System, point_file, settings
from nmforge.zoo_table import chosen_systems, collect, drawing, markdown, recall, rows

ARCH = get_arch("sta256")
SMALL = System(label="ViT for digits", model="vit_mnist", patterns=("dense", "2:4"))
WRONG = System(label="of a size that does not fit", model="vit_mnist", size=29, patterns=("dense",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made, done = tmp_path_factory.mktemp("zoo"), []
    collect([SMALL], ARCH, made, done=lambda *what: done.append(what))
    assert done == [("vit_mnist", "dense"), ("vit_mnist", "2:4")]
    return made


def test_what_is_there_is_not_measured_again(folder, monkeypatch):
    monkeypatch.setattr("nmforge.zoo_table.subprocess.Popen", None)
    done = []
    collect([SMALL], ARCH, folder, done=lambda *what: done.append(what))
    assert len(done) == 2


def test_other_sources_are_measured_again_if_wanted(folder, monkeypatch):
    measured = []
    monkeypatch.setattr("nmforge.zoo_table._measure", lambda system, patterns, *_: measured.append(patterns))
    collect([SMALL], ARCH, folder, fresh=True, done=lambda *_: None)
    assert measured == []
    monkeypatch.setattr("nmforge.zoo_table.sources", lambda: "others")
    collect([SMALL], ARCH, folder, done=lambda *_: None)
    assert measured == []
    collect([SMALL], ARCH, folder, fresh=True, done=lambda *_: None)
    assert measured == [["dense", "2:4"]]


def test_rows(folder):
    dense, sparse = rows([SMALL], ARCH, folder)
    assert dense["speedup"] == 1 and sparse["speedup"] == dense["cycles"] / sparse["cycles"] > 1
    assert sparse["ideal_speedup"] >= sparse["speedup"] and sparse["weight_bytes"] < dense["weight_bytes"]
    assert dense["rtl"] is None and dense["input"] == "1x28x28"
    assert rows([SMALL], get_arch("sta1024"), folder) == []  # another accelerator: not measured


def test_the_mark_of_the_rtl_comes_from_a_recorded_run_alone(folder):
    point = recall(folder, SMALL, "dense", ARCH.name)
    file = point_file(folder, SMALL.model, "dense", rtl=True)
    for change, mark in (({}, True), ({"cycles": point["cycles"] + 1}, False), ({"bit_exact": False}, False)):
        file.write_text(json.dumps({**point, "bit_exact": True, **change}))
        assert rows([SMALL], ARCH, folder)[0]["rtl"] is mark
    file.write_text("{")  # damaged
    assert rows([SMALL], ARCH, folder)[0]["rtl"] is None
    file.unlink()


def test_another_size_is_another_row(folder):
    assert recall(folder, System(label="", model="vit_mnist", size=14), "dense", ARCH.name) is None
    assert recall(folder, SMALL, "1:8", ARCH.name) is None


def test_a_network_that_fails_says_so_in_its_row(tmp_path):
    collect([WRONG], ARCH, tmp_path, done=lambda *_: None)
    (row,) = rows([WRONG], ARCH, tmp_path)
    assert "must be" in row["error"] and "| fails: " in markdown([row])


def test_text_and_picture(folder):
    table = rows([SMALL], ARCH, folder)
    lines = markdown(table).splitlines()
    assert lines[2].startswith("| ViT for digits | 1x28x28 | 0.3 M | 0.0167 G | 0.0% |")
    assert lines[3].startswith("|  |  |  |  |  |  | 2:4 |") and len({line.count("|") for line in lines[:4]}) == 1
    assert drawing(table, "sta256")[:4] == b"\x89PNG"


def test_names():
    assert [system.model for system in chosen_systems(["resnet18", "minilm_l6"])] == ["minilm_l6", "resnet18"]
    with pytest.raises(BadInputError, match="unknown network of the table 'resnet'"):
        chosen_systems(["resnet"])


def test_settings_say_what_a_measurement_is_of():
    assert settings(WRONG) == {"model": "vit_mnist", "size": 29}
