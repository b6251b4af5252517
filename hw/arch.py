"""Architecture parameters of the accelerator: one frozen dataclass, named presets.

Everything that can be derived is a property; a variation is ``dataclasses.replace(arch, lane_depth=512)``.
"""

from dataclasses import asdict, dataclass, fields

__all__ = ["MAX_ROW_GROUPS", "PRESETS", "Arch", "get_arch"]


MAX_ROW_GROUPS = 32
"""Bits of an instruction that say which groups of token rows read as zero."""

_FLAGS = ("sparse", "packing", "spare_dsps", "lane_register")


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


@dataclass(frozen=True, kw_only=True)
class Arch:
    """Size of one accelerator.

    The array holds ``lanes`` lanes; a lane takes one compressed weight per cycle and multiplies it with one
    activation of each of ``rows`` token rows. Attention needs ``rows == lanes``: keys and values are streamed as
    weights, in the layout in which activations are stored. Fewer rows than lanes suit matmuls with few token rows,
    which read weights faster than they can use them again (decoding).

    Raises
    ------
    TypeError
        A field has the wrong kind.
    ValueError
        A field is outside its range; the message names field and value.
    """

    name: str
    rows: int  #: token rows T: activations a lane multiplies per cycle, bytes of one stored column
    lanes: int  #: lanes L: output columns computed at once
    lane_depth: int  #: columns (features) that fit the ring buffer of a lane; the longest reduction of one instruction
    row_depth: int  #: columns of one of the row unit's two banks: the longest LayerNorm or one-pass softmax row
    psum_depth: int  #: columns of int32 partial sums kept on chip
    bus_bytes: int  #: data width of the AXI4 master
    fifo_beats: int = 64  #: depth of the weight reader's FIFO in bus beats; other readers take a fraction
    clock_mhz: int = 200  #: assumed clock for reports in seconds; no vendor tool was run
    sparse: bool = True  #: N:M weights; without, sparse instructions are malformed and there is no position reader or decoder
    spare_dsps: bool = False  #: squares and residual products of look-up tables, for devices with few multipliers
    lane_register: bool = False  #: registers behind the lanes' RAMs, a cycle more, for devices whose block RAM is slow
    multiplier_bits: int = 27  #: of the longer operand of the device's multipliers, signed; the shorter has 18
    packing: bool = False  #: two token rows share a multiplier of 27 x 18 bits (DSP48E2), see hw/lane.py

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"Arch.name must be a str, not {self.name!r}")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Arch.{name} must be a bool, not {getattr(self, name)!r}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _FLAGS:
                continue
            if field.name != "name" and (not isinstance(value, int) or isinstance(value, bool)):
                raise TypeError(f"Arch.{field.name} must be an int, not {value!r}")
            if field.name not in ("name", "clock_mhz", "multiplier_bits") and not _is_power_of_two(value):
                raise ValueError(f"Arch.{field.name} must be a positive power of two, not {value!r}")
        if self.clock_mhz <= 0:
            raise ValueError(f"Arch.clock_mhz must be positive, not {self.clock_mhz!r}")
        if not 18 <= self.multiplier_bits <= 27:
            raise ValueError(f"Arch.multiplier_bits must be in 18..27, not {self.multiplier_bits!r}")
        if not 4 <= self.rows <= 64:
            raise ValueError(f"Arch.rows must be in 4..64, not {self.rows!r}")
        if not self.rows <= self.lanes <= 256:
            raise ValueError(f"Arch.lanes must be in rows..256, not {self.lanes!r} with {self.rows} rows")
        if not 2 * self.rows <= self.bus_bytes <= 128:
            raise ValueError(f"Arch.bus_bytes must be in 2*rows..128, not {self.bus_bytes!r}")
        for name, low, high in (("lane_depth", 64, 8192), ("row_depth", 16, 8192), ("psum_depth", 16, 8192),
                                ("fifo_beats", 32, 1024)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"Arch.{name} must be in {low}..{high}, not {value!r}")

    @property
    def attention(self) -> bool:
        """Whether keys and values can be streamed as weights."""
        return self.rows == self.lanes

    @property
    def row_groups(self) -> int:
        """Groups of neighbouring token rows that a TILE may fetch from one another's place, or as zeros (`a_rotate`)."""
        return min(self.rows, MAX_ROW_GROUPS)

    @property
    def group_rows(self) -> int:
        """Token rows of a row group."""
        return self.rows // self.row_groups

    @property
    def sums_depth(self) -> int:
        """Columns of sums between array and post unit: so long a norm may hold up the post unit and not the array."""
        return 8 * self.lanes

    @property
    def results_depth(self) -> int:
        """Columns between post unit and store unit: so many wait for the output of a norm before them, which comes late."""
        return 8 * self.lanes

    @property
    def macs(self) -> int:
        """Physical multiply-accumulates per cycle, P."""
        return self.rows * self.lanes

    def to_dict(self) -> dict[str, int | str | bool]:
        """Fields as plain values, for manifests and reports."""
        return asdict(self)


PRESETS: dict[str, Arch] = {
    arch.name: arch
    for arch in (
        Arch(name="tiny", rows=4, lanes=4, lane_depth=64, row_depth=32, psum_depth=32, bus_bytes=8, fifo_beats=32),
        Arch(name="ecp5", rows=8, lanes=8, lane_depth=1024, row_depth=512, psum_depth=512, bus_bytes=16, fifo_beats=32,
             clock_mhz=100, spare_dsps=True, lane_register=True, multiplier_bits=18),
        Arch(name="sta256", rows=16, lanes=16, lane_depth=1024, row_depth=1024, psum_depth=1024, bus_bytes=32,
             packing=True),
        Arch(name="sta1024", rows=32, lanes=32, lane_depth=1024, row_depth=1024, psum_depth=1024, bus_bytes=64),
        Arch(name="gemv256", rows=4, lanes=64, lane_depth=1024, row_depth=1024, psum_depth=1024, bus_bytes=64),
        Arch(name="sta4096", rows=64, lanes=64, lane_depth=1024, row_depth=1024, psum_depth=1024, bus_bytes=128),
    )
}


def get_arch(arch: "str | Arch") -> Arch:
    """Return the preset of that name, or the given `Arch` itself.

    Raises
    ------
    ValueError
        Unknown preset; the message lists the known ones.
    """
    if isinstance(arch, Arch):
        return arch
    if not isinstance(arch, str):
        raise TypeError(f"arch must be a preset name or an Arch, not {arch!r}")
    if arch not in PRESETS:
        raise ValueError(f"unknown arch preset {arch!r}; known presets: {', '.join(PRESETS)}")
    return PRESETS[arch]
