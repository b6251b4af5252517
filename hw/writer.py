"""Write side of the memory interface: words in, bursts out, instructions completed in program order."""

from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, ResetInserter, Signal, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from hw.arch import Arch
from hw.axi import BURST_BEATS, AXI4WriteSignature
from hw.commands import writer_command
from hw.gearbox import Widener
from hw.queue import Fifo
from hw.stream_util import StreamHold

__all__ = ["OUTSTANDING", "ROOM_MARGIN", "WRITE_COMMAND", "Writer"]

WRITE_COMMAND = writer_command()
"""Where a `Writer` puts the words of one instruction: `words` (>= 1) from `addr`, `repeats` (>= 1) times,
`stride` bytes apart; without `store` no words are taken and the instruction only completes in order. Token rows
outside `o_skip`..`o_drop` of each column keep their bytes; a column is one word, with `wide` two (an even number of words,
at multiples of two)."""

EDGE = data.StructLayout({name: WRITE_COMMAND.members[name] for name in ("o_skip", "o_drop", "wide")})
"""Which token rows of a beat's columns are written."""

OUTSTANDING = 32
"""Write bursts and instructions in flight at most."""

ROOM_MARGIN = 4
"""Places that every queue keeps free: `room` is known a cycle late, and one beat may be on its way."""


class _Packer(wiring.Component):
    """Pack columns into beats and say where bursts end.

    One column a cycle, also across repeats and commands that store; a command that does not store takes one
    cycle. Latency from ``i`` to ``o``: 1 cycle.

    Members
    -------
    cmd : ``In(stream WRITE_COMMAND)``
    i : ``In(stream)``
    room : ``In(1)``
        Two more beats may come.
    o : ``Out(stream {data, mask, edge, beat, end, last, null}, always_ready)``
        Beats: words filled, rows written, place in memory (in beats), last of its repeat, last of its instruction.
        ``null``: there is no
        beat, but an instruction that did not store ends here.
    busy : ``Out(1)``
    """

    def __init__(self, arch: Arch) -> None:
        self.arch = arch
        self.ratio = arch.bus_bytes // arch.rows
        super().__init__({
            "cmd":  In(stream.Signature(WRITE_COMMAND)),
            "i":    In(stream.Signature(unsigned(16 * arch.rows))),
            "room": In(1),
            "o":    Out(stream.Signature(data.StructLayout({
                "data": 8 * arch.bus_bytes, "mask": self.ratio, "edge": EDGE, "beat": 32 - exact_log2(arch.bus_bytes),
                "end": 1, "last": 1, "null": 1,
            }), always_ready=True)),
            "busy": Out(1),
        })

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        low, high = exact_log2(self.arch.rows), exact_log2(self.arch.bus_bytes)
        m.submodules.widener = widener = Widener(in_bytes=self.arch.rows, out_bytes=self.arch.bus_bytes, pairs=True)
        # the next command
        m.submodules.hold = hold = StreamHold(WRITE_COMMAND)
        wiring.connect(m, wiring.flipped(self.cmd), hold.i)
        cmd = hold.o.payload
        # the current repeat
        active = Signal()
        null = Signal()
        place = Signal(32 - low)
        left = Signal(24)
        words = Signal(24)
        repeats = Signal(16)
        rows = Signal(EDGE)
        following = Signal(32 - low)
        stride = Signal(32 - low)
        take = Signal()
        done = Signal()
        # known from registers: this column is the last of its repeat, a repeat is a column, this repeat is the last
        final = Signal()
        single = Signal()
        last_repeat = Signal()
        # beside the beat being filled
        beat = Signal(32 - high)
        edge = Signal(EDGE)
        end = Signal()
        last = Signal()
        ended = Signal()
        out = self.o.payload
        m.d.comb += [
            self.i.ready.eq(active & ~null & self.room),
            take.eq(self.i.valid & self.i.ready),
            done.eq((take & final & last_repeat) | (active & null & self.room)),
            widener.i.payload.data.eq(self.i.payload),
            widener.i.payload.wide.eq(rows.wide),
            widener.i.payload.slot.eq(place[:high - low]),
            widener.i.payload.last.eq(final),
            widener.i.valid.eq(take),
            widener.o.ready.eq(1),
            out.data.eq(widener.o.payload.data),
            out.mask.eq(widener.o.payload.mask),
            out.edge.eq(edge),
            out.beat.eq(beat),
            out.end.eq(end),
            out.last.eq(last),
            out.null.eq(ended),
            self.o.valid.eq(widener.o.valid | ended),
            self.busy.eq(hold.o.valid | active | self.o.valid),
        ]
        m.d.sync += ended.eq(active & null & self.room)
        with m.If(take):
            m.d.sync += [
                beat.eq(place[high - low:]), end.eq(final), last.eq(done),
                edge.eq(rows), place.eq((place | rows.wide) + 1), left.eq(left - Mux(rows.wide, 2, 1)),
                final.eq(left == Mux(rows.wide, 4, 2)),
            ]
            with m.If(final):
                m.d.sync += [
                    place.eq(following), left.eq(words), repeats.eq(repeats - 1),
                    following.eq(following + stride), final.eq(single), last_repeat.eq(repeats == 2),
                ]
        alone = cmd.words == Mux(cmd.wide, 2, 1)
        with m.If(~active | done):
            m.d.comb += hold.o.ready.eq(1)
            m.d.sync += [
                active.eq(hold.o.valid), null.eq(~cmd.store), place.eq(cmd.addr[low:]), left.eq(cmd.words),
                words.eq(cmd.words), repeats.eq(cmd.repeats), stride.eq(cmd.stride[low:]),
                following.eq(cmd.addr[low:] + cmd.stride[low:]),
                final.eq(alone), single.eq(alone), last_repeat.eq(cmd.repeats == 1),
                *(getattr(rows, name).eq(getattr(cmd, name)) for name in EDGE.members),
            ]
        return m


class Writer(wiring.Component):
    """Write the words of instructions to memory and count the instructions completed, in program order.

    A burst (at most 16 beats, ending at multiples of 16 beats, so never crossing 4 KiB) is requested only
    when all its beats are in the FIFO; the beats then follow without a gap, never before AWVALID of their
    burst. A repeat starts a new beat and burst. One column a cycle, also across repeats and
    commands; commands are taken every other cycle. Latency from a burst's last word to AWVALID and WVALID: 3
    cycles; from its BVALID to ``completed``: 1 cycle.

    To abort, raise ``abort`` until ``idle``: what is not yet part of a complete burst is dropped, complete
    bursts finish. ``completed`` returns to 0. Do not reset the writer itself while ``idle`` is low.

    Parameters
    ----------
    arch : Arch
        Gives bus width and ``rows``.
    fifo_beats : int
        Depth of the FIFO in bus beats, at least 32 (two bursts).
    outstanding : int
        Bursts and instructions in flight at most, at least 8.

    Members
    -------
    cmd : ``In(stream WRITE_COMMAND)``
        One per instruction, in program order. ``ready`` is independent of ``valid``.
    i : ``In(stream)``
        Columns of ``words * repeats`` words for each command that stores: two words each, or one, in the lower half.
    completed : ``Out(16)``
        Number of completed instructions modulo 2^16: all their writes have been answered.
    bus : ``Out(AXI4WriteSignature)``
    abort : ``In(1)``
    idle : ``Out(1)``
        No command, beat or burst is inside.
    error : ``Out(1)``
        A BRESP reported an error; stays until ``abort``.
    """

    def __init__(self, arch: Arch, *, fifo_beats: int = 64, outstanding: int = OUTSTANDING) -> None:
        if not isinstance(arch, Arch):
            raise TypeError(f"arch must be an Arch, not {arch!r}")
        limits = (("fifo_beats", fifo_beats, 2 * BURST_BEATS), ("outstanding", outstanding, 8))
        for name, value, least in limits:
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, not {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value!r}")
        self.arch = arch
        self.fifo_beats = fifo_beats
        self.outstanding = outstanding
        super().__init__({
            "cmd":       In(stream.Signature(WRITE_COMMAND)),
            "i":         In(stream.Signature(unsigned(16 * arch.rows))),
            "completed": Out(16),
            "bus":       Out(AXI4WriteSignature(arch.bus_bytes)),
            "abort":     In(1),
            "idle":      Out(1),
            "error":     Out(1),
        })

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.submodules.packer = packer = ResetInserter(self.abort)(_Packer(self.arch))
        wiring.connect(m, wiring.flipped(self.cmd), packer.cmd)
        wiring.connect(m, wiring.flipped(self.i), packer.i)
        flush = Signal()
        beats = Fifo(width=9 * self.arch.bus_bytes + 1, depth=self.fifo_beats + 1)
        m.submodules.beats = ResetInserter(flush)(beats)
        m.submodules.bursts = bursts = Fifo(width=32 + 4, depth=self.outstanding)
        m.submodules.tokens = tokens = Fifo(width=2, depth=self.outstanding)
        self._commit(m, packer, beats, bursts, tokens)
        self._send(m, beats, bursts)
        self._complete(m, tokens)
        m.d.comb += [
            flush.eq(self.abort & tokens.empty),
            self.idle.eq(~packer.busy & tokens.empty),
        ]
        return m

    def _commit(self, m: Module, packer: _Packer, beats: Fifo, bursts: Fifo,
                tokens: Fifo) -> None:
        """Queue beats; at the end of a burst queue the burst and the token that awaits its response."""
        beat = packer.o.payload
        skip = exact_log2(self.arch.bus_bytes)
        # a burst is open, and began at this beat modulo 16
        inside = Signal()
        first = Signal(4)
        begin = Signal(4)
        commit = Signal()
        push = Signal()
        m.d.comb += [
            push.eq(packer.o.valid & ~beat.null & ~self.abort),
            commit.eq(beat.end | beat.beat[:4].all()),
            begin.eq(Mux(inside, first, beat.beat[:4])),
            beats.w_data.eq(Cat(beat.data, self._strobe(m, beat.mask, beat.edge), commit)),
            beats.w_en.eq(push),
            bursts.w_data.eq(Cat(Const(0, skip), begin, beat.beat[4:], beat.beat[:4] - begin)),
            bursts.w_en.eq(push & commit),
            tokens.w_data.eq(Cat(beat.null, beat.null | (beat.last & commit))),
            tokens.w_en.eq((push & commit) | (packer.o.valid & beat.null & ~self.abort)),
        ]
        with m.If(push):
            m.d.sync += [inside.eq(~commit), first.eq(begin)]
        with m.If(self.abort):
            m.d.sync += inside.eq(0)
        m.d.sync += packer.room.eq(
            (beats.level <= self.fifo_beats - ROOM_MARGIN)
            & (bursts.level <= self.outstanding - ROOM_MARGIN)
            & (tokens.level <= self.outstanding - ROOM_MARGIN))

    def _send(self, m: Module, beats: Fifo, bursts: Fifo) -> None:
        """Drive AW and W; the beats of a burst follow its AWVALID."""
        bus = self.bus
        # bursts accepted on AW less bursts finished on W
        lead = Signal(signed(self.outstanding.bit_length() + 1))
        data_bits = 8 * self.arch.bus_bytes
        allowed = Signal()
        aw = Signal()
        last = Signal()
        m.d.comb += [
            bus.awid.eq(0),
            bus.awaddr.eq(bursts.r_data[:32]),
            bus.awlen.eq(bursts.r_data[32:]),
            bus.awsize.eq(exact_log2(self.arch.bus_bytes)),
            bus.awburst.eq(1),
            bus.awvalid.eq(bursts.r_rdy),
            bursts.r_en.eq(bus.awready),
            allowed.eq((lead > 0) | ((lead == 0) & bursts.r_rdy)),
            bus.wdata.eq(beats.r_data[:data_bits]),
            bus.wstrb.eq(beats.r_data[data_bits:-1]),
            bus.wlast.eq(beats.r_data[-1]),
            bus.wvalid.eq(beats.r_rdy & allowed),
            beats.r_en.eq(bus.wready & allowed),
            aw.eq(bus.awvalid & bus.awready),
            last.eq(bus.wvalid & bus.wready & bus.wlast),
        ]
        m.d.sync += lead.eq(lead + aw - last)

    def _strobe(self, m: Module, mask: Any, edge: Any) -> Any:
        """WSTRB of a beat: words that hold something, and of each column the token rows that are written."""
        rows, columns = self.arch.rows, self.arch.bus_bytes // self.arch.rows
        keep = Signal(rows)
        m.d.comb += keep.eq(Cat((t >= edge.o_skip) & (t + edge.o_drop < rows) for t in range(rows)))
        narrow = Cat(keep for _ in range(columns))
        wide = Cat(Cat(bit.replicate(2) for bit in keep) for _ in range(columns // 2))
        return Cat(bit.replicate(rows) for bit in mask) & Mux(edge.wide, wide, narrow)

    def _complete(self, m: Module, tokens: Fifo) -> None:
        """Match responses with tokens, in order, and count instructions."""
        bus = self.bus
        null, last = tokens.r_data[0], tokens.r_data[1]
        m.d.comb += [
            bus.bready.eq(tokens.r_rdy & ~null),
            tokens.r_en.eq(null | bus.bvalid),
        ]
        with m.If(self.abort):
            m.d.sync += [self.completed.eq(0), self.error.eq(0)]
        with m.Else():
            with m.If(tokens.r_rdy & tokens.r_en & last):
                m.d.sync += self.completed.eq(self.completed + 1)
            with m.If(bus.bvalid & bus.bready & bus.bresp[1]):
                m.d.sync += self.error.eq(1)
