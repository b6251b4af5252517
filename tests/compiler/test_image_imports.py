"""Networks of convolutions from torch: every pass computes the same, and the compiled program is close to the module."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from algo.nm import NM
from compiler.compile import compile_model
from compiler.frontend import trace
from compiler.graph import CompileError, Convolution, Linear, MaxPool, Unfold
from compiler.passes import optimise, run_passes
from sim.simulate import simulate


class Small(nn.Module):
    """Stem, pooling, residual, depth-wise and grouped convolution, dilation, mean of the pixels, classifier."""

    def __init__(self, classes=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.grouped = nn.Conv2d(8, 12, (1, 3), padding=(0, 1), stride=(2, 1), groups=4)
        self.point = nn.Conv2d(12, 10, 1)
        self.fc = nn.Linear(10, classes)

    def forward(self, x):
        x = F.max_pool2d(self.stem(x), 3, 2, 1)
        x = torch.relu(self.body(x) + x)
        x = self.grouped(F.relu6(self.depthwise(x)))
        return self.fc(F.avg_pool2d(self.point(x), 2).mean((2, 3)))


class Backbone(nn.Module):
    """Gives an image, and normalises its input."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x):
        return torch.relu(self.conv(self.norm(x)))


def settled(module):
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            part.weight.data.uniform_(0.5, 1.5)
            part.bias.data.normal_()
    return module.eval()


@pytest.mark.parametrize("kind, image", [(Small, (20, 17)), (Backbone, (5, 6))])
def test_every_pass_computes_the_same(kind, image):
    module, x = settled(kind()), torch.randn(2, 3, *image)
    with torch.no_grad():
        expected = module(x)
    traced = trace(module, x)
    for graph in (traced, *run_passes(traced)):
        (value,) = graph.run(x).values()
        assert torch.allclose(value.reshape(expected.shape), expected, atol=1e-4), graph.stage


def test_batch_norms_are_folded_and_the_stem_is_unfolded():
    graph = optimise(trace(settled(Small()), torch.randn(1, 3, 20, 20)))
    kinds = [type(node) for node in graph.nodes.values()]
    assert kinds.count(Unfold) == kinds.count(MaxPool) == 1
    stem = next(node for node in graph.nodes.values() if isinstance(node, Linear))
    assert stem.weight.shape == (8, 27) and stem.post.function is not None
    # body, depth-wise, grouped, average, mean; the last two are depth-wise, too
    assert sorted(n.groups for n in graph.nodes.values() if isinstance(n, Convolution)) == [1, 4, 8, 10, 10]


@pytest.mark.parametrize("kind, image", [(Small, (20, 17)), (Backbone, (5, 6))])
def test_compiled_program_is_close_to_the_module(kind, image):
    module, x = settled(kind()), torch.randn(2, 3, *image)
    program = compile_model(module, x, arch="tiny", host="forbid", calibration=[torch.randn(8, 3, *image), x])
    run = simulate(program, x, engine="isa")
    with torch.no_grad():
        expected = module(x)
    assert run.bit_exact and run.outputs[0].shape == expected.shape
    assert F.cosine_similarity(run.outputs[0].flatten(1), expected.flatten(1)).min() > 0.99


@pytest.mark.parametrize(
    "layer, image",
    [
        (nn.ConvTranspose2d(4, 6, 2, 2), (3, 4)),
        (nn.ConvTranspose2d(4, 6, (3, 4), (2, 3), padding=(1, 0), output_padding=(0, 2), groups=2), (4, 3)),
        (nn.ConvTranspose2d(4, 4, 3, 2, dilation=3, bias=False), (3, 3)),
        (nn.ConvTranspose2d(4, 4, 1, 3), (2, 3)),
        (nn.ConvTranspose1d(4, 3, 5, 3, padding=2), (7,)),
        (nn.Upsample(scale_factor=(3, 2), mode="bilinear"), (3, 4)),
        (nn.Upsample(size=(7, 5), mode="nearest"), (3, 4)),
        (nn.Upsample(scale_factor=4, mode="linear"), (5,)),
    ],
    ids=str,
)
def test_every_pass_enlarges_images_as_torch_does(layer, image):
    module, x = nn.Sequential((nn.Conv2d if len(image) == 2 else nn.Conv1d)(3, 4, 1), layer).eval(), torch.randn(2, 3, *image)
    with torch.no_grad():
        expected = module(x)
    traced = trace(module, x)
    for graph in (traced, *run_passes(traced)):
        (value,) = graph.run(x).values()
        torch.testing.assert_close(value.reshape(expected.shape), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layer", [nn.Upsample(scale_factor=2, mode="bicubic"), nn.AdaptiveAvgPool2d(5)], ids=str)
def test_what_the_accelerator_cannot_do_names_the_layer(layer):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.Conv2d(4, 4, 3)).eval()
    with pytest.raises(CompileError, match=r"\n +1 \("):
        compile_model(module, torch.randn(1, 3, 8, 8), arch="tiny", host="forbid", calibration=[torch.randn(1, 3, 8, 8)])


def test_weights_that_break_their_pattern_are_refused_by_name():
    module = nn.Sequential(nn.Conv2d(8, 4, 3), nn.ReLU())
    module[0].nm_pattern = NM("2:4")
    with pytest.raises(CompileError, match=r"layer '0'.*2:4.*row 0, group 0"):
        compile_model(module, torch.randn(1, 8, 6, 6), arch="tiny", calibration=[torch.randn(1, 8, 6, 6)])


def test_input_windows_are_those_of_torch():
    from sim.model_io import _windows

    image = np.arange(2 * 3 * 5 * 6, dtype=np.float64).reshape(2, 3, 5, 6)
    node = Unfold(name="u", shape=(2, 9, 27), out_size=(3, 3), kernel=(3, 3), stride=(2, 2), padding=(1, 1))
    rows = _windows(image, (3, 3, 3, 3, 2, 2, 1, 1, 1, 1))
    assert np.array_equal(rows, node.evaluate(torch.from_numpy(image)).numpy())
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    expected = F.conv2d(torch.from_numpy(image), weight, stride=2, padding=1).flatten(2).transpose(1, 2)
    assert torch.allclose(torch.from_numpy(rows) @ weight.permute(0, 2, 3, 1).flatten(1).t(), expected)
