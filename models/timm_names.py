"""timm's key names of RegNet and MobileNetV2, which differ from torchvision's that ours are: both load.

ResNet, ResNeXt and DeiT have the same names in both. Ref: timm 1.0 (github.com/huggingface/pytorch-image-models).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

__all__ = ["Names", "mobilenet_names", "on_load", "regnet_names"]

Names = Mapping[str, str | Callable[[re.Match[str]], str]]
"""Patterns at the start of timm's names -> their replacements."""

_PLACE = {"conv": 0, "bn": 1}


def regnet_names() -> Names:
    """Of a RegNet of any size: ``s2.b1.conv3.bn.weight`` is ``trunk_output.block2.block2-0.f.c.1.weight``."""

    def block(found: re.Match[str]) -> str:
        stage, number, part, kind = found.groups()
        branch = "proj" if part == "downsample" else f"f.{'abc'[int(part[-1]) - 1]}"
        return f"trunk_output.block{stage}.block{stage}-{int(number) - 1}.{branch}.{_PLACE[kind]}."

    return {
        r"stem\.(conv|bn)\.": lambda found: f"stem.{_PLACE[found[1]]}.",
        r"s(\d+)\.b(\d+)\.(conv[123]|downsample)\.(conv|bn)\.": block,
        r"head\.fc\.": "fc.",
    }


def mobilenet_names(stages: tuple[tuple[int, int, int, int], ...]) -> Names:
    """Of a MobileNetV2 with these rows of `models.mobilenet.MobileNetConfig`: ``blocks.1.0.conv_dw.weight`` is
    ``features.2.conv.1.0.weight``."""
    first = [1, *accumulate((blocks for _, _, blocks, _ in stages), initial=1)][1:]
    expanded = {"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1", "conv_pwl": "2", "bn3": "3"}
    plain = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "1", "bn2": "2"}

    def block(found: re.Match[str]) -> str:
        stage, number = int(found[1]), int(found[2])
        parts = plain if stages[stage][0] == 1 else expanded
        return f"features.{first[stage] + number}.conv.{parts[found[3]]}."

    return {
        r"conv_stem\.": "features.0.0.",
        r"bn1\.": "features.0.1.",
        r"blocks\.(\d+)\.(\d+)\.(\w+)\.": block,
        r"conv_head\.": f"features.{first[-1]}.0.",
        r"bn2\.": f"features.{first[-1]}.1.",
        r"classifier\.(?=weight|bias)": "classifier.1.",
    }


def on_load(names: Names) -> Callable[..., None]:
    """A hook for ``nn.Module.register_load_state_dict_pre_hook`` that renames what has timm's names."""

    def rename(_module: object, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            for pattern, replacement in names.items():
                new, count = re.subn(f"^{pattern}", replacement, key[len(prefix) :])
                if count:
                    state[prefix + new] = state.pop(key)
                    break

    return rename
