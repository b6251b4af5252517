"""Small detectors of transformers with random weights, and ours with the same: what the tests of the family share."""

from __future__ import annotations

import torch
from transformers import (
    DabDetrConfig,
    DabDetrForObjectDetection,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
)

from models.detection import Target
from models.huggingface import rename_detector

SIZES = dict(
    num_labels=5, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48,
)  # fmt: skip
OURS = dict(width=4, num_classes=5, hidden=32, heads=4, ffn=48, encoder_layers=2, decoder_layers=3)
KINDS = {
    "detr_r50": (DetrForObjectDetection, DetrConfig, {"num_queries": 9}),
    "dab_detr_r50": (DabDetrForObjectDetection, DabDetrConfig, {"num_queries": 9}),
    "deformable_detr_r50": (DeformableDetrForObjectDetection, DeformableDetrConfig, {"num_queries": 9}),
    "deformable_detr_r50_refine": (
        DeformableDetrForObjectDetection, DeformableDetrConfig, {"num_queries": 9, "with_box_refine": True},
    ),
    "deformable_detr_r50_two_stage": (
        DeformableDetrForObjectDetection, DeformableDetrConfig,
        {"two_stage_num_proposals": 9, "with_box_refine": True, "two_stage": True},
    ),
}  # fmt: skip


def reference(name, **options):
    """A detector of transformers with random weights and statistics, a ResNet-50 of four channels in the stem."""
    kind, config, own = KINDS[name]
    stages = ["stage2", "stage3", "stage4"] if "deformable" in name else ["stage4"]
    backbone = ResNetConfig(embedding_size=4, hidden_sizes=[16, 32, 64, 128], depths=[3, 4, 6, 3], out_features=stages)
    sizes = dict(SIZES)
    if name.startswith("dab"):
        sizes["hidden_size"] = sizes.pop("d_model")
    torch.manual_seed(0)
    model = kind(config(backbone_config=backbone, **(sizes | own | options))).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            noise = torch.randn(value.shape, generator=generator)
            if key.endswith("running_var"):
                value.copy_(0.5 + noise.abs())
            elif value.ndim > 1:  # so large that queries differ and every part counts
                value.copy_(noise if "embeddings" in key else 1.2 * noise / value[0].numel() ** 0.5)
            elif value.is_floating_point():
                value.add_(0.1 * noise)
    return model


def copy_weights(theirs, ours):
    """Our detector with the weights of theirs."""
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    ours.load_state_dict(rename_detector(state, ours.state_dict()))
    return ours


def scene(*, padded=True, classes=5):
    """Two images of 96 x 128, the second narrower, its mask, and objects: three in the first, none in the second."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(2, 3, 96, 128, generator=generator)
    mask = torch.ones(2, 96, 128, dtype=torch.bool)
    if padded:
        mask[1, :, 90:] = False
        mask[1, 70:] = False
        images = images * mask[:, None]
    boxes = torch.rand(3, 4, generator=generator) * 0.3 + 0.2
    full = Target(torch.randint(classes, (3,), generator=generator), boxes)
    return images, mask, [full, Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))]
