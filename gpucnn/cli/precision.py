"""The precision that a run computes in."""

from __future__ import annotations

from typing import Any

import numpy

from gpucnn.device import Device
from gpucnn.errors import ArgumentError

DTYPES = {"float32": numpy.float32, "float64": numpy.float64}
"""What networks are trained in, on every device."""


def choose_dtype(precision: str, device: Device) -> Any:
    """The dtype for ``precision``; ArgumentError, with the reason, where the device cannot compute in it."""
    if precision in DTYPES:
        return DTYPES[precision]
    known = " or ".join(DTYPES)
    if device.name == "cuda":
        raise ArgumentError(
            f"this version of gpucnn trains in {known}, not in '{precision}'; choose one of these with --precision"
        )
    raise ArgumentError(
        f"precision '{precision}' is arithmetic of a GPU's tensor cores, and the device is '{device.name}' "
        f"({device.reason}), which computes in {known}; choose one of these with --precision"
    )
