"""Detectors and segmenters go through the compiler: their products on the accelerator, the rest on the host, every byte right."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from compiler.compile import compile_model
from models.boxes import cxcywh_to_xyxy, paired_iou
from models.group_rcnn import ImagePart
from models.registry import create_model
from sim.simulate import simulate

_DETR: dict[str, Any] = {"width": 8, "queries": 12, "hidden": 32, "heads": 2, "ffn": 32, "encoder_layers": 1, "decoder_layers": 2}
_MASKS: dict[str, Any] = {"width": 8, "queries": 6, "hidden": 32, "heads": 2, "ffn": 32, "decoder_layers": 1}
CASES: dict[str, tuple[dict[str, Any], int, float]] = {
    "deformable_detr_tiny": (_DETR, 64, 0.05),
    "group_rcnn_small": ({"width": 8}, 64, 0.01),
    "pft_small": (_MASKS, 64, 0.6),
}
"""What is smaller than in the model, pixels, and the largest share of the products that the host may have."""


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_the_integer_reference(name: str) -> None:
    overrides, size, share = CASES[name]
    torch.manual_seed(0)
    model = create_model(name, **overrides)
    part = ImagePart(model).eval() if name.startswith("group") else model
    x = torch.randn(1, 3, size, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = compile_model(part, x, arch="sta256", calibration=[x])
    assert program.report().host_share <= share
    run, reference = (simulate(program, x, engine=engine) for engine in ("isa", "reference"))
    assert run.bit_exact and all(map(torch.equal, run.outputs, reference.outputs))
    with torch.no_grad():
        wanted = [value for value in pytree.tree_leaves(part(x)) if isinstance(value, Tensor)]
    assert [value.shape for value in run.outputs] == [value.shape for value in wanted]
    for found, right in zip(run.outputs, wanted, strict=True):
        assert F.cosine_similarity(found.flatten(), right.flatten(), 0) > 0.98
        if name.startswith("deformable") and right.shape[-1] == 4:
            overlap = paired_iou(*(cxcywh_to_xyxy(value.reshape(-1, 4)) for value in (found, right)))
            assert float(overlap.min()) > 0.85 and float(overlap.mean()) > 0.9
