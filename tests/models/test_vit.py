import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from models import ViT, create_model
from models.vit import CONFIGS

TINY = {"layers": 2, "hidden": 12, "heads": 3, "image": 8, "patch": 4, "channels": 1, "num_classes": 5}


def test_published_sizes() -> None:
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in create_model(name).parameters()) for name in CONFIGS}
    # timm's counts for deit_{tiny,small,base}_patch16_224
    assert sizes == {"deit_tiny": 5_717_416, "deit_small": 22_050_664, "deit_base": 86_567_656, "vit_mnist": 306_826}


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


def test_weights_from_a_file_and_another_head(tmp_path) -> None:
    first = create_model("vit_mnist", **TINY)
    save_file(first.state_dict(), tmp_path / "w.safetensors")
    again = create_model("vit_mnist", pretrained=tmp_path / "w.safetensors", **TINY)
    assert torch.equal(again.head.weight, first.head.weight)
    other = create_model("vit_mnist", pretrained=tmp_path / "w.safetensors", **{**TINY, "num_classes": 3})
    assert other.head.weight.shape == (3, 12) and torch.equal(other.pos_embed, first.pos_embed)
    with pytest.raises(ValueError, match="do not fit ViT"):
        create_model("vit_mnist", pretrained=tmp_path / "w.safetensors", **{**TINY, "layers": 1})


def test_wrong_use() -> None:
    with pytest.raises(ValueError, match=r"images must be \(B, 1, 8, 8\), not \(2, 1, 9, 9\)"):
        create_model("vit_mnist", **TINY)(torch.zeros(2, 1, 9, 9))
    for change, message in (
        ({"hidden": 13}, "hidden must be a multiple of heads"), ({"patch": 3}, "image must be a multiple of patch"),
        ({"layers": 0}, "layers must be an integer >= 1"), ({"dropout": 1.0}, "dropout must be in"),
        ({"num_classes": 0}, "num_classes must be >= 1"), ({"depth": 3}, "has no option 'depth'"),
        ({"pretrained": True}, "no installable package carries weights of vit_mnist"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            create_model("vit_mnist", **{**TINY, **change})
