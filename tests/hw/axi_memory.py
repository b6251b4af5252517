"""Behavioural AXI4 memory for the Amaranth simulator: latency, random stalls, protocol checks."""

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any


class ProtocolError(AssertionError):
    """The master broke a rule of AXI4 or of this project."""


@dataclass
class AxiMemory:
    """Memory behind the AR/R (`read`) and AW/W/B (`write`) channels of one master.

    `stall` is the probability that a channel idles in a cycle; `errors` lists byte ranges that answer SLVERR.
    """

    bus_bytes: int
    size: int = 1 << 16
    latency: int = 4
    stall: float = 0.0
    seed: int = 0
    errors: list[range] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.data = bytearray(self.random.randbytes(self.size))
        self.read_bursts: list[tuple[int, int]] = []
        self.write_bursts: list[tuple[int, int]] = []
        self.outstanding_reads = self.outstanding_writes = 0
        self.most_outstanding_writes = 0

    def go(self) -> bool:
        return self.random.random() >= self.stall

    def response(self, addr: int) -> int:
        return 2 if any(addr in bad for bad in self.errors) else 0

    def check_burst(self, kind: str, addr: int, length: int, size: int, burst: int) -> None:
        nbytes = (length + 1) * self.bus_bytes
        if addr % self.bus_bytes or 1 << size != self.bus_bytes or burst != 1 or length > 15:
            raise ProtocolError(f"{kind} burst addr={addr:#x} len={length} size={size} burst={burst}")
        if addr // 4096 != (addr + nbytes - 1) // 4096:
            raise ProtocolError(f"{kind} burst at {addr:#x} of {nbytes} bytes crosses 4 KiB")
        if addr + nbytes > self.size:
            raise ProtocolError(f"{kind} burst at {addr:#x} leaves the memory")

    async def read(self, ctx: Any, bus: Any) -> None:
        """Process of the read channels."""
        beats: deque[tuple[int, int, bool]] = deque()  # cycle from which it may be sent, address, last
        cycle, held = 0, None
        while True:
            *_, arvalid, arready, addr, length, size, burst, rvalid, rready = await ctx.tick().sample(
                bus.arvalid,
                bus.arready,
                bus.araddr,
                bus.arlen,
                bus.arsize,
                bus.arburst,
                bus.rvalid,
                bus.rready,
            )
            cycle += 1
            request = (addr, length, size, burst)
            if held is not None and (not arvalid or request != held):
                raise ProtocolError(f"AR changed before ARREADY: {held} to {request}")
            held = request if arvalid and not arready else None
            if arvalid and arready:
                self.check_burst("read", *request)
                self.read_bursts.append((addr, length))
                self.outstanding_reads += 1
                for k in range(length + 1):
                    beats.append((cycle + self.latency, addr + k * self.bus_bytes, k == length))
            if rvalid and not rready:
                raise ProtocolError("RREADY is low while data comes")
            if rvalid:
                self.outstanding_reads -= beats[0][2]
                beats.popleft()
            ctx.set(bus.arready, self.go())
            if beats and beats[0][0] <= cycle and self.go():
                _, place, last = beats[0]
                ctx.set(bus.rdata, int.from_bytes(self.data[place : place + self.bus_bytes], "little"))
                ctx.set(bus.rlast, last)
                ctx.set(bus.rresp, self.response(place))
                ctx.set(bus.rvalid, 1)
            else:
                ctx.set(bus.rvalid, 0)

    async def write(self, ctx: Any, bus: Any) -> None:
        """Process of the write channels."""
        requests: deque[list[int]] = deque()  # address, beats left, response
        answers: deque[tuple[int, int]] = deque()
        early: deque[tuple[int, int, int]] = deque()  # W before its AW
        cycle, held_aw, held_w = 0, None, None
        while True:
            (
                *_,
                awvalid,
                awready,
                addr,
                length,
                size,
                burst,
                wvalid,
                wready,
                wdata,
                wstrb,
                wlast,
                bvalid,
                bready,
            ) = await ctx.tick().sample(
                bus.awvalid,
                bus.awready,
                bus.awaddr,
                bus.awlen,
                bus.awsize,
                bus.awburst,
                bus.wvalid,
                bus.wready,
                bus.wdata,
                bus.wstrb,
                bus.wlast,
                bus.bvalid,
                bus.bready,
            )
            cycle += 1
            request, beat = (addr, length, size, burst), (wdata, wstrb, wlast)
            if held_aw is not None and (not awvalid or request != held_aw):
                raise ProtocolError(f"AW changed before AWREADY: {held_aw} to {request}")
            if held_w is not None and (not wvalid or beat != held_w):
                raise ProtocolError("W changed before WREADY")
            held_aw = request if awvalid and not awready else None
            held_w = beat if wvalid and not wready else None
            if awvalid and awready:
                self.check_burst("write", *request)
                self.write_bursts.append((addr, length))
                self.outstanding_writes += 1
                self.most_outstanding_writes = max(self.most_outstanding_writes, self.outstanding_writes)
                requests.append([addr, length + 1, 0])
            if wvalid and wready:
                early.append(beat)
            while early and requests:
                self._store(requests, answers, early.popleft(), cycle)
            if len(early) > 16:
                raise ProtocolError("W runs ahead of AW by more than a burst")
            if bvalid and bready:
                answers.popleft()
                self.outstanding_writes -= 1
            ctx.set(bus.awready, self.go())
            ctx.set(bus.wready, self.go())
            held_b = bvalid and not bready
            if held_b or (answers and answers[0][0] <= cycle and self.go()):
                ctx.set(bus.bresp, answers[0][1])
                ctx.set(bus.bvalid, 1)
            else:
                ctx.set(bus.bvalid, 0)

    def _store(self, requests: deque, answers: deque, beat: tuple[int, int, int], cycle: int) -> None:
        wdata, wstrb, wlast = beat
        request = requests[0]
        for k in range(self.bus_bytes):
            if wstrb >> k & 1:
                self.data[request[0] + k] = wdata >> (8 * k) & 255
        if not wstrb:
            raise ProtocolError("a beat without a strobe")
        request[2] |= self.response(request[0])
        request[0] += self.bus_bytes
        request[1] -= 1
        if bool(wlast) != (request[1] == 0):
            raise ProtocolError(f"WLAST is {wlast} with {request[1]} beats to come")
        if wlast:
            answers.append((cycle + self.latency, requests.popleft()[2]))
