import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from algo.batches import LazyImages
from algo.checkpoint import read_json, read_tensors
from algo.distributed import Ahead, Spread, all_ranks, from_main, is_main, mean_of_ranks, processes, rank, share, to_device, world
from algo.logs import read_log
from tests.algo.distributed_run import net, run

ROOT = Path(__file__).parents[2]
MODES = "plain,accumulate-ema,fsdp,fsdp-accumulate-ema"


def torchrun(processes: int, folder: Path, mode: str) -> None:
    """What a user types, on a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command += [str(ROOT / "tests/algo/distributed_run.py"), str(folder), mode]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same trainings by one process and by two."""
    folder = tmp_path_factory.mktemp("runs")
    for mode in ("plain", "accumulate-ema"):
        run(folder / "1" / mode, mode)
    torchrun(2, folder / "2", f"{MODES},resumed-stop,resumed-resume,fsdp-resumed-stop,fsdp-resumed-resume,mismatch,not_finite")
    return folder


@pytest.mark.parametrize("mode", MODES.split(","))
def test_two_processes_give_what_one_gives(runs: Path, mode: str) -> None:
    like = mode.removeprefix("fsdp-") if mode != "fsdp" else "plain"
    one = read_tensors(runs / "1" / like / f"{like}-1.safetensors")[0]
    two = read_tensors(runs / "2" / mode / f"{mode}-2.safetensors")[0]
    assert list(one) == list(two)
    for name, value in one.items():
        if value.is_floating_point():
            assert (two[name] - value).norm() <= 1e-6 * value.norm(), name
        else:
            assert torch.equal(two[name], value), name  # masks
    first, second = (read_json(runs / n / m / f"{m}-{n}.json") for n, m in (("1", like), ("2", mode)))
    assert second["same"] and first["losses"] == pytest.approx(second["losses"], rel=1e-6)
    assert first["scores"] == pytest.approx(second["scores"], rel=1e-5)


def test_only_the_main_process_logs(runs: Path) -> None:
    rows = read_log(runs / "2" / "plain" / "log.csv")
    assert [int(row["step"]) for row in rows if not row["score"]] == list(range(1, 13))


@pytest.mark.parametrize("mode", ["resumed", "fsdp-resumed"])
def test_two_processes_resume(runs: Path, mode: str) -> None:
    like = "fsdp" if "fsdp" in mode else "plain"
    whole = read_tensors(runs / "2" / like / f"{like}-2.safetensors")[0]
    again = read_tensors(runs / "2" / mode / f"{mode}-resume-2.safetensors")[0]
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert read_json(runs / "2" / mode / f"{mode}-resume-2.json")["resumed"] == 4


def test_differing_processes_stop_and_so_do_all_at_a_nan(runs: Path) -> None:
    assert "process 0 and process 1 differ in head.weight" in read_json(runs / "2" / "mismatch.json")["error"]
    first, second = read_json(runs / "2" / "not_finite.json")["errors"]
    assert first == second and "the loss is nan in epoch 0, step 0" in first


def test_leave_flushes_and_gives_the_code() -> None:
    done = subprocess.run([sys.executable, "-c", "from algo.distributed import leave; print('all', end=''); leave(3)"],
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "all")


def test_alone() -> None:
    with processes("auto") as device:
        assert (world(), rank(), is_main(), all_ranks(3), from_main(4)) == (1, 0, True, [3], 4)
        assert device.type in ("cpu", "cuda")
    assert mean_of_ranks(torch.tensor(2.5)) == 2.5
    spread = Spread(net())
    spread.check()
    assert spread.called is spread.model is spread.work is spread.settle()


def test_rows_of_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {"x": torch.arange(5), "y": [torch.arange(10).view(5, 2)]}
    lazy = LazyImages(lambda place: torch.full((1, 1, 1), float(place)), list(range(9)), [7, 2, 5], batch_size=3, workers=1)
    monkeypatch.setattr("algo.distributed.world", lambda: 2)
    for number, rows, weight in ((0, [0, 2, 4], 1.2), (1, [1, 3], 0.8)):
        monkeypatch.setattr("algo.distributed.rank", lambda number=number: number)
        mine, factor = share([batch], 0)
        assert mine["x"].tolist() == rows and mine["y"][0].shape == (len(rows), 2) and factor == pytest.approx(weight)
        loaded, factor = share(lazy, 0)
        assert loaded.labels.tolist() == [[7, 5], [2]][number] and factor == pytest.approx([4 / 3, 2 / 3][number])
    monkeypatch.setattr("algo.distributed.world", lambda: 8)
    monkeypatch.setattr("algo.distributed.rank", lambda: 6)
    mine, factor = share([batch], 0)
    assert mine["x"].tolist() == [0] and factor == 0  # a row to compute with, which counts for nothing
    assert share(lazy, 0)[1] == 0


def test_ahead_gives_batches_in_order() -> None:
    lazy = LazyImages(lambda place: torch.full((1, 1, 1), float(place)), list(range(9)), list(range(9)), batch_size=2, workers=2)
    rows = Ahead(lazy, 1)
    assert [rows.next()[0].labels.tolist() for _ in range(4)] == [[2, 3], [4, 5], [6, 7], [8]]
    assert [Ahead([3, 4, 5], 1).next()[0]] == [4]


def test_to_device_keeps_the_kind() -> None:
    batch = LazyImages(lambda place: torch.zeros(1, 1, 1), [4], [0], batch_size=1, workers=1)[0]
    moved = to_device([batch, {"a": (torch.ones(1), "text")}], torch.device("cpu"))
    assert type(moved[0]) is type(batch) and moved[1]["a"][1] == "text"


def test_wrong_device() -> None:
    with pytest.raises(ValueError, match="device must be cpu, cuda or auto, not 'tpu'"), processes("tpu"):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no CUDA device"), processes("cuda"):
            pass
    with pytest.raises(ValueError, match="parallel must be ddp or fsdp, not 'pipeline'"):
        Spread(net(), "pipeline")  # type: ignore[arg-type]
