"""Whether arrays share memory: a kernel that reads what it has already written gives wrong numbers, no error."""

from __future__ import annotations

from gpucnn_kernels.arrays import DeviceArray
from gpucnn_kernels.errors import ArgumentError


def require_apart(out: DeviceArray, *inputs: DeviceArray | None) -> None:
    """Raise ArgumentError where ``out`` reaches into the bytes from an input's first element to its last."""
    for array in inputs:
        if array is not None and _meet(out, array):
            raise ArgumentError(
                f"{out.name} shares memory with {array.name}, which is still read while it is written; "
                "pass another array"
            )


def require_same_or_apart(out: DeviceArray, *inputs: DeviceArray | None) -> None:
    """Raise ArgumentError where ``out`` shares memory with an input without being it, element for element.

    For kernels that read each element before they write it, and no other thread's.
    """
    for array in inputs:
        if array is None or (array.address == out.address and array.same_layout(out)):
            continue
        if _meet(out, array):
            raise ArgumentError(
                f"{out.name} shares memory with {array.name}, but shifted or in another order, so that elements "
                f"are written before they are read; pass {array.name} itself, or another array"
            )


def _meet(one: DeviceArray, other: DeviceArray) -> bool:
    if one.size == 0 or other.size == 0:
        return False
    first, second = one.pointer(writable=False), other.pointer(writable=False)
    return first.address < second.address + second.size and second.address < first.address + first.size
