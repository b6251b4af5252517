"""Stream test bench: feed and collect several streams of a component at once, with or without random stalls."""

import random
from collections.abc import Sequence

from amaranth.hdl import ShapeCastable
from amaranth.sim import Simulator

__all__ = ["pack_bytes", "run_streams"]


def pack_bytes(values: Sequence[int], bits: int = 8) -> int:
    """Values as one integer, first value lowest."""
    return sum((int(v) & ((1 << bits) - 1)) << (bits * i) for i, v in enumerate(values))


def run_streams(dut, *, inputs: dict, outputs: dict[str, int], stall: float | dict[str, float] = 0.0, seed: int = 0,
                max_cycles: int = 20_000) -> dict[str, list]:
    """Put `inputs[port]` (payload values) into streams, collect `outputs[port]` payloads each; returns them by port.

    A port may be a dotted path. `stall` is the chance per transfer to pause one to four cycles,
    for all ports or by port.
    """
    def find(path: str):
        target = dut
        for part in path.split("."):
            target = getattr(target, part)
        return target

    def chance(name: str) -> float:
        return stall.get(name, 0.0) if isinstance(stall, dict) else stall

    got: dict[str, list] = {name: [] for name in outputs}

    def producer(name: str, payloads: Sequence):
        rng = random.Random(f"{seed}{name}")

        async def process(ctx) -> None:
            port = find(name)
            for payload in payloads:
                while rng.random() < chance(name):
                    await ctx.tick().repeat(rng.randint(1, 4))
                ctx.set(port.payload, payload)
                ctx.set(port.valid, 1)
                await ctx.tick().until(port.ready)
                ctx.set(port.valid, 0)
        return process

    def consumer(name: str, count: int):
        rng = random.Random(f"{seed}{name}")

        async def process(ctx) -> None:
            port = find(name)
            for _ in range(count):
                while rng.random() < chance(name):
                    await ctx.tick().repeat(rng.randint(1, 4))
                ctx.set(port.ready, 1)
                (value,) = await ctx.tick().sample(port.payload).until(port.valid)
                ctx.set(port.ready, 0)
                shape = port.payload.shape()
                got[name].append(value if not isinstance(shape, ShapeCastable) else _plain(value))
        return process

    async def watch(ctx) -> None:
        for _ in range(max_cycles):
            if all(len(got[name]) == count for name, count in outputs.items()):
                return
            await ctx.tick()
        raise TimeoutError(f"after {max_cycles} cycles: " + ", ".join(f"{n} {len(got[n])}/{outputs[n]}" for n in outputs))

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    for name, payloads in inputs.items():
        simulator.add_testbench(producer(name, payloads))
    for name, count in outputs.items():
        simulator.add_testbench(consumer(name, count))
    simulator.add_testbench(watch)
    simulator.run()
    return got


def _plain(value):
    """A data.Const as nested lists or dicts of int."""
    from amaranth.lib import data
    if isinstance(value, data.Const):
        layout = value.shape()
        if isinstance(layout, data.ArrayLayout):
            return [_plain(value[i]) for i in range(layout.length)]
        return {name: _plain(value[name]) for name in layout.members}
    return value
