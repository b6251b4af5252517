"""Feeder: turns the weight stream into steps, one per cycle: a value and an activation address for each lane.

A step of a group takes one weight of each lane. Positions come as 32-bit words per lane (see docs/numerics.md): INDEX
words hold ceil(log2 M) bits a step, BITMAP words a mask of which the lowest set bit is taken and cleared. All formats
end in ``address = base + offset + position``, and dense is a group of one with position 0.
"""

from types import SimpleNamespace

from amaranth import Array, C, Cat, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.arch import Arch
from hw.commands import array_command
from hw.isa import Format
from hw.shared import place
from hw.soft import product

__all__ = ["Feeder", "PositionDecoder", "index_bits", "positions_per_word"]

M_MAX = 32


def index_bits(m: int) -> int:
    """Bits of one position in format INDEX: ceil(log2 m), at least 1."""
    return max(1, (m - 1).bit_length())


def positions_per_word(fmt: Format, n: int, m: int) -> int:
    """Steps that one 32-bit position word serves."""
    return 32 // index_bits(m) if fmt == Format.INDEX else 32 // m * n


def _first(bits):
    """Index of the lowest set bit of 4 or 8."""
    index = C(len(bits) - 1, (len(bits) - 1).bit_length())
    for at in reversed(range(len(bits) - 1)):
        index = Mux(bits[at], at, index)
    return index


class PositionDecoder(wiring.Component):
    """Position word of one lane. Combinational output, the word changes on `advance`.

    Members
    -------
    word : next position word. bitmap, bit : format and first bit of the field in the next cycle, so that every lane has
    registers of its own. mask : of the field (shared by all lanes).
    advance : the current position was taken, or there was none; `load`: the next word takes the place of this one.
    position : 0..31.
    """

    word: In(32)
    load: In(1)
    bitmap: In(1)
    bit: In(5)
    mask: In(5)
    advance: In(1)
    position: Out(5)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        left, filled, nibble = Signal(32), Signal(8), Signal(3)  # filled : nibbles of `left` with a set bit
        bitmap, bit = Signal(), Signal(5)
        m.d.sync += [bitmap.eq(self.bitmap), bit.eq(self.bit)]
        low, rest, rank, window = Signal(4), Signal(4), Signal(2), Signal(8)
        # both formats look at one nibble: the first with a set bit, or the one in which the field starts
        m.d.comb += [
            nibble.eq(Mux(bitmap, _first(filled), bit[2:])),
            low.eq(left.word_select(nibble, 4)), rank.eq(_first(low)), rest.eq(Cat(low[i] & low[:i].any() for i in range(4))),
            window.eq(Cat(low, Cat(left[4:], C(0, 4)).word_select(nibble, 4))),
            self.position.eq(Mux(bitmap, Cat(rank, nibble), window.bit_select(bit[:2], 5) & self.mask)),
        ]
        with m.If(self.advance & (self.load | bitmap)):
            for k in range(8):
                word, now = self.word.word_select(k, 4), left[4 * k:4 * k + 4]
                with m.If(self.load):
                    m.d.sync += [now.eq(word), filled[k].eq(word.any())]
                with m.Elif(nibble == k):
                    m.d.sync += [now.eq(rest), filled[k].eq(rest.any())]
        return m


class _Decode(wiring.Component):
    """Adds what the format implies to a command; one register, whose ready does not depend on what follows: a command every other
    cycle. one_step : a group is a step; one_group : a
    column tile is a group; one_tile : the command is a column tile."""

    def __init__(self, arch: Arch) -> None:
        self._lanes = arch.lanes
        fields = dict(array_command().members)
        del fields["format"]
        flags = dict.fromkeys(("dense", "bitmap", "one_step", "one_group", "one_tile"), 1)
        self.layout = data.StructLayout({**fields, **flags, "bits": 3, "word_steps": 6, "word_span": 6})
        super().__init__({"i": In(stream.Signature(array_command())), "o": Out(stream.Signature(self.layout))})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        cmd, out = self.i.payload, self.o.payload
        dense, bitmap = Signal(), Signal()
        m.d.comb += [self.i.ready.eq(~self.o.valid),
                     dense.eq(cmd.format == Format.DENSE), bitmap.eq(cmd.format == Format.BITMAP)]
        bits = Array(index_bits(k) for k in range(M_MAX + 1))[cmd.m]
        groups = Array(32 // max(k, 1) for k in range(M_MAX + 1))[cmd.m]
        span = Array(32 // max(k, 1) * k for k in range(M_MAX + 1))[cmd.m]
        steps = product(groups, cmd.n, spare=True)  # six bits: no multiplier block for that
        n, m_ = Mux(dense, 1, cmd.n), Mux(dense, 1, cmd.m)
        per_index_word = Array(32 // index_bits(k) for k in range(M_MAX + 1))[cmd.m]
        m.d.sync += self.o.valid.eq(Mux(self.o.valid, ~self.o.ready, self.i.valid))
        with m.If(self.i.ready & self.i.valid):
            m.d.sync += [
                *(out[name].eq(cmd[name]) for name in ("a_unsigned", "k", "cols", "held")),
                out.n.eq(n), out.m.eq(m_), out.one_step.eq(n == 1), out.one_group.eq(cmd.k <= m_),
                out.one_tile.eq(cmd.cols <= self._lanes),
                out.dense.eq(dense), out.bitmap.eq(bitmap), out.bits.eq(bits),
                out.word_steps.eq(Mux(bitmap, steps, per_index_word)), out.word_span.eq(span),
            ]
        return m


def _dense(taken):
    """The fields of a decoded command where all weights are dense: constants take the place of registers."""
    return SimpleNamespace(a_unsigned=taken.a_unsigned, k=taken.k, cols=taken.cols, n=C(1, 6), m=C(1, 6), dense=C(1), bitmap=C(0),
                           one_step=C(1), one_group=taken.one_group, one_tile=taken.one_tile, bits=C(0, 3), word_steps=C(1, 6),
                           word_span=C(0, 6))


class Feeder(wiring.Component):
    """Walks the column tiles, groups and steps of each command. One step per cycle while inputs last.

    Members
    -------
    cmd : one `array_command` per TILE. values : `lanes` weights per step. positions : `lanes` position words.
    loaded : columns written to the lanes' rings so far (wraps). freed : columns given back (wraps), once the next command
    is known not to hold them.
    advance : low freezes the array pipeline; ended, free : why, for the steps alone (see `Drain`).
    step, first, last, unsigned_a : a step and its place in the column tile. tile_cols : columns of the tile (with `last`).
    addr[l], weight[l] : registered, two moves after `step`.
    wait_weights, wait_columns : no step for lack of weights or activations (counters).
    """

    def __init__(self, arch: Arch) -> None:
        self._arch = arch
        self._bits = (arch.lane_depth - 1).bit_length()
        super().__init__({
            "cmd": In(stream.Signature(array_command())),
            "values": In(stream.Signature(8 * arch.lanes)),
            "positions": In(stream.Signature(32 * arch.lanes)),
            "loaded": In(self._bits + 1), "freed": Out(self._bits + 1), "advance": In(1), "ended": In(1), "free": In(1),
            "step": Out(1), "first": Out(1), "last": Out(1), "unsigned_a": Out(1),
            "tile_cols": Out(range(arch.lanes + 1)),
            "addr": Out(self._bits).array(arch.lanes), "weight": Out(signed(8)).array(arch.lanes),
            "wait_weights": Out(1), "wait_columns": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        lanes = self._arch.lanes
        m.submodules.decode = decode = _Decode(self._arch)
        wiring.connect(m, wiring.flipped(self.cmd), decode.i)
        cmd, taken, active = decode.o.payload, Signal(decode.layout), Signal()
        now = taken if self._arch.sparse else _dense(taken)
        base, next_base = Signal(self._bits + 1), Signal(self._bits + 1)
        offset, in_group = Signal(16), Signal(6)  # first column of the group (or of the bitmap word), step in it
        rest, in_word = Signal(16), Signal(6)  # columns from the group on
        # whether the next step is the first or last of its tile, group, position word: known when it comes
        first, group_last, last_group, word_last, tile_end, word_end = (
            Signal(name=name) for name in ("first", "group_last", "last_group", "word_last", "tile_end", "word_end"))
        cols_left, last_tile = Signal(16), Signal()
        # known: every lane has its position, or needs none. spent: the columns wait for the next command
        word_valid, known, spent = Signal(), Signal(), Signal()
        fire, cmd_end, start, free, supplied = (Signal() for _ in range(5))

        enough = Signal()  # all columns of the next command are in the lanes, known a cycle late
        m.d.sync += enough.eq(decode.o.valid & ~start & (cmd.held | ((self.loaded - next_base)[: self._bits + 1] >= cmd.k)))
        m.d.comb += [
            free.eq((spent | (fire & cmd_end)) & decode.o.valid & ~cmd.held),
            supplied.eq(self.values.valid & known),
            fire.eq(active & supplied & (~self.ended | self.free)),  # `advance`, which has many loads
            cmd_end.eq(tile_end & last_tile),
            start.eq((~active | (fire & cmd_end)) & enough),
            decode.o.ready.eq(start), self.values.ready.eq(fire),
            self.positions.ready.eq(~word_valid | (fire & word_end)),
            self.step.eq(fire), self.last.eq(tile_end), self.unsigned_a.eq(now.a_unsigned), self.first.eq(first),
            self.tile_cols.eq(Mux(last_tile, cols_left, lanes)),
            self.wait_weights.eq(active & ~supplied), self.wait_columns.eq(~active & decode.o.valid & ~enough),
        ]
        with m.If(start):
            m.d.sync += [taken.eq(cmd), cols_left.eq(cmd.cols), last_tile.eq(cmd.one_tile)]
            with m.If(~cmd.held):
                m.d.sync += [base.eq(next_base), next_base.eq(next_base + cmd.k)]
        with m.If(fire | start):
            m.d.sync += active.eq(start | ~cmd_end)
        with m.If(free):
            m.d.sync += [self.freed.eq(next_base), spent.eq(0)]
        with m.Elif(start):
            m.d.sync += spent.eq(0)
        with m.Elif(fire & cmd_end):
            m.d.sync += spent.eq(1)
        self._walk(m, now, fire, group_last, tile_end, word_end, offset, in_group, in_word)
        self._ends(m, cmd, now, start, fire, tile_end, word_end, rest, in_group, in_word,
                   (first, group_last, last_group, word_last))
        with m.If(fire & tile_end & ~cmd_end):
            m.d.sync += [cols_left.eq(cols_left - lanes), last_tile.eq(cols_left <= 2 * lanes)]
        word_next = Mux(self.positions.ready, self.positions.valid, word_valid)
        m.d.sync += [word_valid.eq(word_next), known.eq(word_next | Mux(start, cmd.dense, now.dense))]
        self._lanes(m, platform, cmd, now, start, fire, ~word_valid, word_end, tile_end, base, offset)
        return m

    def _walk(self, m: Module, now, fire, group_last, tile_end, word_end, offset, in_group, in_word) -> None:
        """Counters of step, group and position word."""
        with m.If(fire):
            m.d.sync += [in_group.eq(in_group + 1), in_word.eq(in_word + 1)]
            with m.If(group_last):
                m.d.sync += in_group.eq(0)
                with m.If(~now.bitmap):
                    m.d.sync += offset.eq(offset + now.m)
            with m.If(word_end | tile_end):
                m.d.sync += in_word.eq(0)
                with m.If(now.bitmap):
                    m.d.sync += offset.eq(offset + now.word_span)
            with m.If(tile_end):
                m.d.sync += offset.eq(0)

    def _ends(self, m: Module, cmd, now, start, fire, tile_end, word_end, rest, in_group, in_word, flags) -> None:
        """What the step after this one ends, decided a cycle ahead. Dense weights have no position words that end."""
        first, group_last, last_group, word_last = flags
        following = [Signal(name=f"next_{flag.name}") for flag in flags]
        next_first, next_group_last, next_last_group, next_word_last = following
        dense = Mux(start, cmd.dense, now.dense)
        m.d.comb += [
            next_first.eq(tile_end), next_group_last.eq(Mux(group_last, now.one_step, in_group + 2 == now.n)),
            next_word_last.eq(Mux(word_last | tile_end, now.word_steps == 1, in_word + 2 == now.word_steps)),
            next_last_group.eq(Mux(tile_end, now.one_group, Mux(group_last, rest <= (now.m << 1), last_group))),
        ]
        with m.If(start):
            m.d.comb += [next_first.eq(1), next_group_last.eq(cmd.one_step), next_word_last.eq(cmd.word_steps == 1),
                         next_last_group.eq(cmd.one_group)]
            m.d.sync += rest.eq(cmd.k)
        with m.Elif(fire & tile_end):
            m.d.sync += rest.eq(now.k)
        with m.Elif(fire & group_last):
            m.d.sync += rest.eq(rest - now.m)
        with m.If(start | fire):
            ends = next_group_last & next_last_group
            m.d.sync += [*(now_.eq(next_) for now_, next_ in zip(flags, following, strict=True)),
                         tile_end.eq(ends), word_end.eq((ends | next_word_last) & ~dense)]

    def _lanes(self, m: Module, platform: object, cmd, now, start, fire, wordless, word_end, tile_end, base, offset) -> None:
        """One position decoder per lane; registers of position and weight, then of address and weight."""
        mask, origin, decoded, next_bitmap = Signal(5), Signal(self._bits), Signal(), Signal()
        bit, next_bit = Signal(5), Signal(5)  # first bit of the field in the position word
        m.d.comb += [mask.eq((C(1, 6) << now.bits) - 1), next_bitmap.eq(Mux(start, cmd.bitmap, now.bitmap)),
                     next_bit.eq(Mux(fire, Mux(word_end | tile_end, 0, bit + now.bits), bit))]
        m.d.sync += bit.eq(next_bit)
        with m.If(self.advance):
            m.d.sync += [decoded.eq(fire), origin.eq(base + offset)]
        for lane in range(self._arch.lanes):
            weight, place_ = Signal(8, name=f"weight{lane}"), Signal(5, name=f"place{lane}")
            with m.If(self.advance):  # what no step brings is not `decoded`
                m.d.sync += weight.eq(self.values.payload.word_select(lane, 8))
            with m.If(decoded & self.advance):
                m.d.sync += [self.weight[lane].eq(weight), self.addr[lane].eq(origin + place_)]
            if not self._arch.sparse:
                continue
            position = PositionDecoder()
            place(m, platform, f"position{lane}", position, module="position")
            m.d.comb += [
                position.word.eq(self.positions.payload.word_select(lane, 32)),
                position.load.eq(wordless | word_end), position.advance.eq(wordless | fire),
                position.bitmap.eq(next_bitmap), position.bit.eq(next_bit), position.mask.eq(mask),
            ]
            with m.If(self.advance):
                m.d.sync += place_.eq(Mux(now.dense, 0, position.position))
