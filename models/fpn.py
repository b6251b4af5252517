"""Feature pyramid network: every map of a backbone gets what the coarser ones know.

Ref: T.-Y. Lin et al., Feature Pyramid Networks, arXiv 1612.03144, section 3; levels P6 and P7: T.-Y. Lin et al., Focal Loss
(RetinaNet), arXiv 1708.02002, section 4; from P5: Z. Tian et al., FCOS, arXiv 1904.01355.

With the stages 2, 3, 4 of a backbone and two extra levels it gives P3 to P7, with all four stages P2 to P5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["FPN", "Extra"]

Extra = Literal["input", "output", "pool"]
"""What the first extra level is made of: the last map (RetinaNet), the last level (FCOS), or every second cell of it."""


class FPN(nn.Module):
    """Maps (B, channels[i], H_i, W_i), finest first, to as many (B, width, H_i, W_i), and coarser ones of half the size each.

    Parameters
    ----------
    channels
        Of the backbone's maps.
    width
        Channels of every level.
    extra_levels, extra
        Coarser levels behind, each by a 3x3 convolution of stride 2 (``"pool"``: none, every other cell), and from what.
    relu_extra
        ReLU in front of the second extra convolution and those behind it: FCOS has it, Group R-CNN's RetinaNet does not.
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        width: int = 256,
        extra_levels: int = 2,
        extra: Extra = "input",
        relu_extra: bool = False,
    ) -> None:
        super().__init__()
        if not channels or min(*channels, width) < 1:
            raise ValueError(f"channels and width must be integers >= 1, not {tuple(channels)} and {width}")
        if extra_levels < 0 or extra not in get_args(Extra):
            raise ValueError(f"extra_levels must be >= 0 and extra one of {get_args(Extra)}, not {extra_levels} and {extra!r}")
        self.extra_kind, self.extra_levels, self.relu_extra = extra, extra_levels, relu_extra
        self.lateral = nn.ModuleList(nn.Conv2d(inputs, width, 1) for inputs in channels)
        self.output = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        first = channels[-1] if extra == "input" else width
        count = 0 if extra == "pool" else extra_levels
        self.extra = nn.ModuleList(nn.Conv2d(width if level else first, width, 3, 2, padding=1) for level in range(count))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        if len(maps) != len(self.lateral):
            raise ValueError(f"{len(self.lateral)} maps are needed, not {len(maps)}")
        merged = [lateral(x) for lateral, x in zip(self.lateral, maps)]
        for level in reversed(range(len(merged) - 1)):
            merged[level] = merged[level] + F.interpolate(merged[level + 1], size=merged[level].shape[2:])
        levels = [output(x) for output, x in zip(self.output, merged)]
        x = maps[-1] if self.extra_kind == "input" else levels[-1]
        for level in range(self.extra_levels):
            if self.extra_kind == "pool":
                x = F.max_pool2d(x, 1, 2)
            else:
                x = self.extra[level](F.relu(x) if level and self.relu_extra else x)
            levels.append(x)
        return levels
