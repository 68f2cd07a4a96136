"""Models: by name through :func:`create`, or by their classes."""

from __future__ import annotations

from pathlib import Path

from gpucnn.device import Device
from gpucnn.models.animalnet import AnimalNet
from gpucnn.models.lenet5 import LeNet5
from gpucnn.models.mobilenet import MobileNetV2
from gpucnn.models.model import Model
from gpucnn.models.registry import ModelInfo, available, create, describe
from gpucnn.models.resnet import ResNet, resnet18, resnet50
from gpucnn.models.summary import LayerSummary, ModelSummary, summary
from gpucnn.models.vgg import VGGSmall


def load(path: str | Path, device: str | Device = "cpu") -> Model:
    """The model in a checkpoint file or run folder, on ``device``; see :func:`gpucnn.models.saved.load`."""
    from gpucnn.models.saved import load as load_saved  # loads training, which making a model does not need

    return load_saved(path, device)


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
    "load",
    "resnet18",
    "resnet50",
    "summary",
]
