from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from algo.checkpoint import read_tensors, write_tensors
from algo.logs import read_log
from algo.train import NonFiniteLossError, RunOptions, TrainConfig, progress_bars, train


def data(epoch):
    generator = torch.Generator().manual_seed(epoch)
    x = torch.randn(5, 16, 6, generator=generator)
    return [(batch, batch.sum(1, keepdim=True)) for batch in x]


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 1))


def loss_fn(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


CONFIG = TrainConfig(epochs=3, lr=0.01)


class Stop(Exception):
    pass


def stop_at(wanted):
    def before_step(model, step, steps):
        if step == wanted:
            raise Stop

    return before_step


def equal(first, second):
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_loss_goes_down_and_global_state_is_left_alone():
    model = net()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    result = train(model, data, loss_fn, TrainConfig(epochs=20, lr=0.03))
    assert torch.equal(torch.rand(3), expected)
    assert result.losses[-1] < 0.7 * result.losses[0]
    assert not model.training and len(result.losses) == 20 and result.resumed_at == 0


@pytest.mark.parametrize("step", [5, 7, 12])
def test_resume_gives_the_same_weights(tmp_path, step):
    whole, parts = net(), net()
    losses = train(whole, data, loss_fn, CONFIG).losses
    file = tmp_path / "epoch.safetensors"
    with pytest.raises(Stop):
        train(parts, data, loss_fn, CONFIG, checkpoint=file, before_step=stop_at(step))
    again = net()
    torch.manual_seed(99)
    result = train(again, data, loss_fn, CONFIG, checkpoint=file)
    assert result.resumed_at == step // 5 and result.losses == losses
    assert equal(whole, again)


def test_a_finished_run_is_reused(tmp_path):
    first, second = net(), net()
    train(first, data, loss_fn, CONFIG, checkpoint=tmp_path / "e")
    result = train(second, data, loss_fn, CONFIG, checkpoint=tmp_path / "e", before_step=stop_at(0))
    assert result.resumed_at == 3 and equal(first, second)


def test_changed_config_names_the_key(tmp_path):
    file = tmp_path / "e"
    train(net(), data, loss_fn, CONFIG, checkpoint=file, facts={"data": 1})
    with pytest.raises(ValueError, match=r"cannot resume from .*e: lr was 0.01, is now 0.02"):
        train(net(), data, loss_fn, TrainConfig(epochs=3, lr=0.02), checkpoint=file, facts={"data": 1})
    with pytest.raises(ValueError, match=r"facts.data was 1, is now 2"):
        train(net(), data, loss_fn, CONFIG, checkpoint=file, facts={"data": 2})


def test_frozen_parameters_stay():
    model = net()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    train(model, data, loss_fn, CONFIG)
    assert torch.equal(model[0].weight, before)


def test_progress_goes_to_stderr(capsys):
    with progress_bars() as progress:
        train(net(), data, loss_fn, CONFIG, progress=progress, label="fit")
    out, err = capsys.readouterr()
    assert out == "" and "fit" in err and "15/15" in err
    with progress_bars(quiet=True) as progress:
        train(net(), data, loss_fn, CONFIG, progress=progress)
    assert capsys.readouterr() == ("", "")


def test_errors():
    with pytest.raises(ValueError, match="no batches"):
        train(net(), lambda epoch: [], loss_fn, CONFIG)
    with pytest.raises(ValueError, match="epoch 1 has 4 batches, epoch 0 has 5"):
        train(net(), lambda epoch: data(epoch)[epoch:], loss_fn, CONFIG)
    with pytest.raises(ValueError, match="the loss is nan in epoch 0, step 0: lower lr"):
        train(net(), data, lambda model, batch: loss_fn(model, batch) * float("nan"), CONFIG)


@pytest.mark.parametrize(
    ("field", "value"), [("epochs", 0), ("lr", 0.0), ("warmup", 1.5), ("weight_decay", -1.0), ("clip", -1.0)]
)
def test_wrong_config(field, value):
    with pytest.raises(ValueError, match=f"{field} .*{value}"):
        TrainConfig(**{field: value})


def test_resume_within_an_epoch(tmp_path):
    whole, again = net(), net()
    losses = train(whole, data, loss_fn, CONFIG).losses
    file, options = tmp_path / "step.safetensors", RunOptions(save_every=2)
    with pytest.raises(Stop):
        train(net(), data, loss_fn, CONFIG, checkpoint=file, before_step=stop_at(9), run=options)
    result = train(again, data, loss_fn, CONFIG, checkpoint=file, run=options)
    assert (result.resumed_at, result.resumed_step, result.losses) == (1, 8, losses)
    assert equal(whole, again)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sgd", "momentum": 0.8, "schedule": "cosine"},
        {"accumulate": 2, "ema": 0.9},
        {"amp": "bf16", "schedule": "constant"},
        {"amp": "fp16", "clip": 0.0},
    ],
)
def test_every_setting_resumes(tmp_path, changes):
    config = replace(CONFIG, **changes)
    whole, again = net(), net()
    train(whole, data, loss_fn, config)
    with pytest.raises(Stop):
        train(net(), data, loss_fn, config, checkpoint=tmp_path / "s", before_step=stop_at(4), run=RunOptions(save_every=1))
    train(again, data, loss_fn, config, checkpoint=tmp_path / "s")
    assert equal(whole, again) and not equal(whole, net())


def test_accumulated_batches_are_one_larger_batch():
    one, two = net(), net()
    one[1].p = two[1].p = 0.0

    def joined(epoch):
        return data(epoch)[:1]

    def halves(epoch):
        return [(x[i::2], y[i::2]) for x, y in joined(epoch) for i in range(2)]

    train(one, joined, loss_fn, CONFIG)
    result = train(two, halves, loss_fn, replace(CONFIG, accumulate=2))
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
    assert len(result.losses) == 3


def test_the_average_is_the_result():
    seen = []
    averaged = net()
    config = TrainConfig(epochs=3, lr=0.01, ema=0.5)
    train(averaged, data, loss_fn, config, before_step=lambda model, *_: seen.append(model[0].weight.detach().clone()))
    plain = net()
    train(plain, data, loss_fn, replace(config, ema=0.0))
    mean = seen[0].clone()
    for step, weight in enumerate([*seen[1:], plain[0].weight]):
        mean.lerp_(weight.detach(), 1 - min(0.5, (1 + step) / (10 + step)))
    assert torch.allclose(averaged[0].weight, mean, atol=1e-6)


def test_scores_and_log(tmp_path):
    options = RunOptions(log=tmp_path, log_every=2)
    scores = iter([0.25, 0.5, 0.75])
    result = train(net(), data, loss_fn, CONFIG, run=options, evaluate=lambda model: next(scores), label="fit")
    rows = read_log(tmp_path / "log.csv")
    ends = [row for row in rows if row["score"]]
    assert result.scores == (0.25, 0.5, 0.75) == tuple(float(row["score"]) for row in ends)
    assert tuple(float(row["loss"]) for row in ends) == result.losses
    assert [int(row["step"]) for row in rows if not row["score"]] == [2, 4, 6, 8, 10, 12, 14]


def test_not_a_number_names_step_and_checkpoint(tmp_path):
    def bad(model, batch):
        return loss_fn(model, batch) * (float("nan") if len(seen) == 8 else 1.0)

    seen = []
    file = tmp_path / "step.safetensors"
    with pytest.raises(NonFiniteLossError, match=rf"loss is nan in epoch 1, step 2: .*is {file}, after epoch 1, step 1"):
        train(net(), data, bad, CONFIG, checkpoint=file, run=RunOptions(save_every=2), before_step=lambda *_: seen.append(1))
    with pytest.raises(NonFiniteLossError, match="norm of the gradient is nan in epoch 0, step 0.*no checkpoint"):
        train(net(), data, lambda model, batch: loss_fn(model, batch) + (model[0].weight * 0).sum().sqrt(), CONFIG)


def test_weights_of_another_model_are_listed(tmp_path):
    train(net(), data, loss_fn, CONFIG, checkpoint=tmp_path / "s")
    other = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 1, bias=False))
    with pytest.raises(ValueError, match=r"s holds another model. Keys not in the model: 2.bias"):
        train(other, data, loss_fn, CONFIG, checkpoint=tmp_path / "s")


@pytest.mark.parametrize(
    ("field", "value"),
    [("optimizer", "adam"), ("schedule", "step"), ("amp", "fp8"), ("accumulate", 0), ("ema", 1.0), ("momentum", -0.1)],
)
def test_wrong_new_config(field, value):
    with pytest.raises(ValueError, match=f"{field} .*{value}"):
        TrainConfig(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("save_every", -1), ("log_every", 0), ("check_every", 0), ("parallel", "pp")])
def test_wrong_options(field, value):
    with pytest.raises(ValueError, match=f"{field} .*{value}"):
        RunOptions(**{field: value})


def test_checkpoints_of_0_1_0_are_read(tmp_path):
    whole, again = net(), net()
    train(whole, data, loss_fn, CONFIG)
    with pytest.raises(Stop):
        train(net(), data, loss_fn, CONFIG, checkpoint=tmp_path / "s", before_step=stop_at(12))
    tensors, facts = read_tensors(tmp_path / "s")
    tensors["rng"] = tensors.pop("rng.0")
    old = {"epochs", "lr", "weight_decay", "warmup", "clip", "seed", "facts"}
    identity = {key: value for key, value in facts["identity"].items() if key in old}
    write_tensors(tmp_path / "s", tensors, {"identity": identity, "losses": facts["losses"]})
    assert train(again, data, loss_fn, CONFIG, checkpoint=tmp_path / "s").resumed_at == 2 and equal(whole, again)
    with pytest.raises(ValueError, match="optimizer was 'adamw', is now 'sgd'"):
        write_tensors(tmp_path / "s", tensors, {"identity": identity, "losses": facts["losses"]})
        train(net(), data, loss_fn, replace(CONFIG, optimizer="sgd"), checkpoint=tmp_path / "s")
