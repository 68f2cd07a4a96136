"""Layers: PyTorch's names, arguments, defaults and layouts; forward and backward written out."""

from gpucnn.layers.activations import GELU, LeakyReLU, ReLU, ReLU6, Sigmoid, SiLU, Softmax, Tanh
from gpucnn.layers.containers import Concatenate, Identity, Residual, Sequential
from gpucnn.layers.convolution import Conv2d, ConvTranspose2d
from gpucnn.layers.dropout import Dropout, Dropout2d
from gpucnn.layers.layer import Layer
from gpucnn.layers.linear import Flatten, Linear
from gpucnn.layers.normalization import BatchNorm1d, BatchNorm2d
from gpucnn.layers.pooling import AdaptiveAvgPool2d, AvgPool2d, MaxPool2d

__all__ = [
    "GELU",
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "Concatenate",
    "Conv2d",
    "ConvTranspose2d",
    "Dropout",
    "Dropout2d",
    "Flatten",
    "Identity",
    "Layer",
    "LeakyReLU",
    "Linear",
    "MaxPool2d",
    "ReLU",
    "ReLU6",
    "Residual",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Tanh",
]
