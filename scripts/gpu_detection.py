"""Asks an NVIDIA driver what it is, and picks the CuPy that fits it. Standard library only; part of run.py."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from typing import NamedTuple

EXTRAS = ("cuda13", "cuda12")  # the newest first

# The first driver of each CUDA generation, and the least compute capability that its libraries hold code for.
DRIVER_FOR = {"cuda13": 580, "cuda12": 525}
CAPABILITY_FOR = {"cuda13": (7, 5), "cuda12": (5, 0)}


class Found(NamedTuple):
    """The driver's major version, and the least compute capability of the GPUs (None where it was not told)."""

    driver: int
    capability: tuple[int, int] | None


def ask_nvidia_smi() -> Found | None:
    """What the driver's command line tool says; None without the tool or a GPU."""
    tool = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path="/usr/lib/wsl/lib")
    if tool is None:
        return None
    for fields in ("driver_version,compute_cap", "driver_version"):  # old drivers do not know compute_cap
        query = [tool, f"--query-gpu={fields}", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None
        found = parse_nvidia_smi(answer.stdout) if answer.returncode == 0 else None
        if found is not None:
            return found
    return None


def parse_nvidia_smi(text: str) -> Found | None:
    """Read lines like "580.65.06, 9.0", one a GPU."""
    drivers, capabilities = [], []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        try:
            drivers.append(int(fields[0].split(".")[0]))
            if len(fields) > 1:
                major, minor = fields[1].split(".")
                capabilities.append((int(major), int(minor)))
        except ValueError:
            continue  # "[N/A]", or a message in place of a line
    return Found(min(drivers), min(capabilities, default=None)) if drivers else None


def ask_driver_library() -> Found | None:
    """What the driver's own library says, where nvidia-smi is not on the path (in containers, often).

    It tells the CUDA version that it serves, not the driver's number: the first driver of that CUDA stands in.
    """
    library = load_driver_library()
    if library is None:
        return None
    version, count = ctypes.c_int(), ctypes.c_int()
    if library.cuInit(0) != 0 or library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    if library.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return None
    capabilities = []
    for ordinal in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        if library.cuDeviceGet(ctypes.byref(device), ordinal) == 0:
            library.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # compute capability, major
            library.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # and minor
            capabilities.append((major.value, minor.value))
    extra = f"cuda{min(version.value // 1000, 13)}"
    return Found(DRIVER_FOR.get(extra, 1), min(capabilities, default=None))


def load_driver_library() -> ctypes.CDLL | None:
    """The CUDA driver's library, where there is one."""
    for name in ("nvcuda.dll",) if os.name == "nt" else ("libcuda.so.1", "libcuda.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def choose_extra(found: Found | None) -> tuple[str, str]:
    """(the extra or "none", the reason): the newest CUDA that both the driver and the GPU can run."""
    if found is None:
        return "none", "no NVIDIA driver found"
    driver, capability = found
    gpu = "a GPU" if capability is None else "a GPU of compute capability {}.{}".format(*capability)
    reason = f"NVIDIA driver {driver} and {gpu} found"
    for extra in EXTRAS:
        if driver >= DRIVER_FOR[extra] and (capability is None or capability >= CAPABILITY_FOR[extra]):
            return extra, reason
    return "none", f"{reason}, but CUDA 12 needs driver {DRIVER_FOR['cuda12']} and compute capability 5.0"


def detect() -> Found | None:
    """What this machine's driver says, by whichever way it answers."""
    return ask_nvidia_smi() or ask_driver_library()
