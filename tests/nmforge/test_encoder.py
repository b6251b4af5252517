"""Encoder on the accelerator, the rest on the host."""

import pytest
import torch

from nmforge.encoder import calibration_batches, choose_sentences, compile_encoder, encoder_inputs, int8_logits, pad
from nmforge.sentiment import collate, logits_of
from sim.simulate import simulate
from tests.nmforge.tiny_demo import data, model


def test_choose_sentences_spreads_over_the_lengths() -> None:
    sentences = data().test
    numbers = choose_sentences(sentences, 5, 10)
    lengths = [len(sentences[number].ids) for number in numbers]
    fit = sorted(len(s.ids) for s in sentences if len(s.ids) <= 10)
    assert lengths == sorted(lengths) and lengths[0] == fit[0] and lengths[-1] == fit[-1] and len(set(numbers)) == 5
    assert len(choose_sentences(sentences, 1, 10)) == 1
    with pytest.raises(ValueError, match="sentences fit 3 tokens: 2 are wanted"):
        choose_sentences(sentences, 2, 3)


def test_pad() -> None:
    ids, mask = pad((torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64)), 5)
    assert ids.shape == mask.shape == (2, 5) and mask.sum() == 6
    with pytest.raises(ValueError, match="5 tokens do not fit the length 4"):
        pad((ids, mask), 4)


def test_int8_logits_are_those_of_the_simulated_program() -> None:
    """The reference at each sentence's own length, and the program at its padded one, give the same logits."""
    net, sentences = model(), data().test
    batches = calibration_batches(net.bert, data().train, count=16, batch_size=8)
    assert [len(batch["hidden_states"]) for batch in batches] == [8, 8]
    program = compile_encoder(net.bert, batch=3, length=12, arch="tiny", calibration=batches)
    numbers = choose_sentences(sentences, 3, 12)
    seen: list[tuple[int, int]] = []
    logits = int8_logits(program.network, net, sentences, batch_size=7, progress=lambda done, end: seen.append((done, end)))
    assert seen[-1] == (30, 30)
    batch = collate(sentences, numbers)
    ids, mask = pad((batch.ids, batch.mask), 12)
    run = simulate(program, encoder_inputs(net.bert, (ids, mask)), engine="isa")
    with torch.no_grad():
        simulated = net.classify(torch.as_tensor(run.outputs[0]), mask)
    assert run.bit_exact and torch.allclose(simulated, logits[numbers], atol=1e-6)
    assert float((logits - logits_of(net, sentences)).abs().max()) < 0.1
