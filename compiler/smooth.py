"""Outliers of activations moved into weights: a float graph that computes the same, and is easier to quantise.

A channel of a tensor is divided by a factor where it is made, and the weights that read it are multiplied by it: nothing runs at
inference. Factors are those of SmoothQuant (arXiv 2211.10438, equation 4): ``s_c = max|X_c|^alpha / max|W_c|^(1 - alpha)``.

What can take the division: a norm (gamma and beta), a Linear without residual, norm and function (its rows and bias) or with a
ReLU, and a Linear behind which only the values of an attention stand. Where a norm's result is also a residual (post-norm
networks), the sum before it is stored and a second norm makes the divided copy: one operator more, only where a channel
is an outlier.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compiler.graph import Attention, Convolution, Graph, Linear, Node, Norm, Pointwise, Post

__all__ = ["divided_tensors", "migrate", "smooth", "smoothing_factors", "smoothing_factors_together"]

OUTLIER = 8.0
"""A channel this many times as large as the median one is worth a second norm."""
LIMITS = (1e-3, 1e3)
"""Of a factor, after the factors of a tensor are scaled to a geometric mean of 1."""


@dataclass(frozen=True)
class _Site:
    """A tensor whose channels can be scaled: the node that takes the division, and the Linear layers that read the result.

    ``attention``: the node makes the values of that attention, and the layers read the attention. ``copy``: others read it too.
    """

    producer: Node
    readers: tuple[Linear, ...]
    attention: Attention | None = None
    copy: bool = False

    @property
    def tensor(self) -> str:
        """What the readers read."""
        return self.attention.name if self.attention is not None else self.producer.name


def smooth(graph: Graph, batches: Iterable[Any], alpha: float = 0.5) -> Graph:
    """The graph with outliers of activations moved into weights.

    Parameters
    ----------
    graph
        Fused (after all passes).
    batches
        Calibration inputs as for `Graph.run`.
    alpha
        In [0, 1]: how much of the range of activations the weights take over.

    Raises
    ------
    ValueError
        An alpha outside [0, 1].
    """
    return migrate(graph, smoothing_factors(graph, batches, alpha))


def smoothing_factors(graph: Graph, batches: Iterable[Any], alpha: float) -> dict[str, Tensor]:
    """What the channels of tensors are to be divided by, by name of the tensor: float32 (C,)."""
    return smoothing_factors_together([(graph, batches)], alpha)


def smoothing_factors_together(parts: Sequence[tuple[Graph, Iterable[Any]]], alpha: float) -> dict[str, Tensor]:
    """The factors for graphs of one network for several shapes, each with its own batches."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"smooth must be in [0, 1], not {alpha!r}")
    sites = {name: site for graph, _ in parts for name, site in _sites(graph).items()}
    largest: dict[str, Tensor] = {}

    def observe(node: Node, operands: tuple[Tensor, ...], value: Tensor) -> None:
        if node.name in sites:
            found = value.abs().flatten(0, -2).amax(0)
            largest[node.name] = torch.maximum(found, largest.get(node.name, found))

    for graph, batches in parts:
        for batch in batches:
            graph.run(graph.bind(batch), observe=observe)
    factors = {}
    for name, values in largest.items():
        site = sites[name]
        if site.copy and float(values.max()) < OUTLIER * float(values.median()):
            continue
        weights = torch.stack([reader.weight.detach().abs().amax(0) for reader in site.readers]).amax(0)
        if site.attention is not None:
            values, weights = (_shared(part, site.attention) for part in (values, weights))
        factors[name] = _factors(values, weights, alpha)
    return factors


def migrate(graph: Graph, factors: Mapping[str, Tensor]) -> Graph:
    """Divide the channels of tensors by factors where they are made, and multiply the weights that read them."""
    nodes = dict(graph.nodes)
    before: dict[str, Node] = {}
    after: dict[str, Node] = {}
    for name, site in _sites(graph).items():  # in the graph's order: a node is changed as a reader before it is as a producer
        if name not in factors:
            continue
        producer, source = nodes[site.producer.name], name
        if site.copy:
            sums, whole, copy = _with_copy(producer, factors[name])
            nodes[producer.name], after[producer.name], source = whole, copy, copy.name
            if sums is not None:
                before[producer.name] = sums
        else:
            nodes[producer.name] = _divided(producer, _of_values(factors[name], site.attention))
        for linear in site.readers:
            reader = nodes[linear.name]
            assert isinstance(reader, Linear)
            nodes[linear.name] = replace(reader, weight=reader.weight * factors[name], inputs=(source, *reader.inputs[1:]))
    order = (part.get(name) for name in nodes for part in (before, nodes, after))
    return graph.rewrite([node for node in order if node is not None])


def divided_tensors(graph: Graph, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `migrate` divided the channels of the graph's own tensors by, by name."""
    found = {}
    for name, site in _sites(graph).items():
        if name in factors and not site.copy:
            found[name] = factors[name]
            found[site.producer.name] = _of_values(factors[name], site.attention)
    return found


def _sites(graph: Graph) -> dict[str, _Site]:
    """Tensors whose channels can be scaled, by name."""
    users, found = graph.users(), {}
    for node in graph.nodes.values():
        attention = None
        reads = users[node.name]
        if len(reads) == 1 and isinstance(reads[0], Attention) and reads[0].inputs[2] == node.name:
            attention = reads[0] if reads[0].inputs[:2].count(node.name) == 0 else None
            reads = users[attention.name] if attention is not None else reads
        name = node.name if attention is None else attention.name
        linears = tuple(
            user for user in reads if isinstance(user, Linear) and user.inputs[0] == name and name not in user.inputs[1:]
        )
        if not linears or name in graph.outputs or node.name in graph.outputs:
            continue
        alone = len(linears) == len(reads)
        if alone and _takes_division(node) and not (attention is not None and _norm(node) is not None):
            found[name] = _Site(node, linears, attention)
        elif attention is None and not alone and _norm(node) is not None and _function(node) is None:
            found[name] = _Site(node, linears, copy=True)
    return found


def _post(node: Node) -> Post | None:
    return node.post if isinstance(node, Linear | Convolution | Pointwise) else None


def _norm(node: Node) -> Norm | None:
    post = _post(node)
    return None if post is None else post.norm


def _function(node: Node) -> object | None:
    post = _post(node)
    return None if post is None else post.function


def _takes_division(node: Node) -> bool:
    """Whether dividing the result's channels can be done by parameters of the node."""
    post = _post(node)
    if post is None:
        return False
    if post.norm is not None:
        return True
    return isinstance(node, Linear) and not post.residual and (post.function is None or post.function.name == "relu")


def _divided(node: Node, factors: Tensor) -> Node:
    """The node with its result's channels divided."""
    norm = _norm(node)
    if norm is not None:
        divided = replace(norm, gamma=norm.gamma / factors, beta=norm.beta / factors)
        return replace(node, post=replace(_post(node), norm=divided))  # type: ignore[call-arg, type-var]
    assert isinstance(node, Linear)
    bias = None if node.bias is None else node.bias / factors
    return replace(node, weight=node.weight / factors[:, None], bias=bias)


def _with_copy(node: Node, factors: Tensor) -> tuple[Node | None, Node, Node]:
    """A node with a norm as the sum that is normed (None: its operand is that), its norm by its name, and the norm divided."""
    post = _post(node)
    assert post is not None
    sums: Node | None = replace(node, name=f"{node.name}.sum", post=replace(post, norm=None))  # type: ignore[call-arg]
    if isinstance(node, Pointwise) and not post.residual:
        sums = None
    whole = Pointwise(
        name=node.name, inputs=node.inputs if sums is None else (sums.name,), shape=node.shape, source=node.source,
        origin=node.origin, post=Post(norm=post.norm),
    )  # fmt: skip
    return sums, whole, _divided(replace(whole, name=f"{node.name}.smooth"), factors)


def _groups(attention: Attention) -> tuple[int, int, int]:
    """Heads of the values, heads of the result for each of them, channels of a head."""
    kept = attention.kv_heads or attention.heads
    return kept, attention.heads // kept, attention.shape[-1] // attention.heads


def _shared(values: Tensor, attention: Attention) -> Tensor:
    """The largest over all heads that share a channel of the values, for each of them."""
    kept, times, width = _groups(attention)
    return values.view(kept, times, width).amax(1, keepdim=True).expand(-1, times, -1).flatten()


def _of_values(factors: Tensor, attention: Attention | None) -> Tensor:
    """The factors of an attention's result for the channels of its values."""
    if attention is None:
        return factors
    kept, times, width = _groups(attention)
    return factors.view(kept, times, width)[:, 0].flatten()


def _factors(values: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Equation 4; channels without values or weights stay, and the geometric mean is 1."""
    used = (values > 0) & (weights > 0)
    logs = torch.where(used, alpha * values.clamp_min(1e-30).log() - (1 - alpha) * weights.clamp_min(1e-30).log(), 0.0)
    logs = torch.where(used, logs - logs[used].mean() if bool(used.any()) else logs, 0.0)
    return logs.exp().clamp(*LIMITS)
