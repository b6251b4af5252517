"""`nmforge train`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from algo.idp import IDPConfig
from algo.nm import NM
from algo.train import TrainConfig
from nmforge.arguments import pattern_text
from nmforge.console import progress_bars
from nmforge.sentiment import SentimentConfig, prepare, train

__all__ = ["run_training"]


def run_training(
    pattern: dict[str, NM],
    folder: Path,
    *,
    dense_epochs: int,
    epochs: int,
    sentences: int,
    held_out: int,
    seed: int,
    fresh: bool,
) -> dict[str, Any]:
    """Train, and say what came of it as JSON values."""
    plain = SentimentConfig()
    config = SentimentConfig(
        sentences=sentences,
        dense=replace(plain.dense, epochs=dense_epochs, seed=seed),
        idp=IDPConfig(train=TrainConfig(epochs=epochs, lr=plain.idp.train.lr, seed=seed)),
    )
    data = prepare(seed, test_size=held_out, max_length=config.max_length, model=config.model)
    with progress_bars() as progress:
        result = train(pattern, folder, data=data, fresh=fresh, config=config, progress=progress)
    return {
        "pattern": pattern_text(pattern),
        "patterns": {name: str(nm) for name, nm in result.patterns.items()},
        "dense": str(result.dense_folder),
        "sparse": str(result.sparse_folder),
        "accuracy": {"float_dense": result.dense_accuracy, "float_sparse": result.sparse_accuracy},
        "held_out": len(data.test),
        "stages": [
            {"name": s.name, "accuracy": s.accuracy, "seconds": round(s.seconds, 1), "folder": str(s.folder)}
            for s in result.stages
        ],
        "wall_s": round(result.seconds, 1),
    }
