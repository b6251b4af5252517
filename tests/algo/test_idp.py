import pytest
import torch
from torch import nn
from torch.nn import functional as F

from algo.idp import IDPConfig, family_plot, family_table, idp_levels, idp_schedule, run_idp
from algo.nm import NM
from algo.sparsify import finalize
from algo.train import TrainConfig
from algo.verify import verify

CONFIG = IDPConfig(train=TrainConfig(epochs=2, lr=0.01), freeze=0.5)


def data(epoch):
    x = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(epoch))
    return [(batch, batch[:, :2]) for batch in x]


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 24), nn.Dropout(0.2), nn.ReLU(), nn.Linear(24, 2))


def loss_fn(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("target", "levels"),
    [
        ("2:4", "3:4 2:4"),
        ("1:4", "2:4 1:4"),
        ("2:8", "4:8 2:8"),
        ("1:8", "4:8 2:8 1:8"),
        ("4:8", "6:8 4:8"),
        ("1:16", "8:16 4:16 2:16 1:16"),
        ("3:4", "3:4"),
        ("1:2", "1:2"),
        ("3:7", "4:7 3:7"),
        ("4:4", ""),
    ],
)
def test_schedule(target, levels):
    assert " ".join(map(str, idp_schedule(NM(target)))) == levels


def test_every_schedule_descends_to_its_target():
    for m in range(2, 33):
        for n in range(1, m):
            counts = [nm.n for nm in idp_schedule(NM(n, m))]
            assert counts[-1] == n and counts == sorted(set(counts), reverse=True) and counts[0] < m


def test_mixed_patterns_end_together():
    levels = idp_levels({"a": NM("2:4"), "b": NM("1:8"), "c": NM("3:4")})
    assert [" ".join(map(str, level.values())) for level in levels] == [
        "3:4 4:8 3:4",
        "2:4 2:8 3:4",
        "2:4 1:8 3:4",
    ]
    assert idp_levels({}) == []
    assert idp_levels({"a": NM("1:8")}, {"1:8": (2, 1)}) == [{"a": NM("2:8")}, {"a": NM("1:8")}]


def test_levels_obey_their_pattern_and_masks_freeze():
    model = net()
    seen = []

    def on_level(level):
        seen.append(level.name)
        for name, pattern in level.patterns.items():
            mask = model.get_submodule(name).parametrizations.weight[0]
            assert mask.pattern == pattern and mask.frozen.item()

    run_idp(model, {"0": "1:8", "3": "2:4"}, data, loss_fn, CONFIG, on_level=on_level)
    assert seen == ["3:4+4:8", "2:4+2:8", "1:8+2:4"]
    patterns = finalize(model)
    assert patterns == {"0": NM("1:8"), "3": NM("2:4")}
    verify(model, patterns)


class Stop(Exception):
    pass


@pytest.mark.parametrize("batch_count", [5, 8, 11, 15])
def test_interrupted_and_resumed_gives_the_same_weights(tmp_path, batch_count):
    whole = net()
    run_idp(whole, "2:4", data, loss_fn, CONFIG)
    calls = 0

    def failing(model, batch):
        nonlocal calls
        calls += 1
        if calls > batch_count:
            raise Stop
        return loss_fn(model, batch)

    with pytest.raises(Stop):
        run_idp(net(), "2:4", data, failing, CONFIG, out_dir=tmp_path)
    again = net()
    levels = run_idp(again, "2:4", data, loss_fn, CONFIG, out_dir=tmp_path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert [level.folder.name for level in levels] == ["level-1-3of4", "level-2-2of4"]
    third = net()
    reused = run_idp(third, "2:4", data, loss_fn, CONFIG, out_dir=tmp_path)
    assert all(level.training is None for level in reused)
    assert torch.equal(third[0].weight, whole[0].weight)
    with pytest.raises(ValueError, match="cannot reuse .*level-1-3of4: decay was 0.0002, is now 0.1"):
        run_idp(
            net(),
            "2:4",
            data,
            loss_fn,
            IDPConfig(train=CONFIG.train, freeze=0.5, decay=0.1),
            out_dir=tmp_path,
        )


def test_each_level_sees_later_epochs():
    seen = []

    def recorded(epoch):
        seen.append(epoch)
        return data(epoch)

    run_idp(net(), "2:4", recorded, loss_fn, CONFIG)
    assert sorted(set(seen)) == [0, 1, 2, 3]


def test_wrong_config():
    with pytest.raises(ValueError, match=r"freeze must be in \[0, 1\), not 1"):
        IDPConfig(freeze=1)
    with pytest.raises(ValueError, match=r"schedule of 1:8 must descend to 1, not \(4, 2\)"):
        IDPConfig(schedule={"1:8": (4, 2)})
    with pytest.raises(ValueError, match="N must be <= M"):
        IDPConfig(schedule={"1:8": (9, 1)})


def accuracy(model):
    x, y = data(99)[0]
    return 1 / (1 + F.mse_loss(model(x), y).item())


def test_a_family_in_one_run(tmp_path):
    model = net()
    config = IDPConfig(train=TrainConfig(epochs=1, lr=0.01), levels="all", budget={"1:4": 3})
    levels = run_idp(model, "1:4", data, loss_fn, config, out_dir=tmp_path, evaluate=accuracy)
    assert [level.name for level in levels] == ["3:4", "2:4", "1:4"] and all(0 < level.accuracy <= 1 for level in levels)
    assert [len(level.training.losses) for level in levels] == [1, 1, 3]
    assert all((level.folder / "model.safetensors").exists() for level in levels)
    rows = family_table(model, levels)
    assert [row.ideal_speedup for row in rows] == pytest.approx([4 / 3, 2, 4]) and rows[0].dense_bytes == 16 * 24 + 24 * 2
    assert rows[0].packed_bytes == (12 + 1) * 24 + (18 + 2) * 2  # four groups of 2 bits in a row of 16, six in one of 24
    family_plot(rows, tmp_path / "family.png", dense_accuracy=0.9)
    assert (tmp_path / "family.png").read_bytes()[:4] == b"\x89PNG"
    again = run_idp(net(), "1:4", data, loss_fn, config, out_dir=tmp_path, evaluate=lambda model: 1 / 0)
    assert [level.accuracy for level in again] == [level.accuracy for level in levels]


def test_stops_below_the_floor():
    scores = iter([0.9, 0.8, 0.7, 0.6])
    config = IDPConfig(train=TrainConfig(epochs=1), levels="all", floor=0.75)
    levels = run_idp(net(), "1:8", data, loss_fn, config, evaluate=lambda model: next(scores))
    assert [(level.name, level.accuracy) for level in levels] == [("7:8", 0.9), ("6:8", 0.8), ("5:8", 0.7)]
    with pytest.raises(ValueError, match="floor of 0.75 needs evaluate="):
        run_idp(net(), "1:8", data, loss_fn, config)
    with pytest.raises(ValueError, match="levels must be"):
        IDPConfig(levels="some")
    with pytest.raises(ValueError, match="budget of 1:8"):
        IDPConfig(budget={"1:8": 0})


def test_second_order_inheritance_starts_where_sparsegpt_ends():
    from algo.idp import _compensate
    from algo.sparsify import parametrizations, sparsify

    model, twin = net().eval(), net().eval()
    samples = [data(0)[0][0]]
    sparsify(twin, "2:4", method="sparsegpt", calibration=samples)
    sparsify(model, "2:4")
    _compensate(model, {"0": NM("2:4"), "3": NM("2:4")}, samples, first=True)
    x = torch.randn(5, 16)
    assert torch.allclose(model(x), twin(x), atol=1e-6)
    assert all((weight[~mask.new_mask(weight)] != 0).any() for _, weight, mask in parametrizations(model))  # they can come back
    # the next level starts from what this one computed with
    sparsify(twin, "1:4", method="sparsegpt", calibration=samples)
    from algo.sparsify import set_pattern

    set_pattern(model, "1:4")
    _compensate(model, {"0": NM("1:4"), "3": NM("1:4")}, samples, first=False)
    assert torch.allclose(model(x), twin(x), atol=1e-6)


def test_second_order_inheritance_trains(tmp_path):
    config = IDPConfig(train=TrainConfig(epochs=1, lr=0.01), inherit="second-order")
    model = net()
    run_idp(model, "1:4", data, loss_fn, config, out_dir=tmp_path, calibration=[data(0)[0][0]])
    verify(model, finalize(model))
    with pytest.raises(ValueError, match="give calibration=batches"):
        run_idp(net(), "1:4", data, loss_fn, config)
    with pytest.raises(ValueError, match="level-1-2of4: inherit was 'second-order', is now None"):
        run_idp(net(), "1:4", data, loss_fn, IDPConfig(train=config.train), out_dir=tmp_path)
    with pytest.raises(ValueError, match="inherit must be"):
        IDPConfig(inherit="all")
