"""Lane: one compressed weight and `rows` activations per cycle.

The lane's RAM holds the activation tile, a column (`rows` bytes) per address; the weight's position *is* the read
address. So the RAM selects M:1 for any N:M without a multiplexer, and dense is the same thing with rising addresses.
"""

from amaranth import Cat, Const, Module, Mux, Signal, signed, unsigned
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out

from hw.arch import Arch
from hw.shared import place

__all__ = ["ARRAY_LATENCY", "Lane", "LaneControl", "Mac"]

ARRAY_LATENCY = 4
"""Cycles from a step leaving the feeder to its product in the accumulator: address, RAM, product, sum."""


class LaneControl(wiring.Signature):
    """Enables of the pipeline, shared by all lanes, each aligned with its stage.

    Members
    -------
    ram : a step's address is at the RAM.
    mul : a step's activations left the RAM.
    unsigned_a : activations of that step are 0..255.
    acc : a product is ready; `first` starts a new sum.
    copy : the sums are complete: copy them to the shadow registers.
    """

    def __init__(self) -> None:
        super().__init__({name: Out(1) for name in ("ram", "mul", "unsigned_a", "acc", "first", "copy")})


class Mac(wiring.Component):
    """One multiply-accumulate with a shadow register that is drained while the next tile is summed.

    Members
    -------
    a : activation, signed or (unsigned_a) 0..255. w : weight.
    mul, acc, first, copy : see `LaneControl`. shadow : the finished sum.
    """

    def __init__(self) -> None:
        super().__init__({
            "a": In(unsigned(8)), "w": In(signed(8)), "unsigned_a": In(1), "mul": In(1),
            "acc": In(1), "first": In(1), "copy": In(1), "shadow": Out(signed(32)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        # 31 bits hold 8192 products with room, and the adder's carry then fits the simulator's 32-bit words
        product, total = Signal(signed(17)), Signal(signed(31))
        with m.If(self.mul):
            m.d.sync += product.eq(Cat(self.a, self.a[7] & ~self.unsigned_a).as_signed() * self.w)
        with m.If(self.acc):  # one adder, so that synthesis needs no multiplexer behind it
            m.d.sync += total.eq(Mux(self.first, 0, total) + product)
        with m.If(self.copy):
            m.d.sync += self.shadow.eq(total)
        return m


class Lane(wiring.Component):
    """RAM and `rows` multiply-accumulates. Latency: `ARRAY_LATENCY`, one step per cycle.

    Members
    -------
    write_en, write_addr, write_data : a column for the RAM (broadcast by the loader).
    addr, weight : one step, registered by the feeder. control : stage enables. shadow[t] : finished sums.
    """

    def __init__(self, arch: Arch) -> None:
        self._arch = arch
        bits = (arch.lane_depth - 1).bit_length()
        super().__init__({
            "write_en": In(1), "write_addr": In(bits), "write_data": In(8 * arch.rows),
            "addr": In(bits), "weight": In(signed(8)), "control": In(LaneControl()),
            "shadow": Out(signed(32)).array(arch.rows),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.ram = ram = memory.Memory(
            shape=8 * self._arch.rows, depth=self._arch.lane_depth, init=[], attrs={"ram_style": "block"}
        )
        write, read = ram.write_port(), ram.read_port()
        weight = Signal(signed(8))
        m.d.comb += [
            write.en.eq(self.write_en), write.addr.eq(self.write_addr), write.data.eq(self.write_data),
            read.en.eq(self.control.ram), read.addr.eq(self.addr),
        ]
        with m.If(self.control.ram):
            m.d.sync += weight.eq(self.weight)
        for t in range(self._arch.rows):
            mac = Mac()
            place(m, platform, f"mac{t}", mac, module="mac")
            m.d.comb += [
                mac.a.eq(read.data.word_select(Const(t), 8)), mac.w.eq(weight),
                mac.unsigned_a.eq(self.control.unsigned_a), mac.mul.eq(self.control.mul),
                mac.acc.eq(self.control.acc), mac.first.eq(self.control.first), mac.copy.eq(self.control.copy),
                self.shadow[t].eq(mac.shadow),
            ]
        return m
