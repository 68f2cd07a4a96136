"""The memory of results: their layout, and the dtype to calculate in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import DTypeLike, NDArray

from gpucnn.ops.checks import check_out
from gpucnn.recycling import memory

FloatArray = NDArray[Any]


def calculation_dtype(dtype: DTypeLike) -> numpy.dtype[Any]:
    """The dtype to calculate in: float32 for half precision, otherwise the dtype itself."""
    given = numpy.dtype(dtype)
    return numpy.dtype(numpy.float32) if given.itemsize < 4 else given


def result_array(
    out: Any, shape: Sequence[int], dtype: DTypeLike, like: NDArray[Any] | None = None
) -> NDArray[Any]:
    """``out`` after a check of its shape and dtype, or a new array where it is None.

    A new four-dimensional array is channels-last where ``like`` is channels-last and not contiguous.
    """
    size = tuple(int(length) for length in shape)
    if out is None:
        if like is not None and len(size) == 4 and is_channels_last(like):
            n, c, h, w = size
            return memory.empty((n, h, w, c), dtype).transpose(0, 3, 1, 2)
        return memory.empty(size, dtype)
    check_out(out, size, dtype)
    result: NDArray[Any] = out
    return result


def result_like(out: Any, x: NDArray[Any]) -> NDArray[Any]:
    """``out`` after a check against the shape and dtype of x, or a new array, laid out as x, where it is None."""
    if out is not None:
        return result_array(out, x.shape, x.dtype)
    return memory.empty(x.shape, x.dtype) if x.flags.c_contiguous else numpy.empty_like(x, subok=False)


def is_channels_last(array: NDArray[Any]) -> bool:
    """Whether a 4-d array's memory runs N, H, W, C and is not contiguous as N, C, H, W as well."""
    return array.ndim == 4 and not array.flags.c_contiguous and array.transpose(0, 2, 3, 1).flags.c_contiguous


def flat_views(*arrays: NDArray[Any]) -> list[NDArray[Any]] | None:
    """The arrays as 1-d views that walk their memory in one common order, or None where there is none.

    It exists where all arrays are dense and their axes lie in memory in the same order.
    """
    first = arrays[0]
    if all(array.flags.c_contiguous for array in arrays):
        return [array.reshape(-1) for array in arrays]
    order = sorted(range(first.ndim), key=lambda axis: -abs(first.strides[axis]))
    views = [array.transpose(order) for array in arrays]
    if all(view.flags.c_contiguous for view in views):
        return [view.reshape(-1) for view in views]
    return None
