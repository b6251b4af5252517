"""flatten_images: a Linear layer of a whole image, or of all rows of a sequence, becomes a convolution with a kernel as large."""

from __future__ import annotations

from math import prod

from compiler.graph import Activation, Add, Convolution, Graph, Input, Linear, MaxPool, Node, Scale, View
from compiler.layout import Layout

__all__ = ["flatten_images"]


def flatten_images(graph: Graph) -> Graph:
    """``Linear(flatten(x))`` with x (batch, rows, channels), or an input (batch, channels, ...), becomes a convolution of one
    output pixel. Weights stay N:M where rows follow each other; where channels do, a group would be of several kernel positions,
    and the pattern is given up."""
    nodes: dict[str, Node] = {}
    for node in graph.nodes.values():
        if isinstance(node, Linear) and node.post.is_empty and isinstance(view := nodes[node.inputs[0]], View):
            for made in _flattened(node, view, nodes):
                nodes[made.name] = node = made
        nodes[node.name] = node
    return graph.rewrite(nodes.values())


def _flattened(node: Linear, view: View, nodes: dict[str, Node]) -> list[Node]:
    """The nodes in place of a Linear, the last one under its name; none if its input is no flat image."""
    x = nodes[view.inputs[0]]
    made: list[Node] = []
    channels_first, size = _order(view, x, nodes)
    if channels_first is None:
        return []
    if len(x.shape) == 4:
        x = _rows(x, f"{node.name}.pixels")
        made.append(x)
    whole = _convolution(node, x, size or (1, x.shape[1]), channels_first=channels_first)
    layout = Layout.contiguous(whole.shape).reshape(node.shape)
    flat = View(
        name=node.name, inputs=(whole.name,), shape=node.shape, source=node.source, layout=layout, origin=view.origin
    )
    return [*made, whole, flat]


def _order(view: View, x: Node, nodes: dict[str, Node]) -> tuple[bool | None, tuple[int, int] | None]:
    """Whether channels vary slowest in a view (batch, all) of x, and the size of the image if it is known; (None, None) if it is
    no such view."""
    batch, *rest = x.shape
    if len(rest) not in (2, 3) or view.shape not in ((batch, prod(rest)), (batch, 1, prod(rest))):
        return None, None
    whole = Layout.contiguous(x.shape)
    if len(rest) == 3:
        flat = isinstance(x, Input) and view.layout == whole.reshape(view.shape)
        return (True, (rest[1], rest[2])) if flat else (None, None)
    if rest[0] > 1:
        for first, order in ((True, (0, 2, 1)), (False, (0, 1, 2))):
            if view.layout == whole.permute(order).reshape(view.shape):
                return first and not isinstance(x, Input), _size(x, nodes)
    return None, None


def _size(x: Node, nodes: dict[str, Node]) -> tuple[int, int] | None:
    """Height and width of the image that a tensor's rows are, as far as the operators before it know."""
    while isinstance(x, Linear | Activation | Scale | Add):
        x = nodes[x.inputs[0]]
    return x.out_size if isinstance(x, Convolution | MaxPool) else None


def _rows(x: Node, name: str) -> View:
    """An input image (batch, channels, height, width) as rows of pixels."""
    batch, channels, *size = x.shape
    layout = Layout.contiguous(x.shape).permute((0, 2, 3, 1)).reshape((batch, prod(size), channels))
    return View(name=name, inputs=(x.name,), shape=layout.shape, source=x.source, layout=layout, origin=x.origin)


def _convolution(node: Linear, x: Node, size: tuple[int, int], *, channels_first: bool) -> Convolution:
    batch, rows, channels = x.shape
    outputs, kept = len(node.weight), node.pattern is not None and not channels_first and channels % node.pattern.m == 0
    if channels_first:
        weight = node.weight.reshape(outputs, channels, *size)
    else:
        weight = node.weight.reshape(outputs, *size, channels).permute(0, 3, 1, 2)
    return Convolution(
        name=f"{node.name}.whole", inputs=(x.name,), shape=(batch, 1, outputs), source=node.source, origin=node.origin,
        weight=weight, bias=node.bias, pattern=node.pattern if kept else None, size=size, out_size=(1, 1), stride=(1, 1),
        padding=(0, 0), dilation=(1, 1),
    )  # fmt: skip
