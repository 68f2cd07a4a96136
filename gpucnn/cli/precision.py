"""The precision that a run computes in."""

from __future__ import annotations

from gpucnn.device import Device
from gpucnn.layers.precision import WIDE


def described(precision: str, device: Device) -> str:
    """``precision`` in words for a line about a run: on the CPU those of a GPU's tensor cores save nothing."""
    if str(device) != "cpu" or precision in WIDE:
        return precision
    return f"{precision} (rounded as on a GPU; slower than float32 on the CPU)"


def input_dtype(precision: str) -> str:
    """The dtype of the images that a network in ``precision`` is given: the one of its weights."""
    return "float64" if precision == "float64" else "float32"
