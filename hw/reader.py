"""Read side of the memory interface: stream readers that run ahead, and the arbiter that owns AR and R."""

from functools import reduce
from itertools import combinations
from operator import or_
from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from hw.arch import Arch
from hw.axi import BURST_BEATS, AXI4ReadSignature
from hw.commands import reader_command
from hw.gearbox import Narrower, Widener, pair_layout
from hw.queue import Fifo
from hw.stream_util import StreamBuffer, StreamHold

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


class _Runs(wiring.Component):
    """Unfold commands into runs of beats, one a repeat, when their time has come.

    One run a cycle, also across commands. Latency: 2 cycles.

    Members
    -------
    cmd : ``In(stream READ_COMMAND)``
    completed : ``In(16)``
        Completion counter of the writer.
    o : ``Out(stream {beat, left})``
        First beat and number of beats. Registered.
    """

    def __init__(self, *, bus_bytes: int, out_bytes: int) -> None:
        self.bus_bytes = bus_bytes
        self.out_bytes = out_bytes
        wide = max(0, exact_log2(out_bytes) - exact_log2(bus_bytes))
        super().__init__({
            "cmd":       In(stream.Signature(READ_COMMAND)),
            "completed": In(16),
            "o":         Out(stream.Signature(data.StructLayout({
                "beat": 32 - exact_log2(bus_bytes), "left": READ_COMMAND.members["words"] + wide + 1}))),
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
        m.submodules.hold = hold = StreamHold(READ_COMMAND)
        wiring.connect(m, wiring.flipped(self.cmd), hold.i)
        cmd, wait_distance, go = hold.o.payload, Signal(16), Signal()
        m.d.comb += [
            wait_distance.eq(self.completed - cmd.wait_seq),
            go.eq(hold.o.valid & ~(cmd.wait & wait_distance[15])),
        ]
        more, words, repeats, following, stride = Signal(), Signal(24), Signal(16), Signal(32), Signal(32)
        addr, count = Mux(more, following, cmd.addr), Mux(more, words, cmd.words)
        with m.If(~self.o.valid | self.o.ready):
            m.d.comb += hold.o.ready.eq(go & ~more)
            m.d.sync += [
                self.o.valid.eq(more | go),
                self.o.payload.beat.eq(addr[exact_log2(self.bus_bytes):]),
                self.o.payload.left.eq(self._beats(addr, count)),
                following.eq(addr + Mux(more, stride, cmd.stride)),
            ]
            with m.If(more):
                m.d.sync += [repeats.eq(repeats - 1), more.eq(repeats != 2)]
            with m.Else():
                m.d.sync += [words.eq(cmd.words), repeats.eq(cmd.repeats), stride.eq(cmd.stride),
                             more.eq(go & (cmd.repeats != 1))]
        return m


class _Issuer(wiring.Component):
    """Split runs into bursts that end at multiples of `BURST_BEATS` beats, as far as FIFO space is free.

    One burst a cycle, also across runs. Latency from ``i`` to ``request``: 2 cycles.

    Members
    -------
    i : ``In(stream {beat, left})``
        What `_Runs` sends.
    pop : ``In(1)``
        A beat leaves the FIFO.
    request : ``Out(stream BURST)``
        Registered.
    """

    def __init__(self, runs: _Runs, *, fifo_beats: int) -> None:
        self.fifo_beats = fifo_beats
        self._skip = exact_log2(runs.bus_bytes)
        super().__init__({
            "i":       In(runs.o.signature),
            "pop":     In(1),
            "request": Out(stream.Signature(BURST)),
        })

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.submodules.requests = requests = StreamBuffer(BURST)
        wiring.connect(m, requests.o, wiring.flipped(self.request))
        # the current run, and its next burst: how long it is, and whether it is the last
        active, final, take = Signal(), Signal(), Signal()
        beat, left, count = Signal.like(self.i.payload.beat), Signal.like(self.i.payload.left), Signal(5)
        credit = Signal(range(self.fifo_beats + 1), init=self.fifo_beats)
        spent = Signal(range(-BURST_BEATS, self.fifo_beats + 1))
        rest = Signal.like(left)
        m.d.comb += [
            spent.eq(credit - count),
            take.eq(active & requests.i.ready & (spent >= 0)),
            rest.eq(left - count),
            requests.i.valid.eq(take),
            requests.i.payload.addr.eq(Cat(Const(0, self._skip), beat)),
            requests.i.payload.len.eq(count - 1),
        ]
        m.d.sync += credit.eq(Mux(take, spent, credit) + self.pop)

        def burst(left: Value, edge: Value) -> list[Any]:
            """The first burst of so many beats, of which `edge` reach the next multiple of `BURST_BEATS`."""
            fits = ~left[5:].any() & (left[:5] <= edge)
            return [count.eq(Mux(fits, left[:5], edge)), final.eq(fits)]

        with m.If(~active | (take & final)):
            new = self.i.payload
            m.d.comb += self.i.ready.eq(1)
            m.d.sync += [active.eq(self.i.valid), beat.eq(new.beat), left.eq(new.left),
                         *burst(new.left, (BURST_BEATS - new.beat[:4])[:5])]
        with m.Elif(take):
            m.d.sync += [beat.eq(beat + count), left.eq(rest), *burst(rest, Const(BURST_BEATS, 5))]
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
        # the current repeat; `end` : where it ends, from the beat's first slot on
        active = Signal()
        first = Signal(slot)
        end = Signal(25)
        words = Signal(24)
        repeats = Signal(16)
        following = Signal(slot)
        stride = Signal(slot)
        wide = Signal()
        # known from registers: it ends in this beat, it is the last
        final = Signal()
        last_repeat = Signal()
        take = Signal()
        m.d.comb += take.eq(active & (~self.o.valid | self.o.ready))

        def begin(first: Value, words: Value) -> list[Any]:
            bits = exact_log2(self.ratio) + 1
            return [end.eq(first + words), final.eq(~words[bits:].any() & (first + words[:bits] <= self.ratio))]

        with m.If(self.o.ready):
            m.d.sync += self.o.valid.eq(0)
        with m.If(take):
            m.d.sync += [
                self.o.valid.eq(1),
                self.o.payload.first.eq(first),
                self.o.payload.last.eq(Mux(final, end - 1, self.ratio - 1)),
                self.o.payload.wide.eq(wide),
                first.eq(0),
                end.eq(end - self.ratio),
                final.eq(end <= 2 * self.ratio),
            ]
        with m.If(take & final & ~last_repeat):
            m.d.sync += [
                first.eq(following), *begin(following, words), repeats.eq(repeats - 1), last_repeat.eq(repeats == 2),
                following.eq(following + stride),
            ]
        with m.Elif(~active | (take & final)):
            m.d.comb += self.i.ready.eq(1)
            m.d.sync += [
                active.eq(self.i.valid),
                first.eq(self.i.payload.offset),
                *begin(self.i.payload.offset, self.i.payload.words),
                words.eq(self.i.payload.words),
                repeats.eq(self.i.payload.repeats),
                last_repeat.eq(self.i.payload.repeats == 1),
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
    between repeats and commands. Latency: ``cmd`` to ``request`` 4 cycles; ``data`` to ``o`` 3 cycles, 4 for
    words wider than the bus, 1 less without `buffered`.

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
    buffered : bool
        Words leave through a `StreamBuffer`; without, only for a consumer whose ``ready`` is a register.

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

    def __init__(self, arch: Arch, *, out_bytes: int, fifo_beats: int, pairs: bool = False, buffered: bool = True) -> None:
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
        self.buffered = buffered
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
        m.submodules.runs = runs = _Runs(bus_bytes=bus, out_bytes=self.out_bytes)
        m.submodules.issuer = issuer = _Issuer(runs, fifo_beats=self.fifo_beats)
        m.submodules.fifo = fifo = Fifo(width=8 * bus, depth=self.fifo_beats + 1)
        accept = Signal(init=1)  # the framer, too, has room for a command
        m.d.comb += [
            runs.cmd.payload.eq(self.cmd.payload),
            runs.cmd.valid.eq(self.cmd.valid & accept),
            self.cmd.ready.eq(runs.cmd.ready & accept),
            runs.completed.eq(self.completed),
            issuer.pop.eq(fifo.r_rdy & fifo.r_en),
            fifo.w_data.eq(self.data.payload),
            fifo.w_en.eq(self.data.valid),
        ]
        wiring.connect(m, runs.o, issuer.i)
        wiring.connect(m, issuer.request, wiring.flipped(self.request))
        out: Any = wiring.flipped(self.o)
        if self.buffered:
            m.submodules.buffer = buffer = StreamBuffer(self.o.payload.shape())
            wiring.connect(m, buffer.o, out)
            out = buffer.i
        if self.out_bytes < bus:
            self._narrow(m, fifo, accept, out)
        elif self.out_bytes > bus:
            self._widen(m, fifo, out)
        else:
            m.d.comb += [out.payload.eq(fifo.r_data), out.valid.eq(fifo.r_rdy), fifo.r_en.eq(out.ready)]
        return m

    def _narrow(self, m: Module, fifo: Fifo, accept: Signal, out: Any) -> None:
        low, high = exact_log2(self.out_bytes), exact_log2(self.arch.bus_bytes)
        m.submodules.framer = framer = _Framer(ratio=1 << (high - low))
        m.submodules.commands = commands = Fifo(width=2 * (high - low) + 41, depth=COMMANDS_AHEAD)
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
        wiring.connect(m, narrower.o, out)

    def _widen(self, m: Module, fifo: Fifo, out: Any) -> None:
        m.submodules.widener = widener = Widener(in_bytes=self.arch.bus_bytes, out_bytes=self.out_bytes)
        slot = Signal(range(widener.ratio))
        m.d.comb += [
            widener.i.payload.data.eq(fifo.r_data),
            widener.i.payload.slot.eq(slot),
            widener.i.valid.eq(fifo.r_rdy),
            fifo.r_en.eq(widener.i.ready),
            out.payload.eq(widener.o.payload.data),
            out.valid.eq(widener.o.valid),
            widener.o.ready.eq(out.ready),
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
        m.submodules.owners = owners = Fifo(width=max(1, (self.readers - 1).bit_length()),
                                                        depth=self.outstanding)
        # in turn, from the one after the last that was served: whether j comes before k is known from registers
        before = {(j, k): Signal(init=j != 0, name=f"before_{j}_{k}")
                  for j, k in combinations(range(self.readers), 2)}
        requests = Cat(request.valid for request in self.request)
        grant = [request.valid & ~Cat(other.valid & (before[j, k] if j < k else ~before[k, j])
                                      for j, other in enumerate(self.request) if j != k).any()
                 for k, request in enumerate(self.request)]
        accept = Signal()
        m.d.comb += [
            accept.eq((~bus.arvalid | bus.arready) & owners.w_rdy & ~self.abort),
            owners.w_data.eq(Cat(Cat(bit for k, bit in enumerate(grant) if k >> place & 1).any()
                                 for place in range(len(owners.w_data)))),
            owners.w_en.eq(requests.any() & accept),
            bus.arid.eq(0),
            bus.arsize.eq(exact_log2(self.arch.bus_bytes)),
            bus.arburst.eq(1),
        ]
        m.d.comb += [request.ready.eq(accept & bit) for request, bit in zip(self.request, grant, strict=True)]
        with m.If(owners.w_en):
            chosen = [Mux(bit, Cat(request.payload.addr, request.payload.len), 0)
                      for request, bit in zip(self.request, grant, strict=True)]
            m.d.sync += [Cat(bus.araddr, bus.arlen).eq(reduce(or_, chosen)), bus.arvalid.eq(1)]
            # the one that is served, and those before it, come after the others
            passed = [Cat(grant[k:]).any() for k in range(self.readers)]
            m.d.sync += [first.eq(passed[j] == passed[k]) for (j, k), first in before.items()]
        with m.Elif(bus.arready):
            m.d.sync += bus.arvalid.eq(0)

        m.d.comb += [
            bus.rready.eq(owners.r_rdy),
            owners.r_en.eq(bus.rvalid & bus.rlast),
            self.idle.eq(~bus.arvalid & owners.empty),
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
