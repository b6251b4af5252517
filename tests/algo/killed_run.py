"""A run that tests/algo/test_resume.py kills: python killed_run.py FOLDER. Everything that has state takes part."""

import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from algo.checkpoint import write_tensors
from algo.sparsify import freeze_masks, sparsify
from algo.train import RunOptions, TrainConfig, TrainResult, train

EPOCHS, BATCHES = 6, 11
CONFIG = TrainConfig(epochs=EPOCHS, lr=0.01, schedule="cosine", accumulate=2, ema=0.9, amp="bf16")
STEPS = EPOCHS * 6


def net() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.3), nn.Linear(32, 3))
    sparsify(model, {"0": "2:4"})
    return model


def batches(epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.rand(epoch + 1)  # draws from the global generator: resuming must not mind
    generator = torch.Generator().manual_seed(epoch)
    x = torch.randn(BATCHES, 12, 8, generator=generator)
    return [(batch, batch[:, :3].argmax(1)) for batch in x]


def run(folder: Path, pause: float = 0.0) -> TrainResult:
    model = net()

    def before_step(model: nn.Module, step: int, steps: int) -> None:
        time.sleep(pause)
        if step >= 0.75 * steps:
            freeze_masks(model)

    result = train(
        model, batches, lambda model, batch: F.cross_entropy(model(batch[0]).float(), batch[1]), CONFIG,
        checkpoint=folder / "step.safetensors", before_step=before_step, run=RunOptions(save_every=2, log=folder),
        evaluate=lambda model: float((model(batches(99)[0][0]).argmax(1) == batches(99)[0][1]).float().mean()),
    )  # fmt: skip
    write_tensors(folder / "result.safetensors", model.state_dict())
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), pause=0.03)
