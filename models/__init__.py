"""Model definitions, one readable file each, and the registry of their names."""

from models.bert import BertClassifier, BertConfig, BertModel, mean_pool
from models.info import Input, ModelInfo, Published
from models.mobilenet import MobileNetConfig, MobileNetV2
from models.registry import create_model, describe_models, list_models, model_info, register_model
from models.regnet import RegNet, RegNetConfig
from models.resnet import ResNet, ResNetConfig
from models.tokenizer import load_tokenizer
from models.vit import ViT, ViTConfig

__all__ = [
    "BertClassifier",
    "BertConfig",
    "BertModel",
    "Input",
    "MobileNetConfig",
    "MobileNetV2",
    "ModelInfo",
    "Published",
    "RegNet",
    "RegNetConfig",
    "ResNet",
    "ResNetConfig",
    "ViT",
    "ViTConfig",
    "create_model",
    "describe_models",
    "list_models",
    "load_tokenizer",
    "mean_pool",
    "model_info",
    "register_model",
]
