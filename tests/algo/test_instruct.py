import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from algo.instruct import (
    END,
    IGNORED,
    PAD,
    START,
    Example,
    TokenBatch,
    answer_of,
    collate,
    encode,
    example_batches,
    prompt_of,
    token_loss,
    train_tokenizer,
    window_batches,
)

TEXTS = ["a film about film makers", "the film was dull, the makers were not", "prices of oil rose"] * 3
TOKENIZER = train_tokenizer(TEXTS, 300)
EXAMPLE = Example("Did they like it?", "the film was dull", "no")


def test_the_tokenizer_writes_any_text():
    for text in (*TEXTS, "größer £5 ☂", "### Task\n"):
        assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text
    assert [TOKENIZER.token_to_id(token) for token in ("<pad>", "<s>", "</s>")] == [PAD, START, END]
    assert train_tokenizer(TEXTS, 300).to_str() == TOKENIZER.to_str()
    assert len(TOKENIZER.encode("the film").ids) < len("the film")


def test_only_the_answer_has_labels():
    tokens, labels = encode(TOKENIZER, EXAMPLE, 200)
    prompt = labels.count(IGNORED)
    assert labels[:prompt] == [IGNORED] * prompt and labels[prompt:] == tokens[prompt:]
    assert TOKENIZER.decode(tokens[1:prompt]) == prompt_of(EXAMPLE) and tokens[0] == START
    assert TOKENIZER.decode(tokens[prompt:-1]) == answer_of(EXAMPLE) == " no" and tokens[-1] == END
    assert "### Text" not in prompt_of(Example("Say hello.", "", "hello"))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["film", "prices", "ünïcode", "a", ""]), max_size=60), st.integers(60, 120))
def test_long_texts_are_cut_and_answers_kept(words, length):
    tokens, labels = encode(TOKENIZER, Example("Did they like it?", " ".join(words), "yes"), length)
    assert len(tokens) == len(labels) <= length
    assert TOKENIZER.decode(tokens[labels.count(IGNORED) : -1]) == " yes"
    assert TOKENIZER.decode(tokens).endswith("### Answer: yes")


def test_too_short_a_length():
    with pytest.raises(ValueError, match=r"instruction and answer take \d+ tokens, more than 10"):
        encode(TOKENIZER, EXAMPLE, 10)


def test_labels_are_the_next_tokens():
    batch = collate([([1, 5, 6, 2], [IGNORED, IGNORED, 6, 2]), ([1, 7, 2], [IGNORED, 7, 2])])
    assert batch.tokens.tolist() == [[1, 5, 6], [1, 7, PAD]]
    assert batch.labels.tolist() == [[IGNORED, 6, 2], [7, 2, IGNORED]]


def test_epochs_walk_through_all_examples():
    rows = [([1] * (3 + number % 4) + [100 + number], [IGNORED] * (4 + number % 4)) for number in range(10)]
    epochs = example_batches(rows, size=5, batch_size=2, seed=0)
    seen = [row[row != 1].tolist() for number in range(2) for batch in epochs(number) for row in batch.tokens]
    assert len(seen) == 10 and [len(batch.tokens) for batch in epochs(0)].count(2) == 2
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(epochs(1), epochs(1), strict=True))


def test_windows():
    epochs = window_batches(torch.arange(23), length=5, size=None, batch_size=3, seed=0)
    (first, second) = epochs(0)
    tokens = torch.cat([first.tokens, second.tokens])
    assert sorted(tokens.flatten().tolist()) == list(range(20))
    assert torch.equal(torch.cat([first.labels, second.labels]), tokens + 1)


def test_loss_is_of_labelled_tokens_only():
    torch.manual_seed(0)
    model = nn.Embedding(8, 8)
    batch = TokenBatch(torch.tensor([[1, 5, 6], [1, 7, 0]]), torch.tensor([[IGNORED, 6, 2], [7, IGNORED, IGNORED]]))
    logs = model.weight.log_softmax(-1)
    expected = -(logs[5, 6] + logs[6, 2] + logs[1, 7]) / 3
    assert torch.allclose(token_loss(model, batch), expected)
