import pytest
import torch
from torch import nn
from torch.nn import functional as F

from algo.checkpoint import load_model
from algo.finetune import PipelineConfig, prune_pipeline
from algo.idp import IDPConfig
from algo.nm import NM
from algo.sparsify import pattern_of
from algo.train import TrainConfig

CONFIG = PipelineConfig(
    pattern={"0": "2:4"},
    dense=TrainConfig(epochs=2, lr=0.02),
    idp=IDPConfig(train=TrainConfig(epochs=1, lr=0.01)),
)


def data(epoch):
    x = torch.randn(4, 32, 8, generator=torch.Generator().manual_seed(epoch))
    return [(batch, (batch[:, 0] > 0).long()) for batch in x]


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@torch.no_grad()
def evaluate(model):
    x, y = data(1000)[0]
    model.eval()
    return float((model(x).argmax(1) == y).double().mean())


def run(folder, *, loss=loss_fn, config=CONFIG, **options):
    return prune_pipeline(net(), data, loss, evaluate, config, folder, **options)


def test_stages_files_and_patterns(tmp_path):
    result = run(tmp_path)
    assert [stage.name for stage in result.stages] == ["dense", "3:4", "2:4"]
    assert result.patterns == {"0": NM("2:4")} and pattern_of(result.sparse[0]) == NM("2:4")
    assert pattern_of(result.dense[0]) is None and torch.count_nonzero(result.dense[0].weight) == 8 * 16
    assert result.dense_accuracy == evaluate(result.dense) and result.sparse_accuracy == evaluate(
        result.sparse
    )
    other = net()
    load_model(other, result.sparse_folder)
    assert torch.equal(other[0].weight, result.sparse[0].weight)
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("epoch.safetensors"))


class Stop(Exception):
    pass


@pytest.mark.parametrize("steps", [2, 6, 10, 14])
def test_resume_gives_the_same_weights(tmp_path, steps):
    whole = run(tmp_path / "whole")
    calls = 0

    def failing(model, batch):
        nonlocal calls
        calls += 1
        if calls > steps:
            raise Stop
        return loss_fn(model, batch)

    with pytest.raises(Stop):
        run(tmp_path / "parts", loss=failing)
    parts = run(tmp_path / "parts")
    assert torch.equal(whole.sparse[0].weight, parts.sparse[0].weight)
    assert [s.accuracy for s in whole.stages] == [s.accuracy for s in parts.stages]


def test_reuse_fresh_and_other_patterns(tmp_path):
    first = run(tmp_path)
    again = run(tmp_path, loss=None)  # trains nothing
    assert torch.equal(first.sparse[0].weight, again.sparse[0].weight)
    assert all(stage.seconds == 0 for stage in again.stages)
    other = PipelineConfig(pattern={"0": "1:4"}, dense=CONFIG.dense, idp=CONFIG.idp)
    result = run(tmp_path, config=other)
    assert result.stages[0].seconds == 0 and result.sparse_folder != first.sparse_folder
    fresh = run(tmp_path, fresh=True)
    assert all(stage.seconds > 0 for stage in fresh.stages)
    assert torch.equal(first.sparse[0].weight, fresh.sparse[0].weight)


def test_changed_settings_are_named(tmp_path):
    run(tmp_path, facts={"data": 1})
    with pytest.raises(
        ValueError, match=r"cannot reuse .*dense: facts.data was 1, is now 2"
    ):
        run(tmp_path, facts={"data": 2})


def test_level_loss_gets_the_dense_model(tmp_path):
    given = []

    def level_loss(dense):
        given.append(dense)
        return loss_fn

    result = run(tmp_path, level_loss=level_loss)
    assert given == [result.dense]


def test_dense_pattern_prunes_nothing(tmp_path):
    result = run(tmp_path, config=PipelineConfig(pattern="dense", dense=CONFIG.dense))
    assert result.patterns == {} and [stage.name for stage in result.stages] == ["dense"]
    assert torch.equal(result.dense[0].weight, result.sparse[0].weight)
