"""How each aten operator passes channels on: one small rule an operator."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from algo.capture import module_path
from algo.count import LAYERS
from algo.coupling import Ids
from algo.propagation import Call, Channels, Propagation, Rule, because, shape_of

__all__ = ["RULES", "rule_of"]

_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)
_ELEMENTWISE = {
    "_to_copy", "absolute", "alias", "alpha_dropout", "bernoulli", "clone", "contiguous", "copy", "detach", "divide", "dropout",
    "empty_like", "feature_alpha_dropout", "feature_dropout", "fill", "floor_divide", "full_like", "greater", "greater_equal",
    "hardswish", "less", "less_equal", "lift_fresh", "lift_fresh_copy", "log_sigmoid", "multiply", "negative", "not_equal",
    "ones_like", "rand_like", "randn_like", "rsub", "subtract", "to", "type_as", "zero", "zeros_like",
}  # fmt: skip
"""Those that torch does not tag as such."""
_RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"}
_MOVES = {"permute", "transpose", "t", "movedim", "moveaxis", "swapaxes", "swapdims", "numpy_T", "mT"}
_REDUCTIONS = {
    "mean", "sum", "amax", "amin", "var", "std", "prod", "logsumexp", "norm", "linalg_vector_norm", "max", "min", "any", "all",
    "argmax", "argmin",
}  # fmt: skip
_ALONG = {"softmax", "log_softmax", "_softmax", "cumsum", "cumprod", "sort", "topk", "flip", "roll"}


# -- elementwise ---------------------------------------------------------------------------------------------


def pointwise(walk: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Channels | None:
    """Operands with broadcasting: aligned channels are tied."""
    if not isinstance(node.meta.get("val"), Tensor):
        walk.give_up(node)
        return None
    shape, operands = shape_of(node), [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    found = _aligned(walk, [n for n in operands if n not in walk.sources], len(shape))
    found = found or _aligned(walk, operands, len(shape))
    spread = [item for item in found if len(item.ids) < shape[item.axis]]
    for item in spread:
        walk.coupling.keep(item.ids, because(node, "spreads one of them over many"))
    found = [item for item in found if len(item.ids) == shape[item.axis]]
    if len({item.axis for item in found}) > 1:
        walk.give_up(node, "combines two axes of them")
        return None
    if not found:
        walk.refuse([n for n in operands if n in walk.sources], because(node, "computes a weight"))
        return None
    for item in found[1:]:
        walk.coupling.join(found[0].ids, item.ids)
    for other in operands:
        _tie_operand(walk, node, other, found[0], len(shape))
    return found[0]


def _aligned(walk: Propagation, nodes: Sequence[fx.Node], rank: int) -> list[Channels]:
    """Channels of operands, their axes counted in the result."""
    pairs = [(walk.channels(node), len(shape_of(node))) for node in nodes]
    return [Channels(item.axis + rank - own, item.ids) for item, own in pairs if item is not None]


def _tie_operand(walk: Propagation, node: fx.Node, other: fx.Node, channels: Channels, rank: int) -> None:
    """An operand without channels of its own: a parameter is tied, anything else keeps the channels."""
    shape = shape_of(other)
    dim = channels.axis - (rank - len(shape))
    if dim < 0 or (shape[dim] == 1 and len(channels.ids) > 1):
        return
    if other in walk.sources:
        walk.coupling.join(walk.axis(walk.sources[other], dim), channels.ids)
    elif walk.channels(other) is None:
        walk.coupling.keep(channels.ids, because(node, "combines them with a value that is not pruned"))


def prelu(walk: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Channels | None:
    channels, weight = walk.channels(arguments["self"]), arguments["weight"]
    if channels is not None and math.prod(shape_of(weight)) > 1:
        if channels.axis != 1:
            walk.give_up(node)
            return None
        walk.join_vector(weight, channels, because(node, "has computed slopes"))
    return channels


# -- layers --------------------------------------------------------------------------------------------------


def layer(walk: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Channels | None:
    """Convolution and linear layers: the inputs end here, the outputs begin."""
    given, weight = arguments["input"], arguments["weight"]
    owner = _owner(walk, node, weight)
    transposed = "transpose" in str(node.target) or bool(arguments.get("transposed"))
    groups, kernel = arguments.get("groups", 1), shape_of(weight)[2:]
    if owner is None or (transposed and groups > 1):
        walk.give_up(node, "is not the call of a layer" if owner is None else "has groups")
        return None
    name, axis = walk.sources[weight], len(shape_of(node)) - 1 - len(kernel)
    outputs = walk.axis(name, 1 if transposed else 0)
    inputs = _inputs(walk, node, given, axis)
    _join_groups(walk, inputs, outputs, walk.axis(name, 0 if transposed else 1), groups)
    result = Channels(axis, outputs)
    walk.join_vector(arguments.get("bias"), result, because(node, "has a computed bias"))
    walk.calls.append(
        Call(
            layer=owner,
            weight=name,
            inputs=inputs,
            outputs=outputs,
            groups=groups,
            kernel=math.prod(kernel),
            positions=math.prod(shape_of(given if transposed else node))
            // len(inputs if transposed else outputs),
            output_positions=math.prod(shape_of(node)) // len(outputs),
            rows=shape_of(given)[0],
        )
    )
    return result


def dynamic_convolution(walk: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Channels | None:
    """Kernels stacked in one weight and mixed for each sample (models.odconv): an output is a channel of every kernel.

    Attention over channels goes with them. The layers that compute it are parts of this layer, not layers of their own: they
    read what it reads, and a gate on its input is a gate on theirs.
    """
    given, weight, groups = arguments["input"], arguments["weight"], arguments["groups"]
    owner = _owner(walk, node, weight)
    if owner is None:
        walk.give_up(node, "is not the call of a layer")
        return None
    name, kernel = walk.sources[weight], shape_of(weight)[2:]
    kernels = walk.axis(name, 0).reshape(arguments["kernels"], -1)
    outputs, inputs = kernels[0], _inputs(walk, node, given, 1)
    for other in kernels[1:]:
        walk.coupling.join(outputs, other)
    _join_groups(walk, inputs, outputs, walk.axis(name, 1), groups)
    for attention, ids in ((arguments["channel"], inputs), (arguments.get("filters"), outputs)):
        if attention is not None:
            walk.join_channels(attention, ids, because(node, "has attention that is not pruned"))
    mixing = [item for item in (arguments.get("position"), arguments.get("kernel")) if item is not None]
    walk.refuse(mixing, because(node, "mixes by them"))
    walk.calls = [call for call in walk.calls if not call.layer.startswith(f"{owner}.")]
    positions = math.prod(shape_of(node)) // len(outputs)
    walk.calls.append(
        Call(
            layer=owner, weight=name, inputs=inputs, outputs=outputs, groups=groups, kernel=math.prod(kernel),
            positions=positions, output_positions=positions, rows=shape_of(given)[0],
        )
    )  # fmt: skip
    return Channels(1, outputs)


def _join_groups(walk: Propagation, inputs: Ids, outputs: Ids, own: Ids, groups: int) -> None:
    """Tie what a convolution reads to its weight's axis of inputs; of a grouped one, a whole group goes, with all its
    inputs and outputs."""
    if groups == 1:
        walk.coupling.join(own, inputs)
        return
    heads = outputs.reshape(groups, -1)[:, 0]
    for ids in (inputs, outputs):
        walk.coupling.join(heads.repeat(len(ids) // groups), ids)


def _owner(walk: Propagation, node: fx.Node, weight: fx.Node) -> str | None:
    """Name of the layer module that runs this operator with its own weight, or None."""
    part = walk.model.get_submodule(module_path(node))
    if not isinstance(part, LAYERS) or weight not in walk.sources:
        return None
    same = part.weight is walk.model.get_parameter(walk.sources[weight])
    return walk.modules[id(part)] if same else None


def _inputs(walk: Propagation, node: fx.Node, given: fx.Node, axis: int) -> Ids:
    """Channels that a layer reads; those of a value without any are kept."""
    channels = walk.channels(given)
    if channels is not None and channels.axis == axis:
        return channels.ids
    walk.refuse([given], because(node, "reads them as positions"))
    ids = walk.coupling.new(shape_of(given)[axis])
    walk.coupling.keep(ids, "the network's input, or a value that is not pruned")
    return ids


def batch_norm(walk: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Channels | None:
    """Each channel has its own statistics; weight, bias and running statistics go with it."""
    channels = walk.channels(arguments["input"])
    if channels is None or channels.axis != 1:
        walk.give_up(node, "normalises over them")
        return None
    for name in ("weight", "bias", "running_mean", "running_var"):
        walk.join_vector(arguments.get(name), channels, because(node, f"has a computed {name}"))
    return channels


def layer_norm(walk: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Channels | None:
    """Statistics over the last axes: channels there must stay."""
    channels = walk.channels(arguments["input"])
    if channels is None or channels.axis >= len(shape_of(node)) - len(arguments["normalized_shape"]):
        walk.give_up(node, "normalises over them")
        return None
    walk.refuse([item for item in node.all_input_nodes if item in walk.sources], "the weight of a norm")
    return channels


def group_norm(walk: Propagation, node: fx.Node, arguments: dict[str, Any]) -> None:
    walk.give_up(node, "normalises over them")


def embedding(walk: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Channels | None:
    weight = arguments["weight"]
    if weight not in walk.sources:
        walk.give_up(node)
        return None
    return Channels(len(shape_of(node)) - 1, walk.axis(walk.sources[weight], 1))


# -- over positions ------------------------------------------------------------------------------------------


def spatial(walk: Propagation, node: fx.Node, arguments: dict[str, Any], *, rank: int) -> Any:
    """Pooling and resizing over the last ``rank`` axes."""
    channels = walk.channels(node.args[0])
    value = node.meta["val"]
    first = value if isinstance(value, Tensor) else value[0]
    if channels is None or channels.axis >= len(first.shape) - rank:
        walk.give_up(node, "pools over them")
        return None
    return channels if isinstance(value, Tensor) else [channels] * len(value)


def reduction(walk: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    if "other" in arguments:  # max and min of two values
        return pointwise(walk, node, arguments)
    channels = walk.channels(arguments["self"])
    if channels is None:
        walk.give_up(node, "computes a weight")
        return None
    rank, dims = len(shape_of(arguments["self"])), arguments.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(rank))
    dims = [dim % rank for dim in dims]
    if channels.axis in dims:
        walk.give_up(node, "sums over them")
        return None
    axis = (
        channels.axis if arguments.get("keepdim") else channels.axis - sum(dim < channels.axis for dim in dims)
    )
    value = node.meta["val"]
    result = Channels(axis, channels.ids)
    return result if isinstance(value, Tensor) else [result] * len(value)


def along(walk: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """Operators that mix or reorder along one axis, or some."""
    channels = walk.channels(arguments["self"])
    dims = arguments.get("dims", arguments.get("dim"))
    if channels is None or dims is None or dims == []:
        walk.give_up(node)
        return None
    rank = len(shape_of(arguments["self"]))
    if channels.axis in [dim % rank for dim in ([dims] if isinstance(dims, int) else dims)]:
        walk.give_up(node, "works along them")
        return None
    value = node.meta["val"]
    return channels if isinstance(value, Tensor) else [channels] * len(value)


def pad(walk: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Channels | None:
    """Amounts are given from the last axis backwards, two an axis."""
    channels = walk.channels(arguments["self"])
    if channels is not None:
        first = 2 * (len(shape_of(node)) - 1 - channels.axis)
        if any(arguments["pad"][first : first + 2]):
            walk.give_up(node, "pads them")
            return None
    return channels


# -- shapes --------------------------------------------------------------------------------------------------


def reshape(walk: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Channels | None:
    """A new shape of the same order of elements: channels stay whole or are merged with other axes."""
    channels = walk.channels(arguments["self"])
    found = None
    if channels is not None:
        found = _reshaped(channels, shape_of(arguments["self"]), shape_of(node))
    if found is None:
        walk.give_up(node, "splits them" if channels is not None else "computes a weight")
    return found


def _reshaped(channels: Channels, old: tuple[int, ...], new: tuple[int, ...]) -> Channels | None:
    """The axis of ``new`` that holds the channels' axis of ``old`` whole; None if none does."""
    before, size = math.prod(old[: channels.axis]), old[channels.axis]
    candidates = []
    for axis, length in enumerate(new):
        leading = math.prod(new[:axis])
        tile, rest = divmod(before, leading)
        repeat, remainder = divmod(leading * length, before * size)
        if rest or remainder or not tile or tile * size * repeat != length:
            continue
        if axis or tile == 1:  # batch and channels in one axis could not be told apart
            candidates.append((tile * repeat != 1, abs(axis - channels.axis), axis, tile, repeat))
    if not candidates:
        return None
    _, _, axis, tile, repeat = min(candidates)
    return Channels(axis, _tiled(channels.ids, tile, repeat))


def _tiled(ids: Ids, tile: int, repeat: int) -> Ids:
    return ids.repeat(repeat)[None].repeat(tile, axis=0).reshape(-1)


def move(walk: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Channels | None:
    """A permutation of axes, found by moving a tensor whose axes have different lengths."""
    channels = walk.channels(node.args[0])
    if channels is None:
        walk.give_up(node, "computes a weight")
        return None
    given: Any = node.args[0]
    probe = torch.empty(_PRIMES[: len(shape_of(given))], device="meta")
    moved: Any = node.target(probe, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return Channels(list(moved.shape).index(_PRIMES[channels.axis]), channels.ids)


def expand(walk: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Channels | None:
    """More positions: new axes in front, and axes of length 1 that become longer (or, repeated, any axis)."""
    channels = walk.channels(arguments["self"])
    if channels is None:
        walk.give_up(node, "computes a weight")
        return None
    axis = channels.axis + len(shape_of(node)) - len(shape_of(arguments["self"]))
    if shape_of(node)[axis] != len(channels.ids):
        walk.give_up(node, "repeats them")
        return None
    return Channels(axis, channels.ids)


def concatenate(walk: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Channels | None:
    """Along the channels: one after the other. Along another axis: tied."""
    parts: list[fx.Node] = list(arguments["tensors"])
    stack = "stack" in str(node.target)
    dim = arguments["dim"] % len(shape_of(node))
    axes = {item.axis for item in map(walk.channels, parts) if item is not None}
    if len(axes) != 1:
        walk.give_up(node, "combines two axes of them")
        return None
    (axis,) = axes
    ids = [_part(walk, node, part, axis) for part in parts]
    if not stack and axis == dim:
        return Channels(axis, torch.cat([torch.from_numpy(item) for item in ids]).numpy())
    for item in ids[1:]:
        walk.coupling.join(ids[0], item)
    return Channels(axis + (stack and dim <= axis), ids[0])


def _part(walk: Propagation, node: fx.Node, part: fx.Node, axis: int) -> Ids:
    """Channel numbers of one part of a concatenation; kept ones for a part that has none."""
    channels = walk.channels(part)
    if channels is not None:
        return channels.ids
    walk.refuse([part], because(node, "computes a weight"))
    ids = walk.coupling.new(shape_of(part)[axis])
    walk.coupling.keep(ids, because(node, "combines them with a value that is not pruned"))
    return ids


def chunk(walk: Propagation, node: fx.Node, arguments: dict[str, Any]) -> list[Channels] | None:
    """Equal parts: along the channels, the i-th of each part are tied, so that the parts stay equal."""
    channels, parts = walk.channels(arguments["self"]), len(node.meta["val"])
    if channels is None:
        walk.give_up(node, "computes a weight")
        return None
    if arguments["dim"] % len(shape_of(arguments["self"])) != channels.axis:
        return [channels] * parts
    if len(channels.ids) % arguments["chunks"]:
        walk.give_up(node, "cuts them into unequal parts")
        return None
    pieces = channels.ids.reshape(parts, -1)
    for piece in pieces[1:]:
        walk.coupling.join(pieces[0], piece)
    return [Channels(channels.axis, piece) for piece in pieces]


def glu(walk: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Channels | None:
    """The first half times the gate of the second."""
    channels = walk.channels(arguments["self"])
    if channels is None or arguments["dim"] % len(shape_of(node)) != channels.axis:
        return channels
    first, second = channels.ids.reshape(2, -1)
    walk.coupling.join(first, second)
    return Channels(channels.axis, first)


def cut(walk: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """Parts at fixed positions: fine along another axis, but channels there would move."""
    channels = walk.channels(arguments["self"])
    shape, value = shape_of(arguments["self"]), node.meta["val"]
    dim = arguments.get("dim", 0) % len(shape)
    if channels is None:
        walk.give_up(node, "computes a weight")
        return None
    whole = isinstance(value, Tensor) and tuple(value.shape) == shape
    if dim == channels.axis and not whole:
        walk.give_up(node, "cuts them at fixed places")
        return None
    first = value if isinstance(value, Tensor) else value[0]
    dropped = len(first.shape) < len(shape) and dim < channels.axis
    result = Channels(channels.axis - dropped, channels.ids)
    return result if isinstance(value, Tensor) else [result] * len(value)


RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, pointwise),
    **dict.fromkeys(_RESHAPES, reshape),
    **dict.fromkeys(_MOVES, move),
    **dict.fromkeys(_REDUCTIONS, reduction),
    **dict.fromkeys(_ALONG, along),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "conv_transpose1d", "linear"), layer),
    **dict.fromkeys(("conv_transpose2d", "conv_transpose3d", "convolution"), layer),
    **dict.fromkeys(("batch_norm", "instance_norm"), batch_norm),
    **dict.fromkeys(("layer_norm", "rms_norm"), layer_norm),
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to", "repeat"), expand),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), concatenate),
    **dict.fromkeys(("slice", "select", "split", "split_with_sizes", "narrow", "unbind", "tensor_split"), cut),
    **dict.fromkeys(("dynamic_conv2d", "static_conv2d"), dynamic_convolution),
    "group_norm": group_norm,
    "prelu": prelu,
    "embedding": embedding,
    "chunk": chunk,
    "glu": glu,
}
"""Which rule serves which aten operator; elementwise operators need no entry."""


def rule_of(operator: OpOverload) -> Rule | None:
    """The rule of an operator: by its name, in place or not; by torch's tag; or, for pooling, by its rank."""
    name = operator._schema.name.split("::")[1]
    rule = RULES.get(name) or RULES.get(name.removesuffix("_"))
    if rule is None and torch.Tag.pointwise in operator.tags:
        return pointwise
    if rule is None and (match := re.search(r"(?:pool|upsample)\D*([123])d", name)):
        return functools.partial(spatial, rank=int(match[1]))
    return rule
