"""Record what a module runs, as a graph of aten operators that know their source lines.

`torch.export` records; what it cannot record is refused with the module and the line that stopped it.
"""

from __future__ import annotations

import linecache
import re
from pathlib import Path
from types import TracebackType

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from algo.count import ExampleInputs, as_arguments
from algo.modes import quiet_export

__all__ = ["UntraceableError", "capture", "module_path", "refusal", "where"]

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)


class UntraceableError(ValueError):
    """A module does something that cannot be recorded.

    Members
    -------
    module, file, line
        The innermost module and line of its code that stopped the recording; ``""`` and 0 where unknown.
    """

    def __init__(self, message: str, *, module: str = "", file: str = "", line: int = 0) -> None:
        self.module, self.file, self.line = module, file, line
        super().__init__(message)


def capture(model: nn.Module, example_inputs: ExampleInputs) -> ExportedProgram:
    """Record a module in the mode it is in; it is not changed and nothing is computed.

    Raises
    ------
    UntraceableError
        The module's code depends on values or raises; names module, file and line.
    TypeError
        Not a module, or inputs of another kind.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module is needed, not {type(model).__name__}")
    args, kwargs = as_arguments(example_inputs)
    try:
        with quiet_export():
            return torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:  # torch.export raises whatever the module's own code raises
        raise refusal(model, error) from error


def where(node: fx.Node) -> str:
    """The source line of an operator, outside torch where there is one: ``"net.py:12"``, or ``""``."""
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [item for item in found if not item[0].startswith(_TORCH)] or found
    return f"{Path(own[-1][0]).name}:{own[-1][1]}" if own else ""


def module_path(node: fx.Node) -> str:
    """Name of the innermost module that an operator runs in; ``""`` is the whole."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return re.sub(r"@\d+$", "", stack[-1][0]) if stack else ""


def refusal(model: nn.Module, error: BaseException, *, what: str = "cannot be traced") -> UntraceableError:
    """Say at which module and line an error arose, and what that means."""
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "data-dependent" in reason:
        reason = f"what runs next depends on values ({reason})"
    module, file, line = _innermost(model, error.__traceback__)
    if not file:
        return UntraceableError(f"{type(model).__name__} {what}: {reason}")
    part = model.get_submodule(module)
    name = f"{type(part).__name__} {module!r}" if module else type(part).__name__
    code = linecache.getline(file, line).strip()
    message = f'{name} {what} at {file}:{line}, "{code}": {reason}'
    return UntraceableError(message, module=module, file=file, line=line)


def _innermost(model: nn.Module, trace: TracebackType | None) -> tuple[str, str, int]:
    """The last line of a traceback that belongs to a part of the model, and that part's name."""
    names = {id(part): name for name, part in model.named_modules()}
    module, file, line = "", "", 0
    while trace is not None:
        frame = trace.tb_frame
        path = frame.f_code.co_filename
        if id(frame.f_locals.get("self")) in names and not path.startswith(_TORCH):
            module, file, line = names[id(frame.f_locals["self"])], path, trace.tb_lineno
        elif file and not path.startswith((_TORCH, _HERE, "<")):
            file, line = path, trace.tb_lineno  # a helper function that the module calls
        trace = trace.tb_next
    return module, file, line
