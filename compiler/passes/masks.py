"""fold_masks: whatever arithmetic a module does on its padding mask becomes one `KeyMask`.

Modules build masks in many ways (``(1 - m) * -1e4``, ``masked_fill(-inf)``, ``m[:, None, None, :].bool()``,
...), so the pass does not match patterns: it runs the arithmetic on probe masks and looks at which keys each
query may see.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from compiler.frontend import MASKED
from compiler.graph import CompileError, Graph, Input, KeyMask, Node, ScaledDotProduct
from compiler.legality import problem

__all__ = ["fold_masks"]


def fold_masks(graph: Graph) -> Graph:
    """Replace the mask operand of each attention by a `KeyMask` of an input; drop masks that mask nothing."""
    nodes: list[Node] = []
    made: dict[tuple[str, bool], str] = {}
    known: dict[str, tuple[str, bool] | None] = {}  # mask operand -> (input, keep), None if it masks nothing
    refused: list[CompileError] = []
    for node in graph.nodes.values():
        if isinstance(node, ScaledDotProduct) and len(node.inputs) == 4:
            mask = node.inputs[3]
            try:
                found = known[mask] if mask in known else known.setdefault(mask, _understand(graph, node))
            except CompileError as error:
                refused.append(error)
                continue
            if found is None:
                node = replace(node, inputs=node.inputs[:3])
            else:
                if found not in made:
                    made[found] = f"{found[0]}.keep{int(found[1])}"
                    batch, keys = graph.nodes[found[0]].shape
                    nodes.append(
                        KeyMask(
                            name=made[found],
                            inputs=(found[0],),
                            shape=(batch, 1, keys),
                            source=node.source,
                            origin=node.origin,
                            keep=found[1],
                        )
                    )
                node = replace(node, inputs=(*node.inputs[:3], made[found]), key_mask=True)
        nodes.append(node)
    if refused:
        problems = [problem for error in refused for problem in error.problems]
        raise CompileError("\n  ".join(dict.fromkeys(problem.text for problem in problems)), problems)
    return graph.rewrite(nodes)


def _understand(graph: Graph, attention: ScaledDotProduct) -> tuple[str, bool] | None:
    """Which input masks the keys of an attention, and which value keeps a key; None if all keys stay."""
    order = _ancestors(graph, attention.inputs[3])
    inputs = [node for node in order if isinstance(node, Input)]
    if len(inputs) > 1 or any(len(node.shape) != 2 for node in inputs):
        shapes = ", ".join(f"{node.name} {node.shape}" for node in inputs)
        raise _refuse(
            graph, attention, f"the mask must come from one input of shape (batch, keys), not from {shapes}"
        )
    heads = graph.nodes[attention.inputs[0]].shape[:-2]
    scores = (*heads, graph.nodes[attention.inputs[0]].shape[-2], graph.nodes[attention.inputs[1]].shape[-2])
    if not inputs:
        if bool(_kept(graph, attention, order, scores, {}).all()):
            return None
        raise _refuse(
            graph, attention,
            "its mask is a constant (causal or other 2-D): only key padding masks from an input "
            "(batch, keys) are supported",
        )  # fmt: skip
    return _probe(graph, attention, order, inputs[0], scores)


def _probe(
    graph: Graph, attention: ScaledDotProduct, order: list[Node], mask: Input, scores: tuple[int, ...]
) -> tuple[str, bool]:
    """Run the mask arithmetic on masks of ones, of zeros and of both."""
    agree = {True: True, False: True}
    for probe in _probes(mask):
        kept = _kept(graph, attention, order, scores, {mask.name: probe.to(mask.dtype)})
        for keep in agree:
            wanted = _wanted(probe == keep, scores)
            agree[keep] &= wanted is not None and bool((kept == wanted).all())
    if not any(agree.values()):
        raise _refuse(
            graph, attention,
            f"the mask from input {mask.name!r} {mask.shape} depends on the query, the head or several "
            "entries (causal or 2-D): only key padding masks are supported",
        )  # fmt: skip
    return mask.name, agree[True]


def _wanted(keep: Tensor, scores: tuple[int, ...]) -> Tensor | None:
    """A key padding mask as it looks on scores (batch, heads, rows, keys) or (batch * heads, rows, keys)."""
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
def _kept(
    graph: Graph,
    attention: ScaledDotProduct,
    order: list[Node],
    scores: tuple[int, ...],
    inputs: dict[str, Tensor],
) -> Tensor:
    """bool of the scores' shape: which key each query may see."""
    values = dict(inputs)
    for node in order:
        if not isinstance(node, Input):
            values[node.name] = node.evaluate(*(values[name] for name in node.inputs))
    mask = values[attention.inputs[3]]
    try:
        torch.broadcast_shapes(mask.shape, scores)
    except RuntimeError:
        raise _refuse(
            graph, attention, f"its mask {tuple(mask.shape)} does not fit scores {scores}"
        ) from None
    if mask.dtype != torch.bool:
        kept = mask > MASKED
        if bool(((mask != 0) & kept).any()) or bool(mask.isnan().any()):
            raise _refuse(
                graph, attention,
                "its additive mask holds values that neither keep a key (0) nor remove it (<= -1000): "
                "attention biases are not supported",
            )  # fmt: skip
        mask = kept
    return mask.expand(scores)


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
