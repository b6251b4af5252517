from dataclasses import replace

import numpy as np
import pytest

from algo.nm import NM
from compiler.emit import Emitter, Segment, k_chunks, mask_stride
from compiler.placement import RowPlacement
from compiler.program import TensorInfo
from compiler.steps import At, Constants
from hw.arch import PRESETS
from hw.isa import Out

TINY, STA = PRESETS["tiny"], PRESETS["sta1024"]


def _info(
    name: str, shape: tuple[int, int, int], layout: str = "columns", heads: int = 1, dtype: str = "int8"
) -> TensorInfo:
    return TensorInfo(
        name=name,
        of=name,
        shape=shape,
        dtype=dtype,
        scale=1.0,
        layout=layout,
        heads=heads,  # type: ignore[arg-type]
        address=0,
        written=0,
        last_use=0,
        kept=True,
    )


def _emitter(*infos: TensorInfo) -> Emitter:
    return Emitter(TINY, Constants(TINY), {info.name: info for info in infos})


@pytest.mark.parametrize(
    ("k", "pattern", "chunks"),
    [
        (384, None, [(0, 384)]),
        (512, NM("2:4"), [(0, 512)]),
        (1536, NM("2:4"), [(0, 512), (512, 1024), (1024, 1536)]),
        (768, None, [(0, 384), (384, 768)]),  # would fit, but the next row tile's load would not overlap
        (768, NM("1:32"), [(0, 768)]),  # two pieces would take longer to drain than to compute
        (1025, NM("3:5"), [(0, 345), (345, 690), (690, 1025)]),
    ],
)
def test_chunks(k: int, pattern: NM | None, chunks: list[tuple[int, int]]) -> None:
    assert k_chunks(k, pattern, STA, cols=1536, splittable=True) == chunks


def test_chunks_where_nothing_may_be_cut() -> None:
    assert k_chunks(1024, None, STA, cols=32, splittable=False) == [(0, 1024)]
    assert k_chunks(1025, None, STA, cols=32, splittable=False) is None
    assert (
        k_chunks(1024, NM("1:3"), STA, cols=32, splittable=False) is None
    )  # 1026 with the last group's padding


@pytest.mark.parametrize("m", range(1, 33))
@pytest.mark.parametrize("k", [1, 31, 64, 65, 200])
def test_chunks_fit_the_ring(m: int, k: int) -> None:
    chunks = k_chunks(k, NM(1, m), TINY, cols=9, splittable=True)
    assert chunks is not None
    assert [start for start, _ in chunks] == [0, *(stop for _, stop in chunks[:-1])]
    assert chunks[-1][1] == k
    for start, stop in chunks:
        assert start % m == 0
        assert -(-(stop - start) // m) * m <= TINY.lane_depth


def test_segments() -> None:
    def spans(info: TensorInfo, **limit: int) -> list[tuple[int, int]]:
        return [(s.start, s.stop) for s in _emitter(info).segments(info.name, **limit)]

    assert spans(_info("t", (1, 1, 70))) == [(0, 70)]
    assert spans(_info("t", (1, 1, 70)), limit=32) == [(0, 24), (24, 48), (48, 70)]
    assert spans(_info("t", (1, 1, 12), "transposed", 3)) == [(0, 12)]  # heads of 4 = lanes
    assert spans(_info("t", (1, 1, 18), "transposed", 3)) == [(0, 6), (6, 12), (12, 18)]
    assert spans(_info("t", (1, 1, 18), "transposed", 3), limit=5) == [
        (0, 4),
        (4, 6),
        (6, 10),
        (10, 12),
        (12, 16),
        (16, 18),
    ]
    assert spans(_info("t", (1, 1, 7)), limit=2) == [
        (0, 2),
        (2, 4),
        (4, 6),
        (6, 7),
    ]  # fewer partial sums than lanes


def test_addresses() -> None:
    emitter = _emitter(
        _info("a", (2, 5, 3)),
        _info("wide", (2, 5, 3), dtype="int16"),
        _info("v", (2, 5, 12), "transposed", 2),
    )
    assert emitter.own_tile("v", 1, 1) == 3
    assert emitter.column("a", 2, 2) == At("a", (2 * 3 + 2) * 4)
    assert emitter.column("wide", 2, 2) == At("wide", (2 * 3 + 2) * 8)
    assert emitter.transposed("v", 1, 1, 4) == At("v", (3 * 2 * 8 + 4) * 4)
    assert emitter.block_stride("v") == 32
    last = Segment(start=10, stop=12)  # head 1, features 4 and 5
    fields, addresses, region = emitter.store_own("v", 0, 1, last)
    assert (fields["o_stride"], region) == (32, ("v", 1))
    assert addresses["o_addr"] == At("v", (1 * 2 * 8 + 4) * 4 + 32)
    assert emitter.store("v", 1, last)[2] == ("v", 2)  # the whole tile of batch entry 1


def test_shared_tails_go_through_a_buffer() -> None:
    emitter = _emitter(_info("k", (2, 5, 3), "keys"), _info("v", (2, 5, 6), "transposed", 2))
    fields, addresses, region = emitter.store("k", 2, Segment(start=1, stop=3))
    assert (fields, addresses, region) == ({"out": Out.STORE8}, {"o_addr": At("k@tails", 4)}, ("k@tails", 0))
    assert emitter.tails == {"k@tails": 12}
    copies = emitter.spread(7, "k", 2)
    assert [step.addresses["o_addr"] for step in copies] == [At("k", 1 * 12), At("k", 3 * 12)]
    assert [step.writes for step in copies] == [(("k", 1),), (("k", 3),)]
    assert len(emitter.spread(7, "v", 2)) == 4  # two heads of 3 features, two batch entries
    assert emitter.spread(7, "k", 0) == []


def test_copy_is_made_once() -> None:
    emitter = _emitter(_info("x", (1, 5, 6)))
    name, steps = emitter.values(0, "x", 2)
    assert (name, len(steps)) == ("x@transposed2", 4)  # two row tiles, two heads of 3 features
    assert emitter.values(1, "x", 2) == (name, [])
    assert emitter.tensors[name] == replace(emitter.tensors["x"], name=name, layout="transposed", heads=2)
    assert emitter.values(1, name, 2) == (name, [])
    assert emitter.keys(1, "x") == ("x", [])  # one batch entry: no shared tile


def test_mask_stride_is_aligned() -> None:
    assert [mask_stride(RowPlacement(1, keys, 4), TINY) for keys in (1, 8, 9)] == [64, 64, 128]
    assert mask_stride(RowPlacement(2, 5, 4), TINY) == 64  # 6 entries: the second tail is in row 1 of its tile
    assert mask_stride(RowPlacement(1, 1, 64), PRESETS["sta4096"]) == 128


def test_equal_tables_are_one_constant() -> None:
    constants = Constants(TINY)
    assert constants.add(np.zeros(256, np.int8)) == constants.add(np.zeros(256, np.int8))
