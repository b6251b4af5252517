"""timm's names are written down here as its documentation and checkpoints have them (timm 1.0.22)."""

import pytest
import torch

from models import create_model

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def with_norm(conv, norm):
    return [f"{conv}.weight", *(f"{norm}.{part}" for part in NORM)]


def regnet_names(depths):
    """Of a timm RegNet with so many blocks a stage, each first one with a projection, in our order of modules."""
    names = with_norm("stem.conv", "stem.bn")
    for stage, depth in enumerate(depths, 1):
        for block in range(1, depth + 1):
            parts = ["downsample"] * (block == 1) + ["conv1", "conv2", "conv3"]
            for part in parts:
                names += with_norm(f"s{stage}.b{block}.{part}.conv", f"s{stage}.b{block}.{part}.bn")
    return [*names, "head.fc.weight", "head.fc.bias"]


def mobilenet_names(blocks):
    """Of timm's mobilenetv2_100 with these blocks a stage, the first without expansion."""
    names = with_norm("conv_stem", "bn1")
    for stage, count in enumerate(blocks):
        for block in range(count):
            at = f"blocks.{stage}.{block}"
            convolutions = ("conv_dw", "conv_pw") if stage == 0 else ("conv_pw", "conv_dw", "conv_pwl")
            for number, conv in enumerate(convolutions, 1):
                names += with_norm(f"{at}.{conv}", f"{at}.bn{number}")
    return [*names, *with_norm("conv_head", "bn2"), "classifier.weight", "classifier.bias"]


@pytest.mark.parametrize("name, options, theirs", [
    ("regnet_x_200mf", {}, regnet_names((1, 1, 4, 7))),
    ("regnet_x_400mf", {}, regnet_names((1, 2, 7, 12))),
    ("mobilenet_v2", {"width": 0.5}, mobilenet_names((1, 2, 3, 4, 3, 3, 1))),
])  # fmt: skip
def test_both_namings_load(name, options, theirs):
    torch.manual_seed(0)
    first, second, third = (create_model(name, num_classes=3, **options) for _ in range(3))
    with torch.no_grad():
        for value in first.state_dict().values():
            value.copy_(torch.rand(value.shape) * 100)
    state = first.state_dict()
    assert len(theirs) == len(state)
    second.load_state_dict(dict(zip(theirs, state.values())))
    third.load_state_dict(state)
    for model in (second, third):
        assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values()))


def test_what_does_not_fit_is_still_named():
    model = create_model("regnet_x_200mf", num_classes=3)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*trunk_output.block5.block5-0.f.a.0.weight"):
        model.load_state_dict({"s5.b1.conv1.conv.weight": torch.zeros(1)})


def test_a_part_of_a_larger_model_loads_too():
    model = torch.nn.Sequential(create_model("regnet_x_200mf", num_classes=3))
    state = model.state_dict()
    given = state.pop("0.fc.bias") + 1
    model.load_state_dict(state | {"0.head.fc.bias": given})
    assert torch.equal(model[0].fc.bias, given)
