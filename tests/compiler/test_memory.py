"""What lies where, and when, agrees with what the instructions do."""

import numpy as np
import pytest

from compiler.compile import compile_network
from compiler.memory import MemoryMap, Region, memory_map
from compiler.program import Program
from hw.arch import get_arch
from hw.isa import Instruction
from sim.isa_engine import run_isa
from tests.compiler.random_networks import random_inputs, random_network

TINY = get_arch("tiny")


def _program(seed: int, *, reuse: bool = True) -> Program:
    return compile_network(random_network(seed, TINY), TINY, reuse=reuse)


def _meet(one: Region, other: Region) -> bool:
    apart = one.address + one.size <= other.address or other.address + other.size <= one.address
    return not apart and one.first <= other.last and other.first <= one.last


@pytest.mark.parametrize("seed", range(8))
def test_what_lives_at_one_time_shares_nothing(seed: int) -> None:
    found = memory_map(_program(seed))
    regions = found.regions
    assert not [(a, b) for i, a in enumerate(regions) for b in regions[i + 1 :] if _meet(a, b)]
    assert all(0 <= part.address and part.address + part.size <= found.end for part in regions)
    assert found.live <= found.activations
    assert found.live == max(
        sum(part.size for part in regions if part.content not in ("code", "constants") and part.first <= now <= part.last)
        for now in range(-1, found.instructions + 1)
    )


@pytest.mark.parametrize("seed", range(4))
def test_a_region_is_written_from_its_first_instruction_on(seed: int) -> None:
    """The bytes of a tensor change at no instruction outside its life that is in another's."""
    program = _program(seed, reuse=False)
    tensors = [part for part in memory_map(program).regions if part.content in ("outputs", "activations")]
    image = program.memory_image(random_inputs(np.random.default_rng(seed), program.network))
    before = image.copy()

    def after(number: int, _: Instruction) -> None:
        for part in tensors:
            span = slice(part.address, part.address + part.size)
            if not np.array_equal(before[span], image[span]):
                assert part.first <= number, part
        before[:] = image

    run_isa(
        image, arch=TINY, code_addr=program.code_address, instructions=program.instruction_count, after=after
    ).raise_for_error()


def test_memory_is_shared() -> None:
    shared, apart = (memory_map(_program(3, reuse=reuse)) for reuse in (True, False))
    assert shared.live <= shared.activations < apart.activations
    assert shared.unshared == apart.unshared


def test_text_and_json() -> None:
    found = memory_map(_program(1))
    assert isinstance(found, MemoryMap) and found.to_dict()["end"] == found.end
    assert f"memory: {found.end:,} bytes" in str(found) and f"of {TINY.lane_depth:,} columns" in str(found)
    assert 0 < found.lanes[0] <= TINY.lane_depth and found.row[0] <= TINY.row_depth
