"""Checks that the operations share; each message says what came and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from gpucnn.errors import ArgumentError, DtypeError, ShapeError


def require_floating(array: Any, name: str) -> None:
    """Raise DtypeError unless ``array`` is a NumPy array of floating-point numbers."""
    if not isinstance(array, numpy.ndarray):
        raise DtypeError(f"{name} must be a numpy.ndarray, got {type(array).__qualname__}")
    if array.dtype.kind != "f":
        raise DtypeError(
            f"{name} must hold floating-point numbers, got dtype {array.dtype}; convert it with .astype('float32')"
        )


def require_shape(array: Any, shape: Sequence[int], name: str) -> None:
    """Raise ShapeError unless ``array`` has ``shape``."""
    if tuple(array.shape) != tuple(shape):
        raise ShapeError(f"{name} must have shape {tuple(shape)}, got {tuple(array.shape)}")


def require_dimensions(array: Any, dimensions: int, axes: str, name: str) -> None:
    """Raise ShapeError unless ``array`` has ``dimensions`` axes; ``axes`` names them for the message."""
    if array.ndim != dimensions:
        raise ShapeError(f"{name} must have {dimensions} dimensions {axes}, got shape {tuple(array.shape)}")


def require_choice(value: str, choices: Sequence[str], name: str) -> None:
    """Raise ArgumentError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ArgumentError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
