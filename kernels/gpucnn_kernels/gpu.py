"""What a GPU can do, from what its driver says of it: rates and bandwidths to reckon a kernel's time with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Floating-point operations a clock of a multiprocessor, a multiply-add counted as two, by compute capability:
# float32 and float64 from the CUDA C++ Programming Guide's table "Throughput of Native Arithmetic Instructions";
# 16-bit tensor cores, summing in float32, from the datasheets' rates: T4 65 TFLOP/s (40 multiprocessors, 1.59
# GHz), A100 312, A40 150, L40S 362, H100 989, B200 2250, GeForce 5090 210. tf32 is half of that, from 8.0 on.
_OPERATIONS: dict[tuple[int, int], tuple[int, int, int]] = {
    (7, 0): (128, 64, 1024),
    (7, 5): (128, 4, 1024),
    (8, 0): (128, 64, 2048),
    (8, 6): (256, 4, 1024),
    (8, 9): (256, 4, 1024),
    (9, 0): (256, 128, 4096),
    (10, 0): (256, 128, 8192),
    (12, 0): (256, 4, 512),
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU's size and speed.

    ``clock`` is in Hz, ``bandwidth`` the datasheet's bytes a second of its memory.
    """

    name: str
    multiprocessors: int
    capability: tuple[int, int]
    clock: float
    bandwidth: float

    def rate(self, precision: str) -> float:
        """Peak FLOP/s: "float32" and "float64" of the plain units, "tf32" and "16-bit" of the tensor cores.

        0 where there are none.
        """
        known = [capability for capability in _OPERATIONS if capability <= self.capability]
        plain, double, tensor = _OPERATIONS[max(known, default=(7, 0))]
        tf32 = tensor // 2 if self.capability >= (8, 0) else 0
        operations = {"float32": plain, "float64": double, "16-bit": tensor, "tf32": tf32}[precision]
        return operations * self.multiprocessors * self.clock


H200 = Gpu("H200", 132, (9, 0), 1.98e9, 4.8e12)
"""What stands for a GPU where there is none, and for what a driver does not say: the datasheet's numbers."""


def gpu_of(runtime: str, device: int, capability: tuple[int, int]) -> Gpu:
    """The GPU of this number, of this compute capability.

    Where kernels run elsewhere than on CUDA it is the datasheet's H200, so that choices are those of a GPU, but
    without tensor cores where the capability has none.
    """
    if runtime == "cuda":
        return _on_cuda(device, capability)
    return H200 if capability >= (8, 0) else dataclasses.replace(H200, capability=capability)


@functools.cache
def _on_cuda(device: int, capability: tuple[int, int]) -> Gpu:
    import cupy

    return from_attributes(f"cuda:{device}", capability, cupy.cuda.Device(device).attributes)


def from_attributes(name: str, capability: tuple[int, int], attributes: Mapping[str, Any]) -> Gpu:
    """A GPU from CUDA's device attributes: clocks in kHz, the bus in bits. Some drivers give 0 for a clock."""
    memory_clock, bus = attributes.get("MemoryClockRate", 0), attributes.get("GlobalMemoryBusWidth", 0)
    return Gpu(
        name,
        int(attributes.get("MultiProcessorCount", 0)) or H200.multiprocessors,
        capability,
        1e3 * attributes.get("ClockRate", 0) or H200.clock,
        2 * 1e3 * memory_clock * bus / 8 or H200.bandwidth,  # twice a clock: all memories since 2008
    )
