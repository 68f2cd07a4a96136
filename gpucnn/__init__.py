"""Convolutional networks on NVIDIA GPUs in kernels you can read, and the same program on NumPy.

Each part loads on first use (PEP 562), so ``import gpucnn`` costs next to nothing; layers and operations load
NumPy and nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpucnn import (
        data,
        device,
        errors,
        gradient_check,
        initializers,
        layers,
        losses,
        metrics,
        models,
        ops,
        optimizers,
        parameters,
        random,
        schedules,
        training,
        visualize,
    )
    from gpucnn.models.model import Model, Sequential
    from gpucnn.random import manual_seed

__version__ = "0.1.0"

_ORIGINS = {"Model": "gpucnn.models.model", "Sequential": "gpucnn.models.model", "manual_seed": "gpucnn.random"}

__all__ = [
    "Model",
    "Sequential",
    "data",
    "device",
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
    "parameters",
    "random",
    "schedules",
    "training",
    "visualize",
]


def __getattr__(name: str) -> Any:
    if name in _ORIGINS:
        return getattr(import_module(_ORIGINS[name]), name)
    if name in __all__:
        return import_module(f"gpucnn.{name}")
    raise AttributeError(f"module 'gpucnn' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
