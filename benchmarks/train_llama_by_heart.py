"""Can an adapter learn? Sixteen examples of ``train_llama`` by heart: by an adapter alone and, as a control, by all weights.

The base, the prompts and the adapter are those of ``train_llama``; its recipe is for many examples, here all of them are in every
step, at a constant rate after the warm-up. Restartable (``out/train_llama``).
"""

from __future__ import annotations

import copy

import torch

from algo.instruct import example_batches
from algo.train import TrainConfig
from benchmarks import Table
from benchmarks.train_llama import ADAPTER, FEW, load_data, pretrained, score_of, stage
from models import LlamaAdapter, create_model

__all__ = ["run"]

TRAININGS = {
    "adapter": TrainConfig(epochs=800, lr=0.05, weight_decay=0.0, beta2=0.95, warmup=0.1, schedule="constant", clip=1.0),
    "all weights": TrainConfig(epochs=60, lr=1e-3, weight_decay=0.0, beta2=0.95, warmup=0.1, schedule="constant", clip=1.0),
}
"""An epoch is one step."""


def run() -> list[Table]:
    """Loss and whole answers before and after, and what became of the base."""
    torch.set_num_threads(1)
    data = load_data(create_model("llama_small").config.vocabulary)
    base, _ = pretrained(data)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    rows = []
    for name, config in TRAININGS.items():
        torch.manual_seed(1)
        own = copy.deepcopy(base)
        model = LlamaAdapter(own, ADAPTER) if name == "adapter" else own.requires_grad_()
        learned = sum(value.numel() for value in model.parameters() if value.requires_grad)
        first, _ = score_of(model, data.few)
        batches = example_batches(data.few, size=None, batch_size=FEW, seed=0)
        stage(f"by_heart_{name.replace(' ', '_')}", model, batches, config, None)
        last, right = score_of(model, data.few)
        same = sum(torch.equal(value, before[key]) for key, value in own.state_dict().items())
        rows.append((name, learned, config.epochs, first, last, 100 * right, f"{same} of {len(before)}"))
    columns = ("what learns", "numbers", "steps", "loss, start", "loss", "right (%)", "tensors of the base as they were")
    note = f"{FEW} training examples, half of each instruction, all in every step; right: the whole answer by greedy decoding."
    return [Table("Sixteen examples by heart", columns, tuple(rows), note)]
