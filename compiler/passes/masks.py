"""fold_masks: whatever arithmetic a module does on its masks becomes one `KeyMask` and a constant bias of the scores.

Modules build masks in many ways (``(1 - m) * -1e4``, ``masked_fill(-inf)``, ``m[:, None, None, :].bool()``, causal
masks joined with padding masks, relative position biases, ...), so the pass does not match patterns: it runs the
arithmetic on probe masks and looks at which keys each query may see, and at what is added to the scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compiler.frontend import MASKED
from compiler.graph import CompileError, Graph, Input, KeyMask, Node, ScaledDotProduct
from compiler.legality import problem

__all__ = ["fold_masks"]


@dataclass(frozen=True, eq=False)
class _Meaning:
    """What a mask operand does to scores: ``bias`` of their shape is added (None: nothing), and keys whose ``input``
    (batch, keys) has not the value ``keep`` are removed ("": none)."""

    input: str = ""
    keep: bool = True
    bias: Tensor | None = None


def fold_masks(graph: Graph) -> Graph:
    """Replace the mask operand of each attention by a `KeyMask` of an input and a constant bias; drop what masks
    nothing."""
    nodes: list[Node] = []
    made: dict[tuple[str, bool], str] = {}
    known: dict[tuple[str, tuple[int, ...]], _Meaning] = {}
    refused: list[CompileError] = []
    for node in graph.nodes.values():
        if isinstance(node, ScaledDotProduct) and len(node.inputs) == 4:
            key = (node.inputs[3], _scores(graph, node))
            try:
                found = known[key] if key in known else known.setdefault(key, _understand(graph, node))
            except CompileError as error:
                refused.append(error)
                continue
            node = replace(node, inputs=node.inputs[:3], bias=found.bias)
            if found.input:
                mask = (found.input, found.keep)
                if mask not in made:
                    made[mask] = f"{found.input}.keep{int(found.keep)}"
                    batch, keys = graph.nodes[found.input].shape
                    nodes.append(KeyMask(
                        name=made[mask], inputs=(found.input,), shape=(batch, 1, keys), source=node.source,
                        origin=node.origin, keep=found.keep,
                    ))  # fmt: skip
                node = replace(node, inputs=(*node.inputs, made[mask]), key_mask=True)
        nodes.append(node)
    if refused:
        problems = [found for error in refused for found in error.problems]
        raise CompileError("\n  ".join(dict.fromkeys(found.text for found in problems)), problems)
    return graph.rewrite(nodes)


def _scores(graph: Graph, attention: ScaledDotProduct) -> tuple[int, ...]:
    """Shape of an attention's scores: (batch, heads, rows, keys) or (batch * heads, rows, keys)."""
    query, key = (graph.nodes[name].shape for name in attention.inputs[:2])
    return (*query[:-1], key[-2])


def _understand(graph: Graph, attention: ScaledDotProduct) -> _Meaning:
    """What the mask operand of an attention does."""
    order = _ancestors(graph, attention.inputs[3])
    inputs = [node for node in order if isinstance(node, Input)]
    if len(inputs) > 1 or any(len(node.shape) != 2 for node in inputs):
        shapes = ", ".join(f"{node.name} {node.shape}" for node in inputs)
        raise _refuse(
            graph, attention, f"the mask must come from one input of shape (batch, keys), not from {shapes}"
        )
    if inputs:
        return _probe(graph, attention, order, inputs[0])
    return _Meaning(bias=_bias(*_effect(graph, attention, order, {})))


def _bias(kept: Tensor, added: Tensor) -> Tensor | None:
    """A constant effect as a bias; None if there is none."""
    if bool(kept.all()) and not bool(added.any()):
        return None
    return torch.where(kept, added, torch.tensor(-torch.inf))


def _probe(graph: Graph, attention: ScaledDotProduct, order: list[Node], mask: Input) -> _Meaning:
    """Run the mask arithmetic on masks of ones, of zeros and of both: the effect must be a constant one, joined with
    the mask of keys."""
    scores = _scores(graph, attention)
    effects = [(probe, *_effect(graph, attention, order, {mask.name: probe.to(mask.dtype)})) for probe in _probes(mask)]
    for keep in (True, False):
        # probes begin with all ones and all zeros: one of them removes no key
        _, constant, added = effects[0 if keep else 1]
        for probe, kept, bias in effects:
            wanted = _wanted(probe == keep, scores)
            if wanted is None or not bool((kept == (wanted & constant)).all()) or not bool((bias == added)[kept].all()):
                break
        else:
            return _Meaning(mask.name, keep, _bias(constant, added))
    raise _refuse(
        graph, attention,
        f"the mask from input {mask.name!r} {mask.shape} is no padding mask of keys joined with a constant one: it depends "
        "on the query, the head or several entries",
    )  # fmt: skip


def _wanted(keep: Tensor, scores: tuple[int, ...]) -> Tensor | None:
    """A key padding mask as it looks on scores."""
    batch, keys = keep.shape
    if keys != scores[-1] or scores[0] % batch:
        return None
    if len(scores) == 4:
        return keep[:, None, None, :].expand(scores) if batch == scores[0] else None
    return (
        keep.repeat_interleave(scores[0] // batch, 0)[:, None, :].expand(scores) if len(scores) == 3 else None
    )


def _probes(mask: Input) -> Iterator[Tensor]:
    """bool masks of the input's shape: all, none, and random ones."""
    yield torch.ones(mask.shape, dtype=torch.bool)
    yield torch.zeros(mask.shape, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        yield torch.rand(mask.shape, generator=generator) < 0.5


@torch.no_grad()
def _effect(
    graph: Graph, attention: ScaledDotProduct, order: list[Node], inputs: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Which key each query may see (bool), and what is added to its score (float, 0 where it may not); of the scores'
    shape."""
    values, scores = dict(inputs), _scores(graph, attention)
    for node in order:
        if not isinstance(node, Input):
            values[node.name] = node.evaluate(*(values[name] for name in node.inputs))
    mask = values[attention.inputs[3]]
    try:
        fits = tuple(torch.broadcast_shapes(mask.shape, scores)) == scores
    except RuntimeError:
        fits = False
    if not fits or bool(mask.isnan().any()):
        what = "has a NaN" if fits else f"does not fit scores {scores}"
        raise _refuse(graph, attention, f"its mask {tuple(mask.shape)} {what}")
    mask = mask.expand(scores)
    if mask.dtype == torch.bool:
        return mask, torch.zeros(scores)
    kept = mask > MASKED
    return kept, torch.where(kept, mask, torch.tensor(0.0)).float()


def _ancestors(graph: Graph, name: str) -> list[Node]:
    """The nodes that a value is computed from, and its own, in execution order."""
    needed = {name}
    for node in reversed(list(graph.nodes.values())):
        if node.name in needed:
            needed.update(node.inputs)
    return [node for node in graph.nodes.values() if node.name in needed]


def _refuse(graph: Graph, attention: ScaledDotProduct, reason: str) -> CompileError:
    found = problem(graph, attention, reason)
    return CompileError(found.text, [found])
