"""What the larger ONNX operators compute: recurrent layers, transposed convolutions, resizing, norms, and other rearrangements.

Each takes the node's attributes and its operands (None for one that is left out), as those of `compiler.onnx_import`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["LAYERS"]

Attributes = dict[str, Any]
Run = Callable[[Attributes, list[Any]], Any]


def _refuse(attributes: Attributes, *names: str) -> None:
    """Refuse attributes that are set and would change the result."""
    given = [name for name in names if attributes.get(name)]
    if given:
        raise ValueError(f"with {', '.join(given)}")


def _operand(operands: Sequence[Any], place: int) -> Any:
    return operands[place] if len(operands) > place else None


def _norm_of(function: Callable[..., Tensor]) -> Run:
    return lambda a, x: function(a, x[0], x[1], x[2], a.get("epsilon", 1e-5))


def _group_norm(a: Attributes, x: Tensor, scale: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Version 18 has a factor for each group, version 21 for each channel."""
    groups, channels = a["num_groups"], x.shape[1]
    if len(scale) != channels:
        scale, bias = (value.repeat_interleave(channels // groups) for value in (scale, bias))
    return F.group_norm(x, groups, scale, bias, eps)


def _conv_transpose(a: Attributes, x: list[Any]) -> Tensor:
    _refuse(a, "output_shape")
    if a.get("auto_pad", "NOTSET") not in ("NOTSET", ""):
        raise ValueError(f"auto_pad {a['auto_pad']}")
    rank = x[0].ndim - 2
    pads = list(a.get("pads", [0] * 2 * rank))
    if pads[:rank] != pads[rank:]:
        raise ValueError(f"pads {pads} that are not the same at both ends")
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    lists = [list(a.get(name, [default] * rank)) for name, default in (("strides", 1), ("output_padding", 0), ("dilations", 1))]
    return function(x[0], x[1], _operand(x, 2), lists[0], pads[:rank], lists[1], a.get("group", 1), lists[2])


def _resize(a: Attributes, x: list[Any]) -> Tensor:
    _refuse(a, "antialias", "axes", "exclude_outside")
    mode, where = a.get("mode", "nearest"), a.get("coordinate_transformation_mode", "half_pixel")
    rank, scales, sizes = x[0].ndim - 2, _operand(x, 2), _operand(x, 3)
    if mode == "nearest" and (where, a.get("nearest_mode", "round_prefer_floor")) == ("asymmetric", "floor"):
        options: dict[str, Any] = {"mode": "nearest"}
    elif mode == "linear" and where in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        options = {"mode": ("linear", "bilinear", "trilinear")[rank - 1], "align_corners": where == "align_corners"}
    elif mode == "cubic" and rank == 2 and where in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        options = {"mode": "bicubic", "align_corners": where == "align_corners"}
    else:
        raise ValueError(f"mode {mode} with {where}, {a.get('nearest_mode', 'round_prefer_floor')}")
    if sizes:
        return F.interpolate(x[0], size=[int(n) for n in sizes[2:]], **options)
    return F.interpolate(x[0], scale_factor=[float(n) for n in scales[2:]], **options)


def _depth_to_space(a: Attributes, x: list[Any]) -> Tensor:
    size = a["blocksize"]
    if a.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x[0], size)
    batch, channels, height, width = x[0].shape
    parts = x[0].reshape(batch, size, size, channels // size**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(batch, channels // size**2, height * size, width * size)


def _space_to_depth(a: Attributes, x: list[Any]) -> Tensor:
    size, (batch, channels, height, width) = a["blocksize"], x[0].shape
    parts = x[0].reshape(batch, channels, height // size, size, width // size, size).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(batch, channels * size**2, height // size, width // size)


def _prelu(a: Attributes, x: list[Any]) -> Tensor:
    slope = x[1]
    if slope.numel() in (1, x[0].shape[1]) and slope.ndim in (0, 1, x[0].ndim - 1) and (slope.ndim > 1 or slope.numel() == 1):
        return F.prelu(x[0], slope.flatten())
    return x[0].clamp(min=0) + slope * x[0].clamp(max=0)


# -- recurrent layers ----------------------------------------------------------------------------------------

_ORDERS = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
"""Place of torch's gates among those of ONNX."""
_ACTIVATIONS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


def _recurrent(kind: str) -> Run:
    """(steps, batch, inputs) to all states (steps, directions, batch, hidden) and the last ones."""
    order = _ORDERS[kind]

    def sorted_gates(value: Tensor) -> Tensor:
        parts = value.chunk(len(order))
        return torch.cat([parts[i] for i in order])

    def run(a: Attributes, x: list[Any]) -> tuple[Tensor, ...]:
        _refuse(a, "layout", "clip", "input_forget")
        data, weight, recurrent = x[:3]
        directions, size = len(weight), a["hidden_size"]
        given = a.get("activations", _ACTIVATIONS[kind] * directions)
        names = [name.decode() if isinstance(name, bytes) else name for name in given]
        plain = names == _ACTIVATIONS[kind] * directions
        if not (plain or (kind == "RNN" and set(names) == {"Relu"})) or (kind == "GRU" and not a.get("linear_before_reset")):
            raise ValueError(f"activations {', '.join(names)}, or a reset before the product")
        lengths = _operand(x, 4)
        if _operand(x, 7) is not None or not (lengths is None or lengths.tolist() == [len(data)] * data.shape[1]):
            raise ValueError("peepholes, or sequences of several lengths")
        bias = x[3] if _operand(x, 3) is not None else torch.zeros(directions, 2 * recurrent.shape[1])
        parameters = [
            sorted_gates(value) for i in range(directions) for value in (weight[i], recurrent[i], *bias[i].chunk(2))
        ]  # fmt: skip
        zero = torch.zeros(directions, data.shape[1], size)
        h = x[5] if _operand(x, 5) is not None else zero
        state: Any = (h, x[6] if _operand(x, 6) is not None else zero) if kind == "LSTM" else h
        cell = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN": torch.rnn_tanh if plain else torch.rnn_relu}[kind]
        back = a.get("direction", "forward") == "reverse"
        made, *last = cell(  # type: ignore[operator]
            data.flip(0) if back else data, state, parameters, True, 1, 0.0, False, directions == 2, False
        )
        states = made.unflatten(-1, (directions, size)).transpose(1, 2)
        return states.flip(0) if back else states, *last

    return run


def _over(function: Callable[..., Tensor]) -> Run:
    """A reduction whose axes are an attribute or an operand."""

    def run(a: Attributes, x: list[Any]) -> Tensor:
        given = _operand(x, 1)
        axes = a.get("axes") if given is None else [int(axis) for axis in given.tolist()]
        if not axes and a.get("noop_with_empty_axes"):
            return x[0]
        return function(x[0], list(axes or range(x[0].ndim)), bool(a.get("keepdims", 1)))

    return run


LAYERS: dict[str, Run] = {
    "Celu": lambda a, x: F.celu(x[0], a.get("alpha", 1.0)), "ConvTranspose": _conv_transpose, "DepthToSpace": _depth_to_space,
    "Einsum": lambda a, x: torch.einsum(a["equation"], *x),
    "GRU": _recurrent("GRU"), "GlobalMaxPool": lambda a, x: x[0].amax(tuple(range(2, x[0].ndim)), keepdim=True),
    "GroupNormalization": _norm_of(_group_norm),
    "InstanceNormalization": _norm_of(lambda a, x, scale, bias, eps: F.instance_norm(x, None, None, scale, bias, True, 0.0, eps)),
    "LSTM": _recurrent("LSTM"), "Mish": lambda a, x: F.mish(x[0]), "PRelu": _prelu, "RNN": _recurrent("RNN"),
    "ReduceL1": _over(lambda x, dims, keep: x.abs().sum(dims, keep)),
    "ReduceL2": _over(lambda x, dims, keep: x.square().sum(dims, keep).sqrt()),
    "ReduceLogSumExp": _over(lambda x, dims, keep: x.logsumexp(dims, keep)),
    "ReduceSumSquare": _over(lambda x, dims, keep: x.square().sum(dims, keep)), "Resize": _resize,
    "Round": lambda a, x: x[0].round(),
    "Selu": lambda a, x: torch.where(x[0] > 0, x[0], a.get("alpha", 1.6732632) * (x[0].exp() - 1)) * a.get("gamma", 1.0507010),
    "Softsign": lambda a, x: F.softsign(x[0]), "SpaceToDepth": _space_to_depth,
    "Swish": lambda a, x: x[0] * torch.sigmoid(a.get("alpha", 1.0) * x[0]),
    "ThresholdedRelu": lambda a, x: F.threshold(x[0], a.get("alpha", 1.0), 0.0),
}  # fmt: skip
"""What each of these operators computes."""
