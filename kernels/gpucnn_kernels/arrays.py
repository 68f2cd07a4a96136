"""Arrays as kernels see them: an address, a shape, strides in elements, a dtype by name, a device.

Two layouts of images (N, C, H, W) are known, as in PyTorch: contiguous, and channels-last, whose memory is ordered
N, H, W, C. Nothing is converted behind the caller's back: another layout is an error that says how to convert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpucnn_kernels.errors import ArgumentError, DtypeError, LayoutError
from gpucnn_kernels.runtime import ITEM_SIZES, Pointer, Runtime


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """An argument: the runtime's ``array``, the object ``given`` by the caller, and what a launch must know."""

    name: str
    array: Any
    given: Any
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    dtype: str
    device: int

    @property
    def size(self) -> int:
        """The number of elements."""
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie in C order without gaps."""
        return _follows(self.shape, self.strides, range(len(self.shape)))

    @property
    def channels_last(self) -> bool:
        """Whether an (N, C, H, W) array lies in memory as N, H, W, C without gaps."""
        return len(self.shape) == 4 and _follows(self.shape, self.strides, (0, 2, 3, 1))

    @property
    def dense(self) -> bool:
        """Whether the elements lie in some order without gaps or overlaps."""
        order = sorted(range(len(self.shape)), key=lambda axis: (-self.strides[axis], -self.shape[axis]))
        return _follows(self.shape, self.strides, order)

    def same_layout(self, other: DeviceArray) -> bool:
        """Whether shape and strides agree, those of axes of length 1 aside."""
        return self.shape == other.shape and (
            0 in self.shape
            or all(
                length < 2 or a == b for length, a, b in zip(self.shape, self.strides, other.strides, strict=True)
            )
        )

    def pointer(self, writable: bool) -> Pointer:
        """The bytes that a kernel may touch through it. Raises DtypeError for a read-only array to be written."""
        flags = getattr(self.array, "flags", None)
        if writable and not getattr(flags, "writeable", True):
            raise DtypeError(f"{self.name} is read-only; pass a writable array")
        if writable and library_of(self.given) in JAX:
            raise DtypeError(f"{self.name} is a JAX array, which never changes; take the result that is returned")
        if any(stride < 0 for length, stride in zip(self.shape, self.strides, strict=True) if length > 1):
            raise LayoutError(
                f"{self.name} has a negative stride {self.strides}; copy it first (ascontiguousarray)"
            )
        last = sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))
        return Pointer(self.address, (last + 1) * ITEM_SIZES[self.dtype] if self.size else 0, writable)


def _follows(shape: Sequence[int], strides: Sequence[int], order: Sequence[int]) -> bool:
    """Whether memory runs through the axes in ``order``, the last one fastest, without gaps."""
    if 0 in shape:  # of nothing, any strides will do
        return True
    expected = 1
    for axis in reversed(order):
        if shape[axis] > 1 and strides[axis] != expected:
            return False
        expected *= shape[axis]
    return True


def device_array(runtime: Runtime, given: Any, name: str) -> DeviceArray:
    """``given`` as a DeviceArray. Raises DtypeError or DeviceError, naming it, where it cannot be one."""
    array = runtime.as_array(given, name)
    dtype = str(array.dtype)
    if dtype not in ITEM_SIZES:
        raise DtypeError(f"{name} has dtype {dtype}; kernels take {', '.join(ITEM_SIZES)}")
    itemsize = ITEM_SIZES[dtype]
    if any(stride % itemsize for stride in array.strides):
        raise LayoutError(
            f"{name} has strides of {array.strides} bytes, no multiples of its {itemsize}-byte elements"
        )
    strides = tuple(stride // itemsize for stride in array.strides)
    address = runtime.address(array)
    if address % itemsize:
        raise LayoutError(
            f"{name} is not aligned to its {itemsize}-byte elements (address {address}); copy it first"
        )
    return DeviceArray(name, array, given, address, tuple(array.shape), strides, dtype, runtime.device(array))


def numpy_dtype(name: str) -> Any:
    """The numpy.dtype of this name; "bfloat16" is ml_dtypes'. Raises DtypeError where that is not installed."""
    import numpy

    if name != "bfloat16":
        return numpy.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        raise DtypeError("bfloat16 arrays need the package ml_dtypes: pip install ml_dtypes") from None
    return numpy.dtype(ml_dtypes.bfloat16)


def shape_of(given: Any, name: str) -> tuple[int, ...]:
    """The shape of any array. Raises DtypeError where there is none."""
    shape = getattr(given, "shape", None)
    if shape is None:
        raise DtypeError(f"{name} must be an array, got {type(given).__module__}.{type(given).__qualname__}")
    return tuple(int(length) for length in shape)


def image_layout(array: DeviceArray) -> str:
    """Which of "contiguous" and "channels_last"; where both fit (one channel, one pixel), "contiguous".

    Raises LayoutError for any other strides, ArgumentError where there are not four axes.
    """
    if len(array.shape) != 4:
        raise ArgumentError(f"{array.name} must have 4 dimensions (N, C, H, W), got shape {array.shape}")
    if array.contiguous:
        return "contiguous"
    if array.channels_last:
        return "channels_last"
    raise LayoutError(
        f"{array.name} of shape {array.shape} has strides {array.strides} (in elements), neither contiguous nor "
        "channels-last; copy it first with ascontiguousarray"
    )


JAX = ("jax", "jaxlib")
"""The packages whose arrays are JAX's."""


def library_of(given: Any) -> str:
    """The package that the type of ``given`` comes from, such as "torch"."""
    return type(given).__module__.partition(".")[0]


def in_kind(array: Any, given: Any) -> Any:
    """A new array as the library of ``given`` would hand it out, on the same memory.

    PyTorch, JAX and Numba arrays are answered with their own kind, CuPy and NumPy ones as they are; for any other
    library the answer is CuPy's (on the host runtime NumPy's), which speaks DLPack.
    """
    kind = library_of(given)
    if kind == "torch":
        import torch

        if str(array.dtype) == "bfloat16":
            return torch.from_dlpack(array.view("int16")).view(torch.bfloat16)
        return torch.from_dlpack(array)
    if kind in JAX:
        import jax

        return jax.dlpack.from_dlpack(array)
    if kind == "numba":
        from numba import cuda

        return cuda.as_cuda_array(array)
    return array
