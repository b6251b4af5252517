"""Lane: one compressed weight and `rows` activations per cycle.

The lane's RAM holds the activation tile, a column (`rows` activations) per address; the weight's position *is* the read
address. So the RAM selects M:1 for any N:M without a multiplexer, and dense is the same thing with rising addresses.

Two kinds of multiply-accumulate, chosen by ``Arch.packing``; both are written so that one DSP block takes multiplier, product
register, adder and sum register, and both take a step per cycle at the same latency:

* `Mac`: one product.
* `PackedMac`: the products of two token rows, which share the weight, in one multiplier of 27 x 18 bits:
  ``(high * 2^18 + low) * weight``. The sum of the low products outgrows its 18 bits; it is exact all the same, because a
  product moves it by less than a quarter of the field (255 * 128 < 2^16), so that the two top bits of the field before and
  after a step tell whether it wrapped. A counter of wraps gives the missing bits of the low sum, and what they borrowed from
  the high one. `PackedModel` is the same in Python.
"""

from collections.abc import Iterable

from amaranth import Cat, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out

from hw.arch import Arch
from hw.shared import place

__all__ = [
    "ARRAY_LATENCY", "MAX_ARRAY_LATENCY", "Lane", "LaneControl", "Mac", "PackedMac", "PackedModel", "array_latency",
    "column_bits", "lane_column", "sum_bits", "sum_word", "unpack_sums", "wrap_bits",
]

ARRAY_LATENCY = 5
"""Cycles from a step leaving the feeder to its product in the accumulator: position, address, RAM, product, sum."""

MAX_ARRAY_LATENCY = ARRAY_LATENCY + 1
"""The largest `array_latency`."""


def array_latency(arch: Arch) -> int:
    """`ARRAY_LATENCY`, and one more with `lane_register`."""
    return ARRAY_LATENCY + arch.lane_register


FIELD = 18
"""Bits of the low product's field: what is left of the 27-bit multiplier input beside a 9-bit activation."""

_LARGEST = 255 * 128
"""Magnitude of the largest product: an unsigned activation and the weight -128."""


def sum_bits(arch: Arch) -> int:
    """Bits of a finished sum: an instruction sums at most `lane_depth` products."""
    return (arch.lane_depth * _LARGEST).bit_length() + 1


def wrap_bits(arch: Arch) -> int:
    """Bits of `PackedMac`'s counter of wraps."""
    return (arch.lane_depth * _LARGEST >> FIELD).bit_length() + 1


def column_bits(arch: Arch) -> int:
    """Width of the lanes' RAM: with packing an activation has its sign, or its share of the neighbour's, as ninth bit."""
    return (9 if arch.packing else 8) * arch.rows


def lane_column(arch: Arch, column: Value, is_unsigned: Value) -> Value:
    """Expression: a column of bytes as the lanes' RAM stores it.

    With packing, rows 2i and 2i+1 are a multiplier input, of which only the lower one's sign extension is not stored: the
    upper one is less by the one that this extension borrows.
    """
    if not arch.packing:
        return column
    parts = []
    for pair in range(arch.rows // 2):
        low, high = (column.word_select(Const(2 * pair + i), 8) for i in range(2))
        negative = low[7] & ~is_unsigned
        parts += [low, negative, (Cat(high, high[7] & ~is_unsigned).as_signed() - negative)[:9]]
    return Cat(*parts)


def sum_word(arch: Arch) -> tuple[int, int]:
    """Bits and number of the words in which a lane leaves its sums: one a row, or one a pair of rows."""
    bits = sum_bits(arch)
    return (FIELD + bits + wrap_bits(arch), arch.rows // 2) if arch.packing else (bits, arch.rows)


def unpack_sums(arch: Arch, words: Iterable[Value]) -> list[Value]:
    """Expressions: the sums of a lane, row by row, from its words."""
    if not arch.packing:
        return [word.as_signed() for word in words]
    sums = []
    for word in words:
        total, wraps = word[: FIELD + sum_bits(arch)], word[FIELD + sum_bits(arch):].as_signed()
        sums += [Cat(total[:FIELD], wraps).as_signed(), (total[FIELD:].as_signed() - wraps)[: sum_bits(arch)].as_signed()]
    return sums


class PackedModel:
    """Integer model of `PackedMac`: what it holds after each step, and the two sums that this stands for."""

    def __init__(self) -> None:
        self.total = self.wraps = 0

    def step(self, low: int, high: int, weight: int) -> None:
        """Add the products of two activations (-128..255) with one weight (-128..127)."""
        before = self.total >> (FIELD - 2) & 3
        self.total += ((high << FIELD) + low) * weight
        after = self.total >> (FIELD - 2) & 3
        self.wraps += ((before, after) == (3, 0)) - ((before, after) == (0, 3))

    @property
    def sums(self) -> tuple[int, int]:
        """Sums of the low and of the high products."""
        return (self.wraps << FIELD) + (self.total & ((1 << FIELD) - 1)), (self.total >> FIELD) - self.wraps


class LaneControl(wiring.Signature):
    """Enables of the pipeline, shared by all lanes, each aligned with its stage.

    Members
    -------
    ram : a step's address is at the RAM. hold : its activations left the RAM for the register, if there is one.
    mul : a step's activations left the RAM, or the register.
    unsigned_a : activations of that step are 0..255 (with packing, the RAM holds them with their sign).
    acc : a product is ready; `first` starts a new sum.
    copy : the sums are complete: copy them to the shadow registers.
    """

    def __init__(self) -> None:
        super().__init__({name: Out(1) for name in ("ram", "hold", "mul", "unsigned_a", "acc", "first", "copy")})


class Mac(wiring.Component):
    """One multiply-accumulate with a shadow register that is drained while the next tile is summed.

    Members
    -------
    a : activation, signed or (unsigned_a) 0..255. w : weight.
    mul, acc, first, copy : see `LaneControl`. shadow : the finished sum, of `bits` bits.
    """

    def __init__(self, bits: int = 32) -> None:
        super().__init__({
            "a": In(unsigned(8)), "w": In(signed(8)), "unsigned_a": In(1), "mul": In(1),
            "acc": In(1), "first": In(1), "copy": In(1), "shadow": Out(signed(bits)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        # 31 bits hold 8192 products with room, and the adder's carry then fits the simulator's 32-bit words
        product, total = Signal(signed(17)), Signal(signed(31))
        with m.If(self.mul):
            m.d.sync += product.eq(Cat(self.a, self.a[7] & ~self.unsigned_a).as_signed() * self.w)
        with m.If(self.acc):  # one adder, so that it goes into the DSP block
            m.d.sync += total.eq(Mux(self.first, 0, total) + product)
        with m.If(self.copy):
            m.d.sync += self.shadow.eq(total)
        return m


class PackedMac(wiring.Component):
    """Two multiply-accumulates in one multiplier; see the module's text, `PackedModel` and `lane_column`.

    Members
    -------
    a : 18 bits of `lane_column`. w : weight. mul, acc, first, copy : see `LaneControl`. restart : acc and first.
    shadow : `sum_word`: the packed sum and the wraps of its low field.
    """

    def __init__(self, arch: Arch) -> None:
        self._wraps, self._total = wrap_bits(arch), FIELD + sum_bits(arch)
        super().__init__({
            "a": In(unsigned(18)), "w": In(signed(8)), "mul": In(1), "acc": In(1), "first": In(1), "restart": In(1),
            "copy": In(1), "shadow": Out(unsigned(sum_word(arch)[0])),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        product, total = Signal(signed(9 + FIELD + 8)), Signal(signed(self._total))
        wraps, wraps_now, before, counting = Signal(signed(self._wraps)), Signal(signed(self._wraps)), Signal(2), Signal()
        operand = Cat(self.a[:9], self.a[8].replicate(FIELD - 9), self.a[9:]).as_signed()
        with m.If(self.mul):
            m.d.sync += product.eq(operand * self.w)
        with m.If(self.acc):
            m.d.sync += [total.eq(Mux(self.first, 0, total) + product), before.eq(total[FIELD - 2:FIELD])]
        # the wrap of a step is counted one cycle after it, when the sum has left the DSP block
        up, down, after = Signal(), Signal(), total[FIELD - 2:FIELD]
        m.d.comb += [
            up.eq(counting & (before == 3) & (after == 0)), down.eq(counting & (before == 0) & (after == 3)),
            wraps_now.eq(wraps + Cat(up | down, down.replicate(self._wraps - 1)).as_signed()),
        ]
        m.d.sync += [counting.eq(self.acc), wraps.eq(wraps_now)]
        with m.If(self.restart):
            m.d.sync += [before.eq(0), wraps.eq(0)]
        with m.If(self.copy):
            m.d.sync += self.shadow.eq(Cat(total, wraps_now))
        return m


class Lane(wiring.Component):
    """RAM and `rows` multiply-accumulates. Latency: one less than `array_latency`, one step per cycle.

    Members
    -------
    write_en, write_addr, write_data : a `lane_column` for the RAM (broadcast by the loader).
    addr, weight : one step, registered by the feeder. control : stage enables. shadow[i] : finished sums, see `sum_word`.
    """

    def __init__(self, arch: Arch) -> None:
        self._arch = arch
        bits = (arch.lane_depth - 1).bit_length()
        word, words = sum_word(arch)
        super().__init__({
            "write_en": In(1), "write_addr": In(bits), "write_data": In(column_bits(arch)),
            "addr": In(bits), "weight": In(signed(8)), "control": In(LaneControl()),
            "shadow": Out(unsigned(word) if arch.packing else signed(word)).array(words),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.ram = ram = memory.Memory(
            shape=column_bits(self._arch), depth=self._arch.lane_depth, init=[],
            # the ring never reads the column that is being written: no logic for that case where a RAM has none
            attrs={"ram_style": "block", "no_rw_check": 1}
        )
        write, read = ram.write_port(), ram.read_port()
        weight = Signal(signed(8))
        m.d.comb += [
            write.en.eq(self.write_en), write.addr.eq(self.write_addr), write.data.eq(self.write_data),
            read.en.eq(self.control.ram), read.addr.eq(self.addr),
        ]
        with m.If(self.control.ram):
            m.d.sync += weight.eq(self.weight)
        add = self._add_packed if self._arch.packing else self._add_plain
        column = read.data
        if self._arch.lane_register:
            column, held = Signal(column_bits(self._arch), name="column"), Signal(signed(8))
            with m.If(self.control.hold):
                m.d.sync += [column.eq(read.data), held.eq(weight)]
            weight = held
        add(m, platform, column, weight)
        return m

    def _add_plain(self, m: Module, platform: object, column: Value, weight: Signal) -> None:
        """A multiplier a row."""
        for t in range(self._arch.rows):
            mac = Mac(sum_bits(self._arch))
            place(m, platform, f"mac{t}", mac, module="mac")
            m.d.comb += [
                mac.a.eq(column.word_select(Const(t), 8)), mac.w.eq(weight), self.shadow[t].eq(mac.shadow),
                *(getattr(mac, name).eq(getattr(self.control, name)) for name in ("unsigned_a", "mul", "acc", "first", "copy")),
            ]

    def _add_packed(self, m: Module, platform: object, column: Value, weight: Signal) -> None:
        """A multiplier a pair of rows."""
        restart = Signal()
        m.d.comb += restart.eq(self.control.acc & self.control.first)
        for pair in range(self._arch.rows // 2):
            mac = PackedMac(self._arch)
            place(m, platform, f"mac{pair}", mac, module="mac")
            m.d.comb += [
                mac.a.eq(column.word_select(Const(pair), 18)), mac.w.eq(weight), mac.restart.eq(restart),
                self.shadow[pair].eq(mac.shadow),
                *(getattr(mac, name).eq(getattr(self.control, name)) for name in ("mul", "acc", "first", "copy")),
            ]
