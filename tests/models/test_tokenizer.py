import pytest

from models import load_tokenizer


def test_wordpiece_of_the_published_model():
    tokenizer = load_tokenizer()
    code = tokenizer.encode("Hello, unbelievably GOOD world!")
    assert code.tokens[0] == "[CLS]" and code.tokens[-1] == "[SEP]" and "good" in code.tokens
    assert code.ids[0] == 101 and code.ids[-1] == 102
    assert len(tokenizer.encode("a " * 1000).ids) == 1002  # no truncation
    assert [len(c.ids) for c in tokenizer.encode_batch(["a", "a b c"])] == [3, 5]  # no padding


def test_falls_back_to_the_vocabulary(monkeypatch):
    from models import tokenizer as module

    whole = load_tokenizer()
    real = module.distribution_file

    def without_json(distribution, name):
        if name == "tokenizer.json":
            raise FileNotFoundError(name)
        return real(distribution, name)

    monkeypatch.setattr(module, "distribution_file", without_json)
    text = "It's a Café, unbelievably good!"
    assert load_tokenizer().encode(text).ids == whole.encode(text).ids


def test_unknown_model():
    with pytest.raises(ValueError, match="no tokenizer for 'bert_base': there is one for minilm_l6"):
        load_tokenizer("bert_base")
