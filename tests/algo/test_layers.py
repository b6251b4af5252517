"""Which layers become sparse, and why others do not."""

import pytest
import torch
from torch import nn

from algo.layers import dense_reasons, match_patterns, row_length, weight_names
from algo.nm import NM
from algo.sparsify import finalize, pattern_of, sparsify, sparsity_report
from algo.verify import verify


class Tied(nn.Module):
    """An embedding whose weight is the output layer's, too, and two linear layers that share theirs."""

    def __init__(self):
        super().__init__()
        self.embed, self.first, self.second, self.out = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 10)
        self.out.weight = self.embed.weight
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.out(self.second(self.first(self.embed(x)).relu()))


def test_heads_are_dense_unless_named():
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 8), "classifier": nn.Sequential(nn.Linear(8, 8))})
    assert list(match_patterns(model, "2:4")) == ["body"]
    assert list(match_patterns(model, "2:4", exclude=())) == ["body", "head", "classifier.0"]
    assert list(match_patterns(model, {"*": "2:4"})) == ["body", "head", "classifier.0"]
    assert dense_reasons(model, "2:4") == {"head": "excluded by 'head'", "classifier.0": "excluded by 'classifier.*'"}


def test_an_output_at_the_top_is_a_head_and_that_of_an_attention_is_not():
    block = nn.ModuleDict({"attention": nn.ModuleDict({"query": nn.Linear(8, 8), "output": nn.Linear(8, 8)})})
    model = nn.ModuleDict({"layers": nn.ModuleList([block]), "output": nn.Linear(8, 8)})
    wanted = ["layers.0.attention.query", "layers.0.attention.output"]
    assert list(match_patterns(model, "2:4")) == wanted
    assert list(match_patterns(nn.ModuleDict({"base": model}), "2:4")) == [f"base.{name}" for name in wanted]


def test_depthwise_convolutions_stay_dense_and_say_why():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=2), nn.Conv1d(6, 4, 3))
    assert match_patterns(model, "2:4") == {"1": NM("2:4"), "2": NM("2:4")}
    assert "a row of 1 weights keeps all of them at 2:4" in dense_reasons(model, "2:4")["0"]
    with pytest.raises(ValueError, match="layer '0' cannot be 2:4: a row of 1 weights"):
        match_patterns(model, {"0": "2:4"})
    rows = sparsity_report(model, "2:4")
    assert rows[0].pattern is None and "depth-wise" in rows[0].reason and rows[1].reason == "no glob matches" * 0


def test_tied_weights_are_handled_once_and_stay_tied():
    model = Tied()
    assert sparsify(model, "2:4") == {"first": NM("2:4"), "second": NM("2:4")}
    assert "is that of the embedding 'embed'" in dense_reasons(model, "2:4")["out"]
    parameters = list(model.parameters())
    assert len({id(p) for p in parameters}) == len(parameters) == 5  # one embedding, one shared weight, three biases
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    model(torch.arange(10)).square().sum().backward()
    optimizer.step()
    assert torch.equal(model.first.weight, model.second.weight)
    finalize(model)
    assert model.first.weight is model.second.weight and model.out.weight is model.embed.weight
    verify(model, {"first": NM("2:4"), "second": NM("2:4")})


@pytest.mark.parametrize("sizes", [{}, {"kdim": 12, "vdim": 20}])
def test_torch_attention_is_one_layer(sizes):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 4, batch_first=True, **sizes)
    inputs = [torch.randn(2, 5, size) for size in (16, sizes.get("kdim", 16), sizes.get("vdim", 16))]
    names = weight_names(layer)
    assert names == (("q_proj_weight", "k_proj_weight", "v_proj_weight") if sizes else ("in_proj_weight",))
    assert row_length(layer) == sizes.get("kdim", 16)
    assert sparsify(layer, "2:4") == {"": NM("2:4"), "out_proj": NM("2:4")}
    before = layer(*inputs)[0]
    before.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    finalize(layer)
    verify(layer, {"": NM("2:4"), "out_proj": NM("2:4")})
    assert torch.allclose(layer(*inputs)[0], before, atol=1e-6) and pattern_of(layer) == NM("2:4")


def test_transformer_encoder_of_torch():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2, enable_nested_tensor=False)
    found = sparsify(model, "1:4", method="magnitude")
    assert list(found)[:4] == ["layers.0.self_attn", "layers.0.self_attn.out_proj", "layers.0.linear1", "layers.0.linear2"]
    verify(model, found)


def test_nothing_matches():
    with pytest.raises(ValueError, match="excluded by"):
        match_patterns(nn.ModuleDict({"head": nn.Linear(8, 8)}), "2:4")
