import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from models import ViT, create_model
from models.vit import CONFIGS

TINY = {"layers": 2, "hidden": 12, "heads": 3, "image": 8, "patch": 4, "channels": 1, "num_classes": 5}


def test_published_sizes() -> None:
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in create_model(name).parameters()) for name in CONFIGS}
    # timm's counts for {deit,vit}_{tiny,small,base}_patch16_224
    published = {"tiny": 5_717_416, "small": 22_050_664, "base": 86_567_656}
    assert sizes == {f"{kind}_{size}": n for kind in ("deit", "vit") for size, n in published.items()} | {"vit_mnist": 306_826}


def test_names_are_timms() -> None:
    with torch.device("meta"):
        names = set(create_model("deit_tiny").state_dict())
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "norm.bias", "head.weight"} <= names
    block = {name.removeprefix("blocks.3.") for name in names if name.startswith("blocks.3.")}
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    assert block == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}


def test_against_the_published_formula() -> None:
    torch.manual_seed(0)
    model = create_model("vit_mnist", **TINY)
    assert isinstance(model, ViT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    x = torch.randn(3, 1, 8, 8)
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4).reshape(3, 4, 16)
    tokens = patches @ model.patch_embed.proj.weight.view(12, 16).T + model.patch_embed.proj.bias
    h = torch.cat([model.cls_token.expand(3, 1, 12), tokens], 1) + model.pos_embed
    assert torch.allclose(model.embed(x), h, atol=1e-5)
    for block in model.blocks:
        q, k, v = block.attn.qkv(block.norm1(h)).chunk(3, -1)
        parts = (slice(0, 4), slice(4, 8), slice(8, 12))
        heads = [(q[..., s] @ k[..., s].transpose(1, 2) / 2.0).softmax(-1) @ v[..., s] for s in parts]
        h = h + block.attn.proj(torch.cat(heads, -1))
        h = h + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(h))))
    assert torch.allclose(model(x), model.head(model.norm(h)[:, 0]), atol=1e-4)


@pytest.mark.parametrize("names", ["of today", "of the hub"])
def test_equals_transformers(tmp_path, names) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96, image_size=12, patch_size=4,
        num_channels=3, num_labels=7, layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = transformers.ViTForImageClassification(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # zero biases would hide a wrong name
    if names == "of today":
        save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    else:  # transformers writes the names of published checkpoints, such as google/vit-base-patch16-224
        theirs.save_pretrained(tmp_path)
        assert any(".attention.attention.query." in key for key in load_file(tmp_path / "model.safetensors"))
    sizes = {"layers": 3, "hidden": 24, "heads": 3, "image": 12, "patch": 4, "num_classes": 7}
    ours, x = create_model("vit_base", pretrained=tmp_path, **sizes), torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert (ours(x) - theirs(x).logits).abs().max() <= 1e-5


def test_weights_from_a_file_and_another_head(tmp_path) -> None:
    first = create_model("vit_mnist", **TINY)
    save_file(first.state_dict(), tmp_path / "w.safetensors")
    again = create_model("vit_mnist", pretrained=tmp_path / "w.safetensors", **TINY)
    assert torch.equal(again.head.weight, first.head.weight)
    other = create_model("vit_mnist", pretrained=tmp_path / "w.safetensors", **{**TINY, "num_classes": 3})
    assert other.head.weight.shape == (3, 12) and torch.equal(other.pos_embed, first.pos_embed)
    with pytest.raises(ValueError, match=r"do not fit vit_mnist: blocks.1.attn.proj.bias of shape \(12,\) is not in the model"):
        create_model("vit_mnist", pretrained=tmp_path / "w.safetensors", **{**TINY, "layers": 1})
    with pytest.raises(ValueError, match=r"cls_token is \(1, 1, 12\), the model's \(1, 1, 24\) \(\d+ more keys differ\)"):
        create_model("vit_mnist", pretrained=tmp_path / "w.safetensors", **{**TINY, "hidden": 24})


def test_wrong_use() -> None:
    with pytest.raises(ValueError, match=r"images must be \(B, 1, 8, 8\), not \(2, 1, 9, 9\)"):
        create_model("vit_mnist", **TINY)(torch.zeros(2, 1, 9, 9))
    with pytest.raises(ValueError, match=r"images must be \(B, 1, 8, 8\), not \(2, 3, 8, 8\)"):
        create_model("vit_mnist", **TINY)(torch.zeros(2, 3, 8, 8))
    for change, message in (
        ({"hidden": 13}, "hidden must be a multiple of heads"), ({"patch": 3}, "image must be a multiple of patch"),
        ({"layers": 0}, "layers must be an integer >= 1"), ({"dropout": 1.0}, "dropout must be in"),
        ({"num_classes": 0}, "num_classes must be >= 1"), ({"depth": 3}, "has no option 'depth'"),
        ({"pretrained": True}, "no installable package carries weights of vit_mnist"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            create_model("vit_mnist", **{**TINY, **change})
