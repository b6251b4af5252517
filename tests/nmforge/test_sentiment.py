import pytest
import torch

from algo.batches import walk
from algo.idp import IDPConfig
from algo.nm import NM
from algo.train import TrainConfig
from models import create_model
from nmforge.sentiment import (
    Encoded,
    SentimentConfig,
    SentimentData,
    _batches,
    accuracy,
    collate,
    load_classifier,
    logits_of,
    prepare,
    train,
)

TINY = {"layers": 1, "hidden": 24, "heads": 2, "intermediate": 32, "vocabulary": 40, "num_classes": 2}
SMALL = SentimentConfig(
    sentences=24,
    batch_size=8,
    dense=TrainConfig(epochs=2, lr=1e-3),
    idp=IDPConfig(train=TrainConfig(epochs=1, lr=1e-3)),
)


def sentences(count, seed):
    """Token 5 is good, token 6 is bad."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        length = int(torch.randint(1, 9, (1,), generator=generator))
        ids = torch.randint(7, 40, (length,), generator=generator).tolist()
        label = number % 2
        found.append(Encoded((1, 5 if label else 6, *ids, 2), label, ""))
    return found


def data():
    return SentimentData(sentences(50, 0), sentences(30, 1), 0)


def model():
    torch.manual_seed(0)
    return create_model("minilm_l6", **TINY)


def run(folder, pattern="2:4", config=SMALL, **options):
    return train(pattern, folder, data=data(), model=model(), config=config, **options)


def test_interrupted_and_resumed_gives_the_same_weights(tmp_path, monkeypatch):
    from algo import train as module

    whole = run(tmp_path / "whole")
    real, epochs = module._Loop._run_epoch, []

    def stop_in_the_third(*arguments):
        epochs.append(1)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module._Loop, "_run_epoch", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts")
    monkeypatch.setattr(module._Loop, "_run_epoch", real)
    parts = run(tmp_path / "parts")
    assert [stage.name for stage in parts.stages] == ["dense", "3:4", "2:4"]
    for name, value in whole.sparse.state_dict().items():
        assert torch.equal(value, parts.sparse.state_dict()[name]), name
    assert set(parts.patterns.values()) == {NM("2:4")} and len(parts.patterns) == 6
    assert parts.sparse_accuracy == accuracy(parts.sparse, data().test)


@pytest.mark.parametrize(
    "pattern", ["1:4", "2:8", {"*.attention.*": "2:4", "*.up": "1:8", "*.down": "dense"}]
)
def test_other_patterns_and_mixes(tmp_path, pattern):
    result = run(tmp_path, pattern)
    assert {"head"}.isdisjoint(result.patterns) and result.patterns


def test_dropout_and_distillation_settings_are_checked(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="facts.distill was 0.5, is now 0.0"):
        run(tmp_path, config=SentimentConfig(**{**vars(SMALL), "distill": 0.0}))
    with pytest.raises(ValueError, match=r"distill must be in \[0, 1\], not 2"):
        SentimentConfig(distill=2)
    with pytest.raises(ValueError, match="sentences must be >= 1, not 0"):
        SentimentConfig(sentences=0)


def test_epochs_walk_through_all_sentences():
    seen = [number for epoch in range(5) for number in walk(10, 4, epoch, 7)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    batches = _batches(data(), SMALL)
    assert [batch.numbers.tolist() for batch in batches(1)] == [
        batch.numbers.tolist() for batch in batches(1)
    ]
    assert sum(len(batch.labels) for batch in batches(0)) == 24


def test_collate_pads_and_logits_keep_the_order():
    some = data().test
    batch = collate(some, [3, 1])
    assert batch.ids.shape == batch.mask.shape and batch.mask.sum(1).tolist() == [
        len(some[3].ids),
        len(some[1].ids),
    ]
    assert batch.numbers.tolist() == [3, 1] and batch.labels.tolist() == [1, 1]
    net = model()
    alone = torch.cat(
        [net(batch.ids, batch.mask) for batch in (collate(some, [i]) for i in range(len(some)))]
    )
    assert torch.allclose(logits_of(net, some, batch_size=4), alone, atol=1e-5)


def test_real_sentences_and_published_model(tmp_path):
    try:
        real = prepare(test_size=1500, max_length=48)
    except FileNotFoundError as absent:
        pytest.skip(str(absent))
    assert len(real.test) == 1500 and max(len(sentence.ids) for sentence in real.train) == 48
    assert real.train[0].ids[0] == 101 and real.train[0].ids[-1] == 102
    with pytest.raises(FileNotFoundError, match="model.json is missing"):
        load_classifier(tmp_path)
