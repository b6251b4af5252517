"""The C++ memory and register master around a small copy engine with the accelerator's ports."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sim.harness import Harness, HarnessError, ProtocolError
from sim.memory import MemoryModel

SRC, DST, BEATS, GO, FAULT = 0, 4, 8, 12, 16
TARGET = 1 << 19
TEXT = (Path(__file__).parent / "copy_engine.v").read_text()


def open_copy(bus: int, model: MemoryModel | None = None, **options: bool) -> Harness:
    memory = np.random.default_rng(1).integers(0, 256, 1 << 20, dtype=np.uint8)
    return Harness(f"`define NM_TEST_BUS {bus}\n{TEXT}", memory, bus_bytes=bus, model=model, **options)


def copy(harness: Harness, beats: int, source: int = 0, target: int = TARGET) -> int:
    """Returns the cycles taken."""
    for address, value in ((SRC, source), (DST, target), (BEATS, beats), (GO, 1)):
        harness.write(address, value)
    assert harness.run(5_000_000)
    return harness.statistics.finished - harness.statistics.started


@pytest.mark.parametrize("bus", [8, 32, 64, 128])
@pytest.mark.parametrize("stall", [0.0, 0.4])
def test_copies_and_logs_every_byte(bus: int, stall: float) -> None:
    with open_copy(bus, MemoryModel(latency=20, stall_probability=stall, seed=3), log_writes=True) as harness:
        source = harness.memory[: 333 * bus].copy()
        copy(harness, 333)
        assert np.array_equal(harness.memory[TARGET : TARGET + 333 * bus], source)
        log, counts = harness.write_log(), harness.statistics
        assert log.address.tolist() == [TARGET] and log.length.tolist() == [333 * bus]
        assert np.array_equal(log.data, source)
        assert (counts.read_bytes, counts.write_bytes) == (333 * bus, 333 * bus)
        assert counts.read_bursts == counts.write_bursts == 21
        assert counts.hazards == 0
        harness.clear_log()
        assert len(harness.write_log().data) == 0


def test_latency_is_exact() -> None:
    """One beat: AW and AR in cycle 0, R in cycle l, W in l + 1, B in 2l + 1; the engine adds the same few to each."""
    cycles = []
    for latency in (1, 2, 50):
        with open_copy(8, MemoryModel(latency=latency)) as harness:
            cycles.append(copy(harness, 1))
    assert cycles[1] - cycles[0] == 2
    assert cycles[2] - cycles[0] == 2 * 49


@pytest.mark.parametrize("share", [1, 3, 8, 12, 16])
def test_bandwidth_is_shared_by_reads_and_writes(share: int) -> None:
    """2000 beats of 8 bytes read and written: the quotient of bytes and bandwidth, and never more than a beat a cycle."""
    with open_copy(8, MemoryModel(latency=8, bytes_per_cycle=share)) as harness:
        cycles = copy(harness, 2000)
    ideal = 2 * 2000 * 8 / share
    assert ideal <= cycles <= 1.02 * ideal + 100


def test_stalls_are_seeded() -> None:
    def cycles(seed: int) -> int:
        with open_copy(8, MemoryModel(stall_probability=0.5, seed=seed)) as harness:
            return copy(harness, 400)

    assert cycles(1) == cycles(1)
    assert len({cycles(seed) for seed in range(4)}) > 1


def test_out_of_range_is_answered_with_slverr() -> None:
    with open_copy(8) as harness:
        copy(harness, 4, source=1 << 20)
        assert harness.read(GO) == 3  # done, and failed
        before = harness.memory.copy()
        copy(harness, 4, target=1 << 20)
        assert np.array_equal(harness.memory, before)
        copy(harness, 4)
        assert harness.read(GO) == 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (1, r"ARVALID dropped before ARREADY \(cycle \d+\)"),
        (2, r"AR burst at 0xff8 of 128 bytes crosses 4 KiB"),
        (3, r"WLAST set before the last beat of the burst at 0x80000"),
    ],
)
def test_protocol_violations(fault: int, message: str) -> None:
    with open_copy(8, MemoryModel(stall_probability=0.5)) as harness:
        harness.write(FAULT, fault)
        with pytest.raises(ProtocolError, match=message):
            copy(harness, 400)


def test_strobes() -> None:
    with open_copy(8, log_writes=True) as harness:
        before = harness.memory.copy()
        harness.write(FAULT, 4)  # only the first byte of each beat
        copy(harness, 5)
        changed = np.flatnonzero(harness.memory != before)
        assert set(changed) <= {TARGET + 8 * i for i in range(5)}
        assert harness.write_log().address.tolist() == [TARGET + 8 * i for i in range(5)]
        assert np.array_equal(harness.write_log().data, before[:40:8])


def test_overlapping_copy_is_reported_as_hazard() -> None:
    """Source and target share beats while both are in flight: the reads return the old bytes."""
    with open_copy(8) as harness:
        old = harness.memory[:1024].copy()
        copy(harness, 64, source=0, target=256)
        assert harness.statistics.hazards > 0
        assert np.array_equal(harness.memory[256 : 256 + 512], old[:512])


def test_reset_in_mid_run() -> None:
    with open_copy(8) as harness:
        for address, value in ((SRC, 0), (DST, TARGET), (BEATS, 2000), (GO, 1)):
            harness.write(address, value)
        assert not harness.run(300)
        harness.reset()
        source = harness.memory[:80].copy()
        copy(harness, 10, target=TARGET + 4096)
        assert np.array_equal(harness.memory[TARGET + 4096 : TARGET + 4096 + 80], source)


def test_run_gives_up_and_reports_progress() -> None:
    with open_copy(8) as harness:
        seen: list[int] = []
        assert not harness.run(450_000, seen.append)
        assert seen == [200_000, 400_000, 450_000]
        assert not harness.interrupt


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="multiple of 8 bytes, not 12"):
        Harness("", np.zeros(12, np.uint8), bus_bytes=8)
    with pytest.raises(ValueError, match="bus_bytes must be"):
        Harness("", np.zeros(12, np.uint8), bus_bytes=12)
    with pytest.raises(TypeError, match="one-dimensional array of uint8"):
        Harness("", np.zeros(16, np.int8), bus_bytes=8)
    with pytest.raises(ValueError, match="contiguous"):
        Harness("", np.zeros(32, np.uint8)[::2], bus_bytes=8)
    with open_copy(8) as harness:
        with pytest.raises(ValueError, match="a register address is a multiple of 4"):
            harness.write(2, 0)
        with pytest.raises(ValueError, match="32 bits"):
            harness.write(0, 1 << 32)
        with pytest.raises(HarnessError, match="without traces"):
            harness.trace("x.fst")
    with pytest.raises(HarnessError, match="closed"):
        harness.read(0)
    harness.close()


def _fst_times(path: Path) -> tuple[int, int]:
    raw = path.read_bytes()
    assert raw[0] == 0, "not an FST header"
    return int.from_bytes(raw[9:17], "big"), int.from_bytes(raw[17:25], "big")


def test_trace_of_a_window(tmp_path: Path) -> None:
    with open_copy(8, trace=True) as harness:
        harness.trace(tmp_path / "window.fst", 100, 150)
        copy(harness, 100)
        with pytest.raises(HarnessError, match="cannot write the trace"):
            harness.trace(tmp_path / "none" / "window.fst")
    assert _fst_times(tmp_path / "window.fst") == (200, 299)


def test_memory_is_the_callers_array() -> None:
    memory: NDArray[np.uint8] = np.arange(4096, dtype=np.uint32).astype(np.uint8)
    with Harness(f"`define NM_TEST_BUS 8\n{TEXT}", memory, bus_bytes=8) as harness:
        memory[:8] = 7
        copy(harness, 1, target=2048)
        assert harness.memory is memory
        assert (memory[2048:2056] == 7).all()
