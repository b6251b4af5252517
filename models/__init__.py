"""Model definitions, one readable file each, and the registry of their names."""

from models.bert import BertClassifier, BertConfig, BertModel, mean_pool
from models.ceit import CeiT, CeiTConfig
from models.dab_detr import DabDetr, DabDetrConfig
from models.deformable_detr import DeformableDetr, DeformableDetrConfig
from models.detection import Detections, DetectorOutput, Target, pad_images
from models.detr import Detr, DetrConfig
from models.dgnet import RouterConfig, dynamic_graph
from models.fcos import FCOS, FCOSConfig
from models.group_rcnn import GroupRCNN, GroupRCNNConfig
from models.info import Input, ModelInfo, Published
from models.llama import Llama, LlamaConfig, generate
from models.llama_adapter import AdapterConfig, ClassTokens, LlamaAdapter
from models.maskformer import MaskFormer, MaskFormerConfig, MaskOutput, MaskTarget, Segmenter
from models.mobilenet import MobileNetConfig, MobileNetV2
from models.odconv import ODConv2d
from models.pft import PFT, PFTConfig
from models.points import PointTarget, pseudo_target, sample_points
from models.registry import create_model, describe_models, list_models, model_info, register_model
from models.regnet import RegNet, RegNetConfig
from models.resnet import ResNet, ResNetConfig
from models.retinanet import RetinaNet, RetinaNetConfig
from models.swin import Swin, SwinBackbone, SwinConfig
from models.tokenizer import load_tokenizer
from models.vit import ViT, ViTConfig

__all__ = [
    "FCOS",
    "PFT",
    "AdapterConfig",
    "BertClassifier",
    "BertConfig",
    "BertModel",
    "CeiT",
    "CeiTConfig",
    "ClassTokens",
    "DabDetr",
    "DabDetrConfig",
    "DeformableDetr",
    "DeformableDetrConfig",
    "Detections",
    "DetectorOutput",
    "Detr",
    "DetrConfig",
    "FCOSConfig",
    "GroupRCNN",
    "GroupRCNNConfig",
    "Input",
    "Llama",
    "LlamaAdapter",
    "LlamaConfig",
    "MaskFormer",
    "MaskFormerConfig",
    "MaskOutput",
    "MaskTarget",
    "MobileNetConfig",
    "MobileNetV2",
    "ModelInfo",
    "ODConv2d",
    "PFTConfig",
    "PointTarget",
    "Published",
    "RegNet",
    "RegNetConfig",
    "ResNet",
    "ResNetConfig",
    "RetinaNet",
    "RetinaNetConfig",
    "RouterConfig",
    "Segmenter",
    "Swin",
    "SwinBackbone",
    "SwinConfig",
    "Target",
    "ViT",
    "ViTConfig",
    "create_model",
    "describe_models",
    "dynamic_graph",
    "generate",
    "list_models",
    "load_tokenizer",
    "mean_pool",
    "model_info",
    "pad_images",
    "pseudo_target",
    "register_model",
    "sample_points",
]
