# amaranth: UnusedElaboratable=no

import random
import re
from dataclasses import replace

import pytest
from amaranth.hdl import Module, ResetInserter, Signal
from amaranth.lib import wiring
from amaranth.sim import Simulator

from hw.arch import PRESETS
from hw.reader import ReadArbiter, Reader
from tests.hw.axi_memory import AxiMemory

TINY = PRESETS["tiny"]
WIDE = replace(TINY, name="wide", bus_bytes=32)
PERIOD = 1e-6
MAX_CYCLES = 50_000


class Subject(wiring.Component):
    """Readers of several word sizes behind one arbiter, as the top level joins them."""

    def __init__(self, arch, sizes, fifo_beats, pairs=False):
        self.arbiter = ReadArbiter(arch, readers=len(sizes))
        self.readers = [Reader(arch, out_bytes=size, fifo_beats=fifo_beats, pairs=pairs) for size in sizes]
        self.reset = Signal()
        super().__init__({})

    def elaborate(self, platform):
        m = Module()
        m.submodules.arbiter = self.arbiter
        for k, reader in enumerate(self.readers):
            m.submodules[f"reader_{k}"] = ResetInserter(self.reset)(reader)
            wiring.connect(m, reader.request, self.arbiter.request[k])
            wiring.connect(m, self.arbiter.data[k], reader.data)
        return m


def fetch(memory, out_bytes, cmd):
    """The words a command delivers."""
    for repeat in range(cmd["repeats"]):
        base = cmd["addr"] + repeat * cmd["stride"]
        for k in range(cmd["words"]):
            place = base + k * out_bytes
            yield int.from_bytes(memory.data[place : place + out_bytes], "little")


def fetch_columns(memory, out_bytes, cmd):
    """The same, in pairs if the command is wide: what `receive` makes of a reader with pairs."""
    words = list(fetch(memory, out_bytes, cmd))
    if not cmd["wide"]:
        return words
    return [low | high << 8 * out_bytes for low, high in zip(words[::2], words[1::2], strict=True)]


def random_command(rng, arch, out_bytes, size):
    unit = min(out_bytes, arch.bus_bytes)
    words, repeats = (
        rng.choice([1, 2, 3, rng.randrange(1, 80), rng.randrange(1, 300)]),
        rng.choice([1, 1, 2, 5]),
    )
    if out_bytes >= arch.bus_bytes:
        words = 1 + words // (out_bytes // arch.bus_bytes * 4)
    stride = rng.choice([words * out_bytes, rng.randrange(0, 600) * unit, 4096 - unit])
    span = (repeats - 1) * stride + words * out_bytes + arch.bus_bytes
    near = rng.choice([4096, 8192]) - rng.randrange(40) * unit
    addr = near if near + span < size else rng.randrange((size - span) // unit) * unit
    return {"addr": addr, "words": words, "repeats": repeats, "stride": stride, "wait": 0, "wait_seq": 0}


def simulator(dut, memory):
    sim = Simulator(dut)
    sim.add_clock(PERIOD)

    async def read(ctx):
        await memory.read(ctx, dut.arbiter.bus)

    async def give_up(ctx):
        await ctx.delay(MAX_CYCLES * PERIOD)
        raise TimeoutError(f"not done after {MAX_CYCLES} cycles")

    sim.add_testbench(read, background=True)
    sim.add_testbench(give_up, background=True)
    return sim


async def send(ctx, reader, cmd):
    ctx.set(reader.cmd.payload, cmd)
    ctx.set(reader.cmd.valid, 1)
    await ctx.tick().until(reader.cmd.ready)
    ctx.set(reader.cmd.valid, 0)


async def receive(ctx, reader, count, rng=None, stall=0.0):
    words, cycles = [], []
    cycle = 0
    while len(words) < count:
        ctx.set(reader.o.ready, rng is None or rng.random() >= stall)
        _clk, _rst, valid, ready, payload = await ctx.tick().sample(
            reader.o.valid, reader.o.ready, reader.o.payload
        )
        cycle += 1
        if valid and ready:
            if reader.pairs:
                payload = payload.data if payload.wide else payload.data % (1 << 8 * reader.out_bytes)
            words.append(payload)
            cycles.append(cycle)
    ctx.set(reader.o.ready, 0)
    return words, cycles


def run_random(arch, sizes, *, stall, seed, commands, fifo_beats=32):
    dut = Subject(arch, sizes, fifo_beats)
    memory = AxiMemory(arch.bus_bytes, latency=7, stall=stall, seed=seed)
    sim, rng = simulator(dut, memory), random.Random(seed)

    def add(reader, todo, seed):
        rng = random.Random(seed)
        expected = [word for cmd in todo for word in fetch(memory, reader.out_bytes, cmd)]

        async def source(ctx):
            for cmd in todo:
                await send(ctx, reader, cmd)

        async def sink(ctx):
            words, _ = await receive(ctx, reader, len(expected), rng, stall)
            assert words == expected
            await ctx.tick().repeat(40)
            assert not ctx.get(reader.o.valid)

        sim.add_testbench(source)
        sim.add_testbench(sink)

    for k, reader in enumerate(dut.readers):
        add(
            reader,
            [random_command(rng, arch, reader.out_bytes, memory.size) for _ in range(commands)],
            seed + k,
        )
    sim.run()
    assert not memory.outstanding_reads
    assert len({addr for addr, _ in memory.read_bursts}) > 1


@pytest.mark.parametrize("stall", [0.0, 0.3])
@pytest.mark.parametrize(
    ("arch", "sizes", "commands"),
    [
        (TINY, (4, 4, 16, 8, 64), 10),
        (WIDE, (4, 8, 16, 32, 64), 16),
        (replace(TINY, name="widest", bus_bytes=128), (4, 64, 8), 16),
    ],
)
def test_random(arch, sizes, commands, stall):
    run_random(arch, sizes, stall=stall, seed=len(sizes), commands=commands)


def test_random_small_fifo():
    run_random(WIDE, (4, 64), stall=0.2, seed=9, commands=10, fifo_beats=16)


@pytest.mark.parametrize("stall", [0.0, 0.3])
@pytest.mark.parametrize(("arch", "size"), [(TINY, 4), (WIDE, 4), (WIDE, 8)])
def test_pairs(arch, size, stall):
    dut = Subject(arch, (size,), 32, pairs=True)
    memory = AxiMemory(arch.bus_bytes, latency=7, stall=stall, seed=2)
    sim, rng, reader, todo = simulator(dut, memory), random.Random(size), dut.readers[0], []
    for _ in range(16):
        wide = rng.randrange(2)
        cmd = random_command(rng, arch, size << wide, memory.size // 2)
        todo.append(cmd | {"wide": wide, "words": cmd["words"] << wide})
    expected = [column for cmd in todo for column in fetch_columns(memory, size, cmd)]

    async def source(ctx):
        for cmd in todo:
            await send(ctx, reader, cmd)

    async def sink(ctx):
        columns, cycles = await receive(ctx, reader, len(expected), random.Random(1), stall)
        assert columns == expected
        await ctx.tick().repeat(40)
        assert not ctx.get(reader.o.valid)

    sim.add_testbench(source)
    sim.add_testbench(sink)
    sim.run()


@pytest.mark.parametrize("wide", [0, 1])
def test_a_column_a_cycle(wide):
    dut = Subject(TINY, (4,), 64, pairs=True)
    memory = AxiMemory(TINY.bus_bytes, latency=10)
    sim, reader = simulator(dut, memory), dut.readers[0]

    async def both(ctx):
        for k in range(2):
            await send(ctx, reader, {"addr": 512 * k, "words": 50 << wide, "repeats": 1, "stride": 0, "wide": wide})
        _, cycles = await receive(ctx, reader, 100)
        assert cycles[-1] - cycles[0] == 99

    sim.add_testbench(both)
    sim.run()


@pytest.mark.parametrize(
    ("arch", "out_bytes", "cycles_per_word"), [(TINY, 4, 1), (TINY, 8, 1), (TINY, 16, 2), (WIDE, 4, 1)]
)
def test_throughput(arch, out_bytes, cycles_per_word):
    dut = Subject(arch, (out_bytes,), 64)
    memory = AxiMemory(arch.bus_bytes, latency=10)
    sim, reader = simulator(dut, memory), dut.readers[0]
    base = {"addr": 4096 - arch.bus_bytes, "stride": arch.bus_bytes * 7, "wait": 0, "wait_seq": 0}
    todo = [
        base | {"words": 50, "repeats": 3},
        base | {"words": 16, "repeats": 4},
        base | {"words": 100, "repeats": 2},
    ]
    expected = [word for cmd in todo for word in fetch(memory, out_bytes, cmd)]

    async def source(ctx):
        for cmd in todo:
            await send(ctx, reader, cmd)

    async def sink(ctx):
        words, cycles = await receive(ctx, reader, len(expected))
        assert words == expected
        assert cycles[-1] - cycles[0] == (len(expected) - 1) * cycles_per_word
        # cmd at 1, request 4, arvalid 5, memory 5 + 10 + 1, FIFO 2, widener 1
        assert cycles[0] <= 21 + cycles_per_word

    sim.add_testbench(source)
    sim.add_testbench(sink)
    sim.run()


def test_one_beat_repeats_keep_the_bus_busy():
    dut = Subject(TINY, (8,), 64)
    memory = AxiMemory(TINY.bus_bytes, latency=10)
    sim, reader = simulator(dut, memory), dut.readers[0]

    async def both(ctx):
        await send(
            ctx, reader, {"addr": 0, "words": 1, "repeats": 100, "stride": 24, "wait": 0, "wait_seq": 0}
        )
        _, cycles = await receive(ctx, reader, 100)
        assert cycles[-1] - cycles[0] == 99

    sim.add_testbench(both)
    sim.run()


@pytest.mark.parametrize("wait_seq", [1, 5, 0])
def test_wait(wait_seq):
    dut = Subject(TINY, (4,), 32)
    memory = AxiMemory(TINY.bus_bytes)
    sim, reader = simulator(dut, memory), dut.readers[0]

    async def bench(ctx):
        ctx.set(reader.completed, (wait_seq - 3) % 65536)
        cmd = {"addr": 64, "words": 6, "repeats": 1, "stride": 0, "wait": 1, "wait_seq": wait_seq}
        await send(ctx, reader, cmd)
        for ahead in (2, 1):
            ctx.set(reader.completed, (wait_seq - ahead) % 65536)
            await ctx.tick().repeat(20)
            assert not memory.read_bursts
        ctx.set(reader.completed, wait_seq)
        assert (await receive(ctx, reader, 6))[0] == list(fetch(memory, 4, cmd))
        ctx.set(reader.completed, (wait_seq + 200) % 65536)
        await send(ctx, reader, cmd)
        assert (await receive(ctx, reader, 6))[0] == list(fetch(memory, 4, cmd))

    sim.add_testbench(bench)
    sim.run()


@pytest.mark.parametrize("stall", [0.0, 0.4])
@pytest.mark.parametrize("seed", range(4))
def test_abort(stall, seed):
    dut = Subject(TINY, (4, 16), 32)
    memory = AxiMemory(TINY.bus_bytes, latency=12, stall=stall, seed=seed)
    sim, rng = simulator(dut, memory), random.Random(seed)

    async def bench(ctx):
        for _ in range(6):
            cmd = {"addr": 4096 - 64, "words": 60, "repeats": 2, "stride": 256, "wait": 0, "wait_seq": 0}
            for reader in dut.readers:
                await send(ctx, reader, cmd)
                await send(ctx, reader, cmd)
            await receive(ctx, dut.readers[0], rng.randrange(1, 30))
            await ctx.tick().repeat(rng.randrange(1, 20))
            ctx.set(dut.arbiter.abort, 1)
            ctx.set(dut.reset, 1)
            await ctx.tick()
            ctx.set(dut.reset, rng.random() < 0.5)
            while not ctx.get(dut.arbiter.idle):
                await ctx.tick()
            assert not memory.outstanding_reads
            ctx.set(dut.reset, 0)
            ctx.set(dut.arbiter.abort, 0)
            cmd = random_command(rng, TINY, 4, memory.size)
            await send(ctx, dut.readers[0], cmd)
            expected = list(fetch(memory, 4, cmd))
            assert (await receive(ctx, dut.readers[0], len(expected), rng, stall))[0] == expected

    sim.add_testbench(bench)
    sim.run()


def test_error():
    dut = Subject(TINY, (4,), 32)
    memory = AxiMemory(TINY.bus_bytes, errors=[range(128, 136)])
    sim, reader = simulator(dut, memory), dut.readers[0]

    async def bench(ctx):
        cmd = {"addr": 0, "words": 32, "repeats": 1, "stride": 0, "wait": 0, "wait_seq": 0}
        await send(ctx, reader, cmd)
        await receive(ctx, reader, 32)
        assert not ctx.get(dut.arbiter.error)
        await send(ctx, reader, cmd | {"words": 40})
        await receive(ctx, reader, 40)
        await ctx.tick().repeat(10)
        assert ctx.get(dut.arbiter.error)
        ctx.set(dut.arbiter.abort, 1)
        await ctx.tick()
        ctx.set(dut.arbiter.abort, 0)
        await ctx.tick()
        assert not ctx.get(dut.arbiter.error)

    sim.add_testbench(bench)
    sim.run()


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"arch": "tiny"}, TypeError, "arch must be an Arch, not 'tiny'"),
        ({"out_bytes": 4.0}, TypeError, "out_bytes must be an int, not 4.0"),
        ({"out_bytes": 6}, ValueError, "out_bytes must be a power of two, not 6"),
        ({"out_bytes": 2048}, ValueError, "out_bytes must be in 1..1024, not 2048"),
        ({"fifo_beats": 8}, ValueError, "fifo_beats must be in 16..4096, not 8"),
        ({"out_bytes": 8, "pairs": True}, ValueError, "a pair of words of 8 bytes does not fit the bus of 8 bytes"),
    ],
)
def test_reader_init_wrong(kwargs, error, message):
    kwargs = {"arch": TINY, "out_bytes": 4, "fifo_beats": 32} | kwargs
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        Reader(kwargs.pop("arch"), **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"arch": None}, TypeError, "arch must be an Arch, not None"),
        ({"readers": 0}, ValueError, "readers must be positive, not 0"),
        ({"outstanding": "x"}, TypeError, "outstanding must be an int, not 'x'"),
    ],
)
def test_arbiter_init_wrong(kwargs, error, message):
    kwargs = {"arch": TINY, "readers": 2} | kwargs
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        ReadArbiter(kwargs.pop("arch"), **kwargs)
