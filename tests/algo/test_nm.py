import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from algo.nm import MAX_M, NM


def test_spellings_are_one_value():
    assert NM("2:4") == NM(2, 4) == NM(NM(2, 4)) == NM(" 2 : 4 ")
    assert len({NM("2:4"), NM(2, 4), NM(1, 2)}) == 2
    assert NM("dense") == NM(1, 1)


def test_attributes():
    nm = NM("2:8")
    assert (nm.n, nm.m, nm.density, nm.is_dense) == (2, 8, 0.25, False)
    assert (str(nm), repr(nm)) == ("2:8", 'NM("2:8")')
    assert eval(repr(nm)) == nm == copy.deepcopy(nm)
    assert NM(4, 4).is_dense


def test_is_frozen_and_has_no_order():
    with pytest.raises(AttributeError):
        NM("2:4").n = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        sorted([NM("2:4"), NM("1:4")])  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 2), r"N must be <= M, not 4 > 2 \(pattern 4:2\)"),
        ((0, 4), "N must be >= 1, not 0"),
        ((1, 33), "M must be <= 32, not 33"),
        (("2/4",), "written like \"2:4\" .* not '2/4'"),
        (("-1:4",), "not '-1:4'"),
        (("",), "not ''"),
    ],
)
def test_wrong_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        NM(*arguments)


@pytest.mark.parametrize("arguments", [(2,), (2.0, 4), (True, 4), (None,), ("2", 4)])
def test_wrong_kind(arguments):
    with pytest.raises(TypeError, match="NM takes a string"):
        NM(*arguments)


patterns = st.integers(1, MAX_M).flatmap(lambda m: st.builds(NM, st.integers(1, m), st.just(m)))


@given(patterns, st.data())
def test_kept_never_exceeds_n_or_the_group(nm, data):
    size = data.draw(st.integers(0, nm.m))
    kept = nm.kept(size)
    assert kept <= min(nm.n, size)
    assert (kept >= 1) == (size >= 1)
    assert nm.kept(nm.m) == nm.n


def test_kept_refuses_other_sizes():
    with pytest.raises(ValueError, match="2:4 has 0 to 4 elements, not 5"):
        NM("2:4").kept(5)
