"""The memory that the simulated accelerator sees: one frozen description, the same for every engine."""

from dataclasses import asdict, dataclass

__all__ = ["MemoryModel"]

_MAX_LATENCY = 100_000
_MAX_STALL = 0.95


@dataclass(frozen=True, kw_only=True)
class MemoryModel:
    """Timing of the AXI4 memory. It is exact, so that a timing model can reproduce it cycle by cycle.

    * A read burst whose address is accepted in cycle t offers its first beat in cycle t + `latency` or later;
      bursts are pipelined without limit and answered in order. A write response comes `latency` cycles after the
      burst's last beat. Written bytes reach the memory with the response, and a read returns the bytes that were
      there when its address was accepted.
    * Reads and writes together move `bytes_per_cycle`. The credit grows by `bytes_per_cycle` a cycle, up to one beat
      or one cycle's worth, whichever is more; a beat may start while the credit is positive and costs the bus width.
      A read and a write may start in the same cycle, and then both wait until the credit is positive again.
    * With `stall_probability`, each of AR, R, AW, W and B pauses in a cycle with that probability, independently.
      A pause depends on seed, channel and cycle number only.

    Parameters
    ----------
    latency : int
        Cycles from an accepted address to its first data, at least 1.
    bytes_per_cycle : int or None
        Bandwidth, shared by reads and writes. None is the width of the accelerator's bus: one beat a cycle, be it
        read or written. Twice the bus width or more never limits.
    stall_probability : float
        0 to 0.95.
    seed : int
        Of the stalls.

    Raises
    ------
    TypeError
        A field has the wrong kind.
    ValueError
        A field is outside its range; the message names field and value.
    """

    latency: int = 64
    bytes_per_cycle: int | None = None
    stall_probability: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("latency", "bytes_per_cycle", "seed"):
            value = getattr(self, name)
            if name == "bytes_per_cycle" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"MemoryModel.{name} must be an int, not {value!r}")
        if not isinstance(self.stall_probability, (int, float)) or isinstance(self.stall_probability, bool):
            raise TypeError(f"MemoryModel.stall_probability must be a float, not {self.stall_probability!r}")
        if not 1 <= self.latency <= _MAX_LATENCY:
            raise ValueError(f"MemoryModel.latency must be in 1..{_MAX_LATENCY}, not {self.latency!r}")
        if self.bytes_per_cycle is not None and not 1 <= self.bytes_per_cycle <= 1 << 20:
            raise ValueError(f"MemoryModel.bytes_per_cycle must be in 1..{1 << 20}, not {self.bytes_per_cycle!r}")
        if not 0 <= self.stall_probability <= _MAX_STALL:
            raise ValueError(
                f"MemoryModel.stall_probability must be in 0..{_MAX_STALL}, not {self.stall_probability!r}"
            )
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"MemoryModel.seed must be in 0..2^64-1, not {self.seed!r}")

    def bandwidth(self, bus_bytes: int) -> int:
        """Bytes a cycle on a bus of that width."""
        return bus_bytes if self.bytes_per_cycle is None else self.bytes_per_cycle

    def to_dict(self) -> dict[str, int | float | None]:
        """Fields as plain values, for reports."""
        return asdict(self)
