import pytest
import torch
from torch import nn
from torch.nn import functional as F

from algo.train import TrainConfig, progress_bars, train


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
