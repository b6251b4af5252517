"""The accelerator: registers, control, memory ports, and the core of decoupled units.

The core can be reset at any time (soft reset, error, end of a program); the memory ports outlive it and first finish
what they have promised to the bus.
"""

from amaranth import Cat, ClockDomain, Module, Mux, ResetInserter, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.arch import Arch
from hw.array import MacArray
from hw.axi import axi_ports
from hw.commands import writer_command
from hw.dispatch import UNITS, Dispatcher
from hw.isa import INSTRUCTION_BYTES, ErrorCode
from hw.loader import Loader
from hw.post import Post
from hw.queue import Queue, join
from hw.reader import ReadArbiter, Reader
from hw.regs import Registers
from hw.row import RowUnit
from hw.store import RowRoute, Store
from hw.stream_util import StreamBuffer
from hw.writer import Writer

__all__ = ["COUNTERS", "EVENTS", "QUEUE_DEPTH", "READERS", "SCALES_DEPTH", "Accelerator", "Core", "reader_sizes", "writer_beats"]

QUEUE_DEPTH = 8
"""Instructions a unit may lag behind the dispatcher."""

SCALES_DEPTH = 4
"""Row scales between row unit and post unit."""

READERS = {
    "fetch": "instructions", "a": "activations", "w": "weight values", "x": "weight positions",
    "p": "column parameters", "r": "residuals", "g": "norm parameters",
}
"""Read channels and what they carry."""


def reader_sizes(arch: Arch) -> dict[str, tuple[int, int]]:
    """Bytes of an output word (of int16 residuals: of half a column), and FIFO depth in beats, by read channel."""
    return {"fetch": (INSTRUCTION_BYTES, 32), "a": (arch.rows, arch.fifo_beats), "w": (arch.lanes, 2 * arch.fifo_beats),
            "x": (4 * arch.lanes, arch.fifo_beats), "p": (8, 32), "r": (arch.rows, arch.fifo_beats), "g": (8, 32)}


def writer_beats(arch: Arch) -> int:
    """FIFO depth of the writer in beats."""
    return max(32, arch.fifo_beats)


EVENTS = {
    "instructions": "instructions issued",
    "array_busy": "cycles in which the array took a step",
    "array_wait_weights": "cycles in which the array waited for weights",
    "array_wait_columns": "cycles in which the array waited for activations",
    "array_blocked": "cycles in which the array waited for its sums to be drained",
    "load_busy": "columns moved by the loader",
    "load_full": "cycles in which the loader waited for room in the lanes",
    "post_busy": "columns taken by the post unit",
    "post_wait_input": "cycles in which the post unit waited for an operand",
    "post_wait_output": "cycles in which the post unit waited for the row or store unit",
    "row_busy": "cycles in which the row unit worked",
    "row_stalled": "cycles in which the row unit waited for what follows it",
    "store_busy": "columns taken by the writer",
}
"""Event counters and what they count."""

COUNTERS: tuple[tuple[str, str], ...] = (
    ("cycles", "cycles from start to done"),
    *EVENTS.items(),
    *((f"read_beats_{name}", f"bus beats read: {what}") for name, what in READERS.items()),
    ("write_beats", "bus beats written"),
)
"""Performance counters: name and meaning."""


class Core(wiring.Component):
    """Dispatcher and units, without the memory ports.

    Members
    -------
    start, prog_addr, prog_instrs, completed : see `Dispatcher`; also done, error, error_code, error_addr, running.
    request[i], data[i] : read channels in the order of `READERS`. write, words : writer's command and data.
    events : one bit per event counter. progress : something moved.
    """

    def __init__(self, arch: Arch) -> None:
        self._arch = arch
        self._readers = {name: Reader(arch, out_bytes=size, fifo_beats=beats, pairs=name == "r", buffered=name != "fetch")
                         for name, (size, beats) in reader_sizes(arch).items() if arch.sparse or name != "x"}
        any_reader = self._readers["a"]
        members = any_reader.signature.members
        super().__init__({
            "start": In(1), "prog_addr": In(32), "prog_instrs": In(32), "completed": In(16),
            "done": Out(1), "error": Out(1), "error_code": Out(4), "error_addr": Out(32), "running": Out(1),
            "request": Out(members["request"].signature).array(len(READERS)),
            "data": Out(members["data"].signature.flip()).array(len(READERS)),
            "write": Out(stream.Signature(writer_command())), "words": Out(stream.Signature(16 * arch.rows)),
            "events": Out(data.StructLayout(dict.fromkeys(EVENTS, 1))),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.dispatcher = dispatcher = Dispatcher(self._arch)
        m.d.comb += [
            dispatcher.start.eq(self.start), dispatcher.prog_addr.eq(self.prog_addr),
            dispatcher.prog_instrs.eq(self.prog_instrs), dispatcher.completed.eq(self.completed),
            *(getattr(self, name).eq(getattr(dispatcher, name))
              for name in ("done", "error", "error_code", "error_addr", "running")),
        ]
        queues = {}
        for name, layout in UNITS.items():
            if name == "read_x" and "x" not in self._readers:
                m.d.comb += dispatcher.read_x.ready.eq(1)
                continue
            m.submodules[f"queue_{name}"] = queues[name] = Queue(layout(), depth=QUEUE_DEPTH)
            join(m, getattr(dispatcher, name), queues[name].i)
        for name, reader in self._readers.items():
            index = list(READERS).index(name)
            m.submodules[f"read_{name}"] = reader
            join(m, dispatcher.fetch if name == "fetch" else queues[f"read_{name}"].o, reader.cmd)
            join(m, reader.request, self.request[index])
            m.d.comb += [reader.completed.eq(self.completed), reader.data.valid.eq(self.data[index].valid),
                         reader.data.payload.eq(self.data[index].payload)]
        join(m, self._readers["fetch"].o, dispatcher.instructions)
        join(m, queues["write"].o, self.write)
        self._datapath(m, {name: queue.o for name, queue in queues.items()}, dispatcher)
        return m

    def _datapath(self, m: Module, cmds: dict, dispatcher: Dispatcher) -> None:
        """The units and the streams between them, in the direction in which data flows."""
        arch = self._arch
        m.submodules.loader = loader = Loader(arch)
        m.submodules.array = array = MacArray(arch)
        m.submodules.post = post = Post(arch)
        m.submodules.row = row = RowUnit(arch)
        m.submodules.route = route = RowRoute(arch)
        m.submodules.store = store = Store(arch)
        m.submodules.results = results = Queue(post.to_store.payload.shape(), depth=arch.results_depth)
        # long paths end here: ready chains through several units, and what follows a block RAM
        m.submodules.normed = normed = StreamBuffer(row.o.payload.shape())
        m.submodules.routed = routed = StreamBuffer(row.o.payload.shape())
        m.submodules.bypass = bypass = StreamBuffer(loader.bypass.payload.shape())
        m.submodules.posted = posted = StreamBuffer(post.to_store.payload.shape())
        m.submodules.stored = stored = StreamBuffer(store.o.payload.shape())
        m.submodules.scales = scales = Queue(row.scale.payload.shape(), depth=SCALES_DEPTH)
        read = {name: reader.o for name, reader in self._readers.items()}
        for source, sink in (
            (cmds["load"], loader.cmd), (read["a"], loader.memory), (route.lanes, loader.row_unit),
            (cmds["array"], array.cmd), (read["w"], array.values),
            (cmds["post"], post.cmd), (array.o, post.acc), (loader.bypass, bypass.i), (bypass.o, post.bypass),
            (read["p"], post.params),
            (read["r"], post.residual), (scales.o, post.scale),
            (cmds["row"], row.cmd), (post.to_rows, row.i), (read["g"], row.params), (row.scale, scales.i),
            (cmds["row_out"], route.cmd), (row.o, normed.i), (normed.o, route.i),
            (cmds["store"], store.cmd), (post.to_store, results.i), (results.o, posted.i), (posted.o, store.post),
            (route.store, routed.i), (routed.o, store.row_unit), (store.o, stored.i), (stored.o, self.words),
        ):
            join(m, source, sink)
        if "x" in read:
            join(m, read["x"], array.positions)
        m.d.comb += [
            array.loaded.eq(loader.loaded), loader.freed.eq(array.freed), array.write_en.eq(loader.write_en),
            array.write_addr.eq(loader.write_addr), array.write_data.eq(loader.write_data),
        ]
        event = self.events
        m.d.comb += [
            event.instructions.eq(dispatcher.issued), event.array_busy.eq(array.busy),
            event.array_wait_weights.eq(array.wait_weights), event.array_wait_columns.eq(array.wait_columns),
            event.array_blocked.eq(array.blocked), event.load_busy.eq(loader.busy), event.load_full.eq(loader.full),
            event.post_busy.eq(post.busy), event.post_wait_input.eq(post.wait_input),
            event.post_wait_output.eq(post.wait_output), event.row_busy.eq(row.busy), event.row_stalled.eq(row.stalled),
            event.store_busy.eq(store.busy),
        ]


class Accelerator(wiring.Component):
    """Top level: one AXI4 master, one AXI4-Lite slave, an interrupt. `ports` gives the Verilog names.

    A program starts when the driver writes CTRL.start and ends with done or error; either way the core is reset, so
    that the next program finds a fresh machine. Only memory carries over.
    """

    def __init__(self, arch: Arch) -> None:
        if not isinstance(arch, Arch):
            raise TypeError(f"arch must be an Arch, not {arch!r}")
        self._arch = arch
        self._registers = Registers(arch, counters=tuple(name for name, _ in COUNTERS))
        self._arbiter = ReadArbiter(arch, readers=len(READERS))
        self._writer = Writer(arch, fifo_beats=writer_beats(arch))
        super().__init__({"clk": In(1), "rst": In(1)})

    def ports(self) -> dict:
        """Top-level ports under their customary names, for ``amaranth.back.verilog.convert``."""
        return {**axi_ports("s_axi", self._registers.bus), **axi_ports("m_axi", self._arbiter.bus),
                **axi_ports("m_axi", self._writer.bus), "irq": (self._registers.irq, None),
                "clk": (self.clk, None), "rst": (self.rst, None)}

    def elaborate(self, platform: object) -> Module:
        m = Module()
        # the reset input is registered: it then has no long combinational paths into the core
        m.domains.sync = sync = ClockDomain(local=True)
        m.domains.input = clock = ClockDomain(reset_less=True, local=True)
        m.d.comb += [sync.clk.eq(self.clk), clock.clk.eq(self.clk)]
        m.d.input += sync.rst.eq(self.rst)
        core, reset = Core(self._arch), Signal()
        m.submodules.registers = registers = self._registers
        m.submodules.arbiter = arbiter = self._arbiter
        m.submodules.writer = writer = self._writer
        m.submodules.core = ResetInserter(reset)(core)
        join(m, core.write, writer.cmd)
        join(m, core.words, writer.i)
        for index in range(len(READERS)):
            join(m, core.request[index], arbiter.request[index])
            m.d.comb += [core.data[index].valid.eq(arbiter.data[index].valid),
                         core.data[index].payload.eq(arbiter.data[index].payload)]
        m.d.comb += [core.prog_addr.eq(registers.prog_addr), core.prog_instrs.eq(registers.prog_instrs),
                     core.completed.eq(writer.completed)]
        self._control(m, core, reset)
        self._count(m, core)
        return m

    def _control(self, m: Module, core: Core, reset: Signal) -> None:
        """Run until done, error or soft reset; then reset the core while the memory ports finish."""
        registers, arbiter, writer = self._registers, self._arbiter, self._writer
        code, addr, quiet, silent = Signal(4), Signal(32), Signal(32), Signal()
        timeout, moved = Signal(), Signal()
        m.d.sync += moved.eq(core.events.array_busy | core.events.load_busy | core.events.post_busy | core.events.store_busy
                             | core.events.instructions | Cat(port.valid for port in core.data).any())
        m.d.comb += [
            timeout.eq((registers.watchdog != 0) & (quiet == registers.watchdog)),
            registers.error_code.eq(code), registers.error_addr.eq(addr),
        ]
        with m.FSM():
            with m.State("IDLE"):
                with m.If(registers.start):
                    m.d.comb += core.start.eq(1)
                    m.d.sync += [code.eq(ErrorCode.NONE), silent.eq(0), quiet.eq(0)]
                    m.next = "RUN"
            with m.State("RUN"):
                m.d.comb += registers.busy.eq(1)
                m.d.sync += [quiet.eq(Mux(moved, 0, quiet + 1)), addr.eq(core.error_addr)]
                with m.If(core.error):
                    m.d.sync += code.eq(core.error_code)
                with m.Elif(arbiter.error | writer.error):
                    m.d.sync += code.eq(ErrorCode.BUS)
                with m.Elif(timeout):
                    m.d.sync += code.eq(ErrorCode.TIMEOUT)
                with m.If(core.done | core.error | arbiter.error | writer.error | timeout | registers.soft_reset):
                    m.d.sync += silent.eq(registers.soft_reset)
                    m.next = "STOP"
            with m.State("STOP"):
                m.d.comb += [registers.busy.eq(1), reset.eq(1), arbiter.abort.eq(1), writer.abort.eq(1)]
                with m.If(arbiter.idle & writer.idle):
                    m.d.comb += [registers.done.eq(~silent & (code == ErrorCode.NONE)),
                                 registers.error.eq(~silent & (code != ErrorCode.NONE))]
                    m.next = "IDLE"

    def _count(self, m: Module, core: Core) -> None:
        """Performance counters, cleared by start."""
        registers = self._registers
        writer = self._writer.bus
        events = {"cycles": registers.busy, **{name: core.events[name] for name in EVENTS},
                  **{f"read_beats_{name}": core.data[i].valid for i, name in enumerate(READERS)},
                  "write_beats": writer.wvalid & writer.wready}
        started = Signal()
        m.d.sync += started.eq(core.start)
        for name, event in events.items():
            count = Signal(48, name=f"count_{name}")
            m.d.comb += registers.counters[name].eq(count)
            # a cycle late: the events come at the end of long paths
            now = Signal(name=f"now_{name}")
            m.d.sync += now.eq(event)
            with m.If(started):
                m.d.sync += count.eq(0)
            with m.Elif(now):
                m.d.sync += count.eq(count + 1)
