"""Dispatcher: fetches instructions, checks them, and tells each unit its part.

Units run on their own behind command queues; the dispatcher only waits when a queue is full. The checks are the rules
of `hw.isa_check`, evaluated on the instruction register: a malformed instruction is never issued, earlier ones complete,
then the error is raised with its address.
"""

from amaranth import Array, Cat, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw import commands, isa
from hw.arch import Arch
from hw.arithmetic import fold, kept, parts
from hw.feeder import index_bits
from hw.isa import ErrorCode, Format, Opcode, Operand, Residual, RowOp, Scale, Source
from hw.isa import Out as Destination
from hw.isa_check import MAX_M, MAX_PENDING_ROWS, RULES, constant_alignment, k_limits
from hw.post import TABLE_WORDS

__all__ = ["DIVIDEND_BITS", "DIVISION_CYCLES", "UNITS", "Checker", "Dispatcher", "Divider"]

UNITS = {
    "read_a": commands.reader_command, "read_w": commands.reader_command, "read_x": commands.reader_command,
    "read_p": commands.reader_command, "read_r": commands.reader_command, "read_g": commands.reader_command,
    "load": commands.loader_command, "array": commands.array_command, "post": commands.post_command,
    "row": commands.row_command, "row_out": commands.row_out_command, "store": commands.store_command,
    "write": commands.writer_command,
}
"""Command streams of the dispatcher and their layouts."""

DIVIDEND_BITS = 22
"""Bits of the divider's dividend."""

DIVISION_CYCLES = DIVIDEND_BITS + 1
"""Cycles of a division: a bit each, and the rounding."""


class Checker(wiring.Component):
    """The rules of `hw.isa_check` on one instruction; combinational.

    Members
    -------
    instruction : fields. code : `ErrorCode`, NONE if well formed.
    """

    def __init__(self, arch: Arch) -> None:
        self._arch = arch
        super().__init__({"instruction": In(isa.instruction_layout()), "code": Out(4)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        f, arch = self.instruction, self._arch
        limit, known = Signal(16), Signal()
        limits = Array(k_limits(arch))[Mux(f.m > MAX_M, MAX_M, f.m)]
        m.d.comb += limit.eq(Mux(f.format == Format.DENSE, arch.lane_depth, limits))
        tile_code = Value.cast(int(ErrorCode.NONE))
        for rule in reversed(RULES):
            tile_code = Mux(rule.holds(f, arch, limit), int(rule.code), tile_code)
        misaligned = (f.opcode == Opcode.TABLE) & ((f.p_addr & (constant_alignment(arch) - 1)) != 0)
        m.d.comb += known.eq((f.opcode == Opcode.TILE) | (f.opcode == Opcode.TABLE) | (f.opcode == Opcode.HALT))
        with m.If(~known):
            m.d.comb += self.code.eq(ErrorCode.OPCODE)
        with m.Elif(f.opcode == Opcode.TILE):
            m.d.comb += self.code.eq(tile_code)
        with m.Elif(f.reserved != 0):
            m.d.comb += self.code.eq(ErrorCode.FIELD)
        with m.Elif(misaligned):
            m.d.comb += self.code.eq(ErrorCode.ALIGNMENT)
        return m


class Sequence(wiring.Component):
    """`hw.isa_check.SequenceState` in hardware: rows, row scales and columns that TILEs leave for later TILEs.

    Members
    -------
    instruction : a well-formed TILE. issue : it is issued now. wrong : it does not fit the state.
    """

    def __init__(self) -> None:
        super().__init__({"instruction": In(isa.instruction_layout()), "issue": In(1), "wrong": Out(1)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        f = self.instruction
        rows, count, scales = data.ArrayLayout(16, MAX_PENDING_ROWS), Signal(range(MAX_PENDING_ROWS + 2)), Signal(3)
        queue = Signal(rows)
        array, held, columns = f.source == Source.ARRAY, Cat(f.k, f.a_unsigned), Signal(17)
        uses_row, uses_columns = array & (f.operand == Operand.ROWS), array & (f.operand == Operand.HELD)
        uses_scale = (f.scale == Scale.ROW) & ~f.psum_out
        makes_row = f.out == Destination.LANES
        makes_scale = makes_row & ((f.row_op == RowOp.SOFTMAX) | f.row_last)
        count_next, scales_next = Signal(range(MAX_PENDING_ROWS + 3)), Signal(4)
        m.d.comb += [
            count_next.eq(count - uses_row + makes_row), scales_next.eq(scales - uses_scale + makes_scale),
            self.wrong.eq((uses_row & ((count == 0) | (queue[0] != f.k))) | (uses_scale & (scales == 0))
                          | (count_next > MAX_PENDING_ROWS) | (scales_next > MAX_PENDING_ROWS)
                          | (uses_columns & (columns != held))),
        ]
        with m.If(self.issue & array):
            m.d.sync += columns.eq(held)
        with m.If(self.issue):
            m.d.sync += [count.eq(count_next), scales.eq(scales_next)]
            place = Signal(range(MAX_PENDING_ROWS + 2))
            m.d.comb += place.eq(count - uses_row)
            for i in range(MAX_PENDING_ROWS):
                shifted = queue[i + 1] if i + 1 < MAX_PENDING_ROWS else 0
                m.d.sync += queue[i].eq(Mux(makes_row & (place == i), f.cols, Mux(uses_row, shifted, queue[i])))
        return m


class Divider(wiring.Component):
    """Ceiling of a `DIVIDEND_BITS`-bit by 6-bit division in `DIVISION_CYCLES`.

    Members
    -------
    start, dividend, divisor : inputs (divisor >= 1, taken with start). done : `quotient` is valid; stays until the next start.
    """

    start: In(1)
    dividend: In(DIVIDEND_BITS)
    divisor: In(6)
    done: Out(1)
    quotient: Out(DIVIDEND_BITS)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        left, rest, divisor, step = Signal(DIVIDEND_BITS), Signal(7), Signal(6), Signal(range(DIVISION_CYCLES + 1))
        trial = Signal(7)
        m.d.comb += [trial.eq(Cat(left[-1], rest[:6])), self.done.eq(step == 0), self.quotient.eq(left)]
        with m.If(self.start):
            m.d.sync += [left.eq(self.dividend), rest.eq(0), divisor.eq(self.divisor), step.eq(DIVISION_CYCLES)]
        with m.Elif(step == 1):
            m.d.sync += [left.eq(left + (rest != 0)), step.eq(0)]
        with m.Elif(step != 0):
            fits = trial >= divisor
            m.d.sync += [left.eq(Cat(fits, left[:-1])), rest.eq(Mux(fits, trial - divisor, trial)), step.eq(step - 1)]
        return m


class Dispatcher(wiring.Component):
    """One instruction in 4 cycles (about 50 with N:M weights, hidden by the queues).

    Members
    -------
    start, prog_addr, prog_instrs : begin a program. fetch : reader command. instructions : 64-byte words.
    completed : instructions whose stores are done (16 bits, wraps). units.* : command streams, see `UNITS`.
    accept : every unit queue has room. done : HALT reached and all complete. error, error_code, error_addr : stop.
    running : a program is being run. issued : an instruction was issued (counter).
    """

    def __init__(self, arch: Arch) -> None:
        self._arch = arch
        super().__init__({
            "start": In(1), "prog_addr": In(32), "prog_instrs": In(32),
            "fetch": Out(stream.Signature(commands.reader_command())),
            "instructions": In(stream.Signature(8 * isa.INSTRUCTION_BYTES)),
            "completed": In(16), "done": Out(1), "error": Out(1), "error_code": Out(4), "error_addr": Out(32),
            "running": Out(1), "issued": Out(1),
            **{name: Out(stream.Signature(layout())) for name, layout in UNITS.items()},
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.checker = checker = Checker(self._arch)
        m.submodules.sequence = sequence = Sequence()
        raw, index, code = Signal(isa.instruction_layout()), Signal(32), Signal(4)
        steps, words, issue = Signal(DIVIDEND_BITS), Signal(DIVIDEND_BITS), Signal()
        # known a cycle late: that the program ends here or after this instruction, a wrong sequence, room in every queue
        ended, ends, wrong, room = (Signal(name=name) for name in ("ended", "ends", "wrong", "room"))
        tile = raw.opcode == Opcode.TILE
        issuing = Signal()  # the state is ISSUE
        m.d.sync += [ends.eq(index + 1 == self.prog_instrs), wrong.eq(sequence.wrong), room.eq(self._queues_ready()),
                     issuing.eq(0), sequence.issue.eq(issue & tile)]
        m.d.comb += [checker.instruction.eq(raw), sequence.instruction.eq(raw), self.issued.eq(issue), issue.eq(issuing & room),
                     self.fetch.payload.addr.eq(self.prog_addr),
                     self.fetch.payload.words.eq(self.prog_instrs), self.fetch.payload.repeats.eq(1)]
        with m.FSM() as fsm:
            with m.State("IDLE"):
                with m.If(self.start):
                    m.d.sync += index.eq(0)
                    m.next = "REQUEST"
            with m.State("REQUEST"):
                m.d.comb += self.fetch.valid.eq(self.prog_instrs != 0)
                m.d.sync += ended.eq(self.prog_instrs == 0)
                with m.If(self.fetch.ready | (self.prog_instrs == 0)):
                    m.next = "FETCH"
            with m.State("FETCH"):
                m.d.comb += self.instructions.ready.eq(1)
                with m.If(ended):
                    m.d.sync += code.eq(ErrorCode.END)
                    m.next = "FINISH"
                with m.Elif(self.instructions.valid):
                    m.d.sync += raw.eq(self.instructions.payload)
                    m.next = "CHECK"
            with m.State("CHECK"):
                m.d.sync += [code.eq(checker.code), steps.eq(raw.k), words.eq(0)]
                m.next = "DECIDE"
            with m.State("DECIDE"):
                with m.If((code == ErrorCode.NONE) & tile & wrong):
                    m.d.sync += code.eq(ErrorCode.SEQUENCE)
                with m.If((code != ErrorCode.NONE) | (raw.opcode == Opcode.HALT) | (tile & wrong)):
                    m.next = "FINISH"
                with m.Else():
                    m.next = "ISSUE"
                    m.d.sync += issuing.eq(1)
                    if self._arch.sparse:
                        with m.If(tile & (raw.source == Source.ARRAY) & (raw.format != Format.DENSE)):
                            m.next = "GROUPS"
                            m.d.sync += issuing.eq(0)
            if self._arch.sparse:
                self._count_words(m, raw, steps, words, issuing)
            with m.State("ISSUE"):
                m.d.sync += issuing.eq(~room)
                with m.If(room):
                    m.d.sync += [index.eq(index + 1), ended.eq(ends)]
                    m.next = "FETCH"
            with m.State("FINISH"):
                with m.If(self.completed == index[:16]):
                    m.d.comb += [self.done.eq(code == ErrorCode.NONE), self.error.eq(code != ErrorCode.NONE)]
                    m.next = "IDLE"
        m.d.comb += [self.running.eq(~fsm.ongoing("IDLE")), self.error_code.eq(code),
                     self.error_addr.eq(self.prog_addr + (index << (isa.INSTRUCTION_BYTES - 1).bit_length()))]
        self._issue(m, raw, index, steps, words, issue)
        return m

    def _queues_ready(self) -> Value:
        return Cat(getattr(self, name).ready for name in UNITS).all()

    def _count_words(self, m: Module, raw, steps: Signal, words: Signal, issuing: Signal) -> None:
        """States GROUPS to COUNTED: steps = ceil(k / m) * n; words = position words of one column tile."""
        m.submodules.divider = divider = Divider()
        bitmap = raw.format == Format.BITMAP
        per_word = Mux(bitmap, Array(32 // max(k, 1) for k in range(MAX_M + 1))[raw.m],
                       Array(32 // index_bits(k) for k in range(MAX_M + 1))[raw.m])
        with m.State("GROUPS"):
            m.d.comb += [divider.dividend.eq(raw.k), divider.divisor.eq(raw.m), divider.start.eq(1)]
            m.next = "STEPS"
        with m.State("STEPS"):
            with m.If(divider.done):
                m.d.sync += words.eq(divider.quotient)
                m.next = "PARTS"
        terms = parts(words[:16], raw.n, spare=True)
        pieces = kept(terms, "piece")
        with m.State("PARTS"):
            m.d.sync += [piece.eq(term) for (piece, _), (term, _) in zip(pieces, terms, strict=True)]
            m.next = "PRODUCT"
        with m.State("PRODUCT"):
            m.d.sync += steps.eq(fold(pieces)[0][0])
            m.next = "WORDS"
        with m.State("WORDS"):
            m.d.comb += [divider.dividend.eq(Mux(bitmap, words, steps)), divider.divisor.eq(per_word), divider.start.eq(1)]
            m.next = "COUNTED"
        with m.State("COUNTED"):
            with m.If(divider.done):
                m.d.sync += [words.eq(divider.quotient), issuing.eq(1)]
                m.next = "ISSUE"

    def _issue(self, m: Module, raw, index, steps, words, issue) -> None:
        """Commands of the instruction in `raw`, all in the same cycle."""
        arch, lanes = self._arch, self._arch.lanes
        tile, array = raw.opcode == Opcode.TILE, (raw.opcode == Opcode.TILE) & (raw.source == Source.ARRAY)
        bypass = tile & (raw.source == Source.STREAM)
        load_table = raw.opcode == Opcode.TABLE
        tiles, wait_seq = Signal(16), Signal(16)
        m.d.comb += [tiles.eq((raw.cols + (lanes - 1)) >> (lanes - 1).bit_length()), wait_seq.eq(index - raw.dep + 1)]
        by_column = tile & (raw.scale == Scale.COLUMN) & ~raw.psum_out
        residual = tile & (raw.residual != Residual.NONE)
        wide = (raw.residual == Residual.INT16) | (raw.residual == Residual.MUL16)
        norm = tile & ((raw.row_op == RowOp.LAYERNORM) | (raw.row_op == RowOp.RMSNORM))
        rows, rows_out = tile & (raw.row_op != RowOp.NONE), tile & (raw.out != Destination.NONE)
        stores = rows_out & (raw.out != Destination.LANES)
        transposed = raw.out == Destination.STORE8T

        def send(unit: str, when, **fields) -> None:
            port, needed = getattr(self, unit), Signal(name=f"needed_{unit}")
            m.d.sync += needed.eq(when)  # a cycle late: the instruction does not change while it is checked
            m.d.comb += port.valid.eq(issue & needed)
            for name in port.payload.shape().members:
                value = fields.get(name, getattr(raw, name, None) if name in isa_fields else None)
                if value is not None:
                    m.d.comb += getattr(port.payload, name).eq(value)

        isa_fields = {field.name for field in isa.FIELDS}
        waits = {"wait": raw.dep != 0, "wait_seq": wait_seq}
        send("read_a", (array & (raw.operand == Operand.MEMORY)) | bypass, addr=raw.a_addr, repeats=1,
             words=Mux(bypass, raw.cols, raw.k), **waits)
        send("read_w", array, addr=raw.w_addr, words=steps, repeats=tiles, stride=raw.w_stride,
             wait=(raw.dep != 0) & raw.w_dep, wait_seq=wait_seq)
        send("read_x", array & (raw.format != Format.DENSE), addr=raw.x_addr, words=words, repeats=tiles,
             stride=words << (4 * lanes - 1).bit_length())
        send("read_p", by_column | load_table, addr=raw.p_addr, words=Mux(load_table, TABLE_WORDS, raw.cols), repeats=1)
        send("read_r", residual, addr=raw.r_addr, words=Mux(wide, raw.cols << 1, raw.cols), repeats=1,
             wide=wide, **waits)
        send("read_g", norm, addr=raw.g_addr, words=raw.cols, repeats=1)
        held = raw.operand == Operand.HELD
        send("load", (array & ~held) | bypass, count=Mux(bypass, raw.cols, raw.k), from_rows=raw.operand == Operand.ROWS,
             from_memory=raw.operand != Operand.ROWS, bypass=bypass, zero=Mux(norm, 0, raw.g_addr))
        send("array", array, held=held)
        send("post", tile | load_table, load_table=load_table, **commands.post_flags(raw))
        send("row", rows, op=raw.row_op, first=raw.row_first, last=raw.row_last)
        send("row_out", rows & rows_out, count=raw.cols, lanes=raw.out == Destination.LANES)
        send("store", stores, from_rows=raw.row_op != RowOp.NONE, from_post=raw.row_op == RowOp.NONE,
             transposed=transposed, wide=raw.out == Destination.STORE16)
        send("write", 1, addr=raw.o_addr, stride=raw.o_stride, store=stores, wide=raw.out == Destination.STORE16,
             repeats=Mux(transposed, tiles, 1),
             words=Mux(transposed, arch.rows, Mux(raw.out == Destination.STORE16, raw.cols << 1, raw.cols)))
