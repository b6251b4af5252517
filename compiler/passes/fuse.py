"""fuse: residual, function and norm go into the operator before them; one alone becomes a `Pointwise`."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from compiler.graph import (
    Activation,
    Add,
    Convolution,
    Fixed,
    Gather,
    Graph,
    LayerNorm,
    Linear,
    MatMul,
    Mul,
    Node,
    Pointwise,
    Post,
)

__all__ = ["fuse"]


def fuse(graph: Graph) -> Graph:
    """Make every sum, product, function and norm part of a Linear or a Pointwise, in the order of `Post`."""
    graph = _merged(graph)
    users = graph.users()
    done: dict[str, Node] = {}
    renamed: dict[str, str] = {}
    for node in graph.nodes.values():
        node = replace(node, inputs=tuple(renamed.get(name, name) for name in node.inputs))
        if isinstance(node, Gather):
            fields = {"name": node.name, "inputs": node.inputs, "shape": node.shape, "source": node.source, "origin": node.origin}
            node = Pointwise(post=Post(), channels=node.channels, **fields)  # type: ignore[arg-type]
        if not isinstance(node, Add | Mul | Activation | LayerNorm):
            done[node.name] = node
            continue
        place = _place(node, done, {name for name in done if _private(graph, users, renamed, name)})
        producer = None if place is None else done.pop(node.inputs[place])
        if place is None or not isinstance(producer, Linear | Convolution | Pointwise | MatMul):
            done[node.name] = Pointwise(
                name=node.name,
                inputs=node.inputs,
                shape=node.shape,
                source=node.source,
                origin=node.origin,
                post=_extended(Post(), node),
            )
            continue
        residual = (node.inputs[1 - place],) if isinstance(node, Add | Mul) else ()
        # at the last part's place in the order, so that the residual is computed before it
        done[producer.name] = replace(
            producer, inputs=(*producer.inputs, *residual), post=_extended(producer.post, node),
            origin=(*producer.origin, *node.origin),
        )  # fmt: skip
        renamed[node.name] = producer.name
    return graph.rewrite(done.values(), renamed=renamed)


def _merged(graph: Graph) -> Graph:
    """Equal constants as one."""
    found: dict[tuple[object, ...], str] = {}
    renamed = {}
    for node in graph.nodes.values():
        if isinstance(node, Fixed):
            value = node.value.contiguous()
            key = (node.shape, hashlib.sha256(value.numpy().tobytes()).digest())
            if found.setdefault(key, node.name) != node.name:
                renamed[node.name] = found[key]
    return graph.rewrite((node for node in graph.nodes.values() if node.name not in renamed), renamed=renamed)


def _private(graph: Graph, users: dict[str, list[Node]], renamed: dict[str, str], name: str) -> bool:
    """Whether just one node reads a result, counting what has been fused into its producer."""
    latest = next((old for old, new in reversed(renamed.items()) if new == name), name)
    return len(users[latest]) == 1 and latest not in graph.outputs


def _place(node: Node, done: dict[str, Node], private: set[str]) -> int | None:
    """Which operand of a sum, function or norm can take it in: the latest in the order that has room."""
    order = list(done)
    places = sorted(range(len(node.inputs)), key=lambda i: order.index(node.inputs[i]), reverse=True)
    if len(set(node.inputs)) < len(node.inputs):
        return None  # x + x
    for place in places:
        producer = done[node.inputs[place]]
        if (
            node.inputs[place] in private
            and isinstance(producer, Linear | Convolution | Pointwise | MatMul)
            and _has_room(producer, node)
        ):
            if isinstance(node, Add) and isinstance(producer, Pointwise) and producer.post.residual:
                continue
            return place
    return None


def _has_room(producer: Linear | Convolution | Pointwise | MatMul, node: Node) -> bool:
    """Whether the hardware's order (residual, function, norm) allows one more."""
    post = producer.post
    if isinstance(producer, MatMul):
        return isinstance(node, Add) and post.is_empty
    if isinstance(node, Mul):
        return post.is_empty
    if isinstance(node, Add):
        return not post.residual and post.function is None and post.norm is None
    if isinstance(node, Activation):
        return post.function is None and post.norm is None
    return post.norm is None


def _extended(post: Post, node: Node) -> Post:
    if isinstance(node, Add | Mul):
        return replace(post, residual=True, multiply=isinstance(node, Mul))
    if isinstance(node, Activation):
        return replace(post, function=node.function)
    if isinstance(node, LayerNorm):
        return replace(post, norm=node.norm)
    raise TypeError(f"{node.operator} cannot be fused")
