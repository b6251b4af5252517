"""Killed with SIGKILL at random steps and started again: the same weights and the same curve as a run that was left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from algo.checkpoint import read_tensors
from algo.logs import read_log
from tests.algo.killed_run import EPOCHS, STEPS, run

ROOT = Path(__file__).parents[2]


def start(folder: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, str(ROOT / "tests/algo/killed_run.py"), str(folder)], env=environment, cwd=ROOT)


def steps_logged(folder: Path) -> int:
    rows = read_log(folder / "log.csv")
    return int(rows[-1]["step"]) if rows else 0


def test_killed_at_random_steps(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole)
    chance = random.Random(5)
    for target in sorted(chance.sample(range(3, STEPS - 4), 2)):
        process = start(parts)
        while steps_logged(parts) < target and process.poll() is None:
            time.sleep(0.005)
        assert process.poll() is None, "finished or failed before it could be killed"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        # what comes next lost at most save_every steps (and the one that ran when it was killed)
        assert steps_logged(parts) >= target
    result = run(parts)
    assert 0 < result.resumed_step < STEPS and len(result.losses) == EPOCHS == len(result.scores)
    expected, found = read_tensors(whole / "result.safetensors")[0], read_tensors(parts / "result.safetensors")[0]
    assert list(expected) == list(found)
    for name, value in expected.items():
        assert value.equal(found[name]), name
    curves = [[{**row, "seconds": ""} for row in read_log(folder / "log.csv")] for folder in (whole, parts)]
    assert curves[0] == curves[1] and len(curves[0]) == STEPS + EPOCHS
