"""What the performance counters mean, and tables made of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hw.arch import Arch
from hw.top import COUNTERS

__all__ = ["COUNTER_NAMES", "MEANING", "UnitTime", "counters_markdown", "traffic_bytes", "unit_table"]

MEANING: dict[str, str] = dict(COUNTERS)
"""Counter name to what it counts, in the order of the registers."""

COUNTER_NAMES: tuple[str, ...] = tuple(MEANING)

_CYCLES = "cycles"
_BEATS = ("read_beats_", "write_beats")


@dataclass(frozen=True)
class UnitTime:
    """How a unit spent the run.

    busy : cycles in which it worked. waits : cycles by reason. idle : the rest, in which it had nothing to do.
    """

    unit: str
    busy: int
    waits: dict[str, int]
    idle: int
    cycles: int

    @property
    def busy_share(self) -> float:
        """Busy cycles of all cycles."""
        return self.busy / self.cycles if self.cycles else 0.0


def unit_table(counters: Mapping[str, int]) -> tuple[UnitTime, ...]:
    """One row a unit, from the counters ``<unit>_busy`` and ``<unit>_<reason>``.

    Raises
    ------
    KeyError
        A counter is missing.
    """
    cycles = counters[_CYCLES]
    return tuple(_unit(name.removesuffix("_busy"), counters, cycles) for name in MEANING if name.endswith("_busy"))


def _unit(unit: str, counters: Mapping[str, int], cycles: int) -> UnitTime:
    busy = counters[f"{unit}_busy"]
    waits = {name.removeprefix(f"{unit}_"): counters[name] for name in MEANING
             if name.startswith(f"{unit}_") and name != f"{unit}_busy"}
    return UnitTime(unit, busy, waits, max(0, cycles - busy - sum(waits.values())), cycles)


def traffic_bytes(counters: Mapping[str, int], arch: Arch) -> dict[str, int]:
    """Bytes moved on the bus, by what they are: one entry for each kind of read, and ``write``."""
    return {
        name.removeprefix("read_beats_") if name.startswith("read_beats_") else "write": counters[name] * arch.bus_bytes
        for name in MEANING if name.startswith(_BEATS)
    }


def counters_markdown(counters: Iterable[tuple[str, str]] = COUNTERS) -> str:
    """A table of names and meanings for the documentation."""
    return "\n".join(["| counter | counts |", "|---|---|", *(f"| `{name}` | {doc} |" for name, doc in counters), ""])
