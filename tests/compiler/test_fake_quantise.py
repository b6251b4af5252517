"""Fake quantisation against the integer reference, and training through it."""

import numpy as np
import pytest
import torch
from torch import nn

from algo.nm import NM
from algo.sparsify import finalize, sparsify
from algo.train import TrainConfig, train
from compiler.compile import compile_model
from compiler.fake_quantise import FakeQuantised
from compiler.graph import CompileError, Unfold
from sim.reference import dequantise, quantise_inputs, run_reference
from sim.simulate import simulate
from tests.compiler.modules import Apply, make


def _steps(fake, network, inputs):
    """Differences to the integer reference in steps of each tensor's grid, by name."""
    graph = fake.graph()
    bound = graph.bind(inputs)
    given = {node.inputs[0]: node for node in graph.nodes.values() if isinstance(node, Unfold)}
    floats = {given[name].name if name in given else name: given[name].evaluate(x) if name in given else x
              for name, x in bound.items()}
    integers = run_reference(network, quantise_inputs(network, floats))
    with torch.no_grad():
        values = fake.values(**bound)
    found = {}
    for op in network.ops:
        if op.out not in values:
            continue
        factors = network.meta.get(f"divided.{op.out}", "1").split()
        exact = dequantise(network, op.out, integers[op.out]) / torch.tensor([float(text) for text in factors])
        found[op.out] = ((values[op.out].reshape(exact.shape) - exact) / network.tensors[op.out].scale).abs()
    return found


CASES = [
    ("post-LN encoder, gelu, mask", {}), ("post-LN encoder", {"residual_bits": 16}), ("pre-LN encoder, gelu", {"smooth": 0.5}),
    ("mlp with dropout", {"bias_correction": False}), ("stream read twice", {}), ("causal and padding mask", {}),
    ("cross attention", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), CASES)
def test_values_are_those_of_the_integer_reference(name, options):
    """Each rounding may go the other way by the 2^-15 of a multiplier or the segments of the softmax's exponential: a step here
    and there, and what follows with it."""
    module, inputs = make(name)
    fake = FakeQuantised(module, inputs, [inputs], **options)
    for tensor, steps in _steps(fake, fake.network(), inputs).items():
        if fake._grids.tensors[tensor].dtype == "int8":
            assert steps.max() <= 3.01 and steps.mean() < 0.2, (tensor, steps.max(), steps.mean())


def _digits():
    """Noisy stripes of four directions, 12 x 12."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 4
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    waves = torch.stack([torch.sin(1.2 * part) for part in (x, y, x + y, x - y)])
    return waves[labels][:, None] + 1.2 * torch.randn(256, 1, 12, 12, generator=generator), labels


def _network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def test_convolutions_and_folded_batch_norms():
    pixels, _ = _digits()
    model = _network()
    model(pixels)
    fake = FakeQuantised(model.eval(), pixels[:8], [pixels[:64]])
    for tensor, steps in _steps(fake, fake.network(), pixels[:8]).items():
        assert steps.max() <= 2.01 and (steps > 0.01).float().mean() < 0.05, tensor


def _accuracy(module, pixels, labels):
    with torch.no_grad():
        return float((module(pixels).argmax(1) == labels).float().mean())


def test_fine_tuning_raises_accuracy_keeps_masks_and_compiles_to_the_same_integers():
    """A network whose channels were scaled apart, which costs accuracy in 8 bits; a few steps get it back."""
    pixels, labels = _digits()
    batches = lambda epoch: list(zip(pixels.split(64), labels.split(64), strict=True))
    loss = lambda m, batch: nn.functional.cross_entropy(m(batch[0]), batch[1])
    model = _network()
    sparsify(model, {"3": "2:4"}, method="magnitude", hold=True)
    train(model, batches, loss, TrainConfig(epochs=12, lr=1e-2))
    with torch.no_grad():  # an outlier in two channels of the input of the second convolution
        model[1].weight[:2] *= 120
        model[1].bias[:2] *= 120
        model[3].parametrizations.weight.original[:, :2] /= 120
    assert _accuracy(model, pixels, labels) > 0.9
    fake = FakeQuantised(model, pixels[:64], [pixels[:64]])
    before = _accuracy(fake, pixels, labels)
    train(fake, batches, loss, TrainConfig(epochs=6, lr=3e-3, seed=1))
    after = _accuracy(fake, pixels, labels)
    assert before < 0.9 and after > before + 0.1, (before, after)
    mask = model[3].weight != 0
    finalize(model)
    assert torch.equal(model[3].weight != 0, mask)
    program = compile_model(fake, arch="tiny", order="operator")
    assert program.network.ops[1].pattern == NM("2:4")
    for mine, theirs in zip(program.network.ops, fake.network().ops, strict=True):
        assert not hasattr(mine, "weight") or np.array_equal(mine.weight, theirs.weight)
    (logits,) = simulate(program, pixels[:64], engine="reference").outputs
    with torch.no_grad():
        step = program.network.tensors[program.network.outputs[0]].scale
        steps = (logits - fake(pixels[:64])).abs() / step
    assert steps.mean() < 1 and (steps > 1.01).float().mean() < 0.2, (steps.max(), steps.mean())


def test_gradients_are_those_of_the_float_network_where_nothing_is_clipped():
    module, inputs = make("post-LN encoder")
    fake = FakeQuantised(module, inputs, [inputs], observer="minmax")
    weight = next(p for p in module.parameters() if p.ndim == 2)
    grads = []
    for computed in (module.eval(), fake):
        result = computed(*inputs) if isinstance(inputs, tuple) else computed(inputs)
        grads.append(torch.autograd.grad(result.square().sum(), weight)[0].flatten())
    assert torch.cosine_similarity(*grads, dim=0) > 0.98


def test_what_the_host_would_do_is_refused():
    module = Apply(lambda m, x: m.a(x).sort(-1).values, a=nn.Linear(8, 8))
    with pytest.raises(CompileError, match="aten.sort"):
        FakeQuantised(module, torch.randn(2, 8), [torch.randn(2, 8)])
