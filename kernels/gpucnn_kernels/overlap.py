"""Whether arrays share memory: a kernel that reads what it has already written gives wrong numbers, no error."""

from __future__ import annotations

from gpucnn_kernels.arrays import DeviceArray
from gpucnn_kernels.errors import ArgumentError


def require_apart(out: DeviceArray, *inputs: DeviceArray | None) -> None:
    """Raise ArgumentError where ``out`` reaches into the bytes from an input's first element to its last."""
    target = out.pointer(writable=False)
    for array in inputs:
        if array is None or array.size == 0 or out.size == 0:
            continue
        source = array.pointer(writable=False)
        if target.address < source.address + source.size and source.address < target.address + target.size:
            raise ArgumentError(
                f"{out.name} shares memory with {array.name}, which is still read while it is written; "
                "pass another array"
            )
