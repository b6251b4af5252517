"""Networks whose cycles are measured: encoder stacks with random weights, in the shapes of published models."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from algo.sparsify import finalize, sparsify
from compiler.program import Program
from hw.arch import Arch
from models.bert import BertConfig, BertModel
from nmforge.api import compile

__all__ = ["WORKLOADS", "Workload", "build", "compile_workload"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """An encoder stack: `layers` of `hidden` channels, `heads` heads and `intermediate` channels, on `batch` sequences of
    `length` tokens.

    ``"post"`` normalises after each residual and masks padding (BERT), ``"pre"`` normalises before each block and has no mask
    (ViT).
    """

    title: str
    hidden: int
    heads: int
    intermediate: int
    batch: int
    length: int
    layers: int = 1
    norm: Literal["post", "pre"] = "post"


WORKLOADS: dict[str, Workload] = {
    "bert-128": Workload(title="BERT-base, n = 128", hidden=768, heads=12, intermediate=3072, batch=1, length=128),
    "bert-384": Workload(title="BERT-base, n = 384", hidden=768, heads=12, intermediate=3072, batch=1, length=384),
    "deit-t": Workload(title="DeiT-T, n = 197, batch 8", hidden=192, heads=3, intermediate=768, batch=8, length=197, norm="pre"),
    "minilm-32": Workload(title="MiniLM-L6, n = 32, batch 8", hidden=384, heads=12, intermediate=1536, batch=8, length=32),
    "minilm-128": Workload(title="MiniLM-L6, n = 128, batch 8", hidden=384, heads=12, intermediate=1536, batch=8, length=128),
}
"""One layer of each; ``dataclasses.replace(workload, layers=12)`` for the whole model."""


class _PreNormLayer(nn.Module):
    def __init__(self, hidden: int, heads: int, intermediate: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.query, self.key, self.value, self.output = (nn.Linear(hidden, hidden) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, intermediate), nn.Linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        query, key, value = (layer(normed).unflatten(2, (self.heads, -1)).transpose(1, 2)
                             for layer in (self.query, self.key, self.value))
        x = x + self.output(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def build(workload: Workload, *, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network with random weights, and random inputs."""
    torch.manual_seed(seed)
    x = torch.randn(workload.batch, workload.length, workload.hidden)
    if workload.norm == "pre":
        layers = [_PreNormLayer(workload.hidden, workload.heads, workload.intermediate) for _ in range(workload.layers)]
        return nn.Sequential(*layers).eval(), {"input": x}
    config = BertConfig(layers=workload.layers, hidden=workload.hidden, heads=workload.heads,
                        intermediate=workload.intermediate, vocabulary=1)
    mask = torch.ones(workload.batch, workload.length, dtype=torch.int64)
    return BertModel(config).encoder.eval(), {"hidden_states": x, "attention_mask": mask}


def compile_workload(
    workload: Workload, pattern: str | Mapping[str, str] | None, arch: str | Arch, *, seed: int = 0
) -> tuple[Program, dict[str, Tensor]]:
    """Prune by magnitude to `pattern` (None: dense; a dict of name globs: mixed), compile; also the inputs."""
    model, inputs = build(workload, seed=seed)
    if pattern is not None:
        sparsify(model, pattern, method="magnitude")
        finalize(model)
    return compile(model, inputs, arch=arch, calibration=[inputs]), inputs
