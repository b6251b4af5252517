"""Command layouts: what the dispatcher tells each unit about one instruction. One command per unit and instruction."""

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
    from memory are turned by `a_rotate` row groups, and the groups of `zero` are zeros."""
    return _from_isa("a_unsigned", "a_rotate", count=16, from_rows=1, bypass=1, zero=MAX_ROW_GROUPS)


def array_command() -> data.StructLayout:
    """One TILE with source ARRAY; `held`: on the columns of the one before."""
    return _from_isa("a_unsigned", "format", "n", "m", "k", "cols", held=1)


def post_command() -> data.StructLayout:
    """Post-processing of one TILE, or a TABLE (`load_table`)."""
    return _from_isa("source", "psum_in", "psum_out", "scale", "residual", "table", "row_op", "cols",
                     "mult", "shift", "r_mult", "r_shift", load_table=1)


def row_command() -> data.StructLayout:
    """One TILE with a row operation."""
    return data.StructLayout({"op": _BITS["row_op"], "first": 1, "last": 1, "cols": 16, "row_mult": 16,
                              "row_shift": 6, "ln_inv": 16, "ln_shift": 6, "ln_eps": 32})


def row_out_command() -> data.StructLayout:
    """Where the row unit's columns go: the lanes or the store unit."""
    return data.StructLayout({"count": 16, "lanes": 1})


def store_command() -> data.StructLayout:
    """Form of one stored TILE: `cols` columns from the post unit or, with `from_rows`, from the row unit."""
    return _from_isa("out", "cols", from_rows=1)
