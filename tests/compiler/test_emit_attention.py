import pytest

from compiler.emit import Emitter
from compiler.emit_attention import emit_attention
from compiler.ops import Attention
from compiler.program import TensorInfo
from compiler.schedule import by_operator
from compiler.steps import Constants, Step
from hw.arch import PRESETS
from hw.isa import Operand, RowOp

TINY = PRESETS["tiny"]


def _steps(
    queries: int, keys: int, heads: int, head_dim: int, *, depth: int = 1, mask: bool = False
) -> list[Step]:
    shapes = {"q": queries, "k": keys, "v": keys, "out": queries}
    tensors = {
        name: TensorInfo(
            name=name,
            of=name,
            shape=(1, rows, heads * head_dim),
            dtype="int8",
            scale=1.0,
            layout="transposed" if name == "v" else "columns",
            heads=heads if name == "v" else 1,
            address=0,
            written=0,
            last_use=0,
            kept=True,
        )
        for name, rows in shapes.items()
    }
    op = Attention(
        name="a",
        q="q",
        k="k",
        v="v",
        out="out",
        heads=heads,
        score_mult=1,
        score_shift=1,
        out_mult=1,
        out_shift=1,
        mask="mask" if mask else None,
    )
    return by_operator(emit_attention(Emitter(TINY, Constants(TINY), tensors), 0, op), depth=depth)


def _kinds(steps: list[Step]) -> str:
    """S, M, E: scores with SOFTMAX, MAX, EXP; O: output, o: output with more to come; s: partial scores."""
    letters = {RowOp.SOFTMAX: "S", RowOp.MAX: "M", RowOp.EXP: "E"}
    result = ""
    for step in steps:
        kept = bool(step.fields.get("psum_out"))
        if step.fields.get("operand") == Operand.ROWS:
            result += "o" if kept else "O"
        else:
            result += "s" if kept else letters[RowOp(step.fields["row_op"])]
    return result


@pytest.mark.parametrize(
    ("keys", "head_dim", "kinds"),
    [
        (5, 6, "SSOO"),
        (32, 6, "SSOO"),
        (33, 6, "MMEoEO" * 2),  # longer than the row unit
        (90, 6, "MMMEoEoEO" * 2),
        (5, 50, "sSsSOO"),  # two queries' columns do not fit the lanes at once
        (40, 40, "MMEoEOEoEO" * 2),  # values in two groups of columns: partial sums hold 32
    ],
)
def test_order_of_steps(keys: int, head_dim: int, kinds: str) -> None:
    assert _kinds(_steps(4, keys, 2, head_dim)) == kinds


def test_depth_is_how_many_scores_are_ahead() -> None:
    assert [_kinds(_steps(4, 5, 3, 6, depth=depth)) for depth in range(3)] == ["SOSOSO", "SSOSOO", "SSSOOO"]


def test_blocks_are_balanced_aligned_and_read_their_keys_only() -> None:
    scores = [s for s in _steps(4, 90, 1, 6, mask=True) if s.fields.get("row_op") == RowOp.MAX]
    assert [s.fields["cols"] for s in scores] == [32, 32, 26]
    assert [s.fields["row_first"] for s in scores] == [1, 0, 0]
    assert [s.addresses["p_addr"].offset for s in scores] == [0, 256, 512]
    assert [s.addresses["w_addr"].offset for s in scores] == [0, 8 * 6 * 4, 16 * 6 * 4]
    assert [[tile for name, tile in s.reads if name == "k"] for s in scores] == [
        list(range(8)),
        list(range(8, 16)),
        list(range(16, 23)),
    ]


def test_outputs_wait_for_values_and_scores_for_keys() -> None:
    first, _, last, _ = _steps(4, 9, 2, 6)
    assert {name for name, _ in first.reads} == {"q", "k"}
    assert {name for name, _ in last.reads} == {"v"}
    assert last.writes == (("out", 0),)
    assert not first.writes
