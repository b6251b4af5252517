import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from models import SwinBackbone, create_model
from models.backbone import Backbone, FrozenBatchNorm2d, build_backbone, freeze_batch_norm, register_backbone


def test_frozen_batch_norm_is_batch_norm_that_stays():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5)
    norm.train()(torch.randn(4, 5, 3, 3) * 2 + 1)
    frozen = freeze_batch_norm(nn.Sequential(norm))[0]
    x = torch.randn(2, 5, 3, 3)
    assert isinstance(frozen, FrozenBatchNorm2d) and not list(frozen.parameters())
    assert torch.equal(frozen.train()(x), norm.eval()(x))


def test_maps_are_those_of_the_network():
    backbone = build_backbone("resnet50", stages=(1, 3), width=8, frozen_norm=False).eval()
    assert isinstance(backbone, Backbone) and backbone.channels == (32, 128) and backbone.strides == (4, 16)
    network = create_model("resnet50", width=8)
    network.load_state_dict(backbone.state_dict(), strict=False)
    images = torch.randn(2, 3, 70, 50)
    x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
    first = network.layer1(x)
    maps = backbone(images)
    assert torch.equal(maps[0], first) and torch.equal(maps[1], network.layer3(network.layer2(first)))
    assert maps[1].shape[2:] == (5, 4) and "layer4.0.conv1.weight" not in backbone.state_dict()


def test_frozen_stages_do_not_learn():
    backbone = build_backbone("resnet18", stages=(4,), width=8, frozen_stages=2)
    still = {name.split(".")[0] for name, value in backbone.named_parameters() if not value.requires_grad}
    assert still == {"conv1", "layer1"}  # norms have no parameters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": (3, 2)}, r"stages must ascend within 1 to 4, not \(3, 2\)"),
        ({"stages": ()}, r"stages must ascend within 1 to 4, not \(\)"),
        ({"stages": (4,), "frozen_stages": 6}, "frozen_stages must be in 0 to 5, not 6"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        build_backbone("resnet18", **options)


def test_names():
    with pytest.raises(ValueError, match="unknown backbone 'resnet5': did you mean resnet50"):
        build_backbone("resnet5", stages=(4,))
    with pytest.raises(ValueError, match="a backbone named 'resnet50' is already registered"):
        register_backbone("resnet50")(lambda name, **options: nn.Identity())


def classifier(folder, name, **sizes):
    """A file of a classifier's random weights, batch norm's statistics included."""
    torch.manual_seed(1)
    model = create_model(name, **sizes)
    for key, value in model.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            value.copy_(torch.rand_like(value) + 0.5)
    save_file(model.state_dict(), folder / "classifier.safetensors")
    return model, folder / "classifier.safetensors"


@pytest.mark.parametrize("name", ["detr_tiny", "deformable_detr_tiny", "fcos_small", "group_rcnn_small", "maskformer_small"])
def test_weights_of_a_classifier_load_into_the_backbone(name, tmp_path):
    network, path = classifier(tmp_path, "resnet18", width=16)
    model = create_model(name, backbone_weights=path).eval()
    images = torch.randn(1, 3, 64, 64)
    x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
    for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
        x = layer(x)
    assert torch.allclose(model.backbone(images)[-1], x, atol=1e-5)


def test_a_classifier_of_hugging_face_loads_into_the_backbone(tmp_path):
    torch.manual_seed(0)
    config = transformers.ResNetConfig(depths=[2, 2, 2, 2], hidden_sizes=[16, 32, 64, 128], embedding_size=16, layer_type="basic")
    theirs = transformers.ResNetForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    model, images = create_model("retinanet_small", backbone_weights=tmp_path).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.resnet(images, output_hidden_states=True).hidden_states[-1]
        assert torch.allclose(model.backbone(images)[-1], expected, atol=1e-5)


def test_a_swin_classifier_loads_into_the_backbone(tmp_path):
    network, path = classifier(tmp_path, "swin_tiny", width=12, blocks=(1, 1, 1, 1), heads=(1, 1, 2, 2))
    backbone = SwinBackbone(network.config, stages=(1, 3))
    own = {name: value.clone() for name, value in backbone.state_dict().items()}
    state = backbone.of_classifier(load_file(path))
    backbone.load_state_dict(state)
    assert torch.equal(backbone.layers[2].blocks[0].mlp.fc1.weight, network.layers[2].blocks[0].mlp.fc1.weight)
    assert torch.equal(backbone.norm0.weight, own["norm0.weight"]) and len(backbone.layers) == 3
    full, path = classifier(tmp_path, "swin_tiny", width=12)
    model = create_model("maskformer_small", backbone="swin_tiny", width=12, backbone_weights=path)
    assert torch.equal(model.backbone.layers[3].blocks[1].attn.qkv.weight, full.layers[3].blocks[1].attn.qkv.weight)


def test_backbone_weights_that_do_not_fit(tmp_path):
    _, path = classifier(tmp_path, "resnet18", width=8)
    message = r"do not fit the backbone of detr_tiny: conv1.weight is \(8, 3, 7, 7\), the model's \(16, 3, 7, 7\)"
    with pytest.raises(ValueError, match=message):
        create_model("detr_tiny", backbone_weights=path)
    with pytest.raises(ValueError, match="give pretrained or backbone_weights, not both"):
        create_model("fcos_small", backbone_weights=path, pretrained=path)
    with pytest.raises(ValueError, match="resnet18 has no option 'backbone_weights'"):
        create_model("resnet18", backbone_weights=path)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        create_model("pft_small", backbone_weights=tmp_path / "nothing")
