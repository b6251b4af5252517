"""Register stages between an input and an output stream."""

from types import SimpleNamespace

from amaranth import Module, Signal, Value
from amaranth.hdl import ValueLike
from amaranth.lib import stream

from hw.arithmetic import Parts, kept

__all__ = ["Pipeline"]


class Pipeline:
    """Stages that all move together, whenever the last one is empty or its value is taken.

    Use inside `elaborate`: one `stage` call per stage, then `finish`. Registers of a stage that holds nothing
    keep their value.

    Parameters
    ----------
    m : Module
        Where the registers go.
    i : stream.Interface
        Input; its ``ready`` is driven here.
    o : stream.Interface
        Output; its ``valid`` is driven here, its payload by the caller.
    """

    def __init__(self, m: Module, i: stream.Interface, o: stream.Interface) -> None:
        self._m = m
        self._o = o
        self._valid: Value = i.valid
        self._count = 0
        self._en = Signal(name="pipeline_en")
        m.d.comb += [self._en.eq(~o.valid | o.ready), i.ready.eq(self._en)]

    def stage(self, **values: ValueLike | Parts) -> SimpleNamespace:
        """Register `values`, without reset; return the registers under the same names. A list is the terms of a sum."""
        self._count += 1
        valid = Signal(name=f"valid_{self._count}")
        terms = {name: value if isinstance(value, list) else [(Value.cast(value), 0)] for name, value in values.items()}
        registers = {name: kept(value, f"{name}_{self._count}_") for name, value in terms.items()}
        with self._m.If(self._en):
            self._m.d.sync += valid.eq(self._valid)
        with self._m.If(self._en & self._valid):
            self._m.d.sync += [register.eq(term) for name, found in registers.items()
                               for (register, _), (term, _) in zip(found, terms[name], strict=True)]
        self._valid = valid
        return SimpleNamespace(**{name: found if isinstance(values[name], list) else found[0][0]
                                  for name, found in registers.items()})

    def finish(self, stages: int) -> None:
        """Offer the last stage at the output.

        Raises
        ------
        ValueError
            There are not `stages` of them: the latency that others count on would be wrong.
        """
        if self._count != stages:
            raise ValueError(f"the pipeline has {self._count} stages, not {stages!r}")
        self._m.d.comb += self._o.valid.eq(self._valid)
