"""Models: by name through :func:`create`, or by their classes."""

from gpucnn.models.animalnet import AnimalNet
from gpucnn.models.lenet5 import LeNet5
from gpucnn.models.mobilenet import MobileNetV2
from gpucnn.models.model import Model
from gpucnn.models.registry import ModelInfo, available, create, describe
from gpucnn.models.resnet import ResNet, resnet18, resnet50
from gpucnn.models.summary import LayerSummary, ModelSummary, summary
from gpucnn.models.vgg import VGGSmall

__all__ = [
    "AnimalNet",
    "LayerSummary",
    "LeNet5",
    "MobileNetV2",
    "Model",
    "ModelInfo",
    "ModelSummary",
    "ResNet",
    "VGGSmall",
    "available",
    "create",
    "describe",
    "resnet18",
    "resnet50",
    "summary",
]
