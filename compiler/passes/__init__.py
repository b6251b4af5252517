"""The passes, in the order in which they run.

Each takes a graph and gives a graph that computes the same; `compiler.legality` says what is left afterwards.
To add one, write a function ``Graph -> Graph``, put it into `PASSES` and its row into `LEGAL`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from compiler.graph import Graph
from compiler.legality import check
from compiler.passes.attention import match_heads, match_scores
from compiler.passes.elementwise import fix_constants, match_elementwise
from compiler.passes.functions import fold_functions
from compiler.passes.fuse import fuse
from compiler.passes.images import place_images
from compiler.passes.linears import fold_biases, fold_scales, split_linears
from compiler.passes.masks import fold_masks
from compiler.passes.norms import match_norms
from compiler.passes.rotations import fold_gathers, match_rotations
from compiler.passes.views import drop_views, sink_views

__all__ = ["PASSES", "optimise", "run_passes"]

Pass = Callable[[Graph], Graph]

PASSES: tuple[Pass, ...] = (
    match_norms,  # x * rsqrt(mean(x^2) + eps) becomes one norm
    match_rotations,  # rotary positions become two products and a sum
    fold_functions,  # x * sigmoid(x) and the like become one function
    match_elementwise,  # a * b of activations, and of a constant
    match_scores,  # softmax(q k^T * scale + mask) v becomes one ScaledDotProduct
    fold_masks,  # mask arithmetic becomes one KeyMask
    fold_biases,  # a constant vector added or multiplied after a Linear goes into it
    fix_constants,  # other constants that data is added to or multiplied with
    sink_views,  # reshapes and transposes move behind the operators that do not care
    split_linears,  # a Linear whose result is cut into channel ranges becomes several
    sink_views,  # the ranges are whole tensors now, and their views can move
    match_heads,  # ScaledDotProduct between head splits becomes Attention
    drop_views,  # what is left of the views cancels out
    fold_gathers,  # orders of channels go into weights, or out of scores
    place_images,  # images come and go as rows of pixels
    fold_scales,  # scales go into weights and attention
    fuse,  # residual, function and norm go into the operator before them
)


def run_passes(graph: Graph) -> Iterator[Graph]:
    """The graph after each pass, each one checked."""
    check(graph)
    for transform in PASSES:
        graph = replace(transform(graph), stage=transform.__name__)
        check(graph)
        yield graph


def optimise(graph: Graph) -> Graph:
    """Run all passes on what `compiler.frontend.trace` made.

    Raises
    ------
    CompileError
        An operator that cannot be compiled; names module path, operator and shapes.
    """
    *_, result = run_passes(graph)
    return result
