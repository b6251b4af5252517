"""Modules that the Verilog export writes once and instantiates many times.

In simulation by Amaranth a placed component is an ordinary submodule. In the export it is an instance of a module that is
converted on its own, so a design of a thousand multiply-accumulates stays a short, readable file. The module has no reset:
only components whose registers need none may be placed this way.
"""

from amaranth import ClockDomain, ClockSignal, Instance, Module
from amaranth.back import verilog as backend
from amaranth.lib import wiring
from amaranth.lib.wiring import In

__all__ = ["SharedModules", "place"]


class SharedModules:
    """Platform object of the export: collects the text of each shared module."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self._controls: dict[str, dict[str, object]] = {}

    def instance(self, component: wiring.Component, name: str) -> Instance:
        """An instance of `component`'s module, which is converted at its first use; `name` tells modules apart."""
        if name not in self.texts:
            self.texts[name] = ""  # keeps the order: users of a module follow after it is complete
            text = str(backend.convert(component, name=name, platform=self, emit_src=False, strip_internal_attrs=True,
                                       missing_domain=lambda domain: ClockDomain(domain, reset_less=True)))
            self.texts[name] = text
            self._controls[name] = {"i_clk": ClockSignal()} if "input clk;" in text else {}
        component._MustUse__silence = True  # its ports are used as wires, its body is the shared module
        ports = dict(self._controls[name])
        for path, member, value in component.signature.flatten(component):
            prefix = "i_" if member.flow == In else "o_"
            ports[prefix + "__".join(str(part) for part in path)] = value
        return Instance(name, **ports)


def place(m: Module, platform: object, submodule: str, component: wiring.Component, *, module: str) -> None:
    """Add `component` as submodule `submodule` of `m`; all components placed under one `module` name must be alike."""
    if isinstance(platform, SharedModules):
        m.submodules[submodule] = platform.instance(component, f"nmforge_{module}")
    else:
        m.submodules[submodule] = component
