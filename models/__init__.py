"""Model definitions, one readable file each, and the registry of their names."""

from models.bert import BertClassifier, BertConfig, BertModel, mean_pool
from models.dab_detr import DabDetr, DabDetrConfig
from models.deformable_detr import DeformableDetr, DeformableDetrConfig
from models.detection import Detections, DetectorOutput, Target, pad_images
from models.detr import Detr, DetrConfig
from models.fcos import FCOS, FCOSConfig
from models.group_rcnn import GroupRCNN, GroupRCNNConfig
from models.mobilenet import MobileNetConfig, MobileNetV2
from models.registry import create_model, list_models, register_model
from models.regnet import RegNet, RegNetConfig
from models.resnet import ResNet, ResNetConfig
from models.retinanet import RetinaNet, RetinaNetConfig
from models.tokenizer import load_tokenizer
from models.vit import ViT, ViTConfig

__all__ = [
    "FCOS",
    "BertClassifier",
    "BertConfig",
    "BertModel",
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
    "MobileNetConfig",
    "MobileNetV2",
    "RegNet",
    "RegNetConfig",
    "ResNet",
    "ResNetConfig",
    "RetinaNet",
    "RetinaNetConfig",
    "Target",
    "ViT",
    "ViTConfig",
    "create_model",
    "list_models",
    "load_tokenizer",
    "mean_pool",
    "pad_images",
    "register_model",
]
