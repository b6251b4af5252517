import copy

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers.models.maskformer.modeling_maskformer import MaskFormerForInstanceSegmentation

from models import create_model
from models.maskformer import CONFIGS, MaskFormer, MaskFormerConfig, MaskTarget, huggingface_names
from tests.models.sparse_checks import check_fisher, check_nm_training

SIZES = {"num_classes": 4, "queries": 6, "hidden": 64, "heads": 4, "ffn": 96, "decoder_layers": 3}
SWIN = {"backbone": "swin_tiny", "width": 12}
RESNET = {"backbone": "resnet18", "width": 8}


def hf_backbone(kind):
    if kind == "swin":
        sizes = {"embed_dim": 12, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}
        return transformers.SwinConfig(**sizes, window_size=7, drop_path_rate=0.0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    return transformers.ResNetConfig(**sizes, out_features=["stage1", "stage2", "stage3", "stage4"])


def pair(kind, tmp_path):
    """Ours and transformers', every parameter and statistic random and the same; in eval mode."""
    torch.manual_seed(0)
    decoder = transformers.DetrConfig(
        d_model=64, num_queries=6, decoder_layers=3, decoder_ffn_dim=96, decoder_attention_heads=4, encoder_attention_heads=4,
        dropout=0.0,
    )  # fmt: skip
    theirs = MaskFormerForInstanceSegmentation(
        transformers.MaskFormerConfig(
            backbone_config=hf_backbone(kind), decoder_config=decoder, fpn_feature_size=64, mask_feature_size=64, num_labels=4
        )
    ).eval()
    with torch.no_grad():
        for name, value in theirs.state_dict().items():
            if value.is_floating_point() and "empty_weight" not in name:
                value.uniform_(0.5, 1.5) if name.endswith("running_var") else value.normal_(std=0.15)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = create_model("maskformer_r50", pretrained=tmp_path, **SIZES, **(SWIN if kind == "swin" else RESNET))
    return ours, theirs


def targets(counts=(3, 1), size=(64, 96), classes=4):
    generator = torch.Generator().manual_seed(1)
    masks = [torch.rand(count, *size, generator=generator) < 0.3 for count in counts]
    return [MaskTarget(torch.randint(classes, (len(mask),), generator=generator), mask) for mask in masks]


@pytest.mark.parametrize("kind", ["swin", "resnet"])
@pytest.mark.parametrize("size", [(64, 96), (70, 75)])
def test_outputs_equal_transformers(kind, size, tmp_path):
    ours, theirs = pair(kind, tmp_path)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        output, expected = ours(images), theirs(images)
    assert output.masks.shape == (2, 6, -(-size[0] // 4), -(-size[1] // 4)) and output.logits.shape == (2, 6, 5)
    scale = expected.masks_queries_logits.abs().max()
    assert torch.allclose(output.logits, expected.class_queries_logits, atol=1e-5)
    assert torch.allclose(output.masks, expected.masks_queries_logits, atol=1e-6 * scale), scale


@pytest.mark.parametrize("kind", ["swin", "resnet"])
def test_losses_equal_transformers(kind, tmp_path):
    ours, theirs = pair(kind, tmp_path)
    images, objects = torch.randn(2, 3, 64, 96), targets()
    losses = ours.losses(images, objects)
    masks, labels = [target.masks.float() for target in objects], [target.labels for target in objects]
    expected = theirs(images, mask_labels=masks, class_labels=labels)
    last = losses["class"] + losses["focal"] + losses["dice"]
    assert last.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    # every layer, by their criterion on our predictions
    output = ours(images)
    layers = [{"masks_queries_logits": layer.masks, "class_queries_logits": layer.logits} for layer in output.layers]
    each = theirs.get_loss_dict(output.masks, output.logits, masks, labels, layers[:-1])
    names = {"class": "cross_entropy", "focal": "mask", "dice": "dice"}
    assert len(each) == len(losses) == 9
    for name, value in losses.items():
        word, _, layer = name.partition("_")
        assert value.item() == pytest.approx(each[f"loss_{names[word]}{layer and '_' + layer}"].item(), rel=1e-5), name
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


def test_every_layer_is_read_through_the_norm_and_heads(tmp_path):
    ours, theirs = pair("resnet", tmp_path)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        layers = ours(images).layers
        raw = theirs.model(images, output_hidden_states=True).transformer_decoder_hidden_states
        norm = theirs.model.transformer_module.decoder.layernorm
        for number in (0, 1):  # the first of theirs is what enters the first layer
            assert torch.allclose(layers[number].logits, theirs.class_predictor(norm(raw[number + 1])), atol=1e-5)


def test_parameters_of_the_default_configuration():
    with torch.device("meta"):
        theirs = MaskFormerForInstanceSegmentation(transformers.MaskFormerConfig())
        ours = create_model("maskformer_swin_base", num_classes=2)
    unused = theirs.model.pixel_level_module.encoder.model.layernorm
    count = lambda model: sum(parameter.numel() for parameter in model.parameters())
    assert count(theirs) == 101_793_403 == count(ours) + count(unused)  # the norm of Swin's classifier has no reader


def test_zero_instances():
    model = create_model("maskformer_small", queries=5)
    for counts in ((0, 0), (2, 0)):
        losses = model.losses(torch.randn(2, 3, 64, 64), targets(counts, (64, 64), 3))
        sum(losses.values()).backward()
        assert all(value.isfinite() for value in losses.values()) and (losses["dice"] == 0) == (counts == (0, 0))
    assert model.class_head.weight.grad.abs().sum() > 0
    (found,) = model.instances(torch.randn(1, 3, 64, 64), threshold=1.0)
    assert found.masks.shape == (0, 64, 64)


def test_more_objects_than_queries():
    model = create_model("maskformer_small", queries=2)
    assert sum(model.losses(torch.randn(1, 3, 64, 64), targets((5,), (64, 64), 3)).values()).isfinite()


def test_results_have_the_size_of_the_image():
    model = create_model("maskformer_small")
    images = torch.randn(2, 3, 50, 61)
    maps = model.semantic(images)
    assert maps.shape == (2, 50, 61) and maps.dtype == torch.int64 and maps.max() < 3
    assert all(found.masks.shape[1:] == (50, 61) for found in model.instances(images, threshold=0.0))
    with torch.device("meta"):
        assert model.config == CONFIGS["maskformer_small"]


def test_targets():
    semantic = MaskTarget.from_semantic(torch.tensor([[0, 2], [-1, 2]]))
    assert semantic.labels.tolist() == [0, 2] and semantic.masks.sum((1, 2)).tolist() == [1, 2]
    instances = MaskTarget.from_instances(torch.tensor([[0, 2], [9, 2]]), label=1)
    assert instances.labels.tolist() == [1, 1] and instances.masks.sum((1, 2)).tolist() == [2, 1]
    assert MaskTarget.from_instances(torch.zeros(2, 2, dtype=torch.long)).masks.shape == (0, 2, 2)


def test_wrong_use(tmp_path):
    model = create_model("maskformer_small")
    images, (good,) = torch.randn(1, 3, 64, 64), targets((2,), (64, 64), 3)
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), not \(1, 1, 64, 64\)"):
        model(images[:, :1])
    with pytest.raises(ValueError, match="1 images need as many targets, not 2"):
        model.losses(images, [good, good])
    empty = good.masks.clone()
    empty[1] = False
    for target, kind, message in (
        (MaskTarget(good.labels, good.masks[:, :32]), ValueError, r"masks of image 0 must be \(N, 64, 64\), not \(2, 32, 64\)"),
        (MaskTarget(good.labels, good.masks.float()), TypeError, "masks of image 0 must be a bool tensor, not torch.float32"),
        (MaskTarget(good.labels.float(), good.masks), TypeError, "labels of image 0 must be int64, not torch.float32"),
        (MaskTarget(good.labels[:1], good.masks), ValueError, r"image 0 has labels \(1,\) for masks \(2, 64, 64\)"),
        (MaskTarget(good.labels + 3, good.masks), ValueError, "labels of image 0 must be in 0 to 2, not"),
        (MaskTarget(good.labels, empty), ValueError, "mask 1 is empty: leave it out"),
    ):
        with pytest.raises(kind, match=message):
            model.losses(images, [target])
    for use in (lambda wrong: model.losses(wrong, [good]), model.semantic, model.instances):
        with pytest.raises(ValueError, match="image 0 has a pixel that is not finite"):
            use(images * float("inf"))
    broken = copy.deepcopy(model)
    broken.class_head.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="the loss 'class' is not finite"):
        broken.losses(images, [MaskTarget(good.labels[:0], good.masks[:0])])
    for change, message in (
        ({"hidden": 48}, "hidden must be a multiple of 32 and of heads, not 48 with 4 heads"),
        ({"heads": 5}, "hidden must be a multiple of 32 and of heads, not 64 with 5 heads"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\), not -0.1"), ({"queries": 0}, "queries must be an integer >= 1"),
        ({"backbone": "resnet19"}, "unknown backbone 'resnet19': did you mean resnet18"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            create_model("maskformer_small", **change)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = create_model("maskformer_small", pretrained=tmp_path)
    assert torch.equal(again.queries.weight, model.queries.weight)
    with pytest.raises(ValueError, match="do not fit maskformer_small"):
        create_model("maskformer_small", pretrained=tmp_path, hidden=32)


def test_other_names_are_not_taken_for_ours():
    own = MaskFormer(MaskFormerConfig(**SIZES, **RESNET)).state_dict()
    assert set(huggingface_names({**own, "stray": torch.zeros(1)}, own)) == {*own, "stray"}


def test_sparse():
    torch.manual_seed(0)
    options = {"queries": 4, "hidden": 32, "ffn": 48, "decoder_layers": 1, "width": 8}
    images, objects = torch.randn(2, 3, 64, 64), targets((2, 1), (64, 64), 3)
    loss = lambda model: sum(model.losses(images, objects).values())
    check_nm_training(create_model("maskformer_small", **options), loss, minimum=40)
    check_nm_training(create_model("maskformer_small", **options | SWIN), loss, minimum=60)
    parts = ("backbone.layer3.0.conv1", "decoder.0.mlp.up")  # the Swin backbone alone: test_swin
    graph = check_fisher(create_model("maskformer_small", **options), images, loss, target=0.95, parts=parts)
    # channels of the pixel decoder stay: their group norms normalise over them
    assert not any(group.name.startswith("pixel_decoder") for group in graph.prunable)


def as_the_authors_name_them(state):
    """Keys of facebookresearch/MaskFormer with detectron2's ResNet, written out from its modules."""
    named = {"criterion.empty_weight": torch.ones(4), "pixel_mean": torch.zeros(3, 1, 1)}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        pieces = key.split(".")
        if key.endswith("num_batches_tracked"):
            continue
        if part == "backbone":
            block = ["stem"] if pieces[1] in ("conv1", "bn1") else [f"res{int(pieces[1][-1]) + 1}", pieces[2]]
            layer, leaf = pieces[-2], pieces[-1]
            if "downsample" in pieces:
                layer = "shortcut.norm" if layer == "1" else "shortcut"
            key = ".".join(["backbone", *block, layer.replace("bn", "conv") + (".norm" if layer.startswith("bn") else ""), leaf])
        elif part == "pixel_decoder" and pieces[1] != "mask_features":
            name = {"stem": "layer_4", "lateral": "adapter_{}", "merge": "layer_{}"}[pieces[1]].format(3 - int(pieces[2]))
            key = f"sem_seg_head.pixel_decoder.{name}{'.norm' if pieces[-2] == '1' else ''}.{pieces[-1]}"
        elif part == "pixel_decoder":
            key = f"sem_seg_head.{key}"
        elif part == "decoder":
            layer = f"sem_seg_head.predictor.transformer.decoder.layers.{pieces[1]}"
            linear = {"up": "linear1", "down": "linear2"}.get(pieces[3])
            names = {"self_attention": "self_attn", "cross_attention": "multihead_attn", "self_norm": "norm1",
                     "cross_norm": "norm2", "norm": "norm3", "mlp": linear}  # fmt: skip
            if pieces[3] in ("query", "key", "value"):
                joint = f"{layer}.{names[pieces[2]]}.in_proj_{pieces[-1]}"
                named[joint] = torch.cat([named[joint], value]) if joint in named else value  # in the order q, k, v
                continue
            key = ".".join([layer, names[pieces[2]], *(["out_proj"] if pieces[3] == "output" else []), pieces[-1]])
        else:
            names = {"project": "input_proj", "queries": "query_embed", "class_head": "class_embed", "mask_head": "mask_embed",
                     "decoder_norm": "transformer.decoder.norm"}  # fmt: skip
            key = f"sem_seg_head.predictor.{names[part]}.{rest}"
        named[key] = value
    return named


def test_names_of_the_authors_load(tmp_path):
    torch.manual_seed(0)
    model, images = create_model("maskformer_small"), torch.randn(1, 3, 64, 64)
    state = as_the_authors_name_them(model.state_dict())
    assert {"backbone.stem.conv1.norm.running_mean", "backbone.res3.0.shortcut.norm.weight", "backbone.res2.1.conv2.weight",
            "sem_seg_head.pixel_decoder.adapter_1.norm.bias", "sem_seg_head.predictor.mask_embed.layers.2.bias",
            "sem_seg_head.predictor.transformer.decoder.layers.2.multihead_attn.in_proj_weight"} <= set(state)  # fmt: skip
    torch.save({"model": state}, tmp_path / "w.pth")
    torch.manual_seed(1)
    again = create_model("maskformer_small", pretrained=tmp_path / "w.pth")
    with torch.no_grad():
        assert torch.equal(again(images).masks, model(images).masks) and torch.equal(again(images).logits, model(images).logits)
    torch.save({"model": state | {"sem_seg_head.predictor.query_embed.weight": torch.zeros(7, 64)}}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"do not fit maskformer_small: queries.weight is \(7, 64\), the model's"):
        create_model("maskformer_small", pretrained=tmp_path / "w.pth")
