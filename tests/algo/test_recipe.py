import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import algo.recipe
from algo.config import Config, DataConfig, MethodOptions, RunConfig, load
from algo.distill import DistillConfig
from algo.logs import read_log
from algo.methods import METHODS
from algo.recipe import RunMismatchError, run_recipe
from algo.sparsify import pattern_of
from algo.tasks import Task
from algo.train import TrainConfig
from algo.verify import violations


def task() -> Task:
    """Which of four quarters of a row is the largest?"""

    def batch(seed: int, rows: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))
        return x, x.view(rows, 4, 4).sum(2).argmax(1)

    def build(name: str | None) -> nn.Module:
        model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
        model.add_module("name", nn.Identity())
        return model

    return Task(
        name="quarters", classes=tuple("abcd"), build=build, batches=lambda epoch: [batch(100 * epoch + n) for n in range(8)],
        held_out=lambda: [batch(10_000, 200)], inputs=lambda batch: (batch[0],), labels=lambda batch: batch[1],
        layers="[02]", facts={"rows": 32},
    )  # fmt: skip


STAGE = TrainConfig(epochs=3, lr=0.01)


def config(out: Path, **changes: Any) -> Config:
    plain = Config(task="quarters", dense=STAGE, train=STAGE, data=DataConfig(), run=RunConfig(out=out, save_every=3))
    return replace(plain, **changes)


def equal(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns_and_obeys_the_pattern(tmp_path: Path, method: str) -> None:
    outcome = run_recipe(config(tmp_path, method=method), task())
    assert {name: str(nm) for name, nm in outcome.patterns.items()} == {"0": "2:4", "2": "2:4"}
    for layer in (outcome.model[0], outcome.model[2]):
        assert str(pattern_of(layer)) == "2:4" and len(violations(layer.weight.detach(), pattern_of(layer))) == 0
    assert outcome.accuracy["dense"] > 0.6 and outcome.accuracy["final"] > 0.5
    assert outcome.folder == tmp_path / f"2of4-{method}" / "sparse"
    kept = json.loads((tmp_path / "result.json").read_text())
    assert kept["accuracy"] == outcome.accuracy
    stages = list(dict.fromkeys(row["stage"] for row in read_log(tmp_path / "log.csv")))
    assert stages == (["dense", "prune to 3:4", "prune to 2:4"] if method == "idp" else ["dense", f"2of4-{method}"])
    assert load([tmp_path / "config.yaml"]) == config(tmp_path, method=method)
    assert not list(tmp_path.rglob("step.safetensors"))


def test_dense_and_one_shot(tmp_path: Path) -> None:
    dense = run_recipe(config(tmp_path / "a", method="dense", dense=None), task())
    assert dense.patterns == {} and dense.accuracy["final"] > 0.6
    once = run_recipe(config(tmp_path / "b", method="magnitude", dense=None, train=None, init=dense.folder), task())
    assert len(once.patterns) == 2 and once.accuracy["final"] < dense.accuracy["final"]


def test_the_same_again_is_reused_and_a_change_is_named(tmp_path: Path) -> None:
    first = run_recipe(config(tmp_path), task())
    again = run_recipe(config(tmp_path, run=RunConfig(out=tmp_path, save_every=1)), task())
    assert again.seconds == {} and again.accuracy == first.accuracy
    assert equal(first.model, again.model)
    assert set(json.loads((tmp_path / "result.json").read_text())["seconds"]) == {"dense", "2of4-sr-ste"}
    changed = config(tmp_path, train=replace(STAGE, lr=0.02))
    with pytest.raises(RunMismatchError, match=r"holds another run: train.lr was 0.01, is now 0.02. Set it back"):
        run_recipe(changed, task())
    run_recipe(changed, task(), fresh=True)


def test_stopped_and_resumed(tmp_path: Path) -> None:
    whole = run_recipe(config(tmp_path / "whole"), task())

    class Stop(Exception):
        pass

    halting, steps = task(), []

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        steps.append(1)
        if len(steps) == 24 + 11:  # in the sparse stage
            raise Stop
        return task().loss(model, batch)

    object.__setattr__(halting, "loss", loss)
    with pytest.raises(Stop):
        run_recipe(config(tmp_path / "parts"), halting)
    again = run_recipe(config(tmp_path / "parts"), task())
    assert again.resumed_step == 9 and list(again.seconds) == ["2of4-sr-ste"]
    assert equal(whole.model, again.model)


def test_seed_and_distillation(tmp_path: Path) -> None:
    distilled = run_recipe(config(tmp_path / "a", distill=DistillConfig(alpha=0.5)), task())
    assert distilled.accuracy["final"] > 0.5
    other = run_recipe(config(tmp_path / "b", distill=DistillConfig(alpha=0.5), seed=1), task())
    assert not torch.equal(distilled.model[0].weight, other.model[0].weight)


def test_globs_and_exclusions(tmp_path: Path) -> None:
    outcome = run_recipe(config(tmp_path, dense=None, pattern={"0": "1:4", "*": "2:4"}, exclude=("2",)), task())
    assert {name: str(nm) for name, nm in outcome.patterns.items()} == {"0": "1:4"}
    assert outcome.folder.parent.name == "1of4+2of4-sr-ste"


def test_wrong_use(tmp_path: Path) -> None:
    for changes, message in (
        ({"dense": None, "distill": DistillConfig()}, "distill needs a trained teacher"),
        ({"dense": None, "train": None}, "method sr-ste works while the model trains: give train.epochs"),
        ({"dense": None, "train": None, "method": "idp"}, "method idp works while the model trains"),
        ({"dense": None, "train": None, "method": "dense"}, "method dense does nothing but train"),
        ({"dense": None, "method": "sr-st"}, "method must be one of .*sr-ste.*, not 'sr-st'"),
        ({"dense": None, "init": tmp_path / "none"}, "no model in .*none"),
    ):  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run_recipe(config(tmp_path / "x", **changes), task(), fresh=True)


def test_options_reach_the_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    real = algo.recipe.sparsify

    def spy(model: nn.Module, pattern: Any, **options: Any) -> Any:
        seen.update(options)
        return real(model, pattern, **options)

    monkeypatch.setattr(algo.recipe, "sparsify", spy)
    run_recipe(config(tmp_path / "a", dense=None, options=MethodOptions(decay=0.5)), task())
    assert seen == {"method": "sr-ste", "decay": 0.5, "exclude": None, "hold": True}
    run_recipe(config(tmp_path / "b", dense=None, train=None, method="wanda", options=MethodOptions(calibration=3)), task())
    assert seen["hold"] is False and len(seen["calibration"]) == 3 and seen["calibration"][0][0].shape == (32, 16)


def test_idp_family(tmp_path: Path) -> None:
    chosen = config(tmp_path, method="idp", dense=None, pattern="1:4", options=MethodOptions(family=True))
    assert list(run_recipe(chosen, task()).accuracy) == ["3:4", "2:4", "1:4", "final"]


def test_idp_family_is_summed_up_and_stops_at_its_floor(tmp_path: Path) -> None:
    options = MethodOptions(family=True, floor=2.0, budget={"3:4": 1})
    chosen = config(tmp_path, method="idp", dense=None, pattern="1:4", options=options)
    outcome = run_recipe(chosen, task())
    (folder,) = tmp_path.rglob("family.json")
    (level,) = json.loads(folder.read_text())["levels"]  # nothing reaches 200 %
    assert level["name"] == "3:4" and level["accuracy"] == outcome.accuracy["3:4"]
    assert folder.with_name("family.png").read_bytes()[:4] == b"\x89PNG"


def test_flips_are_counted(tmp_path: Path) -> None:
    chosen = config(tmp_path, dense=None)
    run_recipe(replace(chosen, run=replace(chosen.run, flips_every=2)), task())
    lines = (tmp_path / "flips.csv").read_text().splitlines()
    assert lines[0] == "step,layer,sad,weights,rate" and len(lines) > 3
    assert (tmp_path / "flips.png").exists()


def test_another_model_gets_the_pattern_everywhere_but_in_its_head(tmp_path: Path) -> None:
    other = task()
    object.__setattr__(other, "layers", "blocks.*")  # which this model has not
    assert len(run_recipe(config(tmp_path, dense=None, model="other"), other).patterns) == 2


def test_sharded_weights_and_s_ste(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algo.recipe, "world", lambda: 2)
    run = RunConfig(out=tmp_path, parallel="fsdp")
    with pytest.raises(ValueError, match="method s-ste changes weights when its masks are fixed"):
        run_recipe(config(tmp_path, dense=None, method="s-ste", run=run), task())
