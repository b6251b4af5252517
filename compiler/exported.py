"""What `torch.export` makes of a module: aten operators, and which of them need no input.

The front end turns these operators, or some of them, into a `compiler.graph.Graph`; the partition
(`compiler.partition`) decides which; the rest runs as it is (`compiler.host`).
"""

from __future__ import annotations

import copy
import operator
import re
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from algo.modes import evaluating, quiet_export
from algo.sparsify import pattern_of
from compiler.decompositions import decompositions
from compiler.graph import CompileError, named_inputs

__all__ = ["Exported", "dtype_name", "export", "is_getitem", "listed", "mapped", "module_path", "source_line"]


aten = torch.ops.aten
_PYTHON = str(Path(re.__file__).parent.parent)
"""Folder of Python's own modules."""
_WAY_OUT = ": model.float() and x.float() make it so"

@dataclass(frozen=True, eq=False)
class Exported:
    """A module as functional aten operators on tensors of fixed shapes.

    Members
    -------
    module
        With the effective weights of layers in sparse training.
    program
        Of `torch.export`; linear, layer_norm and attention are whole operators.
    values
        Parameters and buffers by name, in place of those when it was exported; what is computed from them keeps its gradient.
    """

    module: nn.Module
    program: ExportedProgram
    values: Mapping[str, Tensor] | None = None

    @property
    def operators(self) -> list[fx.Node]:
        """The operators in execution order, without assertions about metadata."""
        return [node for node in self.program.graph.nodes if node.op == "call_function" and node.meta.get("val") is not None]

    @cached_property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The module's tensor arguments, in order."""
        names = [spec.arg.name for spec in self.program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
        nodes = {node.name: node for node in self.program.graph.nodes if node.op == "placeholder"}
        return tuple(nodes[name] for name in names if isinstance(nodes[name].meta["val"], Tensor))

    @cached_property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The module's results, in order; no changed buffers, and not what is None.

        Raises
        ------
        CompileError
            A result that is no tensor, or none at all.
        """
        (node,) = (node for node in self.program.graph.nodes if node.op == "output")
        results = zip(cast(Any, node.args[0]), self.program.graph_signature.output_specs, strict=True)
        own = [item for item, spec in results if spec.kind is OutputKind.USER_OUTPUT and item is not None]
        if not own:
            raise CompileError("the module returns no tensor: nothing to compile")
        for item in own:
            if not isinstance(item, fx.Node) or not isinstance(item.meta.get("val"), Tensor):
                raise CompileError(f"a compiled module must return tensors, not {type(item).__name__}")
        return tuple(own)

    def constant(self, node: fx.Node) -> tuple[Any, str] | None:
        """Value of a parameter, a buffer, or what is computed from them alone (a tensor or a tuple of them), and the
        parameter's name if it is one parameter's; None for what depends on an input or on chance."""
        return self._constants.get(node)

    def bind(self, inputs: Any) -> dict[str, Tensor]:
        """Give a tensor, a sequence or a dict of tensors the names of the module's arguments.

        Raises
        ------
        ValueError
            A missing or surplus input, or one of another shape or dtype than the example.
        """
        inputs = named_inputs([node.name for node in self.inputs], inputs, "the module")
        for node in self.inputs:
            wanted, value = node.meta["val"], inputs[node.name]
            if not isinstance(value, Tensor) or value.dtype != wanted.dtype or value.shape != wanted.shape:
                given = f"{dtype_name(value.dtype)} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"input {node.name!r} must be {dtype_name(wanted.dtype)} {tuple(wanted.shape)} as in example_inputs, "
                    f"not {given}: host operators have fixed shapes"
                )
        return inputs

    @cached_property
    def _constants(self) -> dict[fx.Node, tuple[Any, str]]:
        found: dict[fx.Node, tuple[Any, str]] = {}
        by_name = {node.name: node for node in self.program.graph.nodes if node.op == "placeholder"}
        for spec in self.program.graph_signature.input_specs:
            target = str(spec.target)
            if spec.kind is not InputKind.USER_INPUT:
                stored = self.program.state_dict if target in self.program.state_dict else self.program.constants
                value = cast(Tensor, stored[target]).detach() if self.values is None else self.values.get(target, stored[target])
                found[by_name[spec.arg.name]] = (cast(Tensor, value), target)
        with torch.set_grad_enabled(self.values is not None and torch.is_grad_enabled()):
            for node in self.operators:
                if _is_random(node) or any(item not in found for item in node.all_input_nodes):
                    continue
                args, kwargs = mapped(node, lambda item: found[item][0])
                sources = {found[item][1] for item in node.all_input_nodes if found[item][1]}
                found[node] = cast(Any, node.target)(*args, **kwargs), sources.pop() if len(sources) == 1 else ""
        return found


def _is_random(node: fx.Node) -> bool:
    """Whether a result depends on chance; attention and dropout do in training alone."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    if node.target is aten.scaled_dot_product_attention.default:
        return bool(node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0))
    return not (node.target is aten.dropout.default and not (node.args[1] and node.args[2]))


def export(module: nn.Module, example_inputs: Any) -> Exported:
    """Record what a module computes.

    Raises
    ------
    CompileError
        The module cannot be traced, or has parameters or inputs of other dtypes than float32 and integers.
    TypeError
        Not a module, or inputs that are no tensors.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"trace takes a torch.nn.Module, not {type(module).__name__}")
    args, kwargs = _arguments(example_inputs)
    _check_parameters(module)
    module = _effective(module)
    program = _export(module, args, kwargs)
    _check_shapes(program)
    changed = [str(spec.target) for spec in program.graph_signature.output_specs if spec.kind is OutputKind.BUFFER_MUTATION]
    if changed:
        warnings.warn(
            f"the module changes its buffers ({', '.join(changed)}) when it runs: the program has the values that they have now; "
            "what a run is to hand to the next must be an argument and a result",
            stacklevel=2,
        )
    return Exported(module, program)


def _arguments(example_inputs: Any) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Positional and keyword arguments, checked."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    else:
        args = tuple(example_inputs)
    named = [(f"argument {i}", value) for i, value in enumerate(args)] + list(kwargs.items())
    for name, value in named:
        if not isinstance(value, Tensor):
            raise TypeError(
                f"example_inputs must be tensors, not {type(value).__name__} ({name}): bind what is none in a module around it"
            )
        if value.is_complex() or (value.is_floating_point() and value.dtype != torch.float32):
            raise CompileError(
                f"input {name} is {dtype_name(value.dtype)} {tuple(value.shape)}: only float32 can be compiled{_WAY_OUT}"
            )
    if not named:
        raise TypeError("example_inputs must hold at least one tensor")
    return args, kwargs


def _check_parameters(module: nn.Module) -> None:
    """Refuse parameters of other dtypes before torch meets them, and numbers that are none before calibration blames data."""
    problems = [
        f"{name}: parameter of {dtype_name(value.dtype)} {tuple(value.shape)}"
        for name, value in module.named_parameters()
        if value.is_complex() or (value.is_floating_point() and value.dtype != torch.float32)
    ]
    if problems:
        raise CompileError(listed(f"only float32 can be compiled{_WAY_OUT}", problems))
    broken = [
        f"parameter {name} {tuple(value.shape)}"
        for name, value in module.named_parameters() if not is_lazy(value) and not bool(value.isfinite().all())
    ]  # fmt: skip
    if broken:
        raise CompileError(listed("these have a NaN or an infinity, from training that diverged or a damaged file", broken))


def _effective(module: nn.Module) -> nn.Module:
    """The module itself, or a copy without parametrisations that has the effective weights."""
    if not any(parametrize.is_parametrized(part) for part in module.modules()):
        return module
    result = copy.deepcopy(module).eval()
    for part in result.modules():
        if parametrize.is_parametrized(part):
            pattern, names = pattern_of(part), list(cast(Any, part).parametrizations)
            values = {name: getattr(part, name).detach() for name in names}
            # not remove_parametrizations: it would change the class, which the copy shares with the module
            part.__class__ = parametrize.type_before_parametrizations(part)
            del part.parametrizations
            for name, value in values.items():
                setattr(part, name, nn.Parameter(value, requires_grad=False))
            part.nm_pattern = pattern  # type: ignore[assignment]
    return result


def _export(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> ExportedProgram:
    """The module as functional aten operators; linear, layer_norm and attention stay whole."""
    args = tuple(value.clone() for value in args)  # one tensor given twice is two inputs
    kwargs = {name: value.clone() for name, value in kwargs.items()}
    with evaluating(module), quiet_export(), torch.no_grad():
        try:
            program = torch.export.export(module, args, kwargs, strict=False)
            return program.run_decompositions(decompositions(program))
        except Exception as error:  # torch.export raises whatever the module's own code raises
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            if "data-dependent" in first:
                first = re.sub(r" *\((unhinted|Size-like symbols)[^)]*\)+\.?", "", first) + (
                    " (what runs depends on values: use torch.where, or take the branch out of the module)"
                )
            line = _line(str(error)) or _raised_at(error)
            raise CompileError(
                f"torch.export cannot trace {type(module).__name__} with inputs "
                f"{[tuple(value.shape) for value in (*args, *kwargs.values())]}: {first}{f' at {line}' if line else ''}"
            ) from error


def _check_shapes(program: ExportedProgram) -> None:
    """Refuse results whose size depends on values, such as the elements that a condition chooses."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, Tensor) and not all(isinstance(size, int) for size in part.shape):
                where = f"{module_path(node) or 'the module'} ({source_line(node) or 'line unknown'})"
                raise CompileError(
                    f"{where}: how much {node.target} gives depends on values: use torch.where or a product with a mask, which "
                    "keep the shape, or do it behind the module"
                )


def mapped(node: fx.Node, change: Callable[[fx.Node], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an fx node, with something else for the nodes among them."""
    return cast(Any, fx.node.map_arg)((node.args, node.kwargs), change)


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that ran the operator."""
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""


def source_line(node: fx.Node) -> str:
    """Where the operator stands in the module's code, as ``file.py:12``; empty if torch does not know."""
    return _line(node.meta.get("stack_trace") or "")


def _line(trace: str) -> str:
    """The last line of code in a stack trace that is not torch's own, or the last."""
    lines = re.findall(r'File "([^"]+)", line (\d+)', trace)
    own = [(file, line) for file, line in lines if "/torch/" not in file] or lines
    return f"{Path(own[-1][0]).name}:{own[-1][1]}" if own else ""


def _raised_at(error: BaseException) -> str:
    """The last line of the module's own code, or what it calls, that an exception went through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename not in (__file__, "<string>") and not _is_library(frame.filename)]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""


def _is_library(file: str) -> bool:
    """Whether a file is torch's or Python's own: no line of theirs says where a user's module went wrong."""
    return "/torch/" in file or (file.startswith(_PYTHON) and "-packages" not in file)


def is_getitem(node: fx.Node) -> bool:
    """Whether a node picks one result of an operator with several."""
    return node.target is operator.getitem


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def listed(reason: str, problems: list[str], shown: int = 5) -> str:
    """One message for several problems."""
    more = f"\n  ... and {len(problems) - shown} more" if len(problems) > shown else ""
    return "\n  ".join([f"{reason}:", *problems[:shown]]) + more
