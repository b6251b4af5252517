"""Command layouts: what the dispatcher tells each unit about one instruction. One command per unit and instruction."""

from typing import Any

from amaranth import signed, unsigned
from amaranth.lib import data

from hw import isa
from hw.arch import MAX_ROW_GROUPS

__all__ = [
    "array_command",
    "column_layout",
    "loader_command",
    "param_layout",
    "post_command",
    "post_flags",
    "reader_command",
    "row_command",
    "row_out_command",
    "row_scale_layout",
    "store_command",
    "writer_command",
]

_BITS = {field.name: field.bits for field in isa.FIELDS}


def _from_isa(*names: str, **extra: int) -> data.StructLayout:
    return data.StructLayout({**{name: _BITS[name] for name in names}, **extra})


def column_layout(rows: int, bits: int) -> data.ArrayLayout:
    """One value of each token row."""
    return data.ArrayLayout(signed(bits), rows)


def param_layout() -> data.StructLayout:
    """One column parameter: (bias, mult, shift) of a requantisation or (beta, gamma, shift) of a norm."""
    return data.StructLayout({"bias": signed(32), "mult": signed(16), "shift": 8, "reserved": 8})


def row_scale_layout(rows: int) -> data.StructLayout:
    """Multiplier and shift of each token row, made by a softmax for the TILE that multiplies by its values."""
    return data.StructLayout(
        {"mult": data.ArrayLayout(unsigned(16), rows), "shift": data.ArrayLayout(unsigned(6), rows)}
    )


def reader_command() -> data.StructLayout:
    """Fetch `words` output words from `addr`, again from `addr + stride`, ..., `repeats` times; with `wide` they leave in
    pairs."""
    return data.StructLayout({"addr": 32, "words": 24, "repeats": 16, "stride": 32, "wait": 1, "wait_seq": 16, "wide": 1})


def writer_command() -> data.StructLayout:
    """Write `words` words of `rows` bytes at `addr`, again at `addr + stride`, ...; store=0 writes nothing. `o_skip` token rows
    at the start and `o_drop` at the end of a column are not written; a column is a word or, if `wide`, two."""
    return _from_isa("o_skip", "o_drop", addr=32, words=24, repeats=16, stride=32, store=1, wide=1)


def loader_command() -> data.StructLayout:
    """`count` columns go to the lanes (from memory or, with `from_rows`, from the row unit) or straight to the post unit. Those
    from memory are turned by `a_rotate` row groups, and the groups of `zero` are zeros. `from_memory` is the inverse of
    `from_rows`, which drives the whole column."""
    return _from_isa("a_unsigned", "a_rotate", count=16, from_rows=1, from_memory=1, bypass=1, zero=MAX_ROW_GROUPS)


def array_command() -> data.StructLayout:
    """One TILE with source ARRAY; `held`: on the columns of the one before."""
    return _from_isa("a_unsigned", "format", "n", "m", "k", "cols", held=1)


def post_command() -> data.StructLayout:
    """Post-processing of one TILE, or a TABLE (`load_table`); what its enums mean is decoded, see `post_flags`."""
    return _from_isa("psum_in", "psum_out", "table", "cols", "mult", "shift", "r_mult", "r_shift", load_table=1,
                     **dict.fromkeys(_POST_FLAGS, 1))


_POST_FLAGS = ("array", "bypass", "array_data", "bypass_data", "by_column", "by_row", "params", "scaled", "residual", "times8",
               "times16", "add", "larger", "rows")


def post_flags(f: Any) -> dict[str, Any]:
    """Flags of a `post_command` from the fields of its TILE, ints or values of Amaranth.

    array, bypass : where columns come from, else nowhere; array_data, bypass_data : the same, for the data. by_column, by_row :
    whose multiplier. params, scaled : a column takes a word of parameters, a command a row scale. residual : a column takes one;
    times8, times16, add, larger : what becomes of it. rows : to the row unit.
    """
    by_column, by_row, ends = f.scale == isa.Scale.COLUMN, f.scale == isa.Scale.ROW, f.psum_out == 0
    array, bypass, kinds = f.source == isa.Source.ARRAY, f.source == isa.Source.STREAM, isa.Residual
    return {
        "array": array, "bypass": bypass, "array_data": array, "bypass_data": bypass,
        "by_column": by_column, "by_row": by_row, "params": by_column & ends, "scaled": by_row & ends,
        "residual": f.residual != kinds.NONE, "times8": f.residual == kinds.MUL8, "times16": f.residual == kinds.MUL16,
        "add": (f.residual == kinds.INT8) | (f.residual == kinds.INT16), "larger": f.residual == kinds.MAX8,
        "rows": f.row_op != isa.RowOp.NONE,
    }


def row_command() -> data.StructLayout:
    """One TILE with a row operation."""
    return data.StructLayout({"op": _BITS["row_op"], "first": 1, "last": 1, "cols": 16, "row_mult": 16,
                              "row_shift": 6, "ln_inv": 16, "ln_shift": 6, "ln_eps": 32})


def row_out_command() -> data.StructLayout:
    """Where the row unit's columns go: the lanes or the store unit."""
    return data.StructLayout({"count": 16, "lanes": 1})


def store_command() -> data.StructLayout:
    """Form of one stored TILE: `cols` columns from the post unit or, with `from_rows`, from the row unit; as int16 if `wide`,
    as transposed int8 if `transposed`, else as int8. `from_post` is the inverse of `from_rows`, which drives the whole column."""
    return _from_isa("cols", from_rows=1, from_post=1, wide=1, transposed=1)
