import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.ao.pruning import WeightNormSparsifier

from algo.mask import from_rows, magnitude_mask, rows
from algo.nm import NM

patterns = st.integers(1, 32).flatmap(lambda m: st.builds(NM, st.integers(1, m), st.just(m)))


def golden(matrix, pattern):
    """The definition, element by element."""
    mask = torch.zeros(matrix.shape, dtype=torch.bool)
    for row, values in enumerate(matrix.tolist()):
        for start in range(0, len(values), pattern.m):
            group = values[start : start + pattern.m]
            order = sorted(range(len(group)), key=lambda i: (-abs(group[i]), i))
            for index in order[: pattern.kept(len(group))]:
                mask[row, start + index] = True
    return mask


@settings(max_examples=80, deadline=None)
@given(patterns, st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_equals_definition_with_ties_and_remainders(pattern, out, width, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-3, 4, (out, width), generator=generator).float()  # small integers: many ties
    assert torch.equal(magnitude_mask(weight, pattern), golden(weight, pattern))


def test_equals_torch_ao_sparsifier():
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    expected = nn.Sequential(layer)
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    mask = magnitude_mask(layer.weight, NM("2:4"))
    sparsifier.prepare(expected, config=[{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    assert torch.equal(mask, layer.parametrizations.weight[0].mask.bool())


@pytest.mark.parametrize("pattern", ["2:4", "1:3", "4:16", "5:24"])
def test_conv_groups_lie_along_input_channels(pattern):
    torch.manual_seed(0)
    weight = torch.randn(4, 10, 3, 2)
    mask = magnitude_mask(weight, NM(pattern))
    channels_last = weight.permute(0, 2, 3, 1).reshape(-1, 10)
    assert torch.equal(mask.permute(0, 2, 3, 1).reshape(-1, 10), golden(channels_last, NM(pattern)))
    assert mask.is_contiguous() and mask.dtype == torch.bool


def test_rows_round_trip():
    for shape in [(3, 5), (3, 5, 2, 4)]:
        weight = torch.randn(shape)
        assert torch.equal(from_rows(rows(weight), weight.shape), weight)


def test_dense_keeps_all():
    assert magnitude_mask(torch.zeros(3, 5), NM("dense")).all()


def test_errors():
    with pytest.raises(ValueError, match=r"not \(5,\)"):
        magnitude_mask(torch.zeros(5), NM("2:4"))
    with pytest.raises(TypeError, match="must be a torch.Tensor, not list"):
        magnitude_mask([1.0], NM("2:4"))  # type: ignore[arg-type]
