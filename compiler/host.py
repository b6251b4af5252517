"""Host parts: what of a network runs as torch operators, as data.

A `HostPart` is a list of aten operators with their arguments, as `torch.export` recorded them, and the constants
they use. It is stored as JSON and safetensors; nothing is pickled, and only the operators of `OPERATORS` run, so
that a program file from elsewhere can do no more than arithmetic.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, fx

from compiler.exported import Exported, is_getitem, mapped, module_path, source_line
from compiler.graph import CompileError

__all__ = ["OPERATORS", "HostOp", "HostPart", "host_operator", "host_part", "is_allowed", "operator_name"]

_NAMES = """
    __and__ __or__ __xor__ _adaptive_avg_pool2d _cdist_forward _embedding_bag _embedding_bag_forward_only _fft_c2c
    _fft_c2r _fft_r2c _log_softmax _native_batch_norm_legit_no_training _pdist_forward _softmax _to_copy _unsafe_index
    _unsafe_view _upsample_nearest_exact1d _upsample_nearest_exact2d abs absolute acos acosh adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d add addbmm addcdiv addcmul addmm
    addmv addr alias all amax amin angle any arange argmax argmin argsort as_strided asin asinh atan atan2 atanh
    avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bilinear bitwise_and bitwise_not bitwise_or bitwise_xor bmm
    bucketize cat cdist ceil celu channel_shuffle chunk clamp clamp_max clamp_min clip clone col2im complex
    conj_physical constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    convolution cos cosh cosine_similarity count_nonzero cross cummax cummin cumprod cumsum detach diag_embed diagonal
    diff dist div divide dot dropout dstack elu embedding embedding_bag eq erf erfc erfinv exp exp2 expand expand_as
    expm1 eye feature_dropout fft_fft fft_fft2 fft_fftn fft_fftshift fft_ifft fft_ifft2 fft_ifftn fft_ifftshift
    fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn fill flatten flip floor floor_divide fmod frac full
    full_like gather ge gelu glu greater greater_equal grid_sampler grid_sampler_2d group_norm gru gt hardshrink
    hardsigmoid hardswish hardtanh heaviside hstack hypot im2col imag index index_add index_put index_select
    instance_norm isclose isfinite isinf isnan kron layer_norm le leaky_relu less less_equal lift_fresh_copy
    linalg_cross linalg_vector_norm linear linspace log log10 log1p log2 log_sigmoid log_softmax logaddexp logcumsumexp
    logical_and logical_not logical_or logical_xor logit logsumexp lstm lt masked_fill matmul max max_pool1d
    max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices maximum mean median
    meshgrid min minimum mish mm movedim mul multiply mv nan_to_num narrow native_channel_shuffle native_group_norm
    native_layer_norm ne neg negative new_full new_ones new_zeros norm not_equal one_hot ones ones_like outer pad
    pairwise_distance permute pixel_shuffle pixel_unshuffle polar pow prelu prod real reciprocal reflection_pad1d
    reflection_pad2d relu relu6 remainder renorm repeat repeat_interleave replication_pad1d replication_pad2d
    replication_pad3d reshape rms_norm rnn_relu rnn_tanh roll rot90 round rrelu rsqrt rsub scalar_tensor
    scaled_dot_product_attention scatter scatter_add scatter_reduce searchsorted select select_scatter selu sigmoid sign
    silu sin sinh slice slice_scatter softmax softplus softshrink sort special_erfc split split_with_sizes sqrt square
    squeeze stack std sub subtract sum swapaxes swapdims t take_along_dim tan tanh tensor_split threshold tile to topk
    trace transpose tril triu true_divide trunc type_as unbind unflatten unfold unsafe_chunk unsafe_split
    unsafe_split_with_sizes unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d
    upsample_nearest2d upsample_trilinear3d var var_mean vdot view view_as view_as_complex view_as_real vstack where
    xlogy zeros zeros_like
"""
OPERATORS = frozenset(_NAMES.split())
"""Names of the aten operators that a host part may run: pure, without chance, files or code."""

GETITEM = "getitem"

_NAMED: dict[str, type] = {"dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout}


@dataclass(frozen=True, kw_only=True)
class HostOp:
    """One operator: ``name = target(*args, **kwargs)``.

    Arguments are numbers, strings, None, lists of these, or ``{"ref": name}`` for a tensor, and ``{"dtype": "float32"}``
    and the like for what torch has names for. ``source`` is the module path, ``line`` that in the module's code.
    """

    name: str
    target: str
    args: list[Any]
    kwargs: dict[str, Any]
    source: str = ""
    line: str = ""


@dataclass(frozen=True, eq=False, kw_only=True)
class HostPart:
    """Operators in execution order.

    Members
    -------
    ops
        See `HostOp`.
    constants
        Tensors by name.
    inputs, outputs
        Names of the tensors that it takes and gives.
    """

    ops: tuple[HostOp, ...]
    constants: Mapping[str, Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @torch.no_grad()
    def run(self, values: Mapping[str, Any], *, observe: Callable[[str, Any], None] | None = None) -> dict[str, Any]:
        """The outputs, from the inputs among ``values``.

        Raises
        ------
        ValueError
            An operator that is not allowed, or fails; names operator, module path and line.
        """
        known: dict[str, Any] = {**self.constants, **{name: values[name] for name in self.inputs}}
        last = {name: i for i, op in enumerate(self.ops) for name in _references([op.args, op.kwargs])}
        for i, op in enumerate(self.ops):
            known[op.name] = _execute(op, known)
            if observe is not None:
                observe(op.name, known[op.name])
            for name in {*_references([op.args, op.kwargs]), op.name}:
                if last.get(name, i) == i and name not in self.outputs and name not in self.constants:
                    known.pop(name, None)
        return {name: known[name] for name in self.outputs}

    def to_bytes(self) -> tuple[bytes, bytes]:
        """JSON of the operators, safetensors of the constants."""
        constants = {name: value.contiguous().clone() for name, value in sorted(self.constants.items())}
        return self.structure(), save_tensors(constants)

    def structure(self) -> bytes:
        """JSON of the operators."""
        body = {"ops": [asdict(op) for op in self.ops], "inputs": list(self.inputs), "outputs": list(self.outputs)}
        return json.dumps(body, indent=1, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, structure: bytes, constants: bytes) -> HostPart:
        """Inverse of `to_bytes`.

        Raises
        ------
        ValueError, KeyError, TypeError
            Damaged, or an operator that is not allowed.
        """
        try:
            tensors = load_tensors(constants)
        except SafetensorError as error:
            raise ValueError(f"constants: {error}") from error
        return cls.from_structure(structure, tensors)

    @classmethod
    def from_structure(cls, structure: bytes, constants: Mapping[str, Tensor]) -> HostPart:
        """Inverse of `structure`, with the constants; raises as `from_bytes`."""
        body = json.loads(structure)
        part = cls(
            ops=tuple(HostOp(**op) for op in body["ops"]), constants=constants,
            inputs=tuple(body["inputs"]), outputs=tuple(body["outputs"]),
        )  # fmt: skip
        part.check()
        return part

    def check(self) -> None:
        """Whether all operators are allowed, and read what is there.

        Raises
        ------
        ValueError
        """
        known = {*self.constants, *self.inputs}
        for op in self.ops:
            host_operator(op.target)
            missing = [name for name in _references([op.args, op.kwargs]) if name not in known]
            if missing:
                raise ValueError(f"host operator {op.name!r} reads {missing[0]!r}, which is not there")
            known.add(op.name)
        for name in self.outputs:
            if name not in known:
                raise ValueError(f"host output {name!r} is not computed")


def operator_name(target: Any) -> str:
    """``aten.add.Tensor`` as text."""
    return str(target)


def is_allowed(target: Any) -> bool:
    """Whether an exported operator may run on the host."""
    try:
        host_operator(GETITEM if callable(target) and getattr(target, "__name__", "") == GETITEM else operator_name(target))
    except ValueError:
        return False
    return True


def host_operator(target: str) -> Callable[..., Any]:
    """The function behind a name.

    Raises
    ------
    ValueError
        Not one of `OPERATORS`.
    """
    if target == GETITEM:
        return lambda value, index: value[index]
    namespace, _, rest = target.partition(".")
    name, _, overload = rest.partition(".")
    packet = getattr(torch.ops.aten, name, None) if namespace == "aten" and name in OPERATORS else None
    if packet is None or overload not in packet.overloads():
        raise ValueError(f"{target} is none of the operators that a host part may run")
    function = getattr(packet, overload)
    if function._schema.is_mutable or torch.Tag.nondeterministic_seeded in function.tags and name not in _HARMLESS:
        raise ValueError(f"{target} changes its arguments or depends on chance: a host part may not run it")
    return function


_HARMLESS = ("dropout", "feature_dropout", "gru", "lstm", "rnn_relu", "rnn_tanh", "rrelu", "scaled_dot_product_attention")
"""Depend on chance in training alone; `_execute` refuses that."""


def host_part(exported: Exported, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> HostPart:
    """Some exported operators, in execution order, as a host part.

    Raises
    ------
    CompileError
        An operator that is not allowed on the host.
    """
    constants: dict[str, Tensor] = {}

    def reference(node: fx.Node) -> Any:
        constant = exported.constant(node)
        if constant is None:
            return _Reference(node.name)
        if isinstance(constant[0], Tensor):
            constants[node.name] = constant[0]
            return _Reference(node.name)
        names = [f"{node.name}.{i}" for i in range(len(constant[0]))]
        constants.update(zip(names, constant[0], strict=True))
        return [_Reference(name) for name in names]

    ops = []
    for node in nodes:
        target = GETITEM if is_getitem(node) else operator_name(node.target)
        try:
            host_operator(target)
        except ValueError as error:
            where = f"{module_path(node) or 'the module'} ({source_line(node) or 'line unknown'})"
            way = "give it training=self.training" if "dropout" in target else "take it out of the module"
            raise CompileError(f"{where}: {error}, and the accelerator cannot either: {way}") from error
        args, kwargs = mapped(node, reference)
        source, line = module_path(node), source_line(node)
        ops.append(HostOp(
            name=node.name, target=target, args=_plain(list(args)), kwargs=_plain(dict(kwargs)), source=source, line=line,
        ))  # fmt: skip
    for node in outputs:
        if exported.constant(node) is not None:
            reference(node)
    part = HostPart(
        ops=tuple(ops), constants=constants,
        inputs=tuple(node.name for node in inputs), outputs=tuple(node.name for node in outputs),
    )  # fmt: skip
    part.check()
    return part


@dataclass(frozen=True)
class _Reference:
    name: str


def _plain(value: Any) -> Any:
    """An argument as JSON."""
    if isinstance(value, _Reference):
        return {"ref": value.name}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    for name, kind in _NAMED.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": "cpu"}
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CompileError(f"an argument of kind {type(value).__name__} cannot be stored in a program")


def _filled(value: Any, known: Mapping[str, Any]) -> Any:
    """Inverse of `_plain`."""
    if isinstance(value, list):
        return [_filled(item, known) for item in value]
    if not isinstance(value, dict):
        return value
    (kind, item), *_ = value.items()
    if kind == "ref":
        return known[item]
    if kind == "device":
        return torch.device("cpu")
    if kind == "float":
        return float(item)
    found = getattr(torch, item, None) if kind in _NAMED and isinstance(item, str) else None
    if kind not in _NAMED or not isinstance(found, _NAMED[kind]):
        raise ValueError(f"unknown argument {value!r}")
    return found


def _references(value: Any) -> list[str]:
    """Names of the tensors among arguments."""
    if isinstance(value, list):
        return [name for item in value for name in _references(item)]
    if isinstance(value, dict):
        return [value["ref"]] if "ref" in value else [name for item in value.values() for name in _references(item)]
    return []


def _by_chance(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operator that draws numbers in training is called as in training."""
    if torch.Tag.nondeterministic_seeded not in getattr(function, "tags", ()):
        return False
    given = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False)) | dict(kwargs)
    training = given.get("train", given.get("training", "dropout_p" in given))
    return bool(training and given.get("p", given.get("dropout", given.get("dropout_p", 1.0))))


def _execute(op: HostOp, known: Mapping[str, Any]) -> Any:
    function = host_operator(op.target)
    args = _filled(op.args, known)
    kwargs = {name: _filled(value, known) for name, value in op.kwargs.items()}
    try:
        if _by_chance(function, args, kwargs):
            raise ValueError("it is called as in training, where it depends on chance")
        return function(*args, **kwargs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        where = " ".join(filter(None, (op.source or "the module", op.line and f"({op.line})")))
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{where}: host operator {op.target} {op.name!r} failed: {first}") from error
