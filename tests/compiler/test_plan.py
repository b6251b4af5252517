import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.plan import Buffer, PlanError, align_up, plan_memory


@st.composite
def _buffers(draw: st.DrawFn) -> list[Buffer]:
    count = draw(st.integers(0, 25))
    result = []
    for i in range(count):
        first = draw(st.integers(-1, 30))
        result.append(
            Buffer(
                name=f"b{i}",
                size=draw(st.integers(1, 500)),
                first=first,
                last=first + draw(st.integers(0, 10)),
            )
        )
    return result


def _check(buffers: list[Buffer], plan, *, align: int, reuse: bool) -> None:
    for i, one in enumerate(buffers):
        start = plan.addresses[one.name]
        assert start % align == 0
        assert plan.base <= start
        assert start + one.size <= plan.end
        for other in buffers[:i]:
            apart = (
                start + one.size <= plan.addresses[other.name]
                or plan.addresses[other.name] + other.size <= start
            )
            assert apart or (reuse and not one.overlaps(other))


@given(_buffers(), st.sampled_from([1, 64, 128]), st.booleans())
def test_live_buffers_never_share_bytes(buffers: list[Buffer], align: int, reuse: bool) -> None:
    plan = plan_memory(buffers, base=align_up(1000, align), align=align, reuse=reuse)
    _check(buffers, plan, align=align, reuse=reuse)
    assert plan == plan_memory(buffers, base=align_up(1000, align), align=align, reuse=reuse)


def test_a_chain_needs_two_buffers() -> None:
    chain = [Buffer(name=f"t{i}", size=64, first=i, last=i + 1) for i in range(10)]
    assert plan_memory(chain).peak_bytes == 128
    assert plan_memory(chain, reuse=False).peak_bytes == 640


def test_best_gap_is_taken() -> None:
    buffers = [
        Buffer(name="a", size=256, first=0, last=9),
        Buffer(name="hole", size=192, first=0, last=1),
        Buffer(name="c", size=128, first=0, last=9),
        Buffer(name="late", size=64, first=5, last=6),
    ]
    plan = plan_memory(buffers)
    assert plan.addresses["late"] == plan.addresses["hole"]


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(PlanError, match=r"more than 1024 bytes of memory: big \(1000 bytes\)"):
        plan_memory([Buffer(name="big", size=1000, first=0, last=1)], base=64, limit=1024)
    with pytest.raises(PlanError, match="more than 4294967296 bytes"):
        plan_memory([Buffer(name=f"b{i}", size=1 << 31, first=0, last=1) for i in range(3)])


def test_no_buffers() -> None:
    plan = plan_memory([], base=128)
    assert (plan.addresses, plan.peak_bytes) == ({}, 0)
