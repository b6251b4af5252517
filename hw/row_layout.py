"""Layouts shared by the parts of the row unit; the widths come from the instruction's fields."""

from amaranth import signed, unsigned
from amaranth.lib import data

from hw.isa import FIELDS

__all__ = ["NORM_PARAM", "ROW_COMMAND", "column_layout", "row_scale_layout"]

_BITS = {field.name: field.bits for field in FIELDS}

ROW_COMMAND = data.StructLayout({
    "op":        _BITS["row_op"],
    "first":     _BITS["row_first"],
    "last":      _BITS["row_last"],
    "cols":      _BITS["cols"],
    "row_mult":  _BITS["row_mult"],
    "row_shift": _BITS["row_shift"],
    "ln_inv":    _BITS["ln_inv"],
    "ln_shift":  _BITS["ln_shift"],
    "ln_eps":    _BITS["ln_eps"],
})
"""One TILE with a row operation: its fields (``op``, ``first``, ``last``: without their ``row_``)."""

NORM_PARAM = data.StructLayout({
    "bias":     signed(32),
    "mult":     signed(16),
    "shift":    unsigned(8),
    "reserved": unsigned(8),
})
"""Norm parameters of one column: beta, gamma, shift, laid out as `hw.numerics.PARAM_DTYPE`."""


def column_layout(rows: int) -> data.ArrayLayout:
    """One int16 column: a value per token row."""
    return data.ArrayLayout(signed(16), rows)


def row_scale_layout(rows: int) -> data.StructLayout:
    """Multiplier and shift of each token row, made by softmax."""
    return data.StructLayout({
        "mult":  data.ArrayLayout(unsigned(16), rows),
        "shift": data.ArrayLayout(unsigned(_BITS["row_shift"]), rows),
    })
