"""The precision that a run computes in."""

from __future__ import annotations

from gpucnn.device import Device
from gpucnn.layers.precision import PRECISIONS, WIDE, check_precision


def choose_precision(precision: str, device: Device) -> str:
    """``precision``; ArgumentError, with the reason, where the device cannot compute in it."""
    check_precision(precision, str(device), device.reason)
    return precision


def input_dtype(precision: str) -> str:
    """The dtype of the images that a network in ``precision`` is given: the one of its weights."""
    return "float64" if precision == "float64" else "float32"


def precisions_of(device: str) -> tuple[str, ...]:
    """The names that ``device`` ("cpu", "cuda:1") computes in."""
    return WIDE if device == "cpu" else PRECISIONS
