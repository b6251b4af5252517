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
    print_models([{"name": "net", "parameters": 2_500_000, "shapes": "2 layers", "source": "here"}])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("net", "2.5 M", "2 layers", "here"))
