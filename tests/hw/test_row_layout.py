"""The layouts agree with the instruction set and with the parameters in memory."""

from hw.isa import FIELDS
from hw.numerics import PARAM_DTYPE
from hw.row_layout import NORM_PARAM, ROW_COMMAND, column_layout, row_scale_layout


def test_command():
    bits = {field.name: field.bits for field in FIELDS}
    for name, field in ROW_COMMAND:
        assert field.width == bits[f"row_{name}" if name in ("op", "first", "last") else name]


def test_param():
    assert NORM_PARAM.size == 8 * PARAM_DTYPE.itemsize
    for name, field in NORM_PARAM:
        dtype, offset = PARAM_DTYPE.fields[name]
        assert (field.offset, field.width) == (8 * offset, 8 * dtype.itemsize)


def test_rows():
    assert column_layout(8).size == 128
    assert row_scale_layout(8).size == 8 * (16 + 6)
