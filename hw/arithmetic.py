"""Expressions that datapaths are made of: clipping, rounding, and products in pieces with a register between the steps."""

from collections.abc import Sequence

from amaranth import C, Cat, Mux, Signal, Value

from hw.soft import product

__all__ = ["Parts", "fold", "kept", "parts", "rounded", "saturate"]

Parts = Sequence[tuple[Value, int]]
"""Terms of a sum, each with the place of its lowest bit."""

_SHORT, _SOFT = 18, 4  # bits of a multiplier's shorter operand; bits of a piece whose product is made of two levels of adders


def saturate(value: Value, bits: int) -> Value:
    """A signed value clipped to `bits` bits."""
    high = value[bits - 1:]
    overflow = high.any() & ~high.all()
    top = C((1 << (bits - 1)) - 1, bits)
    return Mux(overflow, top ^ value[-1].replicate(bits), value[:bits]).as_signed()


def rounded(value: Value, bits: int) -> Value:
    """``saturate((value + 1) >> 1, bits)`` of a signed value: the adder has `bits` bits and is beside the clipping."""
    whole, sign = value[1:], value[-1]
    high = whole[bits - 1:]
    total = (whole[:bits] + value[0])[:bits]
    overflow = (high.any() & ~high.all()) | (~whole[bits - 1] & total[-1])
    top = C((1 << (bits - 1)) - 1, bits)
    return Mux(overflow, top ^ sign.replicate(bits), total).as_signed()


def _pieces(value: Value, bits: int) -> list[tuple[Value, int]]:
    """Pieces of at most `bits` bits with the sign bit that an unsigned one needs."""
    found, place, is_signed = [], 0, value.shape().signed
    while len(value) - place > bits - (not is_signed):
        found.append((value[place:place + bits - 1], place))
        place += bits - 1
    last = value[place:]
    return [*found, (last.as_signed() if is_signed else last, place)]


def parts(a: Value, b: Value, *, bits: int = _SHORT, spare: bool = False) -> Parts:
    """``a * b`` as a sum of products of their pieces.

    Parameters
    ----------
    bits : int
        Of the longer operand of the device's multipliers.
    spare : bool
        No multipliers: adders.
    """
    if spare:
        return [(product(a, y, spare=True), place) for y, place in _pieces(b, _SOFT + 1)]
    return [(x * y, left + right) for x, left in _pieces(a, bits) for y, right in _pieces(b, _SHORT)]


def fold(terms: Parts) -> Parts:
    """The same sum with half as many terms: one level of adders."""
    ordered = sorted(terms, key=lambda term: term[1])
    pairs = [ordered[i:i + 2] for i in range(0, len(ordered), 2)]
    return [pair[0] if len(pair) == 1 else (_sum(*pair[0], *pair[1]), pair[0][1]) for pair in pairs]


def _sum(low: Value, place: int, high: Value, above: int) -> Value:
    """``low + high * 2^(above - place)``: what lies below `high` needs no adder."""
    distance = above - place
    is_signed = low.shape().signed or high.shape().signed
    rest = low[distance:].as_signed() if low.shape().signed else low[distance:]
    total = Cat(low[:distance], C(0, max(0, distance - len(low))), rest + high)
    return total.as_signed() if is_signed else total


def kept(terms: Parts, name: str) -> Parts:
    """Registers, without reset, for the terms of a sum."""
    return [(Signal(term.shape(), name=f"{name}{index}", reset_less=True), place) for index, (term, place) in enumerate(terms)]
