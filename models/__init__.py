"""Model definitions, one readable file each, and the registry of their names."""

from models.bert import BertClassifier, BertConfig, BertModel, mean_pool
from models.ceit import CeiT, CeiTConfig
from models.dgnet import RouterConfig, dynamic_graph
from models.mobilenet import MobileNetConfig, MobileNetV2
from models.odconv import ODConv2d
from models.registry import create_model, list_models, register_model
from models.regnet import RegNet, RegNetConfig
from models.resnet import ResNet, ResNetConfig
from models.tokenizer import load_tokenizer
from models.vit import ViT, ViTConfig

__all__ = [
    "BertClassifier",
    "BertConfig",
    "BertModel",
    "CeiT",
    "CeiTConfig",
    "MobileNetConfig",
    "MobileNetV2",
    "ODConv2d",
    "RegNet",
    "RegNetConfig",
    "ResNet",
    "ResNetConfig",
    "RouterConfig",
    "ViT",
    "ViTConfig",
    "create_model",
    "dynamic_graph",
    "list_models",
    "load_tokenizer",
    "mean_pool",
    "register_model",
]
