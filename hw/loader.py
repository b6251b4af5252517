"""Loader: writes activation columns into the lanes' ring buffers, or passes them on to the post unit (source STREAM)."""

from amaranth import Cat, Module, Mux, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from hw.arch import Arch
from hw.commands import loader_command
from hw.lane import column_bits, lane_column
from hw.stream_util import Columns

__all__ = ["Loader"]


def _window(arch: Arch, column: Value, rotate: Value, zero: Value) -> Value:
    """Expression: row group g has what is stored in group (g + rotate) mod groups, or zero. What a convolution needs: its
    windows lie in the same columns at other rows, or beyond the edge of the image."""
    bits = 8 * arch.rows // arch.row_groups
    for stage in range((arch.row_groups - 1).bit_length()):
        turned = Cat(column[bits << stage:], column[:bits << stage])
        column = Mux(rotate[stage], turned, column)
    return column & ~Cat(zero[group].replicate(bits) for group in range(arch.row_groups))


class Loader(wiring.Component):
    """One column per cycle, in program order. A command without columns to move is not sent here.

    Members
    -------
    cmd : `loader_command`. memory : columns read from memory. row_unit : columns of probabilities.
    bypass : columns for the post unit. write_en, write_addr, write_data : broadcast to the lanes' RAMs.
    loaded : columns written so far; freed : columns the array has given back (both wrap at twice `lane_depth`).
    busy : a column moved. full : a column waits for room in the ring.
    """

    def __init__(self, arch: Arch) -> None:
        self._arch = arch
        bits = (arch.lane_depth - 1).bit_length()
        column = stream.Signature(8 * arch.rows)
        super().__init__({
            "cmd": In(stream.Signature(loader_command())),
            "memory": In(column), "row_unit": In(column), "bypass": Out(column),
            "write_en": Out(1), "write_addr": Out(bits), "write_data": Out(column_bits(arch)),
            "loaded": Out(bits + 1), "freed": In(bits + 1), "busy": Out(1), "full": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        cmd, move = self.cmd.payload, Signal()
        columns = Columns(m, cmd.count, move)
        room, to_lanes, available, column = Signal(), Signal(), Signal(), Signal(8 * self._arch.rows)
        window = Signal.like(column)
        m.d.comb += [
            window.eq(_window(self._arch, self.memory.payload, cmd.a_rotate, cmd.zero)),
            column.eq(Mux(cmd.from_rows, self.row_unit.payload, window)),
            room.eq((self.loaded ^ self.freed) != self._arch.lane_depth),  # full: they differ in the highest bit alone
            available.eq(Mux(cmd.from_memory, self.memory.valid, self.row_unit.valid)),
            to_lanes.eq(self.cmd.valid & ~cmd.bypass & available & room),
            self.bypass.valid.eq(self.cmd.valid & cmd.bypass & self.memory.valid),
            self.bypass.payload.eq(window),
            move.eq(to_lanes | (self.bypass.valid & self.bypass.ready)),
            self.memory.ready.eq(move & cmd.from_memory), self.row_unit.ready.eq(move & ~cmd.from_memory),
            self.cmd.ready.eq(move & columns.last),
            self.busy.eq(move), self.full.eq(self.cmd.valid & ~cmd.bypass & available & ~room),
        ]
        m.d.sync += [self.write_en.eq(to_lanes), self.write_addr.eq(self.loaded), self.loaded.eq(self.loaded + to_lanes),
                     self.write_data.eq(lane_column(self._arch, column, cmd.a_unsigned))]
        return m
