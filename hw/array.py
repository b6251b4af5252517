"""The array: feeder, lanes, and the drain that hands finished sums to the post unit column by column.

While one column tile is summed, the previous one leaves from the shadow registers, into a queue before the post unit. If
the drain has not finished when the next tile is complete, the whole pipeline freezes for as long as it takes (`advance`).
"""

from amaranth import Array as Select
from amaranth import Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.arch import Arch
from hw.commands import array_command, column_layout
from hw.feeder import Feeder
from hw.lane import Lane, column_bits, sum_word, unpack_sums
from hw.queue import Queue
from hw.shared import place

__all__ = ["SUMS_MARGIN", "Drain", "MacArray"]

SUMS_MARGIN = 3
"""Places that the queue of sums keeps free: `room` is known a cycle late, and two columns may be on their way."""


class Selector(wiring.Component):
    """Picks a word of one lane; latency 1. One a row (or a pair of rows), so that it is written and mapped once.

    Members
    -------
    i[l] : words. lane, take : which, and when. o : registered.
    """

    def __init__(self, arch: Arch) -> None:
        self._lanes, word = arch.lanes, sum_word(arch)[0]
        super().__init__({"i": In(word).array(arch.lanes), "lane": In(range(arch.lanes)), "take": In(1), "o": Out(word)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        with m.If(self.take):
            m.d.sync += self.o.eq(Select(self.i[lane] for lane in range(self._lanes))[self.lane])
        return m


class Drain(wiring.Component):
    """Selects one lane's shadow registers per cycle, and queues `Arch.sums_depth` columns. One column per cycle, latency 3.

    Members
    -------
    ended, cols : the sums of a tile of `cols` columns are complete. copy : the lanes copy them to their shadow registers in this
    cycle. advance : low while that has to wait, ``~ended | free``. shadow[l][i] : sums, see `hw.lane.sum_word`.
    o : columns of int32.
    """

    def __init__(self, arch: Arch) -> None:
        self._arch = arch
        word, self._words = sum_word(arch)
        super().__init__({
            "ended": In(1), "cols": In(range(arch.lanes + 1)), "copy": Out(1), "advance": Out(1), "free": Out(1),
            "shadow": In(word).array(arch.lanes, self._words),
            "o": Out(stream.Signature(column_layout(arch.rows, 32))),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        left, lane, take = Signal(range(self._arch.lanes + 1)), Signal(range(self._arch.lanes)), Signal()
        none, one, room, ending = Signal(init=1), Signal(), Signal(), Signal()  # `left` is 0, is 1, will be 1
        m.submodules.sums = sums = Queue(data.ArrayLayout(sum_word(self._arch)[0], self._words), depth=self._arch.sums_depth)
        m.d.comb += [
            take.eq(~none & room), self.o.valid.eq(sums.o.valid), sums.o.ready.eq(self.o.ready),
            # one level of logic from registers: the whole array waits for it
            self.advance.eq(~self.ended | none | (one & room)), self.copy.eq(self.ended & (none | (one & room))),
            self.free.eq(none | (one & room)),
            ending.eq(left == 2),
        ]
        m.d.sync += [room.eq(sums.level <= self._arch.sums_depth - SUMS_MARGIN), sums.i.valid.eq(take)]
        with m.If(self.copy):
            m.d.sync += [left.eq(self.cols), lane.eq(0), none.eq(0), one.eq(self.cols == 1)]
        with m.Elif(take):
            m.d.sync += [left.eq(left - 1), lane.eq(lane + 1), none.eq(one), one.eq(ending)]
        for index in range(self._words):
            selector = Selector(self._arch)
            place(m, platform, f"selector{index}", selector, module="selector")
            m.d.comb += [selector.lane.eq(lane), selector.take.eq(take),
                         *(selector.i[i].eq(self.shadow[i][index]) for i in range(self._arch.lanes))]
            m.d.comb += sums.i.payload[index].eq(selector.o)
        words = [sums.o.payload[index] for index in range(self._words)]
        m.d.comb += [self.o.payload[t].eq(value) for t, value in enumerate(unpack_sums(self._arch, words))]
        return m


class MacArray(wiring.Component):
    """`lanes` x `rows` multiply-accumulates. One step per cycle; sums are ready `array_latency` cycles after a tile's last step.

    Members
    -------
    cmd, values, positions, loaded, freed : see `Feeder`. write_en, write_addr, write_data : loader's broadcast.
    o : columns of int32 sums. busy : a step was issued. blocked : frozen because the drain is behind.
    wait_weights, wait_columns : see `Feeder`.
    """

    def __init__(self, arch: Arch) -> None:
        self._arch = arch
        bits = (arch.lane_depth - 1).bit_length()
        super().__init__({
            "cmd": In(stream.Signature(array_command())),
            "values": In(stream.Signature(8 * arch.lanes)),
            "positions": In(stream.Signature(32 * arch.lanes)),
            "loaded": In(bits + 1), "freed": Out(bits + 1),
            "write_en": In(1), "write_addr": In(bits), "write_data": In(column_bits(arch)),
            "o": Out(stream.Signature(column_layout(arch.rows, 32))),
            "busy": Out(1), "blocked": Out(1), "wait_weights": Out(1), "wait_columns": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        arch = self._arch
        m.submodules.feeder = feeder = Feeder(arch)
        m.submodules.drain = drain = Drain(arch)
        for port in ("cmd", "values", "positions"):
            wiring.connect(m, wiring.flipped(getattr(self, port)), getattr(feeder, port))
        wiring.connect(m, drain.o, wiring.flipped(self.o))

        stage = data.StructLayout({"valid": 1, "first": 1, "last": 1, "unsigned_a": 1, "cols": feeder.tile_cols.shape()})
        issue, decoded, address, ram, held, product, total = (
            Signal(stage, name=name) for name in ("issue", "decoded", "address", "ram", "held", "product", "total"))
        freed = Signal.like(self.freed)
        operands = held if arch.lane_register else ram
        advance, ended = Signal(), Signal()
        m.d.comb += [
            issue.eq(stage.const(None)), issue.valid.eq(feeder.step), issue.first.eq(feeder.first),
            issue.last.eq(feeder.last), issue.unsigned_a.eq(feeder.unsigned_a), issue.cols.eq(feeder.tile_cols),
            advance.eq(drain.advance), feeder.advance.eq(advance), feeder.ended.eq(ended), feeder.free.eq(drain.free),
            drain.ended.eq(ended), drain.cols.eq(total.cols),
            feeder.loaded.eq(self.loaded),
            self.busy.eq(feeder.step), self.blocked.eq(~advance),
            self.wait_weights.eq(feeder.wait_weights), self.wait_columns.eq(feeder.wait_columns),
        ]
        with m.If(advance):
            # columns are given back when their last step has read the RAM, which a freeze may delay
            m.d.sync += [decoded.eq(issue), address.eq(decoded), ram.eq(address), product.eq(operands), total.eq(product),
                         freed.eq(feeder.freed), self.freed.eq(freed),
                         ended.eq(product.valid & product.last)]
            if arch.lane_register:
                m.d.sync += held.eq(ram)
        for index in range(arch.lanes):
            lane = Lane(arch)
            place(m, platform, f"lane{index}", lane, module="lane")
            m.d.comb += [
                lane.write_en.eq(self.write_en), lane.write_addr.eq(self.write_addr), lane.write_data.eq(self.write_data),
                lane.addr.eq(feeder.addr[index]), lane.weight.eq(feeder.weight[index]),
                lane.control.ram.eq(address.valid & advance), lane.control.hold.eq(ram.valid & advance),
                lane.control.mul.eq(operands.valid & advance), lane.control.unsigned_a.eq(operands.unsigned_a),
                lane.control.acc.eq(product.valid & advance),
                lane.control.first.eq(product.first), lane.control.copy.eq(drain.copy),
                *(drain.shadow[index][i].eq(lane.shadow[i]) for i in range(sum_word(arch)[1])),
            ]
        return m
