"""Layouts against torch: every chain of views gives the elements that torch gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.layout import Layout, LayoutError


def _shapes(total: int) -> list[tuple[int, ...]]:
    """All shapes of up to four dimensions with that many elements."""
    divisors = [d for d in range(1, total + 1) if total % d == 0]
    found = {(total,)}
    for a in divisors:
        for b in divisors:
            if total % (a * b) == 0:
                found |= {(a, b, total // (a * b)), (a, b, 1, total // (a * b))}
    return sorted(found)


@st.composite
def _chains(draw):
    """A base shape, and steps of view, permute, select and narrow."""
    shape = draw(st.sampled_from([(2, 3, 4), (4, 6), (2, 2, 6), (24,), (1, 5, 8), (3, 1, 4)]))
    base, steps = shape, []
    for _ in range(draw(st.integers(1, 5))):
        total = int(torch.Size(shape).numel())
        kind = draw(st.sampled_from(["reshape", "permute", "select", "narrow"]))
        if kind == "reshape":
            arg = draw(st.sampled_from(_shapes(total)))
            shape = arg
        elif kind == "permute":
            arg = tuple(draw(st.permutations(range(len(shape)))))
            shape = tuple(shape[i] for i in arg)
        elif len(shape) < 2:
            continue
        elif kind == "select":
            dim = draw(st.integers(0, len(shape) - 1))
            arg = (dim, draw(st.integers(0, shape[dim] - 1)))
            shape = shape[:dim] + shape[dim + 1 :]
        else:
            dim = draw(st.integers(0, len(shape) - 1))
            start = draw(st.integers(0, shape[dim] - 1))
            arg = (dim, start, draw(st.integers(1, shape[dim] - start)))
            shape = (*shape[:dim], arg[2], *shape[dim + 1 :])
        steps.append((kind, arg))
    return base, steps


def _apply(layout: Layout, kind: str, arg: tuple) -> Layout:
    return getattr(layout, kind)(arg) if kind in ("reshape", "permute") else getattr(layout, kind)(*arg)


def _torch(value: torch.Tensor, kind: str, arg: tuple) -> torch.Tensor:
    return getattr(value, kind)(arg) if kind in ("reshape", "permute") else getattr(value, kind)(*arg)


@settings(max_examples=300, deadline=None)
@given(_chains())
def test_chain_of_steps_is_what_torch_does(chain):
    base, steps = chain
    layout, wanted = Layout.contiguous(base), torch.arange(torch.Size(base).numel()).reshape(base)
    first = wanted
    for kind, arg in steps:
        try:
            layout = _apply(layout, kind, arg)
        except LayoutError:
            return  # may refuse, must not be wrong
        wanted = _torch(wanted, kind, arg)
        assert layout.shape == tuple(wanted.shape)
        assert torch.equal(layout.apply(first), wanted)


@settings(max_examples=300, deadline=None)
@given(_chains(), st.data())
def test_composition_is_one_view_after_the_other(chain, data):
    base, steps = chain
    cut = data.draw(st.integers(0, len(steps)))
    try:
        inner = Layout.contiguous(base)
        for kind, arg in steps[:cut]:
            inner = _apply(inner, kind, arg)
        outer = Layout.contiguous(inner.shape)
        for kind, arg in steps[cut:]:
            outer = _apply(outer, kind, arg)
        both = outer.compose(inner)
    except LayoutError:
        return
    value = torch.arange(torch.Size(base).numel()).reshape(base)
    assert both.shape == outer.shape
    assert torch.equal(both.apply(value), outer.apply(inner.apply(value)))


def test_same_map_is_the_same_layout_however_it_was_made():
    direct = Layout.contiguous((2, 5, 12)).reshape((2, 5, 3, 4)).permute((0, 2, 1, 3))
    around = Layout.contiguous((10, 12)).reshape((2, 5, 12)).permute((1, 0, 2)).permute((1, 0, 2))
    assert around.reshape((2, 5, 3, 4)).permute((0, 2, 1, 3)) == direct


def test_split_and_merge_of_heads_cancel():
    split = Layout.contiguous((2, 5, 12)).reshape((2, 5, 3, 4)).permute((0, 2, 1, 3))
    merge = Layout.contiguous((2, 3, 5, 4)).permute((0, 2, 1, 3)).reshape((2, 5, 12))
    assert merge.compose(split) == Layout.contiguous((2, 5, 12))
    assert merge.compose(split).is_contiguous()


def test_view_of_a_slice_of_a_tensor_with_a_storage_offset():
    value = torch.arange(60).reshape(3, 4, 5)[1:]
    assert torch.equal(Layout.contiguous((2, 4, 5)).select(0, 1).apply(value), value[1])


def test_refusals():
    with pytest.raises(LayoutError, match=r"\(2, 3\) has not as many elements as \(7,\)"):
        Layout.contiguous((2, 3)).reshape((7,))
    with pytest.raises(LayoutError, match="does not divide an atom of"):
        Layout.contiguous((2, 3)).permute((1, 0)).reshape((2, 3))
