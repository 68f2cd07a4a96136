"""The precision that a run computes in."""

from __future__ import annotations

from typing import Any

import numpy

from gpucnn.device import Device
from gpucnn.errors import ArgumentError

ON_CPU = {"float32": numpy.float32, "float64": numpy.float64}


def choose_dtype(precision: str, device: Device) -> Any:
    """The dtype for ``precision``; ArgumentError, with the reason, where the device cannot compute in it."""
    if precision not in ON_CPU:
        raise ArgumentError(
            f"precision '{precision}' is arithmetic of a GPU's tensor cores, and the device is '{device.name}' "
            f"({device.reason}), which computes in {' or '.join(ON_CPU)}; choose one of these with --precision"
        )
    return ON_CPU[precision]
