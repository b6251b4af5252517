import numpy as np

from compiler.steps import (
    MAX_DEP,
    At,
    Constants,
    Step,
    assign_dependences,
    encode,
    insert_tables,
    live_ranges,
    pipelined,
    plan_buffers,
)
from hw.arch import PRESETS
from hw.isa import Instruction, Opcode

TINY = PRESETS["tiny"]


def _step(reads: str = "", writes: str = "", table: str | None = None) -> Step:
    """Regions are letters with a row tile 0: "ab" reads a and b."""
    return Step(op=0, reads=tuple((b, 0) for b in reads), writes=tuple((b, 0) for b in writes), table=table)


def test_constants_are_aligned_and_stored_once() -> None:
    constants = Constants(TINY)
    first = constants.add(np.arange(10, dtype=np.int8))
    second = constants.add(np.arange(65, dtype=np.int8))
    assert constants.add(np.arange(10, dtype=np.uint8)) == first  # the same bytes
    assert constants.offsets == {first: 0, second: 128}  # a burst of 16 beats
    assert len(constants.image) == 128 + 128
    assert constants.image[128 + 64] == 64


def test_dependence_is_the_distance_to_the_last_producer() -> None:
    steps = assign_dependences([_step("x", "a"), _step("", "b"), _step("ab"), _step("a"), _step("x")])
    assert [s.fields.get("dep", 0) for s in steps] == [0, 0, 1, 3, 0]


def test_regions_of_one_buffer_are_told_apart() -> None:
    writers = [Step(op=0, writes=(("a", tile),)) for tile in range(3)]
    readers = [Step(op=1, reads=(("a", tile),)) for tile in range(3)]
    assert [s.fields.get("dep", 0) for s in assign_dependences(writers + readers)] == [0, 0, 0, 3, 3, 3]


def test_long_dependence_is_cut() -> None:
    steps = assign_dependences([_step("", "a"), *[_step()] * MAX_DEP, _step("a")])
    assert steps[-1].fields["dep"] == MAX_DEP


def test_tables_are_inserted_when_they_change() -> None:
    steps = insert_tables([_step(table="t"), _step(), _step(table="t"), _step(table="u"), _step(table="t")])
    assert [s.opcode.name for s in steps] == [
        "TABLE",
        "TILE",
        "TILE",
        "TILE",
        "TABLE",
        "TILE",
        "TABLE",
        "TILE",
    ]
    assert steps[4].addresses == {"p_addr": At("u")}


def test_pipelined_orders() -> None:
    first, second = [[Step(op=i)] for i in range(3)], [[Step(op=10 + i)] for i in range(3)]
    orders = {depth: [s.op for s in pipelined(first, second, depth=depth)] for depth in range(3)}
    assert orders == {0: [0, 10, 1, 11, 2, 12], 1: [0, 1, 10, 2, 11, 12], 2: [0, 1, 2, 10, 11, 12]}


def test_live_ranges_and_plan() -> None:
    steps = [_step("x", "a"), _step("a", "b"), _step("b", "c")]
    assert live_ranges(steps) == {"x": (0, 0), "a": (0, 1), "b": (1, 2), "c": (2, 2)}
    sizes = dict.fromkeys("xabc", 64)
    plan = plan_buffers(sizes, steps, pinned=frozenset("xc"), base=0, align=64, reuse=True)
    assert plan.peak_bytes == 4 * 64  # x and c stay, a and b meet
    assert len(set(plan.addresses.values())) == 4


def test_encode_resolves_addresses() -> None:
    step = Step(op=0, fields={"k": 3}, addresses={"a_addr": At("x", 8), "w_addr": At("w")})
    code = encode([step, Step(op=-1, opcode=Opcode.HALT)], {"x": 0x100, "w": 0x200})
    assert Instruction.decode(code[:64]) == Instruction(opcode=Opcode.TILE, k=3, a_addr=0x108, w_addr=0x200)
    assert Instruction.decode(code[64:]) == Instruction(opcode=Opcode.HALT)
