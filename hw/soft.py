"""Products of look-up tables, for devices with few multipliers."""

from amaranth import Cat, Const, Mux, Value

__all__ = ["product"]


def product(a: Value, b: Value, *, spare: bool) -> Value:
    """Expression: ``a * b``; with `spare`, a tree of adders that synthesis does not take for a multiplier."""
    if not spare:
        return a * b
    a, bits, negative = Value.cast(a), len(b), b.shape().signed
    terms: list[Value] = []
    for index in range(bits):
        shifted = Cat(Const(0, index), a)
        shifted = shifted.as_signed() if a.shape().signed else shifted
        # the top bit of a signed number counts negative
        terms.append(Mux(b[index], -shifted if negative and index == bits - 1 else shifted, 0))
    while len(terms) > 1:
        pairs = zip(terms[::2], terms[1::2])
        terms = [*(x + y for x, y in pairs), *terms[len(terms) & ~1:]]
    result = terms[0][: len(a) + bits]
    return result.as_signed() if a.shape().signed or negative else result
