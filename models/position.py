"""Sine encodings of positions: of the cells of a feature map, and of points and boxes.

Ref: A. Vaswani et al., arXiv 1706.03762, section 3.5; N. Carion et al., DETR, arXiv 2005.12872, appendix A.4; S. Liu et al.,
DAB-DETR, arXiv 2201.12329, section 4.2.

Shapes: B images, H and W cells, C channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["encode_coordinates", "inverse_sigmoid", "sine_position"]


def _waves(angles: Tensor, features: int, temperature: float) -> Tensor:
    """(...) -> (..., features): sine and cosine in turn, of falling frequency."""
    exponent = torch.arange(features, dtype=angles.dtype, device=angles.device).div(2, rounding_mode="floor") * 2 / features
    phases = angles[..., None] / temperature**exponent
    return torch.stack([phases[..., 0::2].sin(), phases[..., 1::2].cos()], -1).flatten(-2)


def sine_position(mask: Tensor, channels: int, *, temperature: float = 10000.0, offset: float = 0.0) -> Tensor:
    """Encode where each cell lies in its image.

    Parameters
    ----------
    mask
        Bool (B, H, W), True for cells of the image, False for padding.
    channels
        A multiple of 4: the first half encodes y, the second x.
    offset
        Added to the count of cells, the first being 1; -0.5 (Deformable-DETR) means their centres.

    Returns
    -------
    Tensor
        Float32 (B, channels, H, W).
    """
    if channels % 4:
        raise ValueError(f"channels must be a multiple of 4, not {channels}")
    count = mask.to(torch.float32)
    y, x = count.cumsum(1), count.cumsum(2)
    y = (y + offset) / (y[:, -1:, :] + 1e-6) * (2 * math.pi)
    x = (x + offset) / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
    halves = [_waves(angles, channels // 2, temperature) for angles in (y, x)]
    return torch.cat(halves, -1).permute(0, 3, 1, 2)


def encode_coordinates(coordinates: Tensor, features: int, *, temperature: float = 10000.0) -> Tensor:
    """Encode fractions of the image: (..., K) -> (..., K * features), one block of ``features`` per coordinate, in order."""
    return _waves(coordinates * (2 * math.pi), features, temperature).flatten(-2)


def inverse_sigmoid(x: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Logits of numbers in [0, 1]; nearer to 0 or 1 than ``eps`` they count as ``eps`` away."""
    x = x.clamp(min=0, max=1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
