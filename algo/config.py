"""One YAML file, one training: read, overridden, checked, and written back.

A file names only what differs from the defaults, and may build on others: ``base: [mnist5k, methods/sr-ste]``, files beside it
or ready ones; what comes later wins.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from algo.distill import DistillConfig
from algo.idp import IDPConfig
from algo.settings import section, setting
from algo.tasks import DataConfig
from algo.train import RunOptions, TrainConfig

__all__ = ["Config", "ConfigError", "MethodOptions", "RunConfig", "dump", "flat", "keys", "load", "reference"]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file and the key."""


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """Numbers of the methods; a method takes those it knows."""

    decay: float | None = setting(None, "sr-ste, idp: lambda, how strongly pruned weights decay")
    end: float | None = setting(None, "gradual: share of the steps after which N is reached")
    precondition: float | None = setting(None, "step: share of the steps that are dense")
    freeze: float = setting(0.25, "share of the steps, at the end, in which masks stay")
    levels: dict[str, tuple[int, ...]] = section(dict, 'idp: N of each level, such as {"1:8": [4, 2, 1]}')
    family: bool = setting(False, "idp: every N from M-1 down, each a model, instead of about half at each level")
    budget: dict[str, int] = section(dict, 'idp: epochs of single levels, such as {"1:8": 4}; else train.epochs')
    inherit: Literal["weights", "second-order"] = setting("weights", "idp: second-order starts each level by SparseGPT")
    floor: float | None = setting(None, "idp: stop after the first level whose accuracy is below")
    calibration: int = setting(16, "wanda, sparsegpt, idp second-order: training batches that they see")

    def __post_init__(self) -> None:
        IDPConfig(freeze=self.freeze, schedule=self.levels, budget=self.budget)
        if self.calibration < 1:
            raise ValueError(f"calibration must be >= 1, not {self.calibration!r}")


@dataclass(frozen=True, kw_only=True)
class RunConfig(RunOptions):
    """Where and how a run happens; `algo.train.RunOptions` and what belongs to a whole run."""

    out: Path = setting(Path("out/train"), "folder of checkpoints, log and result")
    save_every: int = setting(200, "steps between checkpoints: all that a kill can lose; 0: an epoch")
    flips_every: int = setting(0, "steps between counts of the mask bits that changed (flips.csv, flips.png); 0: none")
    device: Literal["cpu", "cuda", "auto"] = setting("cpu", "cpu, cuda, or auto: CUDA if there is any")
    threads: int | None = setting(None, "of torch, in each process; bits repeat for the same number only")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole training: dense first if ``dense`` is there, then sparse."""

    task: str = setting("mnist5k", "data, model, loss and metric")
    model: str | None = setting(None, "another model than the task's own: a registered name")
    init: Path | None = setting(None, "folder of a model (out/dense of another run) to start from")
    method: str = setting("sr-ste", "N:M method; dense trains without")
    pattern: str | dict[str, str] = setting("2:4", "N:M of the task's layers, or globs of layer names: patterns")
    exclude: tuple[str, ...] = setting((), "globs of layers that stay dense")
    seed: int = setting(0, "of first weights and training; the split has its own")
    options: MethodOptions = section(MethodOptions, "of the method")
    data: DataConfig = section(DataConfig, "what the task reads")
    dense: TrainConfig | None = setting(None, "training before sparsity; null: none")
    train: TrainConfig | None = section(TrainConfig, "sparse training, for idp each level; null: one-shot only")
    distill: DistillConfig | None = setting(None, "learn from the dense model; null: from labels only")
    run: RunConfig = section(RunConfig, "where and how; no part of the result")


def load(
    sources: Sequence[str | Path], overrides: Iterable[str] = (), *, ready: Path | None = None
) -> Config:
    """Read configurations, later ones over earlier ones, then overrides.

    Parameters
    ----------
    sources
        YAML files, or names of ready ones.
    overrides
        ``"train.lr=1e-3"``; values are YAML.
    ready
        Folder of the ready configurations.

    Raises
    ------
    ConfigError
        No such file, not YAML, an unknown key (with near ones), or a value of the wrong kind.
    """
    merged: dict[str, Any] = {}
    for source in sources:
        merged = _merge(merged, _read(source, ready, ()))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not (key.strip() and equals):
            raise ConfigError(f"--set takes KEY=VALUE, such as train.lr=1e-3, not {text!r}")
        nested: Any = _parse(value, f"--set {key}")
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        _check_keys(nested, Config, "", f"--set {key}")
        merged = _merge(merged, nested)
    return _build(merged, ", ".join(map(str, sources)) or "the configuration")


def dump(config: Config) -> str:
    """The whole configuration as YAML that `load` reads."""
    return yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)


def flat(config: Config) -> dict[str, Any]:
    """What decides the result, as JSON values: everything but ``run`` and the number of threads that load data."""
    plain = _plain(config)
    del plain["run"], plain["data"]["workers"]
    return plain


def keys(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, default, meaning) of each setting, with dots."""
    for item in dataclasses.fields(kind):
        section = _section(typing.get_type_hints(kind)[item.name])
        if section is None:
            default = getattr(kind(), item.name)
            shown = yaml.safe_dump(_plain(default), default_flow_style=True).removesuffix("\n").removesuffix("\n...")
            yield prefix + item.name, shown.strip(), item.metadata["help"]
        else:
            yield from keys(section, f"{prefix}{item.name}.")


def reference() -> str:
    """Text of ``docs/configuration.md``."""
    titles = {
        "": "The training",
        "data": "`data`: what the task reads",
        "options": "`options`: numbers of the method",
        "dense": "`dense` and `train`: the two stages, each with these keys",
        "distill": "`distill`: learning from the dense model",
        "run": "`run`: where and how; no part of the result",
    }
    lines = [
        "# Configuration of a training",
        "",
        "Generated from the declarations (`python -m algo.config > docs/configuration.md`). How to use it is in",
        "[training.md](training.md). A default of `null` means: not given. The sections `dense` and `distill` are `null` by",
        "default, and have the defaults below once a key of theirs is given.",
    ]
    for part, title in titles.items():
        rows = [(key, default, meaning) for key, default, meaning in keys() if key.rpartition(".")[0] == part]
        lines += ["", f"## {title}", "| key | default | meaning |", "|---|---|---|"]
        lines += [f"| `{key.rpartition('.')[2]}` | `{default}` | {meaning} |" for key, default, meaning in rows]
    return "\n".join(lines) + "\n"


class _Loader(yaml.SafeLoader):
    """YAML whose ``2:4`` is a text, not the base-60 number 124, and whose ``1e-3`` is a number."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rows if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")]
        for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+\.[0-9]*([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.[0-9]+([eE][-+]?[0-9]+)?)$"),
    list("-+.0123456789"),
)


# -- reading ----------------------------------------------------------------------------------------------------------


def _read(source: str | Path, ready: Path | None, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = _find(source, ready, seen)
    if path in seen:
        raise ConfigError(f"{path}: base leads back to itself")
    try:
        values = _parse(path.read_text(encoding="utf-8"), str(path)) or {}
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: keys and values are expected, not {type(values).__name__}")
    bases = values.pop("base", [])
    _check_keys(values, Config, "", str(path))
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        merged = _merge(merged, _read(base, ready, (*seen, path)))
    return _merge(merged, values)


def _find(source: str | Path, ready: Path | None, seen: tuple[Path, ...]) -> Path:
    beside = [seen[-1].parent / source] if seen else [Path(source)]
    named = [] if ready is None else [ready / source, ready / f"{source}.yaml"]
    beside += [path.with_name(path.name + ".yaml") for path in beside]
    for path in (*beside, *named):
        if path.is_file():
            return path
    names = [] if ready is None else sorted(str(path.relative_to(ready).with_suffix("")) for path in ready.rglob("*.yaml"))
    near = difflib.get_close_matches(str(source), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"ready ones: {', '.join(names) or 'none'}"
    raise ConfigError(f"no configuration {source}: {hint}")


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}") from None


def _merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Sections are merged; a pattern of globs, like any value, is replaced."""
    merged = dict(old)
    for key, value in new.items():
        before = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(before, Mapping) and key not in ("pattern", "levels")
        merged[key] = _merge(before, value) if both else value  # type: ignore[arg-type]
    return merged


def _check_keys(values: Mapping[str, Any], kind: type, prefix: str, where: str) -> None:
    hints = typing.get_type_hints(kind)
    known = [item.name for item in dataclasses.fields(kind)]
    for key, value in values.items():
        if key not in known:
            every = [name for name, _, _ in keys()]
            ends = [name for name in every if name.split(".")[-1] == key]
            near = ends or difflib.get_close_matches(f"{prefix}{key}", every, n=2, cutoff=0.6)
            hint = f"did you mean {' or '.join(near[:2])}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key {prefix}{key}: {hint}")
        section = _section(hints[key])
        if section is not None and isinstance(value, Mapping):
            _check_keys(value, section, f"{prefix}{key}.", where)


def _build(values: Mapping[str, Any], where: str) -> Config:
    try:
        return TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("dict[", "function-")))
        given = "" if first["type"] == "value_error" else f", not {first['input']!r}"
        reason = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {key or 'the configuration'}: {reason}{given}") from None


def _section(hint: Any) -> type | None:
    """The dataclass that a field holds, if it holds one."""
    for kind in typing.get_args(hint) if isinstance(hint, UnionType) else (hint,):
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            return kind
    return None


def _plain(value: Any) -> Any:
    """YAML and JSON values."""
    if dataclasses.is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


if __name__ == "__main__":
    print(reference(), end="")
