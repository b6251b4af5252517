"""Tables for people."""

import pytest

from compiler.compile import compile_network
from nmforge.tables import print_models, print_run
from sim.simulate import simulate
from tests.sim.small_network import random_input, small_network


def test_run(capsys: pytest.CaptureFixture[str]) -> None:
    program = compile_network(small_network(), "tiny")
    for check, word in ((True, "yes"), (False, "not checked")):
        run = simulate(program, random_input(), engine="isa", check=check)
        print_run(run)
        printed = capsys.readouterr().out
        assert word in printed and run.outputs_sha256[:16] in printed and "utilisation" not in printed


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"name": "net", "family": "F", "params": 2_500_000, "macs": 3_100_000_000, "activations": None, "paper": None}
    print_models([row | {"input_shape": {"images": [1, 3, 8, 8]}}])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("net", "2.50 M", "3.10 G", "1x3x8x8"))
