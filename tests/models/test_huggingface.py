import re

import pytest
import torch
from safetensors.torch import save_file

from models import create_model
from models.huggingface import rename_detector
from tests.models.detr_reference import KINDS, OURS, copy_weights, reference, scene


def save(state, path):
    save_file({key: value.clone().contiguous() for key, value in state.items()}, path)
    return path


def published(state):
    """Names as in the files of the first generation: timm's backbone, out_proj, fc1."""
    renamed = {}
    for key, value in state.items():
        if ".backbone." in key:
            key = re.sub(r"^model\.backbone\.(conv_encoder\.)?model\.", "model.backbone.conv_encoder.model.", key)
            key = key.replace("embedder.embedder.convolution", "conv1").replace("embedder.embedder.normalization", "bn1")
            for pattern, kind in (("convolution", "conv"), ("normalization", "bn")):
                key = re.sub(
                    rf"encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.{pattern}",
                    lambda found, kind=kind: f"layer{int(found[1]) + 1}.{found[2]}.{kind}{int(found[3]) + 1}", key,
                )  # fmt: skip
            key = re.sub(
                r"encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut\.(c|n)\w+",
                lambda found: f"layer{int(found[1]) + 1}.{found[2]}.downsample.{'cn'.index(found[3])}", key,
            )  # fmt: skip
        else:
            key = re.sub(r"layers\.(\d+)\.mlp\.fc", r"layers.\1.fc", key).replace("attn.o_proj", "attn.out_proj")
        renamed[key] = value
    return renamed


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_files_of_both_generations_load(name, old, tmp_path):
    if old and name.startswith("dab"):
        pytest.skip("has one generation of names")
    theirs = reference(name)
    state = theirs.state_dict()
    path = save(published(state) if old else state, tmp_path / "model.safetensors")
    ours = create_model(name, **OURS, queries=9, pretrained=path)
    images, mask, _ = scene()
    with torch.no_grad():
        assert torch.allclose(ours(images, mask).logits, theirs(images, pixel_mask=mask.long()).logits, atol=1e-4)


def test_our_own_file_loads(tmp_path):
    ours = create_model("detr_r50", **OURS)
    again = create_model("detr_r50", **OURS, pretrained=save(ours.state_dict(), tmp_path / "model.safetensors"))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in ours.state_dict().items())


def test_files_of_another_size_are_refused(tmp_path):
    path = save(reference("detr_r50").state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"do not fit Detr: .*\n.*size mismatch for queries.weight"):
        create_model("detr_r50", **OURS, queries=10, pretrained=path)
    with pytest.raises(ValueError, match="do not fit DabDetr: "):
        create_model("dab_detr_r50", **OURS, queries=9, pretrained=path)


def test_heads_that_differ_need_a_detector_with_as_many():
    theirs, shared = reference("deformable_detr_r50_refine"), create_model("deformable_detr_r50_refine", **OURS, queries=9)
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    state["class_embed.1.bias"] += 1
    with pytest.raises(ValueError, match=r"several values for 'class_head.0.bias': the detector shares what the file has"):
        rename_detector(state, shared.state_dict())
    own = create_model("deformable_detr_r50_refine", **OURS, queries=9, share_class_head=False)
    own.load_state_dict(rename_detector(state, own.state_dict()))
    assert torch.equal(own.class_head[1].bias, state["class_embed.1.bias"])
    assert copy_weights(theirs, shared) is shared
