"""The compared lanes compute the same sums; bounds and the command line."""

import numpy as np
import pytest
from amaranth.sim import Simulator

from benchmarks.__main__ import main
from benchmarks.datapaths import DenseLane, MuxLane, export, gather_cycles, lanes, mux_cycles
from hw.arch import Arch
from hw.lane import Lane

ROWS, GROUP, STEPS = 4, 8, 11


def _run(lane, load, select) -> list[int]:
    """Sums of a lane after `STEPS` steps; `load(ctx)` fills it, `select(ctx, step)` gives the step's activations."""
    rng = np.random.default_rng(1)
    weights, found = rng.integers(-128, 128, STEPS), []

    async def bench(ctx) -> None:
        await load(ctx)
        control = lane.control
        for cycle in range(STEPS + 4):  # address, activation, product, sum: see LaneControl
            ctx.set(control.ram, cycle < STEPS)
            if cycle < STEPS:
                ctx.set(lane.weight, int(weights[cycle]))
                select(ctx, cycle)
            ctx.set(control.mul, 0 < cycle <= STEPS)
            ctx.set(control.acc, 1 < cycle <= STEPS + 1)
            ctx.set(control.first, cycle == 2)
            ctx.set(control.copy, cycle == STEPS + 2)
            await ctx.tick()
        found.extend(ctx.get(lane.shadow[t]) for t in range(ROWS))

    simulator = Simulator(lane)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    return found


def test_lanes_agree() -> None:
    rng = np.random.default_rng(2)
    window, positions = rng.integers(-128, 128, (ROWS, GROUP)), rng.integers(0, GROUP, STEPS)
    columns = [int.from_bytes(window[:, c].astype(np.int8).tobytes(), "little") for c in range(GROUP)]
    weights = np.random.default_rng(1).integers(-128, 128, STEPS)
    expected = (window[:, positions] @ weights).tolist()

    async def nothing(ctx) -> None:
        pass

    dense = DenseLane(ROWS)
    assert _run(dense, nothing, lambda ctx, s: [
        ctx.set(dense.column[t], int(window[t, positions[s]]) & 255) for t in range(ROWS)]) == expected

    mux = MuxLane(GROUP, ROWS)

    async def fill_window(ctx) -> None:
        for t in range(ROWS):
            ctx.set(mux.window[t], int.from_bytes(window[t].astype(np.int8).tobytes(), "little"))
    assert _run(mux, fill_window, lambda ctx, s: ctx.set(mux.position, int(positions[s]))) == expected

    gather = Lane(Arch(name="test", rows=ROWS, lanes=ROWS, lane_depth=64, row_depth=16, psum_depth=16, bus_bytes=8))

    async def fill_memory(ctx) -> None:
        ctx.set(gather.write_en, 1)
        for address, column in enumerate(columns):
            ctx.set(gather.write_addr, address)
            ctx.set(gather.write_data, column)
            await ctx.tick()
        ctx.set(gather.write_en, 0)
    assert _run(gather, fill_memory, lambda ctx, s: ctx.set(gather.addr, int(positions[s]))) == expected


def test_export_shares_the_mac() -> None:
    for text in lanes().values():
        assert text.count("module nmforge_mac(") == 1 and text.count("nmforge_mac mac") == 16
    assert 'ram_style = "distributed"' in lanes()["gather, LUT RAM, depth 64"]
    assert export(MuxLane(4), "other").count("module other(") == 1


def test_bounds() -> None:
    assert gather_cycles(2) == 2
    assert mux_cycles(2, 4, columns_per_cycle=1) == 4  # waits for the window: no faster than dense
    assert mux_cycles(2, 4, columns_per_cycle=2) == 2
    assert mux_cycles(1, 32, columns_per_cycle=4, reuse=4) == 2
    assert all(mux_cycles(n, m, columns_per_cycle=m) == gather_cycles(n) for n, m in ((1, 1), (2, 8), (3, 32)))


def test_unknown_benchmark(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["nothing"])
    assert stopped.value.code == 2
    assert "unknown benchmark 'nothing'; known: utilisation" in capsys.readouterr().err
