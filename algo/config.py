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
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from algo.distill import DistillConfig
from algo.idp import IDPConfig
from algo.tasks import DataConfig
from algo.train import RunOptions, TrainConfig

__all__ = ["Config", "ConfigError", "MethodOptions", "RunConfig", "dump", "flat", "keys", "load"]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file and the key."""


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """Numbers of the methods; a method takes those it knows."""

    decay: float | None = field(default=None, metadata={"help": "sr-ste, idp: lambda, how strongly pruned weights decay"})
    end: float | None = field(default=None, metadata={"help": "gradual: share of the steps after which N is reached"})
    precondition: float | None = field(default=None, metadata={"help": "step: share of the steps that are dense"})
    freeze: float = field(default=0.25, metadata={"help": "sr-ste, ste, s-ste, step, gradual, idp: share of the steps, at the end, with fixed masks"})
    levels: dict[str, tuple[int, ...]] = field(default_factory=dict, metadata={"help": 'idp: N of each level, such as {"1:8": [4, 2, 1]}'})
    calibration: int = field(default=16, metadata={"help": "wanda, sparsegpt: training batches that they see"})

    def __post_init__(self) -> None:
        IDPConfig(freeze=self.freeze, schedule=self.levels)
        if self.calibration < 1:
            raise ValueError(f"calibration must be >= 1, not {self.calibration!r}")


@dataclass(frozen=True, kw_only=True)
class RunConfig(RunOptions):
    """Where and how a run happens; `algo.train.RunOptions` and what belongs to a whole run."""

    out: Path = field(default=Path("out/train"), metadata={"help": "folder of checkpoints, log and result"})
    save_every: int = field(default=200, metadata={"help": "steps between checkpoints: all that a kill can lose; 0: an epoch"})
    device: Literal["cpu", "cuda", "auto"] = field(default="cpu", metadata={"help": "cpu, cuda, or auto: CUDA if there is any"})
    threads: int | None = field(default=None, metadata={"help": "of torch, in each process; bits repeat for the same number only"})


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole training: dense first if ``dense`` is there, then sparse."""

    task: str = field(default="mnist5k", metadata={"help": "data, model, loss and metric"})
    model: str | None = field(default=None, metadata={"help": "another model than the task's own: a registered name"})
    init: Path | None = field(default=None, metadata={"help": "folder of a model (out/dense of another run) to start from"})
    method: str = field(default="sr-ste", metadata={"help": "N:M method; dense trains without"})
    pattern: str | dict[str, str] = field(default="2:4", metadata={"help": "N:M of the task's layers, or globs of layer names: patterns"})
    exclude: tuple[str, ...] = field(default=(), metadata={"help": "globs of layers that stay dense"})
    seed: int = field(default=0, metadata={"help": "of first weights and training; the split has its own"})
    options: MethodOptions = field(default_factory=MethodOptions, metadata={"help": "of the method"})
    data: DataConfig = field(default_factory=DataConfig, metadata={"help": "what the task reads"})
    dense: TrainConfig | None = field(default=None, metadata={"help": "training before sparsity; null: none"})
    train: TrainConfig | None = field(default_factory=TrainConfig, metadata={"help": "sparse training, for idp each level; null: one-shot only"})
    distill: DistillConfig | None = field(default=None, metadata={"help": "learn from the dense model; null: from labels only"})
    run: RunConfig = field(default_factory=RunConfig, metadata={"help": "where and how; no part of the result"})


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
    """What decides the result, as JSON values: everything but ``run``."""
    plain = _plain(config)
    del plain["run"]
    return plain


def keys(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, default, meaning) of each setting, with dots."""
    for item in dataclasses.fields(kind):
        section = _section(typing.get_type_hints(kind)[item.name])
        if section is None:
            default = item.default if item.default is not dataclasses.MISSING else item.default_factory()  # type: ignore[misc]
            shown = yaml.safe_dump(_plain(default), default_flow_style=True).removesuffix("\n").removesuffix("\n...")
            yield prefix + item.name, shown.strip(), item.metadata["help"]
        else:
            yield from keys(section, f"{prefix}{item.name}.")


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
        reason = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {key or 'the configuration'}: {reason}, not {first['input']!r}" if first["type"] != "value_error"
                          else f"{where}: {key or 'the configuration'}: {reason}") from None


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
