import pytest
import torch
import transformers
from safetensors.torch import save_file

from models import create_model
from models.backbone import Backbone, build_backbone
from models.swin import CONFIGS, Swin, SwinBackbone, SwinConfig, _offsets, _shift_mask, official_names
from tests.models.sparse_checks import check_fisher, check_nm_training

SMALL = {"width": 12, "blocks": (2, 2, 2), "heads": (1, 2, 4), "window": 4, "num_classes": 5}
CONFIG = SwinConfig(**SMALL)


def reference(kind=transformers.SwinForImageClassification, config=CONFIG, image=32, **options):
    """A transformers network of the same size, every parameter random, the buffers of norms and tables included."""
    torch.manual_seed(0)
    sizes = {"embed_dim": config.width, "depths": list(config.blocks), "num_heads": list(config.heads)}
    model = kind(transformers.SwinConfig(
        **sizes, window_size=config.window, image_size=image, num_labels=config.num_classes, num_channels=config.channels,
        drop_path_rate=0.0, layer_norm_eps=1e-5, **options)).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (53, 71), (16, 90)])
def test_backbone_equals_transformers_at_any_size(size):
    theirs = reference(transformers.SwinBackbone, out_features=["stage1", "stage2", "stage3"])
    ours = SwinBackbone(CONFIG).eval()
    ours.load_state_dict(_without(official_names(theirs.state_dict()), "norm."))
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected, maps = theirs(x).feature_maps, ours(x)
    for stage, (a, b) in enumerate(zip(maps, expected, strict=True)):
        assert a.shape[1] == ours.channels[stage] and a.shape[2] == -(-size[0] // ours.strides[stage])
        assert torch.allclose(a, b, atol=1e-5), (a - b).abs().max()


def _without(state, *prefixes):
    return {name: value for name, value in state.items() if not name.startswith(prefixes)}


@pytest.mark.parametrize("size", [(64, 64), (66, 70)])
def test_classifier_equals_transformers(size, tmp_path):
    theirs = reference()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = create_model("swin_tiny", pretrained=tmp_path, **SMALL)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x).logits, atol=1e-5)


def test_one_window_is_not_shifted():
    """The last stage of the published sizes: 7 x 7 in windows of 7, 12 x 12 in windows of 12."""
    ours, theirs = Swin(CONFIG).eval(), reference(image=64)
    ours.load_state_dict(official_names(theirs.state_dict()))
    x = torch.randn(1, 3, 64, 64)  # maps of 16, 8 and 4 positions
    with torch.no_grad():
        logits = ours(x)
        assert torch.allclose(logits, theirs(x).logits, atol=1e-5)
        ours.layers[2].blocks[1].attn.relative_position_bias_table.add_(1.0)  # the same for all pairs: no effect on a softmax
        assert torch.allclose(ours(x), logits, atol=1e-5)


def test_names_of_published_files():
    """Hugging Face's files have older names than its classes, timm's merge patches a stage later, the authors' hold buffers."""
    own = Swin(CONFIG).state_dict()
    older, timm = {}, {}
    for name, value in own.items():
        stage = f"layers.{int(name.split('.')[1]) + 1}.downsample" if ".downsample" in name else ""
        timm[name.replace("head.", "head.fc.") if not stage else f"{stage}.{name.split('downsample.')[1]}"] = value
        older.update(_older_name(name, value))
    timm["layers.1.blocks.1.attn_mask"] = torch.zeros(1)
    theirs = {**own, "layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16)}
    for state in (older, timm, theirs, own):
        renamed = official_names(state)
        assert set(renamed) == set(own) and all(torch.equal(renamed[name], own[name]) for name in own)


def _older_name(name, value):
    """As microsoft/swin-tiny-patch4-window7-224 has it on the hub."""
    for ours, theirs in (("patch_embed.proj", "embeddings.patch_embeddings.projection"), ("patch_embed.norm", "embeddings.norm"),
                         ("layers", "encoder.layers"), ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
                         ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"), ("attn.proj", "attention.output.dense"),
                         ("attn.rel", "attention.self.rel")):  # fmt: skip
        name = name.replace(ours, theirs)
    if "attn.qkv" in name:
        words = ("query", "key", "value")
        return {f"swin.{name.replace('attn.qkv', f'attention.self.{word}')}": part for word, part in zip(words, value.chunk(3))}
    if name.startswith("head."):
        return {name.replace("head.", "classifier."): value}
    return {f"swin.{'layer' if name.startswith('norm.') else ''}{name}": value}


def test_bias_and_mask():
    index = _offsets(2)
    assert index.tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    mask = _shift_mask(torch.zeros(1, 3, 4, 1), 2, 1)  # three rows are padded to four: 2 x 2 windows
    assert mask.shape == (4, 4, 4) and not mask[0].any()
    assert mask[1].tolist() == [[0, -100] * 2, [-100, 0] * 2] * 2  # the right window holds both edges
    assert (mask[3] == 0).equal(torch.eye(4, dtype=torch.bool))


def test_drop_path_leaves_out_whole_branches():
    model = Swin(SwinConfig(**SMALL, drop_path=0.5))
    rates = [block.drop_path.rate for layer in model.layers for block in layer.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    torch.manual_seed(0)
    kept = model.layers[-1].blocks[-1].drop_path.train()(torch.ones(2000, 2, 2, 1))
    assert set(kept.unique().tolist()) == {0.0, 2.0} and kept.flatten(1).std(1).max() == 0
    assert kept.mean().item() == pytest.approx(1, abs=0.1)
    assert torch.equal(model.eval().layers[-1].blocks[-1].drop_path(kept), kept)


def test_exports_and_trains():
    model = create_model("swin_tiny", **SMALL)
    x = torch.randn(2, 3, 20, 36)
    exported = torch.export.export(model, (x,)).module()
    assert torch.allclose(exported(x), model(x), atol=1e-5)
    model.train()(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_wrong_use(tmp_path):
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), not \(2, 1, 32, 32\)"):
        Swin(CONFIG)(torch.zeros(2, 1, 32, 32))
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), not \(3, 32, 32\)"):
        SwinBackbone(CONFIG)(torch.zeros(3, 32, 32))
    for change, message in (
        ({"heads": (1, 2)}, r"heads and blocks must have one entry a stage, not \(1, 2\) and \(2, 2, 2\)"),
        ({"heads": (1, 2, 5)}, "width must be a multiple of heads in each stage, not 48 channels with 5 heads"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\), not 1.0"), ({"window": 0}, "window must be an integer >= 1"),
        ({"depth": 3}, "swin_tiny has no option 'depth'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            create_model("swin_tiny", **{**SMALL, **change})
    save_file(Swin(CONFIG).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="do not fit swin_tiny"):
        create_model("swin_tiny", pretrained=tmp_path, **{**SMALL, "window": 7})


def test_published_configurations_differ_only_in_size():
    assert CONFIGS["swin_base_384"].window == CONFIGS["swin_large_384"].window == 12
    assert {config.num_classes for config in CONFIGS.values()} == {1000}


def test_backbone_of_some_stages():
    torch.manual_seed(0)
    whole, part = SwinBackbone(CONFIG).eval(), SwinBackbone(CONFIG, stages=(2,), frozen_stages=2).eval()
    state = whole.state_dict()
    part.load_state_dict({name: state[name] for name in part.state_dict()})
    x = torch.randn(1, 3, 33, 40)
    assert len(part(x)) == 1 and torch.equal(part(x)[0], whole(x)[1])
    assert (part.channels, part.strides) == ((24,), (8,))
    learns = {name.split(".")[0] + name.split(".")[1] for name, value in part.named_parameters() if value.requires_grad}
    assert learns == {"layers1", "norm1weight", "norm1bias"}
    with pytest.raises(ValueError, match=r"stages must ascend within 1 to 3, not \(2, 4\)"):
        SwinBackbone(CONFIG, stages=(2, 4))
    with pytest.raises(ValueError, match="frozen_stages must be in 0 to 4, not 5"):
        SwinBackbone(CONFIG, frozen_stages=5)


def test_registered_as_backbones():
    with torch.device("meta"):
        backbone = build_backbone("swin_base_384", stages=(1, 2, 3, 4))
        assert [tuple(x.shape) for x in backbone(torch.empty(1, 3, 70, 64))] == [
            (1, 128, 18, 16), (1, 256, 9, 8), (1, 512, 5, 4), (1, 1024, 3, 2)]  # fmt: skip
        narrow = build_backbone("swin_tiny", stages=(4,), width=24, drop_path=0.0)
    assert narrow.channels == (192,) and isinstance(backbone, Backbone)


def test_sparse():
    torch.manual_seed(0)
    images, loss = torch.randn(2, 3, 32, 32), lambda model: model(torch.randn(2, 3, 32, 32)).square().mean()
    check_nm_training(create_model("swin_tiny", **SMALL), loss, minimum=27)
    graph = check_fisher(create_model("swin_tiny", **SMALL), images, loss, target=0.9, parts=("layers.0.blocks.1.mlp.fc1",))
    # the hidden channels of the MLPs can go; heads are fixed by the shape of the windows, the rest by LayerNorm
    assert {group.name.rpartition(".")[2] for group in graph.prunable} == {"fc1"}
    kept = " ".join(group.kept for group in graph.groups if group.kept)
    assert "layer_norm normalises over them" in kept and "view splits them" in kept
