"""What a trace records."""

from pathlib import Path

import pytest

from sim.trace import Trace


def test_bad_windows(tmp_path: Path) -> None:
    Trace(tmp_path / "x.fst", 5, 6)
    with pytest.raises(ValueError, match=r"a trace needs 0 <= start < stop, not start=5, stop=5"):
        Trace(tmp_path / "x.fst", 5, 5)
    with pytest.raises(ValueError, match=r"0 <= start"):
        Trace(tmp_path / "x.fst", -1)
    with pytest.raises(ValueError, match=r"the folder of the trace .* does not exist"):
        Trace(tmp_path / "none" / "x.fst")
