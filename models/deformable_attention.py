"""Multi-scale deformable attention: each query looks at a few sampled points of every feature map.

Ref: X. Zhu et al., Deformable DETR, arXiv 2010.04159, eq. 3 and appendix A.2; pure PyTorch (`F.grid_sample`).

Shapes: B images, Q queries, S cells of all L maps one after the other, C channels, P points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DeformableAttention", "sample_levels"]


def sample_levels(value: Tensor, sizes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples; what lies outside a map counts as zero.

    Parameters
    ----------
    value
        Float (B, S, heads, C / heads).
    sizes
        Height and width of each map.
    locations
        Float (B, Q, heads, L, P, 2): x and y as fractions of the map.
    weights
        Float (B, Q, heads, L, P).

    Returns
    -------
    Tensor
        Float (B, Q, C).
    """
    batch, _, heads, depth = value.shape
    queries = locations.shape[1]
    samples = []
    for number, (part, size) in enumerate(zip(value.split([height * width for height, width in sizes], 1), sizes)):
        image = part.permute(0, 2, 3, 1).reshape(batch * heads, depth, *size)
        grid = 2 * locations[:, :, :, number].transpose(1, 2).flatten(0, 1) - 1  # (B heads, Q, P, 2)
        samples.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    mixed = (torch.cat(samples, -1) * weights).sum(-1)  # (B heads, C / heads, Q)
    return mixed.view(batch, heads * depth, queries).transpose(1, 2)


class DeformableAttention(nn.Module):
    """Attention whose places come from the query: (B, Q, C) -> (B, Q, C)."""

    def __init__(self, hidden: int, *, heads: int = 8, levels: int = 4, points: int = 4) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(hidden, heads * levels * points * 2)
        self.attention_weights = nn.Linear(hidden, heads * levels * points)
        self.value = nn.Linear(hidden, hidden)
        self.output = nn.Linear(hidden, hidden)
        self._initialise()

    def _initialise(self) -> None:
        """Head h looks in direction 2 pi h / heads, point p (from 1) at a distance of p cells, with equal weights."""
        angles = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)[:, None]
        places = (directions[:, None, None] * steps).expand(self.heads, self.levels, self.points, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(places.reshape(-1))
        for layer in (self.attention_weights, self.value, self.output):
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.attention_weights.weight)
        for layer in (self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)

    def forward(
        self, query: Tensor, reference: Tensor, memory: Tensor, sizes: Sequence[tuple[int, int]], inside: Tensor
    ) -> Tensor:
        """Look around reference points or boxes.

        Parameters
        ----------
        query
            Float (B, Q, C), position included.
        reference
            Float (B, Q, L, 2), x and y as fractions of each map, offsets then counting cells; or (B, Q, L, 4), cxcywh, offsets
            then counting half sides over P.
        memory
            Float (B, S, C): the cells to look at.
        sizes
            Height and width of each map; their products sum to S.
        inside
            Bool (B, S), False for padding, whose values count as zero.
        """
        value = self.value(memory).masked_fill(~inside[..., None], 0.0).unflatten(-1, (self.heads, -1))
        shape = (self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(query).unflatten(-1, (*shape, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.heads, -1)).softmax(-1).unflatten(-1, shape[1:])
        centre = reference[:, :, None, :, None, :2]
        if reference.shape[-1] == 2:
            cells = offsets.new_tensor([(width, height) for height, width in sizes])[:, None]
            locations = centre + offsets / cells
        else:
            locations = centre + offsets / self.points * reference[:, :, None, :, None, 2:] * 0.5
        return self.output(sample_levels(value, sizes, locations, weights))
