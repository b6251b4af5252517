"""Model definitions, one readable file each, and the registry of their names."""

from models.bert import BertClassifier, BertConfig, BertModel, mean_pool
from models.registry import create_model, list_models, register_model
from models.tokenizer import load_tokenizer

__all__ = [
    "BertClassifier",
    "BertConfig",
    "BertModel",
    "create_model",
    "list_models",
    "load_tokenizer",
    "mean_pool",
    "register_model",
]
