"""The preset ecp5 placed and routed by nextpnr: clock, critical path by module. An hour or more on two cores."""

from sys import stderr

from benchmarks import DOCS, Table, write_page
from hw.arch import PRESETS
from hw.verilog import TOP_NAME, verilog
from sim.place import place_and_route

__all__ = ["run"]


def run() -> list[Table]:
    """Both tables, on the page too."""
    arch = PRESETS["ecp5"]
    found = place_and_route(verilog(arch), top=TOP_NAME, clock_mhz=arch.clock_mhz,
                            progress=lambda line: print(line, file=stderr, flush=True))
    used = tuple((kind, count, found.available[kind], f"{count / found.available[kind]:.1%}")
                 for kind, count in found.used.items() if count)
    path = tuple((name, ns) for name, ns in found.modules)
    tables = [
        Table(title=f"ecp5 placed and routed on {found.device}: {found.fmax_mhz} MHz (seed {found.seed}, {found.seconds:.0f} s)",
              columns=("cell", "used", "available", "share"), rows=used, note=f"nextpnr-ecp5 {found.version}."),
        Table(title="Its critical path by module", columns=("module", "ns"), rows=path),
    ]
    write_page(DOCS / "silicon.md", "placement", tables)
    return tables
