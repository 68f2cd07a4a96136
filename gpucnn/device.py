"""Where computations run: chosen once, with the reason said."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

from gpucnn.errors import ArgumentError, DeviceError

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Device:
    """A chosen device: its ``name`` ("cpu" or "cuda") and the ``reason`` for the choice, for the user to read."""

    name: str
    reason: str


def cuda_status() -> tuple[bool, str]:
    """(whether CUDA can be used, the reason): a CuPy that imports is not yet a GPU that works."""
    if importlib.util.find_spec("gpucnn.ops.cuda") is None:
        return False, "this version of gpucnn has no CUDA operations yet"
    if importlib.util.find_spec("cupy") is None:
        return False, "CuPy is not installed (pip install 'gpucnn[cuda12]' or 'gpucnn[cuda13]')"
    try:
        import cupy

        if not cupy.cuda.is_available():
            return False, "CuPy is installed but finds no usable NVIDIA GPU or driver"
        properties = cupy.cuda.runtime.getDeviceProperties(0)
    except Exception as error:  # CuPy raises many kinds for a broken driver or library; each is a reason
        return False, f"CuPy does not work here: {error}"
    return True, f"{properties['name'].decode()} found"


def choose_device(requested: str | None = None) -> Device:
    """The device for ``requested``, else for $GPUCNN_DEVICE, else for "auto".

    "auto" takes CUDA where it works and the CPU elsewhere, and says why. Raises DeviceError, with the reason,
    where "cuda" is asked for and cannot be used; ArgumentError for any other name.
    """
    source = "asked for"
    if requested is None:
        requested = os.environ.get("GPUCNN_DEVICE") or "auto"
        source = "set by GPUCNN_DEVICE"
    if requested not in DEVICES:
        raise ArgumentError(f"unknown device '{requested}'; choose one of {', '.join(DEVICES)}")
    if requested == "cpu":
        return Device("cpu", source)
    usable, reason = cuda_status()
    if requested == "cuda":
        if not usable:
            raise DeviceError(f"device 'cuda' cannot be used: {reason}; use --device cpu, or auto to fall back")
        return Device("cuda", f"{source}; {reason}")
    return Device("cuda" if usable else "cpu", f"auto: {reason}")
