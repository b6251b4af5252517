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
from compiler.passes.broadcasts import broadcast_operands
from compiler.passes.elementwise import fix_constants, match_elementwise
from compiler.passes.fills import move_fills
from compiler.passes.flatten import flatten_images
from compiler.passes.functions import fold_functions
from compiler.passes.fuse import fuse
from compiler.passes.images import fold_pads, place_images
from compiler.passes.linears import fold_biases, fold_scales, fold_vectors, split_linears
from compiler.passes.masks import fold_masks
from compiler.passes.norms import match_norms
from compiler.passes.products import match_products
from compiler.passes.rotations import fold_gathers, match_rotations
from compiler.passes.rows import arrange_rows, hoist_rows, place_constants
from compiler.passes.views import drop_views, sink_views

__all__ = ["PASSES", "optimise", "run_passes"]

Pass = Callable[[Graph], Graph]

PASSES: tuple[Pass, ...] = (
    match_norms,  # x * rsqrt(mean(x^2) + eps) becomes one norm
    fold_biases,  # a constant vector added after a Linear becomes its bias
    match_rotations,  # rotary positions become two products and a sum
    fold_vectors,  # a product with a vector of channels goes into what was before it
    fold_functions,  # x * sigmoid(x) and the like become one function
    broadcast_operands,  # x * y with fewer pixels or channels gets operands of equal shapes
    match_elementwise,  # a * b of activations, and of a constant
    match_scores,  # softmax(q k^T * scale + mask) v becomes one ScaledDotProduct
    fold_masks,  # mask arithmetic becomes one KeyMask
    fix_constants,  # other constants that data is multiplied with
    place_constants,  # other constants that are added or joined become tensors
    sink_views,  # reshapes and transposes move behind the operators that do not care
    split_linears,  # a Linear whose result is cut into channel ranges becomes several
    sink_views,  # the ranges are whole tensors now, and their views can move
    match_heads,  # ScaledDotProduct between head splits becomes Attention
    match_products,  # other products of two activations
    drop_views,  # what is left of the views cancels out
    flatten_images,  # a Linear of a whole image becomes a convolution
    drop_views,  # whose result has fewer rows
    fold_gathers,  # orders of channels go into weights, or out of scores
    place_images,  # images come and go as rows of pixels
    hoist_rows,  # rows are chosen before they are multiplied
    arrange_rows,  # what still moves becomes copies of rows
    move_fills,  # constants joined with data go into a constant added to both
    fold_pads,  # zeros around an image become padding
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
