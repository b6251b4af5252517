"""AXI4 and AXI4-Lite as signatures with flat members named after the standard, and their port names.

Ref: AMBA AXI and ACE Protocol Specification, Arm IHI 0022.
"""

import enum
from typing import Any

from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

__all__ = [
    "BURST_BEATS",
    "AXI4LiteSignature",
    "AXI4ReadSignature",
    "AXI4WriteSignature",
    "Response",
    "axi_ports",
]

BURST_BEATS = 16
"""Longest burst of the master. Bursts end at multiples of 16 beats, so none crosses 4 KiB."""


class Response(enum.IntEnum):
    """RRESP and BRESP."""

    OKAY = 0
    EXOKAY = 1
    SLVERR = 2
    DECERR = 3


def _check_bytes(data_bytes: int) -> None:
    if not isinstance(data_bytes, int) or isinstance(data_bytes, bool):
        raise TypeError(f"data_bytes must be an int, not {data_bytes!r}")
    if data_bytes not in (1, 2, 4, 8, 16, 32, 64, 128):
        raise ValueError(f"data_bytes must be a power of two in 1..128, not {data_bytes!r}")


class AXI4ReadSignature(wiring.Signature):
    """AR and R channels of an AXI4 master: 32-bit addresses, one ID bit.

    Parameters
    ----------
    data_bytes : int
        Width of the data bus.
    """

    def __init__(self, data_bytes: int) -> None:
        _check_bytes(data_bytes)
        self.data_bytes = data_bytes
        super().__init__({
            "arid":    Out(1),
            "araddr":  Out(32),
            "arlen":   Out(8),
            "arsize":  Out(3),
            "arburst": Out(2),
            "arvalid": Out(1),
            "arready": In(1),
            "rid":     In(1),
            "rdata":   In(8 * data_bytes),
            "rresp":   In(2),
            "rlast":   In(1),
            "rvalid":  In(1),
            "rready":  Out(1),
        })

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AXI4ReadSignature) and self.data_bytes == other.data_bytes

    def __repr__(self) -> str:
        return f"AXI4ReadSignature({self.data_bytes!r})"


class AXI4WriteSignature(wiring.Signature):
    """AW, W and B channels of an AXI4 master: 32-bit addresses, one ID bit.

    Parameters
    ----------
    data_bytes : int
        Width of the data bus.
    """

    def __init__(self, data_bytes: int) -> None:
        _check_bytes(data_bytes)
        self.data_bytes = data_bytes
        super().__init__({
            "awid":    Out(1),
            "awaddr":  Out(32),
            "awlen":   Out(8),
            "awsize":  Out(3),
            "awburst": Out(2),
            "awvalid": Out(1),
            "awready": In(1),
            "wdata":   Out(8 * data_bytes),
            "wstrb":   Out(data_bytes),
            "wlast":   Out(1),
            "wvalid":  Out(1),
            "wready":  In(1),
            "bid":     In(1),
            "bresp":   In(2),
            "bvalid":  In(1),
            "bready":  Out(1),
        })

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AXI4WriteSignature) and self.data_bytes == other.data_bytes

    def __repr__(self) -> str:
        return f"AXI4WriteSignature({self.data_bytes!r})"


class AXI4LiteSignature(wiring.Signature):
    """All five channels of an AXI4-Lite master with 32-bit data; a slave has it as ``In``.

    Parameters
    ----------
    addr_width : int
        Address bits.
    """

    def __init__(self, addr_width: int) -> None:
        if not isinstance(addr_width, int) or isinstance(addr_width, bool):
            raise TypeError(f"addr_width must be an int, not {addr_width!r}")
        if not 3 <= addr_width <= 32:
            raise ValueError(f"addr_width must be in 3..32, not {addr_width!r}")
        self.addr_width = addr_width
        super().__init__({
            "awaddr":  Out(addr_width),
            "awvalid": Out(1),
            "awready": In(1),
            "wdata":   Out(32),
            "wstrb":   Out(4),
            "wvalid":  Out(1),
            "wready":  In(1),
            "bresp":   In(2),
            "bvalid":  In(1),
            "bready":  Out(1),
            "araddr":  Out(addr_width),
            "arvalid": Out(1),
            "arready": In(1),
            "rdata":   In(32),
            "rresp":   In(2),
            "rvalid":  In(1),
            "rready":  Out(1),
        })

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AXI4LiteSignature) and self.addr_width == other.addr_width

    def __repr__(self) -> str:
        return f"AXI4LiteSignature({self.addr_width!r})"


def axi_ports(prefix: str, interface: Any) -> dict[str, tuple[Any, Any]]:
    """Ports of one AXI interface under their customary Verilog names, for ``verilog.convert(ports=...)``.

    Parameters
    ----------
    prefix : str
        ``"m_axi"`` names the member ``araddr`` ``m_axi_araddr``.
    interface
        Interface of one of the signatures above, as seen from the component that owns it.
    """
    # direction None: the back end takes driven signals as outputs, the others as inputs
    return {f"{prefix}_{name}": (getattr(interface, name), None) for name in interface.signature.members}
