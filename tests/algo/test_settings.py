from dataclasses import dataclass, fields

from algo.settings import section, setting


@dataclass(frozen=True)
class Example:
    size: int = setting(3, "how many")
    names: dict = section(dict, "of what")


def test_defaults_and_meanings() -> None:
    assert Example() == Example(3, {}) and Example().names is not Example().names
    assert [item.metadata["help"] for item in fields(Example)] == ["how many", "of what"]
