"""place_images: what the host does to images on their way in and out, and convolutions of the input as Linear layers."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from compiler.graph import Convolution, Fold, Graph, Input, Linear, Node, Unfold, View
from compiler.layout import Layout

__all__ = ["place_images"]

FEW_CHANNELS = 16
"""A convolution of an input of at most so many channels is unfolded by the host: its columns would be a few at a time."""


def place_images(graph: Graph) -> Graph:
    """A view of an input as rows of pixels becomes an `Unfold`, one of an output as an image a `Fold`: the host does both
    when it writes and reads memory. A convolution of an input with few channels becomes a Linear on the windows; a pattern whose
    groups they do not fill is given up."""
    users = graph.users()
    nodes: dict[str, Node] = {}
    for node in graph.nodes.values():
        if isinstance(node, View) and isinstance(x := graph.nodes[node.inputs[0]], Input) and _is_rows(node.layout, x.shape):
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


def _is_rows(layout: Layout, shape: tuple[int, ...]) -> bool:
    if len(shape) not in (3, 4):
        return False
    batch, channels, *size = shape
    order = (0, *range(2, len(shape)), 1)
    return layout == Layout.contiguous(shape).permute(order).reshape((batch, prod(size), channels))


def _is_image(node: View, graph: Graph) -> bool:
    batch, channels, *size = node.shape
    rows = Layout.contiguous((batch, *size, channels)).permute((0, len(size) + 1, *range(1, len(size) + 1)))
    return graph.nodes[node.inputs[0]].shape == (batch, prod(size), channels) and node.layout == rows
