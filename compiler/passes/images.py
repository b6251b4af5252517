"""place_images: what the host does to images on their way in and out, and convolutions of the input as Linear layers."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch

from compiler.graph import Convolution, Fold, Graph, Input, Linear, Node, Rearrange, Unfold, View
from compiler.layout import Layout

__all__ = ["fold_pads", "place_images"]

FEW_CHANNELS = 16
"""A convolution of an input of at most so many channels is unfolded by the host: its columns would be a few at a time."""


def place_images(graph: Graph) -> Graph:
    """A view of an input as rows of pixels becomes an `Unfold`, one of an output as an image a `Fold`: the host does both
    when it writes and reads memory. A convolution of an input with few channels becomes a Linear on the windows; a pattern whose
    groups they do not fill is given up."""
    graph = _as_pixels(graph)
    users = graph.users()
    nodes: dict[str, Node] = {}
    for node in graph.nodes.values():
        if isinstance(node, View) and isinstance(x := graph.nodes[node.inputs[0]], Input) and _are_rows(users[x.name], x):
            node = Unfold(
                name=node.name, inputs=node.inputs, shape=node.shape, source=node.source, origin=node.origin,
                out_size=(x.shape[2], x.shape[3]) if len(x.shape) == 4 else (1, x.shape[2]),
            )  # fmt: skip
        elif isinstance(node, View) and node.name in graph.outputs and len(node.shape) in (3, 4) and _is_image(node, graph):
            node = Fold(
                name=node.name, inputs=node.inputs, shape=node.shape, source=node.source, origin=node.origin,
                size=node.shape[2:],
            )  # fmt: skip
        elif isinstance(node, Convolution) and isinstance(x := nodes[node.inputs[0]], Unfold) and node.groups == 1:
            if len(users[x.name]) == 1 and x.shape[-1] <= FEW_CHANNELS:
                node = _unfolded(node, x, nodes)
        nodes[node.name] = node
    return graph.rewrite(nodes.values())


def _as_pixels(graph: Graph) -> Graph:
    """An input image that is seen as rows of pixels in one place is seen so everywhere: who wants it otherwise gets a view of
    the rows."""
    users = graph.users()
    nodes: dict[str, Node] = {}
    now: dict[str, str] = {}
    for node in graph.nodes.values():
        if node.name in nodes:
            continue
        nodes[node.name] = replace(node, inputs=tuple(now.get(name, name) for name in node.inputs))
        if not isinstance(node, Input) or len(node.shape) != 4 or node.name in graph.outputs:
            continue
        layout = _pixel_rows(node.shape)
        rows = [user for user in users[node.name] if isinstance(user, View) and user.layout == layout]
        if rows and len(rows) < len(users[node.name]):
            nodes[rows[0].name] = rows[0]
            back = View(
                name=f"{node.name}.image", inputs=(rows[0].name,), shape=node.shape, source=node.source, origin=rows[0].origin,
                layout=_image(node.shape),
            )  # fmt: skip
            nodes[back.name] = back
            now[node.name] = back.name
    return graph.rewrite(nodes.values())


def fold_pads(graph: Graph) -> Graph:
    """A convolution of an image with zeros around it takes them as its padding; of an input image, the host writes its windows
    as ever."""
    users = graph.users()
    nodes: dict[str, Node] = {}
    for node in graph.nodes.values():
        if isinstance(node, Convolution) and isinstance(pad := nodes[node.inputs[0]], Rearrange) and len(pad.inputs) == 1:
            x = nodes[pad.inputs[0]]
            found = _padding(pad, node.size, x.shape)
            if found is not None:
                (top, left), size = found
                padding = (node.padding[0] + top, node.padding[1] + left)
                node = replace(node, inputs=(x.name, *node.inputs[1:]), size=size, padding=padding)
                single = len(users[pad.name]) == 1 and len(users[x.name]) == 1
                if isinstance(x, Unfold) and x.kernel == (1, 1) and node.groups == 1 and single and x.shape[-1] <= FEW_CHANNELS:
                    node = _unfolded(node, x, nodes)
        nodes[node.name] = node
    return graph.rewrite(nodes.values())


def _padding(pad: Rearrange, size: tuple[int, int], shape: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Lines and columns of zeros before the images of a tensor, and their size, if a rearrangement does nothing but pad them."""
    (part, *more) = pad.parts
    if more or part.width != pad.shape[-1] or part.width != shape[-1] or len(shape) != 3 or shape[0] != pad.shape[0]:
        return None
    if pad.fill is not None and bool(pad.fill.any()):
        return None
    rows = torch.full((shape[0] * pad.shape[1],), -1)
    rows[part.to] = part.rows
    images = rows.reshape(shape[0], *size)
    lines, columns = (torch.nonzero((images[0] >= 0).any(dim)).flatten().tolist() for dim in (1, 0))
    if not lines or not columns:
        return None
    inner = images[:, lines[0] : lines[-1] + 1, columns[0] : columns[-1] + 1]
    whole = torch.arange(shape[0] * shape[1])
    if len(part.to) != len(whole) or not torch.equal(inner.flatten(), whole):
        return None
    return (lines[0], columns[0]), (inner.shape[1], inner.shape[2])


def _unfolded(node: Convolution, x: Unfold, nodes: dict[str, Node]) -> Linear:
    weight = node.weight.permute(0, 2, 3, 1).flatten(1)
    shape = (*node.shape[:2], weight.shape[1])
    nodes[x.name] = replace(
        x, shape=shape, out_size=node.out_size, kernel=(node.weight.shape[2], node.weight.shape[3]), stride=node.stride,
        padding=node.padding, dilation=node.dilation,
    )  # fmt: skip
    return Linear(
        name=node.name, inputs=node.inputs, shape=node.shape, source=node.source, origin=node.origin, weight=weight,
        bias=node.bias, pattern=None if node.pattern is None or node.weight.shape[1] % node.pattern.m else node.pattern,
        post=node.post,
    )  # fmt: skip


def _are_rows(users: list[Node], x: Input) -> bool:
    """Whether an input is only ever seen as rows of pixels."""
    if len(x.shape) not in (3, 4):
        return False
    rows = _pixel_rows(x.shape)
    return all(isinstance(user, View) and user.layout == rows for user in users)


def _pixel_rows(shape: tuple[int, ...]) -> Layout:
    """(batch, channels, ...) as (batch, pixels, channels)."""
    batch, channels, *size = shape
    return Layout.contiguous(shape).permute((0, *range(2, len(shape)), 1)).reshape((batch, prod(size), channels))


def _is_image(node: View, graph: Graph) -> bool:
    batch, channels, *size = node.shape
    return graph.nodes[node.inputs[0]].shape == (batch, prod(size), channels) and node.layout == _image(node.shape)


def _image(shape: tuple[int, ...]) -> Layout:
    """Rows of pixels (batch, pixels, channels) as (batch, channels, ...)."""
    batch, channels, *size = shape
    return Layout.contiguous((batch, *size, channels)).permute((0, len(size) + 1, *range(1, len(size) + 1)))
