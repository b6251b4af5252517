"""The WordPiece tokenizer that belongs to a model's published weights."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.implementations.bert_wordpiece import BertWordPieceTokenizer

from models.bert import DISTRIBUTIONS
from models.weights import distribution_file

__all__ = ["load_tokenizer"]


def load_tokenizer(name: str = "minilm_l6") -> Tokenizer:
    """Load the tokenizer of a model: lower-casing WordPiece with [CLS] and [SEP], no truncation, no padding.

    ``load_tokenizer().encode("...").ids`` gives the token numbers.

    Raises
    ------
    ValueError
        No package carries that model's tokenizer.
    FileNotFoundError
        The package is not installed.
    """
    if name not in DISTRIBUTIONS:
        raise ValueError(f"no tokenizer for {name!r}: there is one for {', '.join(sorted(DISTRIBUTIONS))}")
    distribution = DISTRIBUTIONS[name]
    try:
        tokenizer = Tokenizer.from_file(str(distribution_file(distribution, "tokenizer.json")))
    except FileNotFoundError:
        vocabulary = str(distribution_file(distribution, "vocab.txt"))
        tokenizer = Tokenizer.from_str(BertWordPieceTokenizer(vocabulary).to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
