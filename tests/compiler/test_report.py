"""The report: every operator once, with its place, MACs and reason."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from compiler.compile import compile_model
from compiler.exported import export
from compiler.partition import partition
from compiler.report import Report, ReportRow, operator_macs, partition_rows
from hw.arch import get_arch
from tests.compiler.modules import Apply, split_heads
from tests.compiler.networks import library_model, retriever

X = torch.randn(2, 7, 24)

PRODUCTS = {
    "linear": (nn.Linear(24, 5), X),
    "rows": (nn.Linear(24, 5), torch.randn(9, 24)),
    "addmm": (Apply(lambda m, x: torch.addmm(torch.ones(5), x, m.w), w=nn.Parameter(torch.randn(24, 5))), torch.randn(9, 24)),
    "matmul": (Apply(lambda m, x: x @ x.transpose(1, 2)), X),
    "bmm": (Apply(lambda m, x: torch.bmm(x, x.transpose(1, 2))), X),
    "attention": (Apply(lambda m, x: F.scaled_dot_product_attention(*[split_heads(x)] * 3)), X),
    "convolution": (nn.Conv2d(4, 6, 3, stride=2, groups=2), torch.randn(2, 4, 9, 9)),
    "none": (nn.ReLU(), X),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_macs_are_those_that_torch_counts(name: str) -> None:
    module, x = PRODUCTS[name]
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        module(x)
    assert sum(map(operator_macs, export(module, x).operators)) == counter.get_total_flops() // 2


def test_rows_of_a_partition() -> None:
    exported = export(*retriever())
    found = partition(exported, get_arch("tiny"))
    rows = partition_rows(found)
    live = {node.name for stage in found.stages for node in stage.nodes}
    assert sorted(row.name for row in rows) == sorted(live) and rows[-1].name == "argmax"
    assert all(bool(row.reason) == (row.place == "host") for row in rows)
    first = rows[0]
    assert (first.operator, first.place, first.source, first.shape) == ("embedding.default", "host", "embed", (2, 6, 16))
    assert first.bytes == 4 * (20 * 16 + 2 * 6 * 16)


def test_figures_and_warning() -> None:
    def row(place: str, macs: int, size: int) -> ReportRow:
        return ReportRow(
            name="a", operator="o", place=place, stage=0, shape=(size,), macs=macs, bytes=1, reason="because"  # type: ignore[arg-type]
        )

    good = Report((row("accelerator", 100, 5), row("host", 0, 20), row("host", 30, 9)), moved=10)
    assert good.macs == {"accelerator": 100, "host": 30} and good.host_work == 60 and good.warning == ""
    assert good.host_share == 30 / 130
    bad = Report((row("accelerator", 100, 5), row("host", 60, 20)), moved=50)
    assert bad.warning.startswith("the host's work (110 operations and elements moved) outweighs")
    assert "warning: the host's work" in str(bad) and bad.to_dict()["host_work"] == 110
    assert Report(()).host_share == 0


def test_a_whole_program_has_a_report() -> None:
    module, inputs, _ = library_model("torch encoder, causal")
    report = compile_model(module, inputs, arch="tiny", calibration=[inputs]).report()
    assert report.macs["host"] == 0 and report.host_share == 0 and report.moved == 0
    assert any(row.operator == "attention" for row in report.rows)
    assert "layers.0.self_attn" in str(report)
