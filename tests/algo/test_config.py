from pathlib import Path

import pytest

from algo.config import Config, ConfigError, dump, flat, keys, load, reference


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_defaults_and_round_trip(tmp_path: Path) -> None:
    assert load([]) == Config()
    changes = ["pattern={'blocks.*': 1:4}", "dense.epochs=3", "run.out=x", "options.levels={'1:8': [4, 1]}", "exclude=[head]"]
    config = load([], changes)
    assert config.dense is not None and config.dense.epochs == 3 and config.pattern == {"blocks.*": "1:4"}
    assert load([write(tmp_path, "a.yaml", dump(config))]) == config


def test_patterns_and_powers_of_ten_are_what_they_look_like() -> None:
    config = load([], ["pattern=2:4", "train.lr=1e-3", "train.weight_decay=.5", "train=null"])
    assert config.pattern == "2:4" and config.train is None
    assert load([], ["train.lr=5e-4"]).train.lr == 5e-4


def test_layers_of_files(tmp_path: Path) -> None:
    write(tmp_path, "ready/r8.yaml", "task: r8\ntrain: {epochs: 5, lr: 0.1}\n")
    write(tmp_path, "ready/methods/idp.yaml", "method: idp\n")
    mine = write(tmp_path, "mine.yaml", "base: [r8, methods/idp]\ntrain: {lr: 0.2}\n")
    config = load([mine, "methods/idp"], ["train.epochs=7"], ready=tmp_path / "ready")
    assert (config.task, config.method, config.train.epochs, config.train.lr) == ("r8", "idp", 7, 0.2)
    write(tmp_path, "near.yaml", "base: mine.yaml\nseed: 3\n")
    assert load([tmp_path / "near.yaml"], ready=tmp_path / "ready").seed == 3


def test_errors_name_file_and_key(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", "train: {epoch: 3}\n")
    with pytest.raises(ConfigError, match=r"a.yaml: unknown key train.epoch: did you mean train.epochs"):
        load([file])
    for text, message in (
        ("lr: 3", r"unknown key lr: did you mean dense.lr or train.lr\?"),
        ("zzz: 3", "unknown key zzz: known: task, model"),
        ("train: {lr: fast}", r"train.lr: Input should be a valid number.*, not 'fast'"),
        ("train: {lr: -1}", "train: lr must be > 0, not -1.0"),
        ("train: {amp: fp8}", "train.amp: .*not 'fp8'"),
        ("data: {batch_size: 0}", "data: batch_size must be >= 1, not 0"),
        ("options: {freeze: 2}", r"options: freeze must be in \[0, 1\), not 2"),
        ("[1]", "keys and values are expected, not list"),
        ("a: [", "is not YAML"),
        ("base: a", "base leads back to itself"),
        ("base: b", "no configuration b"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load([file])
    with pytest.raises(ConfigError, match="--set takes KEY=VALUE, such as train.lr=1e-3, not 'train.lr'"):
        load([], ["train.lr"])
    with pytest.raises(ConfigError, match="--set trian.lr: unknown key trian: did you mean train"):
        load([], ["trian.lr=3"])


def test_unknown_file_offers_ready_ones(tmp_path: Path) -> None:
    write(tmp_path, "mnist5k.yaml", "task: mnist5k")
    with pytest.raises(ConfigError, match=r"no configuration mnst5k: did you mean mnist5k\?"):
        load(["mnst5k"], ready=tmp_path)
    with pytest.raises(ConfigError, match="ready ones: mnist5k"):
        load(["zzz"], ready=tmp_path)


def test_what_decides_the_result() -> None:
    config = load([], ["data.folder=a/b"])
    assert "run" not in flat(config) and "workers" not in flat(config)["data"] and flat(config)["data"]["folder"] == "a/b"


def test_every_key_has_a_meaning_and_its_default_loads() -> None:
    rows = list(keys())
    assert len(rows) == len({key for key, _, _ in rows}) > 50 and all(meaning for _, _, meaning in rows)
    assert ("train.lr", "5.0e-05", "highest learning rate") in rows
    overrides = [f"{key}={default}" for key, default, _ in rows if not key.startswith(("dense.", "distill."))]
    assert load([], overrides) == Config()


def test_the_page_is_generated() -> None:
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text() == reference(), "run python -m algo.config > docs/configuration.md"
    for key, default, meaning in keys():
        assert f"| `{key.rpartition('.')[2]}` | `{default}` | {meaning} |" in page.read_text()
