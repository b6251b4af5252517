"""Read side of the memory interface: stream readers that run ahead, and the arbiter that owns AR and R."""

from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from hw.arch import Arch
from hw.axi import BURST_BEATS, AXI4ReadSignature
from hw.commands import reader_command
from hw.gearbox import Narrower, Widener, pair_layout
from hw.stream_util import StreamHold

__all__ = ["BURST", "COMMANDS_AHEAD", "OUTSTANDING", "READ_COMMAND", "ReadArbiter", "Reader"]

READ_COMMAND = reader_command()
"""What a `Reader` is told to fetch: `words` (>= 1) words from `addr`, `repeats` (>= 1) times, `stride` bytes
apart; with `wait` only once the writer has completed `wait_seq` instructions; with `wide` (`Reader.pairs`) two words at a
time."""

BURST = data.StructLayout({"addr": 32, "len": 4})
"""One burst: bus-aligned byte address, number of beats - 1."""

COMMANDS_AHEAD = 8
"""Commands whose data may be outstanding in a reader of words narrower than the bus."""

OUTSTANDING = 32
"""Read bursts in flight at most."""


class _Issuer(wiring.Component):
    """Split commands into bursts that end at multiples of `BURST_BEATS` beats, as far as FIFO space is free.

    One burst a cycle, also across repeats. From one command to the next one cycle is lost if the first was a
    single burst, none otherwise. Latency from ``cmd`` to ``request``: 3 cycles.

    Members
    -------
    cmd : ``In(stream READ_COMMAND)``
    completed : ``In(16)``
        Completion counter of the writer.
    pop : ``In(1)``
        A beat leaves the FIFO.
    request : ``Out(stream BURST)``
        Registered.
    """

    def __init__(self, *, bus_bytes: int, out_bytes: int, fifo_beats: int) -> None:
        self.bus_bytes = bus_bytes
        self.out_bytes = out_bytes
        self.fifo_beats = fifo_beats
        super().__init__({
            "cmd":       In(stream.Signature(READ_COMMAND)),
            "completed": In(16),
            "pop":       In(1),
            "request":   Out(stream.Signature(BURST)),
        })

    def _beats(self, addr: Any, words: Any) -> Any:
        """Beats that hold the words from that address on."""
        if self.out_bytes >= self.bus_bytes:
            return words << exact_log2(self.out_bytes // self.bus_bytes)
        ratio = self.bus_bytes // self.out_bytes
        offset = addr[exact_log2(self.out_bytes):exact_log2(self.bus_bytes)]
        return (words + offset + (ratio - 1)) >> exact_log2(ratio)

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        skip = exact_log2(self.bus_bytes)

        m.submodules.hold = hold = StreamHold(READ_COMMAND)
        wiring.connect(m, wiring.flipped(self.cmd), hold.i)
        cmd = hold.o.payload
        wait_distance = Signal(16)
        go = Signal()
        m.d.comb += [
            wait_distance.eq(self.completed - cmd.wait_seq),
            go.eq(hold.o.valid & ~(cmd.wait & wait_distance[15])),
        ]
        # the current repeat
        active = Signal()
        beat = Signal(32 - skip)
        left = Signal(32)
        words = Signal(24)
        repeats = Signal(16)
        following = Signal(32)
        stride = Signal(32)
        edge = Signal(5)
        final = Signal()
        count = Signal(5)
        take = Signal()
        credit = Signal(range(self.fifo_beats + 1), init=self.fifo_beats)
        m.d.comb += [
            edge.eq(BURST_BEATS - beat[:4]),
            final.eq(left <= edge),
            count.eq(Mux(final, left[:5], edge)),
            take.eq(active & (~self.request.valid | self.request.ready) & (credit >= count)),
        ]
        m.d.sync += credit.eq(credit - Mux(take, count, 0) + self.pop)

        def start(addr: Any, words: Any) -> list[Any]:
            return [beat.eq(addr[skip:]), left.eq(self._beats(addr, words))]

        with m.If(self.request.ready):
            m.d.sync += self.request.valid.eq(0)
        with m.If(take):
            m.d.sync += [
                self.request.valid.eq(1),
                self.request.payload.addr.eq(Cat(Const(0, skip), beat)),
                self.request.payload.len.eq(count - 1),
                beat.eq(beat + count),
                left.eq(left - count),
            ]
        with m.If(take & final & (repeats != 1)):
            m.d.sync += [*start(following, words), repeats.eq(repeats - 1), following.eq(following + stride)]
        with m.Elif(~active | (take & final)):
            m.d.comb += hold.o.ready.eq(go)
            m.d.sync += [
                active.eq(go),
                *start(cmd.addr, cmd.words),
                words.eq(cmd.words),
                repeats.eq(cmd.repeats),
                stride.eq(cmd.stride),
                following.eq(cmd.addr + cmd.stride),
            ]
        return m


class _Framer(wiring.Component):
    """Say for each beat of a command which words of it count, for words narrower than the bus.

    One beat a cycle, also across repeats and commands; ``o`` is registered.

    Members
    -------
    i : ``In(stream {offset, words, repeats, stride, wide})``
        ``offset`` and ``stride`` in words, modulo the words of a beat.
    o : ``Out(stream {first, last, wide})``
    """

    def __init__(self, *, ratio: int) -> None:
        self.ratio = ratio
        super().__init__({
            "i": In(stream.Signature(data.StructLayout(
                {"offset": range(ratio), "words": 24, "repeats": 16, "stride": range(ratio), "wide": 1}))),
            "o": Out(stream.Signature(data.StructLayout({"first": range(ratio), "last": range(ratio), "wide": 1}))),
        })

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        slot = range(self.ratio)
        # the current repeat
        active = Signal()
        first = Signal(slot)
        left = Signal(24)
        words = Signal(24)
        repeats = Signal(16)
        following = Signal(slot)
        stride = Signal(slot)
        wide = Signal()
        end = Signal(25)
        final = Signal()
        take = Signal()
        m.d.comb += [
            end.eq(first + left),
            final.eq(end <= self.ratio),
            take.eq(active & (~self.o.valid | self.o.ready)),
        ]
        with m.If(self.o.ready):
            m.d.sync += self.o.valid.eq(0)
        with m.If(take):
            m.d.sync += [
                self.o.valid.eq(1),
                self.o.payload.first.eq(first),
                self.o.payload.last.eq(Mux(final, end - 1, self.ratio - 1)),
                self.o.payload.wide.eq(wide),
                first.eq(0),
                left.eq(end - self.ratio),
            ]
        with m.If(take & final & (repeats != 1)):
            m.d.sync += [
                first.eq(following), left.eq(words), repeats.eq(repeats - 1),
                following.eq(following + stride),
            ]
        with m.Elif(~active | (take & final)):
            m.d.comb += self.i.ready.eq(1)
            m.d.sync += [
                active.eq(self.i.valid),
                first.eq(self.i.payload.offset),
                left.eq(self.i.payload.words),
                words.eq(self.i.payload.words),
                repeats.eq(self.i.payload.repeats),
                stride.eq(self.i.payload.stride),
                wide.eq(self.i.payload.wide),
                following.eq(self.i.payload.offset + self.i.payload.stride),
            ]
        return m


class Reader(wiring.Component):
    """One read stream: ``repeats`` runs of ``words`` words of ``out_bytes`` bytes, ``stride`` bytes apart.

    Bursts are requested as long as the FIFO has room for all their beats, across commands, so that data never
    has to wait on the bus (``data`` is always ready) and the reader runs ahead of its consumer by
    ``fifo_beats`` beats and up to 8 commands. One output word a cycle, as the bus allows, without bubbles
    between repeats and commands. Latency: ``cmd`` to ``request`` 3 cycles; ``data`` to ``o`` 2 cycles, 3 for
    words wider than the bus.

    A word address must be a multiple of ``min(out_bytes, bus_bytes)``, so must ``stride``; lower bits are
    ignored. Words that leave in pairs are an even number, at multiples of ``2 * out_bytes``.

    Parameters
    ----------
    arch : Arch
        Gives the bus width.
    out_bytes : int
        Bytes of an output word: a power of two.
    fifo_beats : int
        Depth of the FIFO in bus beats, in 16..4096.
    pairs : bool
        Words narrower than the bus leave two at a time, one pair a cycle, if the command is ``wide``.

    Members
    -------
    cmd : ``In(stream READ_COMMAND)``
        What to fetch. ``ready`` is independent of ``valid`` and of the bus.
    completed : ``In(16)``
        `Writer.completed`; a command with ``wait`` starts when ``(completed - wait_seq) mod 2^16 < 2^15``.
    o : ``Out(stream)``
        The words; with ``pairs`` a `pair_layout`.
    request : ``Out(stream BURST)``
        To `ReadArbiter.request`.
    data : ``In(stream, always_ready)``
        From `ReadArbiter.data`.
    """

    def __init__(self, arch: Arch, *, out_bytes: int, fifo_beats: int, pairs: bool = False) -> None:
        if not isinstance(arch, Arch):
            raise TypeError(f"arch must be an Arch, not {arch!r}")
        limits = (("out_bytes", out_bytes, 1, 1024), ("fifo_beats", fifo_beats, BURST_BEATS, 4096))
        for name, value, low, high in limits:
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, not {value!r}")
            if not low <= value <= high:
                raise ValueError(f"{name} must be in {low}..{high}, not {value!r}")
        if out_bytes & (out_bytes - 1):
            raise ValueError(f"out_bytes must be a power of two, not {out_bytes!r}")
        if pairs and 2 * out_bytes > arch.bus_bytes:
            raise ValueError(f"a pair of words of {out_bytes} bytes does not fit the bus of {arch.bus_bytes} bytes")
        self.arch = arch
        self.out_bytes = out_bytes
        self.pairs = pairs
        self.fifo_beats = fifo_beats
        super().__init__({
            "cmd":       In(stream.Signature(READ_COMMAND)),
            "completed": In(16),
            "o":         Out(stream.Signature(pair_layout(out_bytes) if pairs else unsigned(8 * out_bytes))),
            "request":   Out(stream.Signature(BURST)),
            "data":      In(stream.Signature(unsigned(8 * arch.bus_bytes), always_ready=True)),
        })

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        bus = self.arch.bus_bytes
        m.submodules.issuer = issuer = _Issuer(
            bus_bytes=bus, out_bytes=self.out_bytes, fifo_beats=self.fifo_beats)
        m.submodules.fifo = fifo = SyncFIFOBuffered(width=8 * bus, depth=self.fifo_beats + 1)
        accept = Signal(init=1)  # the framer, too, has room for a command
        m.d.comb += [
            issuer.cmd.payload.eq(self.cmd.payload),
            issuer.cmd.valid.eq(self.cmd.valid & accept),
            self.cmd.ready.eq(issuer.cmd.ready & accept),
            issuer.completed.eq(self.completed),
            issuer.pop.eq(fifo.r_rdy & fifo.r_en),
            fifo.w_data.eq(self.data.payload),
            fifo.w_en.eq(self.data.valid),
        ]
        wiring.connect(m, issuer.request, wiring.flipped(self.request))
        if self.out_bytes < bus:
            self._narrow(m, fifo, accept)
        elif self.out_bytes > bus:
            self._widen(m, fifo)
        else:
            m.d.comb += [
                self.o.payload.eq(fifo.r_data), self.o.valid.eq(fifo.r_rdy), fifo.r_en.eq(self.o.ready),
            ]
        return m

    def _narrow(self, m: Module, fifo: SyncFIFOBuffered, accept: Signal) -> None:
        low, high = exact_log2(self.out_bytes), exact_log2(self.arch.bus_bytes)
        m.submodules.framer = framer = _Framer(ratio=1 << (high - low))
        m.submodules.commands = commands = SyncFIFOBuffered(width=2 * (high - low) + 41, depth=COMMANDS_AHEAD)
        m.submodules.narrower = narrower = Narrower(
            in_bytes=self.arch.bus_bytes, out_bytes=self.out_bytes, pairs=self.pairs)
        cmd = self.cmd.payload
        m.d.comb += [
            accept.eq(commands.w_rdy),
            commands.w_data.eq(Cat(cmd.addr[low:high], cmd.words, cmd.repeats, cmd.stride[low:high], cmd.wide)),
            commands.w_en.eq(self.cmd.valid & self.cmd.ready),
            framer.i.payload.eq(commands.r_data),
            framer.i.valid.eq(commands.r_rdy),
            commands.r_en.eq(framer.i.ready),
            narrower.i.payload.data.eq(fifo.r_data),
            narrower.i.payload.first.eq(framer.o.payload.first),
            narrower.i.payload.last.eq(framer.o.payload.last),
            narrower.i.valid.eq(fifo.r_rdy & framer.o.valid),
            fifo.r_en.eq(narrower.i.ready & framer.o.valid),
            framer.o.ready.eq(narrower.i.ready & fifo.r_rdy),
        ]
        if self.pairs:
            m.d.comb += narrower.i.payload.wide.eq(framer.o.payload.wide)
        wiring.connect(m, narrower.o, wiring.flipped(self.o))

    def _widen(self, m: Module, fifo: SyncFIFOBuffered) -> None:
        m.submodules.widener = widener = Widener(in_bytes=self.arch.bus_bytes, out_bytes=self.out_bytes)
        slot = Signal(range(widener.ratio))
        m.d.comb += [
            widener.i.payload.data.eq(fifo.r_data),
            widener.i.payload.slot.eq(slot),
            widener.i.valid.eq(fifo.r_rdy),
            fifo.r_en.eq(widener.i.ready),
            self.o.payload.eq(widener.o.payload.data),
            self.o.valid.eq(widener.o.valid),
            widener.o.ready.eq(self.o.ready),
        ]
        with m.If(fifo.r_rdy & widener.i.ready):
            m.d.sync += slot.eq(slot + 1)


class ReadArbiter(wiring.Component):
    """Give the AR and R channels of one AXI4 master to several readers, round robin, one burst at a time.

    All bursts have ID 0, so responses come in order; a queue of owners routes them. One burst a cycle;
    ``request`` to ``arvalid`` 1 cycle, ``rvalid`` to ``data`` 0 cycles.

    To abort, raise ``abort``, reset the readers, and keep ``abort`` high until ``idle``: no request is taken
    any more, an ARVALID already raised stays until accepted, and the data in flight is dropped. Do not reset
    the arbiter itself while ``idle`` is low.

    Parameters
    ----------
    arch : Arch
        Gives the bus width.
    readers : int
        Number of readers.
    outstanding : int
        Bursts in flight at most.

    Members
    -------
    request : ``In(stream BURST).array(readers)``
    data : ``Out(stream, always_ready).array(readers)``
        All payloads are RDATA.
    bus : ``Out(AXI4ReadSignature)``
    abort : ``In(1)``
    idle : ``Out(1)``
        No burst is outstanding.
    error : ``Out(1)``
        An RRESP reported an error; stays until ``abort``.
    """

    def __init__(self, arch: Arch, *, readers: int, outstanding: int = OUTSTANDING) -> None:
        if not isinstance(arch, Arch):
            raise TypeError(f"arch must be an Arch, not {arch!r}")
        for name, value in (("readers", readers), ("outstanding", outstanding)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, not {value!r}")
            if value <= 0:
                raise ValueError(f"{name} must be positive, not {value!r}")
        self.arch = arch
        self.readers = readers
        self.outstanding = outstanding
        super().__init__({
            "request": In(stream.Signature(BURST)).array(readers),
            "data":    Out(stream.Signature(unsigned(8 * arch.bus_bytes), always_ready=True)).array(readers),
            "bus":     Out(AXI4ReadSignature(arch.bus_bytes)),
            "abort":   In(1),
            "idle":    Out(1),
            "error":   Out(1),
        })

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        bus = self.bus
        m.submodules.owners = owners = SyncFIFOBuffered(width=max(1, (self.readers - 1).bit_length()),
                                                        depth=self.outstanding)
        grant = Signal(range(self.readers))  # the first after the last one that has a request
        last = Signal(range(self.readers))
        with m.Switch(last):
            for k in range(self.readers):
                with m.Case(k):
                    for distance in range(self.readers, 0, -1):
                        index = (k + distance) % self.readers
                        with m.If(self.request[index].valid):
                            m.d.comb += grant.eq(index)

        accept = Signal()
        m.d.comb += [
            accept.eq((~bus.arvalid | bus.arready) & owners.w_rdy & ~self.abort),
            owners.w_data.eq(grant),
            bus.arid.eq(0),
            bus.arsize.eq(exact_log2(self.arch.bus_bytes)),
            bus.arburst.eq(1),
        ]
        with m.If(bus.arready):
            m.d.sync += bus.arvalid.eq(0)
        for k, request in enumerate(self.request):
            m.d.comb += request.ready.eq(accept & (grant == k))
            with m.If(request.valid & request.ready):
                m.d.comb += owners.w_en.eq(1)
                m.d.sync += [
                    last.eq(k), bus.arvalid.eq(1), bus.araddr.eq(request.payload.addr),
                    bus.arlen.eq(request.payload.len),
                ]

        m.d.comb += [
            bus.rready.eq(owners.r_rdy),
            owners.r_en.eq(bus.rvalid & bus.rlast),
            self.idle.eq(~bus.arvalid & (owners.level == 0)),
        ]
        for k, target in enumerate(self.data):
            m.d.comb += [
                target.payload.eq(bus.rdata),
                target.valid.eq(bus.rvalid & owners.r_rdy & (owners.r_data == k) & ~self.abort),
            ]
        with m.If(self.abort):
            m.d.sync += self.error.eq(0)
        with m.Elif(bus.rvalid & bus.rready & bus.rresp[1]):
            m.d.sync += self.error.eq(1)
        return m
