# amaranth: UnusedElaboratable=no

import random
import re
from dataclasses import replace

import pytest
from amaranth.sim import Simulator

from hw.arch import PRESETS
from hw.writer import WRITE_COMMAND, Writer
from tests.hw.axi_memory import AxiMemory

TINY = PRESETS["tiny"]
WIDE = replace(TINY, name="wide", bus_bytes=32)
WIDER = replace(TINY, name="wider", rows=8, lanes=8, bus_bytes=16)
PERIOD = 1e-6
MAX_CYCLES = 50_000


def random_command(rng, arch, size):
    if rng.random() < 0.25:
        return dict.fromkeys(WRITE_COMMAND.members, 0)
    wide = int(rng.random() < 0.3)
    skip = rng.choice([0, 0, rng.randrange(arch.rows)])
    drop = rng.choice([0, 0, rng.randrange(arch.rows - skip)])
    unit = arch.rows << wide
    words, repeats = (
        rng.choice([1, 2, 3, rng.randrange(1, 80), rng.randrange(1, 150)]),
        rng.choice([1, 1, 2, 5]),
    )
    stride = rng.choice([words * unit, (words + rng.randrange(40)) * unit, 4096 - unit])
    span = (repeats - 1) * stride + words * unit + arch.bus_bytes
    near = rng.choice([4096, 8192]) - rng.randrange(40) * unit
    addr = near if near + span < size else rng.randrange((size - span) // unit) * unit
    return {"addr": addr, "words": words << wide, "repeats": repeats, "stride": stride, "store": 1, "wide": wide,
            "o_skip": skip, "o_drop": drop}


def random_words(rng, arch, cmd):
    """A column each: two words if the command is wide, else one and bytes that do not count."""
    return [rng.getrandbits(16 * arch.rows) for _ in range((cmd["words"] >> cmd["wide"]) * cmd["repeats"] * cmd["store"])]


def store(memory, arch, cmd, words):
    """What the writer should do to the memory."""
    wide = cmd.get("wide", 0)
    columns = cmd["words"] >> wide
    for k, word in enumerate(words):
        place = cmd["addr"] + (k // columns) * cmd["stride"] + (k % columns) * (arch.rows << wide)
        data = word.to_bytes(2 * arch.rows, "little")
        for byte in range(arch.rows << wide):
            row = byte >> wide
            if cmd.get("o_skip", 0) <= row < arch.rows - cmd.get("o_drop", 0):
                memory[place + byte] = data[byte]


def simulator(dut, memory):
    sim = Simulator(dut)
    sim.add_clock(PERIOD)

    async def write(ctx):
        await memory.write(ctx, dut.bus)

    async def give_up(ctx):
        await ctx.delay(MAX_CYCLES * PERIOD)
        raise TimeoutError(f"not done after {MAX_CYCLES} cycles")

    sim.add_testbench(write, background=True)
    sim.add_testbench(give_up, background=True)
    return sim


async def send(ctx, dut, cmd):
    ctx.set(dut.cmd.payload, cmd)
    ctx.set(dut.cmd.valid, 1)
    await ctx.tick().until(dut.cmd.ready)
    ctx.set(dut.cmd.valid, 0)


async def feed(ctx, dut, words, rng=None, stall=0.0):
    for word in words:
        while rng is not None and rng.random() < stall:
            await ctx.tick()
        ctx.set(dut.i.payload, word)
        ctx.set(dut.i.valid, 1)
        await ctx.tick().until(dut.i.ready)
        ctx.set(dut.i.valid, 0)


async def wait_for(ctx, signal, value, limit=20000):
    for _ in range(limit):
        if ctx.get(signal) == value:
            return
        await ctx.tick()
    raise TimeoutError(f"{signal!r} did not become {value}")


@pytest.mark.parametrize(("memory_stall", "stall"), [(0.0, 0.0), (0.3, 0.3), (0.9, 0.0)])
@pytest.mark.parametrize(("arch", "seed"), [(TINY, 1), (WIDE, 3), (WIDER, 4)])
def test_random(arch, seed, memory_stall, stall):
    dut = Writer(arch, fifo_beats=32, outstanding=8)
    memory = AxiMemory(arch.bus_bytes, latency=6, stall=memory_stall, seed=seed)
    sim, rng = simulator(dut, memory), random.Random(seed)
    todo = [random_command(rng, arch, memory.size) for _ in range(16)]
    data = [random_words(rng, arch, cmd) for cmd in todo]
    image, author = bytearray(memory.data), {}  # final memory; which instruction wrote a byte last
    for k, (cmd, words) in enumerate(zip(todo, data, strict=True)):
        store(image, arch, cmd, words)
        for repeat in range(cmd["repeats"]):
            base = cmd["addr"] + repeat * cmd["stride"]
            author |= dict.fromkeys(range(base, base + cmd["words"] * arch.rows), k)

    async def source(ctx):
        for cmd in todo:
            await send(ctx, dut, cmd)

    async def words(ctx):
        await feed(ctx, dut, [word for part in data for word in part], rng, stall)

    async def check(ctx):
        seen = 0
        while seen < len(todo):
            done = ctx.get(dut.completed)
            if done != seen:  # what a completed instruction wrote is in memory
                assert all(memory.data[place] == image[place] for place, k in author.items() if k < done)
            seen = done
            await ctx.tick()
        assert memory.data == image
        assert not memory.outstanding_writes
        await ctx.tick().repeat(2)
        assert ctx.get(dut.idle)
        assert not ctx.get(dut.error)

    for process in (source, words, check):
        sim.add_testbench(process)
    sim.run()


@pytest.mark.parametrize("wide", [0, 1])
@pytest.mark.parametrize("words", [8, 32, 33])
def test_throughput(words, wide):
    dut = Writer(TINY)
    memory = AxiMemory(TINY.bus_bytes, latency=60)
    sim = simulator(dut, memory)
    commands = 20
    accepted = []

    async def source(ctx):
        for k in range(commands):
            await send(ctx, dut, {"addr": 512 * k, "words": words << wide, "repeats": 1, "stride": 0, "store": 1,
                                  "wide": wide})

    async def feeder(ctx):
        cycle = 0
        ctx.set(dut.i.valid, 1)
        while len(accepted) < commands * words:
            ctx.set(dut.i.payload, len(accepted))
            _clk, _rst, ready = await ctx.tick().sample(dut.i.ready)
            cycle += 1
            if ready:
                accepted.append(cycle)
        ctx.set(dut.i.valid, 0)
        assert accepted[-1] - accepted[0] == commands * words - 1
        await wait_for(ctx, dut.completed, commands)
        assert memory.most_outstanding_writes >= 2

    sim.add_testbench(source)
    sim.add_testbench(feeder)
    sim.run()


def test_latency():
    dut = Writer(TINY)
    memory = AxiMemory(TINY.bus_bytes, latency=1)
    sim = simulator(dut, memory)

    async def bench(ctx):
        await send(ctx, dut, {"addr": 4, "words": 1, "repeats": 1, "stride": 0, "store": 1})
        await feed(ctx, dut, [0x12345678])
        cycle = 1
        while not ctx.get(dut.bus.awvalid):
            await ctx.tick()
            cycle += 1
        assert cycle == 3
        assert ctx.get(dut.bus.wvalid)
        assert ctx.get(dut.bus.wstrb) == 0xF0
        assert ctx.get(dut.bus.awaddr) == 0

    sim.add_testbench(bench)
    sim.run()


def test_completion_in_order():
    dut = Writer(TINY)
    memory = AxiMemory(TINY.bus_bytes, latency=30)
    sim = simulator(dut, memory)
    nothing = {"addr": 0, "words": 0, "repeats": 0, "stride": 0, "store": 0}

    async def bench(ctx):
        await send(ctx, dut, nothing)
        await wait_for(ctx, dut.completed, 1, 10)
        await send(ctx, dut, {"addr": 0, "words": 2, "repeats": 1, "stride": 0, "store": 1})
        await send(ctx, dut, nothing)
        await ctx.tick().repeat(10)
        assert ctx.get(dut.completed) == 1
        await feed(ctx, dut, [1, 2])
        await ctx.tick().repeat(20)
        assert ctx.get(dut.completed) == 1
        assert not ctx.get(dut.idle)
        await wait_for(ctx, dut.completed, 3, 30)
        assert memory.data[:8] == bytes([1, 0, 0, 0, 2, 0, 0, 0])

    sim.add_testbench(bench)
    sim.run()


@pytest.mark.parametrize("stall", [0.0, 0.4])
@pytest.mark.parametrize("seed", range(4))
def test_abort(seed, stall):
    dut = Writer(TINY, fifo_beats=32)
    memory = AxiMemory(TINY.bus_bytes, latency=15, stall=stall, seed=seed)
    sim, rng = simulator(dut, memory), random.Random(seed)

    async def bench(ctx):
        for _ in range(8):
            await send(ctx, dut, {"addr": 4096 - 128, "words": 50, "repeats": 2, "stride": 256, "store": 1})
            await send(
                ctx, dut, {"addr": 64, "words": 50, "repeats": 1, "stride": 0, "store": rng.randrange(2)}
            )
            count = rng.randrange(1, 95)
            before = bytes(memory.data)
            words = [rng.getrandbits(32) for _ in range(count)]
            await feed(ctx, dut, words)
            await ctx.tick().repeat(rng.randrange(1, 6))
            ctx.set(dut.abort, 1)
            await ctx.tick()
            await wait_for(ctx, dut.idle, 1)
            assert not memory.outstanding_writes
            await ctx.tick()
            ctx.set(dut.abort, 0)
            assert ctx.get(dut.completed) == 0
            image = bytearray(before)
            cmd = {"addr": 4096 - 128, "words": 50, "repeats": 2, "stride": 256}
            store(image, TINY, cmd, words)
            assert all(now in (old, new) for now, old, new in zip(memory.data, before, image, strict=True))

            cmd = random_command(rng, TINY, memory.size)
            words = random_words(rng, TINY, cmd)
            image = bytearray(memory.data)
            store(image, TINY, cmd, words)
            await send(ctx, dut, cmd)
            await feed(ctx, dut, words, rng, stall)
            await wait_for(ctx, dut.completed, 1)
            assert memory.data == image
            ctx.set(dut.abort, 1)
            await ctx.tick()
            ctx.set(dut.abort, 0)

    sim.add_testbench(bench)
    sim.run()


def test_error():
    dut = Writer(TINY)
    memory = AxiMemory(TINY.bus_bytes, errors=[range(4096, 8192)])
    sim = simulator(dut, memory)

    async def bench(ctx):
        cmd = {"addr": 4088, "words": 2, "repeats": 1, "stride": 0, "store": 1}
        await send(ctx, dut, cmd)
        await feed(ctx, dut, [1, 2])
        await wait_for(ctx, dut.completed, 1)
        assert not ctx.get(dut.error)
        await send(ctx, dut, cmd | {"words": 3})
        await feed(ctx, dut, [1, 2, 3])
        await wait_for(ctx, dut.completed, 2)
        assert ctx.get(dut.error)
        ctx.set(dut.abort, 1)
        await ctx.tick()
        ctx.set(dut.abort, 0)
        await ctx.tick()
        assert not ctx.get(dut.error)

    sim.add_testbench(bench)
    sim.run()


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"arch": "tiny"}, TypeError, "arch must be an Arch, not 'tiny'"),
        ({"fifo_beats": 16}, ValueError, "fifo_beats must be at least 32, not 16"),
        ({"fifo_beats": True}, TypeError, "fifo_beats must be an int, not True"),
        ({"outstanding": 4}, ValueError, "outstanding must be at least 8, not 4"),
    ],
)
def test_init_wrong(kwargs, error, message):
    kwargs = {"arch": TINY} | kwargs
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        Writer(kwargs.pop("arch"), **kwargs)
