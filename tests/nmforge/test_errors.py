"""Messages of errors."""

from nmforge.errors import CheckFailedError, unknown


def test_unknown_offers_near_names() -> None:
    assert str(unknown("fruit", "aple", ["apple", "pear"])) == "unknown fruit 'aple': did you mean apple or pear?"
    assert str(unknown("fruit", "x", ["apple", "pear"])) == "unknown fruit 'x': known: apple, pear"


def test_a_failed_check_keeps_its_result() -> None:
    assert CheckFailedError("different", {"bytes": 3}).result == {"bytes": 3}
