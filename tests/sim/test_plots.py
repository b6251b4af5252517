"""Plots are SVG elements: whole, scalable, and the same for the same numbers."""

import xml.etree.ElementTree as ElementTree

import pytest
from matplotlib.axes import Axes

from sim.plots import against, bars, beside, grouped, short, stacked


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (7, "7"), (1234, "1.23 k"), (45e6, "45 M"), (2.5e9, "2.5 G"), (0.125, "0.125")]
)
def test_short(value: float, text: str) -> None:
    assert short(value) == text


def test_svg() -> None:
    made = [
        stacked(["a", "b"], {"x": [1, 2], "y": [3, 4]}, label="cycles"),
        stacked(["a"], {"x": [0.25], "y": [0.75]}, label="share", share=True),
        grouped(["a", "b"], {"dense": [1e3, 2e3], "2:4": [0, 3e3]}, label="bytes"),
        bars(["a"], [0.8], ["80 %"], label="accuracy", colours=["#123456"], errors=[0.02], limits=(0.5, 1), share=True),
    ]
    for svg in made:
        root = ElementTree.fromstring(svg)
        assert root.tag.endswith("svg") and "viewBox" in root.attrib
        assert "width" not in root.attrib and "height" not in root.attrib
    again = stacked(["a", "b"], {"x": [1, 2], "y": [3, 4]}, label="cycles")
    assert again == made[0]


def test_png() -> None:
    lines = {"a": [(1, 2), (2, 3)], "b": [(1, 5), (4, 6), (9, 7)]}
    panels = {"speed": {"dense": [1, 1], "mix": [None, 2]}, "use": {"dense": [0.5, 1], "mix": [None, 1]}}
    made = [against(lines, x="size", y="seconds"), beside(["a", "b"], panels, shares=["use"])]
    assert all(picture[:4] == b"\x89PNG" for picture in made)
    assert made[0] == against(lines, x="size", y="seconds")


def test_bars_of_a_row_stand_around_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, list[float]] = {}
    draw = Axes.barh
    monkeypatch.setattr(Axes, "barh", lambda axes, places, *rest, label, **more: (
        found.update({label: list(places)}), draw(axes, places, *rest, label=label, **more))[1])
    beside(["a", "b"], {"speed": {"dense": [1, 1], "2:4": [2, 2], "mix": [3, None]}})
    assert found["2:4"][0] == 0 and found["dense"][0] == -found["mix"][0]
    assert found["dense"][1] + found["2:4"][1] == 2
