"""Multiply-accumulates and lanes against their models: all operand extremes, with and without random freezes."""

import random
from dataclasses import replace
from itertools import product

import pytest
from amaranth import Const, Module, Signal
from amaranth.sim import Simulator

from hw.arch import PRESETS
from hw.lane import (
    FIELD,
    Lane,
    Mac,
    PackedMac,
    PackedModel,
    array_latency,
    lane_column,
    sum_bits,
    sum_word,
    unpack_sums,
    wrap_bits,
)

PLAIN = PRESETS["tiny"]
PACKED = replace(PLAIN, packing=True)
DEEP = replace(PACKED, lane_depth=8192)
EXTREMES = ((-128, 127), (0, 255))


def evaluate(expression, signals):
    """Value of a combinational expression for given signal values."""
    m, out = Module(), Signal(expression.shape())
    m.d.comb += out.eq(expression)
    found = []

    async def bench(ctx):
        for signal, value in signals:
            ctx.set(signal, value)
        await ctx.delay(1e-9)
        found.append(ctx.get(out))
    simulator = Simulator(m)
    simulator.add_testbench(bench)
    simulator.run()
    return found[0]


def signed(value, bits):
    return (value & ((1 << bits) - 1)) - ((value >> (bits - 1) & 1) << bits)


# -- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", EXTREMES)
def test_every_product_moves_the_low_sum_by_less_than_a_quarter(activations):
    """The bound on which counting wraps rests, over all operands."""
    assert max(abs(a * w) for a in range(activations[0], activations[1] + 1) for w in range(-128, 128)) < 1 << (FIELD - 2)


@pytest.mark.parametrize("seed", range(12))
def test_model_equals_two_sums(seed):
    rng = random.Random(seed)
    low_end, high_end = EXTREMES[seed % 2]
    corners = seed % 3 == 0
    model, low, high = PackedModel(), 0, 0
    for _ in range(2000):
        a, b = (rng.choice((low_end, high_end)) if corners else rng.randint(low_end, high_end) for _ in range(2))
        w = rng.choice((-128, 127)) if corners else rng.randint(-128, 127)
        model.step(a, b, w)
        low, high = low + a * w, high + b * w
        assert model.sums == (low, high)


@pytest.mark.parametrize("depth", [64, 1024, 8192])
@pytest.mark.parametrize(("low", "high", "weight"), [*product((255, 0, -128), (255, 0, -128), (-128, 127))])
def test_the_longest_sum_fits(depth, low, high, weight):
    """Widths of the registers, at the depth of the lane and operands that do not change sign."""
    arch = replace(PACKED, lane_depth=depth)
    model = PackedModel()
    for _ in range(depth):
        model.step(low, high, weight)
    assert model.sums == (depth * low * weight, depth * high * weight)
    assert signed(model.total, FIELD + sum_bits(arch)) == model.total and signed(model.wraps, wrap_bits(arch)) == model.wraps
    assert all(signed(value, sum_bits(arch)) == value for value in model.sums)


# -- components -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_unsigned", [0, 1])
def test_lane_column(is_unsigned):
    """A stored pair is the multiplier operand high * 2^18 + low."""
    low_end, high_end = EXTREMES[is_unsigned]
    rng = random.Random(is_unsigned)
    for _ in range(30):
        a = [rng.choice((low_end, high_end, -1 + is_unsigned, 0, rng.randint(low_end, high_end))) for _ in range(PACKED.rows)]
        packed = sum((value & 0xFF) << (8 * i) for i, value in enumerate(a))
        column = evaluate(lane_column(PACKED, Const(packed, 8 * PACKED.rows), Const(is_unsigned, 1)), ())
        for pair in range(PACKED.rows // 2):
            bits = column >> (18 * pair)
            operand = (signed(bits >> 9, 9) << FIELD) + (signed(bits, 9) & ((1 << FIELD) - 1))
            assert operand == (a[2 * pair + 1] << FIELD) + a[2 * pair]
    assert lane_column(PLAIN, packed, is_unsigned) is packed


def random_tiles(rng, is_unsigned, rows, depth):
    """Tiles of steps: (activations by row, weight)."""
    low_end, high_end = EXTREMES[is_unsigned]
    tiles = []
    for length in (1, 2, depth, *(rng.randint(1, 12) for _ in range(12))):
        corners = rng.random() < 0.4
        tiles.append([([rng.choice((low_end, high_end)) if corners else rng.randint(low_end, high_end) for _ in range(rows)],
                       rng.choice((-128, 127, -128 if corners else 3, rng.randint(-128, 127)))) for _ in range(length)])
    return tiles


class PipelineDriver:
    """Drives `mul`, `acc`, `first`, `copy` of a stream of steps as the array does: one step per cycle unless frozen."""

    def __init__(self, tiles, rng, freeze):
        self.steps = [(step, i == 0, i == len(tile) - 1) for tile in tiles for i, step in enumerate(tile)]
        self._rng, self._freeze = rng, freeze

    async def run(self, ctx, put, control, take):
        """put(step) sets operands; control gives the enable signals; take() is called after each copy."""
        stages = [None, None, None]  # operands, product, sum
        queue = [*self.steps, None, None, None]
        copied = False
        while queue or any(stages) or copied:
            frozen = self._rng.random() < self._freeze
            stages[0] = stages[0] or (queue.pop(0) if queue else None)
            operands, products, sums = stages
            if operands:
                put(operands[0])
            for name, value in (("mul", operands and not frozen), ("acc", products and not frozen),
                                ("copy", sums and sums[2] and not frozen), ("first", products and products[1])):
                ctx.set(control[name], bool(value))
            if "restart" in control:
                ctx.set(control["restart"], bool(products and products[1] and not frozen))
            if copied:
                take()
            copied = bool(sums and sums[2] and not frozen)
            await ctx.tick()
            if not frozen:
                stages = [None, operands, products]


def run_mac(dut, arch, tiles, put, control, seed, freeze):
    """Sums (rows of a tile) that a multiply-accumulate leaves for each tile."""
    found = []

    async def bench(ctx):
        def take():
            words = [Const(ctx.get(dut.shadow), sum_word(arch)[0])]
            found.append([evaluate(value, ()) for value in unpack_sums(arch, words)])
        await PipelineDriver(tiles, random.Random(seed), freeze).run(ctx, lambda step: put(ctx, *step), control, take)
    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    return found


def expected(tiles, rows):
    return [[sum(a[t] * w for a, w in tile) for t in range(rows)] for tile in tiles]


@pytest.mark.parametrize("freeze", [0.0, 0.4])
@pytest.mark.parametrize("is_unsigned", [0, 1])
def test_mac(is_unsigned, freeze):
    tiles = random_tiles(random.Random(is_unsigned), is_unsigned, 1, 64)
    dut = Mac(sum_bits(PLAIN))

    def put(ctx, a, w):
        for signal, value in ((dut.a, a[0] & 0xFF), (dut.w, w), (dut.unsigned_a, is_unsigned)):
            ctx.set(signal, value)
    control = {name: getattr(dut, name) for name in ("mul", "acc", "first", "copy")}
    assert run_mac(dut, PLAIN, tiles, put, control, 1, freeze) == expected(tiles, 1)


@pytest.mark.parametrize("freeze", [0.0, 0.4])
@pytest.mark.parametrize("is_unsigned", [0, 1])
@pytest.mark.parametrize("arch", [PACKED, DEEP], ids=["depth64", "depth8192"])
def test_packed_mac(arch, is_unsigned, freeze):
    tiles = random_tiles(random.Random(is_unsigned), is_unsigned, 2, 200 if arch is DEEP else 64)
    dut = PackedMac(arch)

    def put(ctx, a, w):
        negative = a[0] < 0
        ctx.set(dut.a, (a[0] & 0x1FF) | (((a[1] - negative) & 0x1FF) << 9))
        ctx.set(dut.w, w)
    control = {name: getattr(dut, name) for name in ("mul", "acc", "first", "copy", "restart")}
    assert run_mac(dut, arch, tiles, put, control, 2, freeze) == expected(tiles, 2)


@pytest.mark.parametrize("arch", [PLAIN, PACKED, replace(PACKED, lane_register=True)], ids=["plain", "packed", "register"])
def test_lane_sums_what_its_ram_holds(arch):
    """A lane by itself: columns written, read in any order, a step a cycle."""
    rng = random.Random(3)
    columns = [[rng.randint(-128, 127) for _ in range(arch.rows)] for _ in range(arch.lane_depth)]
    steps = [(rng.randrange(arch.lane_depth), rng.randint(-128, 127)) for _ in range(50)]
    dut, found = Lane(arch), []

    async def bench(ctx):
        for address, column in enumerate(columns):
            packed = Const(sum((v & 0xFF) << (8 * i) for i, v in enumerate(column)), 8 * arch.rows)
            ctx.set(dut.write_en, 1)
            ctx.set(dut.write_addr, address)
            ctx.set(dut.write_data, evaluate(lane_column(arch, packed, Const(0, 1)), ()))
            await ctx.tick()
        ctx.set(dut.write_en, 0)
        latency = array_latency(arch) - 1  # from the address
        for cycle in range(len(steps) + latency):
            if cycle < len(steps):
                ctx.set(dut.addr, steps[cycle][0])
                ctx.set(dut.weight, steps[cycle][1])
            for name, stage in (("ram", 0), ("hold", 1), ("mul", latency - 3), ("acc", latency - 2), ("copy", latency - 1)):
                ctx.set(getattr(dut.control, name), stage <= cycle < len(steps) + stage)
            ctx.set(dut.control.first, cycle == latency - 2)
            await ctx.tick()
        words = [Const(ctx.get(word), sum_word(arch)[0]) for word in dut.shadow]
        found.extend(evaluate(value, ()) for value in unpack_sums(arch, words))
    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    assert found == [sum(columns[address][t] * w for address, w in steps) for t in range(arch.rows)]
