"""The reference's convolutions and poolings against torch's own in float64, where every sum is exact."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from compiler.ops import Conv, MaxPool, QuantNetwork, QuantTensor, Requant, Window
from sim.reference import run_reference

SIZES = {
    "square": dict(kernel=(3, 3), padding=(1, 1)),
    "strides": dict(kernel=(3, 2), stride=(2, 3), padding=(1, 0)),
    "dilation": dict(kernel=(2, 3), padding=(1, 2), dilation=(3, 2)),
    "one pixel": dict(kernel=(1, 1)),
    "more behind than before": dict(kernel=(2, 4), padding=(0, 1)),
    "pixels left out": dict(kernel=(2, 2), padding=(-1, -2)),
}


def network(op, image, channels, out, outputs, dtype="int16"):
    tensors = {
        "x": QuantTensor("x", (2, image[0] * image[1], channels), "int8", 1.0, image),
        "y": QuantTensor("y", (2, out[0] * out[1], outputs), dtype, 1.0, out),
    }
    return QuantNetwork(tensors=tensors, ops=(op,), inputs=("x",), outputs=("y",))


def as_image(values, size):
    return torch.from_numpy(values).double().transpose(1, 2).unflatten(2, size)


def shape_of(window, image, behind):
    return tuple(
        (image[i] + window.padding[i] + behind[i] - (window.kernel[i] - 1) * window.dilation[i] - 1) // window.stride[i] + 1
        for i in range(2)
    )


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_convolution_equals_torch(name, groups):
    rng, image, window = np.random.default_rng(groups), (7, 6), Window(**SIZES[name])
    behind = (2, 2) if name == "more behind than before" else tuple(max(0, p) for p in window.padding)
    out, outputs, inputs = shape_of(window, image, behind), 6, 6
    weight = rng.integers(-127, 128, (outputs, *window.kernel, inputs // groups)).astype(np.int8)
    bias = rng.integers(-1000, 1000, outputs).astype(np.int32)
    # mult and shift that divide by 8 exactly: rounds half up
    requant = Requant(bias, np.full(outputs, 1 << 10, np.int16), np.full(outputs, 13, np.uint8))
    op = Conv(name="conv", x="x", out="y", weight=weight, window=window, groups=groups, requant=requant)
    x = rng.integers(-128, 128, (2, image[0] * image[1], inputs)).astype(np.int8)
    got = run_reference(network(op, image, inputs, out, outputs), {"x": x})["y"]
    (top, left), (bottom, right) = window.padding, behind
    kernel = torch.from_numpy(weight).double().permute(0, 3, 1, 2)
    padded = F.pad(as_image(x, image), (left, right, top, bottom))
    exact = F.conv2d(padded, kernel, torch.from_numpy(bias).double(), window.stride, 0, window.dilation, groups)
    expected = torch.floor(exact / 8 + 0.5).clamp(-32768, 32767).flatten(2).transpose(1, 2)
    assert torch.equal(torch.from_numpy(got).double(), expected)


@pytest.mark.parametrize("name", ["square", "strides", "dilation", "one pixel"])
def test_pooling_equals_torch(name):
    rng, image, window = np.random.default_rng(7), (7, 6), Window(**SIZES[name])
    out = shape_of(window, image, window.padding)
    x = rng.integers(-128, 128, (2, image[0] * image[1], 5)).astype(np.int8)
    op = MaxPool(name="pool", x="x", out="y", window=window)
    got = run_reference(network(op, image, 5, out, 5, "int8"), {"x": x})["y"]
    (top, left) = window.padding
    padded = F.pad(as_image(x, image), (left, left, top, top), value=-torch.inf)
    expected = F.max_pool2d(padded, window.kernel, window.stride, 0, window.dilation)
    assert torch.equal(torch.from_numpy(got).double(), expected.flatten(2).transpose(1, 2))
