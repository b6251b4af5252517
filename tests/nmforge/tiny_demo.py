"""The demo's flow on a budget of seconds: a small BERT, made-up sentences, the arch tiny."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from algo.idp import IDPConfig
from algo.nm import NM
from algo.train import TrainConfig
from hw.arch import get_arch
from models import create_model
from models.bert import BertClassifier
from nmforge.arguments import parse_pattern
from nmforge.demo import DemoConfig
from nmforge.sentiment import Encoded, SentimentConfig, SentimentData

__all__ = ["config", "data", "model"]

SIZES = {"layers": 1, "hidden": 16, "heads": 2, "intermediate": 32, "vocabulary": 40, "num_classes": 2}
TRAINING = SentimentConfig(
    sentences=24,
    batch_size=8,
    dense=TrainConfig(epochs=1, lr=2e-3),
    idp=IDPConfig(train=TrainConfig(epochs=1, lr=1e-3)),
)


def sentences(count: int, seed: int) -> list[Encoded]:
    """Token 5 is good, token 6 is bad; 4 to 11 tokens."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        length = int(torch.randint(1, 9, (1,), generator=generator))
        ids = torch.randint(7, 40, (length,), generator=generator).tolist()
        found.append(Encoded((1, 5 if number % 2 else 6, *ids, 2), number % 2, f"a <b>sentence</b>, number {number}"))
    return found


def data() -> SentimentData:
    """Training and held-out sentences."""
    return SentimentData(sentences(40, 0), sentences(30, 1), 0)


def model() -> BertClassifier:
    """The same small model at each call."""
    torch.manual_seed(0)
    made = create_model("minilm_l6", **SIZES)  # type: ignore[arg-type]
    assert isinstance(made, BertClassifier)
    return made


def config(folder: Path, pattern: str | Mapping[str, NM] = "2:4", **changes: Any) -> DemoConfig:
    """A demo of three sentences of twelve tokens on the ISA engine."""
    settings: dict[str, Any] = {
        "pattern": parse_pattern(pattern) if isinstance(pattern, str) else pattern,
        "arch": get_arch("tiny"), "out": folder, "batch": 3, "length": 12,
        "calibration": 16, "engine": "isa", "training": TRAINING,
    }  # fmt: skip
    return DemoConfig(**{**settings, **changes})
