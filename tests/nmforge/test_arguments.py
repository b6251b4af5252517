"""Command-line text to values."""

import pytest

from algo.nm import NM
from nmforge.arguments import parse_arch, parse_pattern, pattern_text
from nmforge.errors import BadInputError


def test_patterns() -> None:
    assert parse_pattern("2:4") == {"bert.encoder.*": NM("2:4")}
    mix = parse_pattern("*.attention.*=2:4, bert.encoder.layers.0.up = 1:8,*=dense")
    assert mix == {"bert.encoder.*.attention.*": NM("2:4"), "bert.encoder.layers.0.up": NM("1:8"), "bert.encoder.*": NM("dense")}
    for text in ("2:4", "*.attention.*=2:4,layers.0.up=1:8"):
        assert pattern_text(parse_pattern(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4:2", r"bad pattern '4:2': N must be <= M, not 4 > 2 .*; did you mean 2:4\?"),
        ("2of4", r"bad pattern '2of4': .*; did you mean 2:4\?"),
        ("0:4", r"bad pattern '0:4': N must be >= 1, not 0 \(pattern 0:4\)$"),
        ("2:64", r"bad pattern '2:64': M must be <= 32, not 64"),
        ("half", r"bad pattern 'half': .*, not 'half'$"),
        ("*.up=", r'a mix of patterns is written like .*, not \'\*.up=\''),
        ("a=2:4,a=1:4", r"names 'a' twice"),
    ],
)
def test_bad_patterns(text: str, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        parse_pattern(text)


def test_archs() -> None:
    assert parse_arch("sta1024").macs == 1024
    with pytest.raises(BadInputError, match=r"unknown arch preset 'sta1000': did you mean sta1024 or "):
        parse_arch("sta1000")
    with pytest.raises(BadInputError, match=r"unknown arch preset 'q': known: tiny, ecp5, sta256, sta1024, gemv256, sta4096"):
        parse_arch("q")
