"""split_norms: a norm of wider rows than the row unit holds becomes norms of equal parts, joined by their statistics.

Part i of a row x has the mean m_i and the deviation s_i = mean(x_i z_i), where z_i is the part normalised by itself. The numbers
m_i + s_i and m_i - s_i of all parts have the mean and the variance of the whole row, so that the norm of *these* gives
``b_i + a_i`` and ``b_i - a_i`` with ``(x_i - m) / s = a_i z_i + b_i``. Without means (RMSNorm), ``a_i`` is the norm of the s_i.
Whatever the magnitude of a row, a_i, b_i and z_i are about 1: 8 bits hold them where the row itself has 16.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compiler.graph import Convolution, Graph, Linear, Node, Norm, Pointwise, Post

__all__ = ["norm_parts", "split_norms"]

LEAST = 4
"""Columns of a part, at least: the deviation of fewer says little, and there would be as many parts as columns."""
PART_EPS = 1e-4
"""``eps`` of the parts, of that of the whole: a part that hardly varies beside it must not be blown up."""


def norm_parts(columns: int, depth: int) -> int | None:
    """Into how many equal parts a norm over ``columns`` is divided so that each fits ``depth``; None if there is no number."""
    for parts in range(-(-columns // depth), columns // LEAST + 1):
        if columns % parts == 0 and 2 * parts <= depth:
            return parts
    return 1 if columns <= depth else None


def split_norms(graph: Graph, depth: int) -> Graph:
    """Divide the norms of a fused graph that are wider than ``depth`` and can be."""
    nodes: list[Node] = []
    users = graph.users()
    for node in graph.nodes.values():
        norm = node.post.norm if isinstance(node, Linear | Convolution | Pointwise) else None
        parts = None if norm is None or norm.width <= depth else norm_parts(norm.width, depth)
        nodes += [node] if norm is None or parts is None else _divided(node, norm, parts, users[node.name])
    return graph.rewrite(nodes)


def _divided(node: Any, norm: Norm, parts: int, users: list[Node]) -> list[Node]:
    """The nodes in place of one with a norm, the last one under its name. A last one that adds a bias can centre its channels,
    which Linear layers make up for: 3 dB."""
    bare, columns, width = replace(node.post, norm=None), len(norm.gamma), norm.width // parts
    made: list[Node] = []
    x = node.inputs[0]
    if not (isinstance(node, Pointwise) and bare.is_empty and node.channels is None):
        made.append(replace(node, name=f"{node.name}.sum", post=bare))
        x = made[0].name

    def add(name: str, kind: type[Node], inputs: tuple[str, ...], width: int = columns, **fields: Any) -> str:
        made.append(kind(
            name=name, inputs=inputs, shape=(*node.shape[:-1], width), source=node.source, origin=node.origin, **fields
        ))  # fmt: skip
        return name

    def linear(name: str, inputs: tuple[str, ...], weight: Tensor, **fields: Any) -> str:
        return add(name, Linear, inputs, len(weight), weight=weight, **{"bias": None, **fields})

    own = torch.eye(parts).repeat_interleave(width, 1)  # (parts, columns): which columns each part has
    signs = torch.ones(1, 1) if norm.rms else torch.tensor([[1.0], [-1.0]])
    ones, zeros, eps = torch.ones(columns), torch.zeros(columns), norm.eps * PART_EPS
    alone = add(f"{node.name}.alone", Pointwise, (x,), post=Post(norm=Norm(ones, zeros, eps, norm.rms, parts)))
    squares = add(f"{node.name}.squares", Pointwise, (alone, x), post=Post(residual=True, multiply=True))
    deviations, read = (signs[:, :, None] * own / width).flatten(0, 1), [squares]
    if not norm.rms:
        read.append(linear(f"{node.name}.means", (x,), own.repeat(2, 1) / width, wide=True))
    found = linear(f"{node.name}.statistics", tuple(read), deviations, post=Post(residual=len(read) > 1), wide=True)
    few = len(deviations)
    joined = Post(norm=Norm(torch.ones(few), torch.zeros(few), norm.eps, norm.rms))
    joint = add(f"{node.name}.joint", Pointwise, (found,), few, post=joined)
    scaled = add(f"{node.name}.scaled", Pointwise, (x,), post=Post(norm=Norm(norm.gamma, zeros, eps, norm.rms, parts)))
    centred = bool(users) and all(isinstance(user, Linear) and node.name not in user.inputs[1:] for user in users)
    shifted = not norm.rms or bool(norm.beta.any()) or centred
    factors = (signs[:, :, None] * own / len(signs)).flatten(0, 1).t()
    product = Post(residual=True, multiply=True)
    last = linear(f"{node.name}.factors" if shifted else node.name, (joint, scaled), factors, post=product)
    if shifted:
        offsets = norm.gamma[:, None] * (own.repeat(len(signs), 1).t() if not norm.rms else torch.zeros(columns, few)) / 2
        linear(node.name, (joint, last), offsets, post=Post(residual=True), bias=norm.beta)
    return made
