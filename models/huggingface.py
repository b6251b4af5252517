"""Rename the weights of others, such as Hugging Face, to ours: by tables of patterns, for detectors whole.

Both generations of names are known: those of the published files (``conv_encoder``, ``out_proj``, timm's backbone) and those of
current transformers (``o_proj``, ``mlp.fc1``, its own ResNet).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Patterns", "rename_backbone", "rename_detector", "renamed", "stack_qkv"]

Patterns: TypeAlias = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
"""Parts of a name and what stands for them, in the order of replacement, as ``re.sub`` takes them."""


def renamed(key: str, table: Patterns) -> str:
    """A name with every pattern of a table replaced."""
    for pattern, replacement in table:
        key = re.sub(pattern, replacement, key)
    return key


def stack_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One ``attn.qkv`` in place of each ``attn.q``, ``attn.k`` and ``attn.v``, their weights and biases one below the other."""
    stacked: dict[str, Tensor] = {}
    for name, value in state.items():
        found = re.fullmatch(r"(.*\battn\.)([qkv])\.(weight|bias)", name)
        if found is None:
            stacked[name] = value
        elif found[2] == "q":
            stacked[f"{found[1]}qkv.{found[3]}"] = torch.cat([state[f"{found[1]}{part}.{found[3]}"] for part in "qkv"])
    return stacked


_BACKBONE = (
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.convolution\.", r"layer<\1>.\2.downsample.0."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.normalization\.", r"layer<\1>.\2.downsample.1."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.convolution\.", r"layer<\1>.\2.conv<\3>."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.normalization\.", r"layer<\1>.\2.bn<\3>."),
    (r"<(\d+)>", lambda found: str(int(found[1]) + 1)),  # Hugging Face counts from 0
)

_DETECTOR = (
    (r"^model\.(backbone|encoder|decoder|input_proj|query|reference|level|enc_output|pos_trans)", r"\1"),
    # shared parts: heads, queries, projections
    (r"^(class_labels_classifier|class_embed)\.", "class_head."),
    (r"^(bbox_predictor|bbox_embed)\.", "box_head."),
    (r"^decoder\.bbox_embed\.", "box_head."),
    (r"^decoder\.class_embed\.", "class_head."),
    (r"^input_projection\.", "project."),
    (r"^input_proj\.", "project."),
    (r"^(query_position_embeddings|query_refpoint_embeddings)\.", "queries."),
    (r"^enc_output\.", "proposal."),
    (r"^enc_output_norm\.", "proposal_norm."),
    (r"^pos_trans\.", "proposal_position."),
    (r"^pos_trans_norm\.", "proposal_position_norm."),
    (r"^decoder\.layernorm\.", "decoder_norm."),
    # layers
    (r"^(encoder|decoder)\.layers\.(\d+)\.", r"\1.\2."),
    (r"^((?:encoder|decoder)\.\d+)\.(mlp\.)?fc1\.", r"\1.mlp.up."),
    (r"^((?:encoder|decoder)\.\d+)\.(mlp\.)?fc2\.", r"\1.mlp.down."),
    (r"^((?:encoder|decoder)\.\d+)\.(mlp\.)?activation_fn\.", r"\1.mlp.activation."),
    (r"^((?:encoder|decoder)\.\d+)\.(mlp\.)?final_layer_norm\.", r"\1.norm."),
    (r"^(encoder\.\d+)\.self_attn_layer_norm\.", r"\1.attention_norm."),
    (r"^(encoder\.\d+)\.self_attn\.", r"\1.attention."),
    # DAB-DETR keeps its projections beside the attention
    (r"^(decoder\.\d+)\.self_attn\.self_attn_layer_norm\.", r"\1.self_norm."),
    (r"^(decoder\.\d+)\.self_attn\.self_attn_(\w+)_proj\.", r"\1.self_attention.\2."),
    (r"^(decoder\.\d+)\.self_attn\.self_attn\.output_proj\.", r"\1.self_attention.output."),
    (r"^(decoder\.\d+)\.cross_attn\.cross_attn_layer_norm\.", r"\1.cross_norm."),
    (r"^(decoder\.\d+)\.cross_attn\.cross_attn_(\w+)_proj\.", r"\1.cross_attention.\2."),
    (r"^(decoder\.\d+)\.cross_attn\.cross_attn\.output_proj\.", r"\1.cross_attention.output."),
    (r"^encoder\.query_scale\.", "encoder_scale."),
    (r"^decoder\.query_scale\.", "query_scale."),
    (r"^decoder\.ref_point_head\.", "query_position."),
    (r"^decoder\.ref_anchor_head\.", "anchor_size."),
    # the others
    (r"^(decoder\.\d+)\.self_attn_layer_norm\.", r"\1.self_norm."),
    (r"^(decoder\.\d+)\.self_attn\.", r"\1.self_attention."),
    (r"^(decoder\.\d+)\.encoder_attn_layer_norm\.", r"\1.cross_norm."),
    (r"^(decoder\.\d+)\.encoder_attn\.", r"\1.cross_attention."),
    (r"attention\.q_proj\.", "attention.query."),
    (r"attention\.k_proj\.", "attention.key."),
    (r"attention\.(v_proj|value_proj)\.", "attention.value."),
    (r"attention\.(o_proj|out_proj|output_proj)\.", "attention.output."),
)
_BACKBONE_PREFIX = re.compile(r"^backbone\.(conv_encoder\.)?model\.(_backbone\.)?")


def rename_backbone(key: str) -> str:
    """A key of a ResNet of Hugging Face or timm as torchvision has it."""
    return renamed(key, _BACKBONE)


def rename_detector(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of DETR, Deformable-DETR or DAB-DETR to the keys of ``own``, a detector's state dict.

    Heads that the file repeats for every decoder layer become one where ``own`` has one. Counters of batch norm go.

    Raises
    ------
    ValueError
        Heads of the layers differ, but the detector shares one.
    """
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        key = renamed(key, _DETECTOR)
        if _BACKBONE_PREFIX.match(key):
            key = "backbone." + rename_backbone(_BACKBONE_PREFIX.sub("", key))
        if key.endswith("num_batches_tracked") and key not in own:
            continue
        if key not in own:
            key = _shared(key, own)
        if key in found and not torch.equal(found[key], value):
            raise ValueError(f"the file has several values for {key!r}: the detector shares what the file has for each layer")
        found[key] = value
    return found


def _shared(key: str, own: Mapping[str, Tensor]) -> str:
    """The key of the one head that stands for those of all layers, if the detector has such."""
    for number in ("", "0."):
        shared = re.sub(r"^(class_head|box_head)\.\d+\.", rf"\1.{number}", key)
        if shared in own:
            return shared
    return key
