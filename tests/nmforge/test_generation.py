"""Generation on the simulated accelerator against the integer reference and the float model."""

import pytest
import torch
from torch.nn import functional as F

from models.llama import Llama, LlamaConfig, generate
from models.llama_adapter import AdapterConfig, LlamaAdapter
from nmforge.generation import FlatStep, Generator

SIZES = LlamaConfig(layers=2, hidden=32, heads=4, kv_heads=2, intermediate=48, vocabulary=64, positions=32)


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.manual_seed(0)
    model = LlamaAdapter(Llama(SIZES), AdapterConfig(length=3, layers=1, bottleneck=4)).eval()
    with torch.no_grad():
        for weight in model.base.parameters():
            if weight.ndim == 2:
                weight.copy_(torch.randn_like(weight) * weight.shape[1] ** -0.5)
        model.gates[0].normal_()
        model.adapter_query.weight.normal_()
    prompts = torch.randint(0, 64, (4, 6)).tolist()
    return Generator(model, length=6, places=24, calibration=prompts, arch="tiny")


def test_the_two_modules_are_the_model(generator: Generator) -> None:
    tokens = torch.randint(0, 64, (1, 7), generator=torch.Generator().manual_seed(1))
    model = generator.model
    with torch.no_grad():
        logits, *kept = generator.prefill_module(generator.embed(tokens[0, :6].tolist()))
        torch.testing.assert_close(logits, model(tokens[:, :6]), atol=1e-4, rtol=0)
        cache = [F.pad(part, (0, 0, 0, 18)) for part in kept]
        logits, *_ = FlatStep(generator.step_module)(*generator.inputs(int(tokens[0, 6]), 6, cache))
        torch.testing.assert_close(logits[:, 0], model(tokens)[:, 6], atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [6, 3])
def test_sixteen_steps_equal_the_reference(generator: Generator, length: int) -> None:
    prompt = torch.randint(0, 64, (length,), generator=torch.Generator().manual_seed(2)).tolist()
    found = generator.generate(prompt, new_tokens=17, engine="isa")
    expected = generator.generate(prompt, new_tokens=17, engine="reference")
    assert found.tokens == expected.tokens and found.bit_exact and found.bytes_checked > 0 and expected.bit_exact is None
    assert found.tokens[0] == generate(generator.model, [prompt], new_tokens=1)[0][0]


def test_errors(generator: Generator) -> None:
    for prompt, new in (([], 1), ([1] * 7, 1), ([1] * 6, 20), ([1], 0)):
        with pytest.raises(ValueError, match="a prompt must have 1 to 6 tokens"):
            generator.generate(prompt, new_tokens=new)
    for length, places in ((6, 6), (6, 33), (0, 4)):
        with pytest.raises(ValueError, match="length and places must rise"):
            Generator(generator.model, length=length, places=places, calibration=[[1] * length])
    with pytest.raises(ValueError, match="prompts of length = 6 tokens"):
        Generator(generator.model, length=6, places=9, calibration=[[1]])
