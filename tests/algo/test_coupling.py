import numpy as np
import pytest

from algo.coupling import Coupling


def test_nothing_tied():
    coupling = Coupling()
    assert coupling.new(3).tolist() == [0, 1, 2] and coupling.new(2).tolist() == [3, 4]
    assert coupling.solve().of.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("seed", range(5))
def test_classes_are_connected_components(seed):
    random = np.random.default_rng(seed)
    coupling, size = Coupling(), 200
    ids = coupling.new(size)
    classes = [{i} for i in range(size)]
    for _ in range(12):
        left, right = random.choice(size, (2, 10))
        coupling.join(ids[left], ids[right])
        for a, b in zip(left, right):
            first, second = (next(c for c in classes if i in c) for i in (a, b))
            if first is not second:
                classes.remove(second)
                first |= second
    expected = {i: min(members) for members in classes for i in members}
    assert coupling.solve().of.tolist() == [expected[i] for i in range(size)]


def test_a_long_chain():
    coupling = Coupling()
    ids = coupling.new(5000)
    coupling.join(ids[:-1], ids[1:])
    assert not coupling.solve().of.any()


def test_one_is_tied_to_all_of_the_other_side():
    coupling = Coupling()
    left, right = coupling.new(1), coupling.new(3)
    coupling.join(left, right)
    assert coupling.solve().of.tolist() == [0, 0, 0, 0]


def test_the_first_reason_of_a_class_counts():
    coupling = Coupling()
    a, b = coupling.new(3), coupling.new(3)
    coupling.join(a, b)
    coupling.keep(b[1:], "second half")
    coupling.keep(a, "all")
    assert coupling.solve().kept == {1: "second half", 2: "second half", 0: "all"}
