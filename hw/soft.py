"""Products of look-up tables, for devices with few multipliers."""

from amaranth import Cat, Mux, Value

__all__ = ["product"]


def product(a: Value, b: Value, *, spare: bool) -> Value:
    """Expression: ``a * b``; with `spare`, a tree of adders that synthesis does not take for a multiplier."""
    return _tree(a, b, top_is_negative=b.shape().signed) if spare else a * b


def _tree(a: Value, b: Value, *, top_is_negative: bool) -> Value:
    """The product with each half of b, added where they overlap."""
    if len(b) == 1:
        return Mux(b[0], -a if top_is_negative else a, 0)
    half = len(b) // 2
    low, high = _tree(a, b[:half], top_is_negative=False), _tree(a, b[half:], top_is_negative=top_is_negative)
    above = low[half:].as_signed() if low.shape().signed else low[half:]
    total = Cat(low[:half], above + high)[: len(a) + len(b) + 1]
    return total.as_signed() if a.shape().signed or top_is_negative else total
