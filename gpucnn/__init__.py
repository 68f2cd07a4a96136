"""Convolutional networks on NVIDIA GPUs in kernels you can read, and the same program on NumPy.

``import gpucnn`` loads NumPy and nothing else; data, models, training and visualize load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gpucnn import errors, initializers, layers, losses, ops, random
from gpucnn.random import manual_seed

if TYPE_CHECKING:
    from gpucnn import data, gradient_check, metrics, models, optimizers, schedules, training, visualize
    from gpucnn.models.model import Model, Sequential

__version__ = "0.1.0"

_MODULES = ("data", "gradient_check", "metrics", "models", "optimizers", "schedules", "training", "visualize")
_FROM_MODELS = ("Model", "Sequential")

__all__ = [
    "Model",
    "Sequential",
    "data",
    "errors",
    "gradient_check",
    "initializers",
    "layers",
    "losses",
    "manual_seed",
    "metrics",
    "models",
    "ops",
    "optimizers",
    "random",
    "schedules",
    "training",
    "visualize",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"gpucnn.{name}")
    if name in _FROM_MODELS:
        return getattr(import_module("gpucnn.models.model"), name)
    raise AttributeError(f"module 'gpucnn' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
