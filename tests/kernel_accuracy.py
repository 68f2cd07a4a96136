"""What the tests of the kernels share: the four element types, their rounding, the layouts, the host runtime."""

import ml_dtypes
import numpy
import pytest

from gpucnn_kernels import runtime
from gpucnn_kernels.runtime.host_launch import ptx_architecture
from tests.accuracy import channels_last

DTYPES = {
    "float32": numpy.dtype(numpy.float32),
    "float16": numpy.dtype(numpy.float16),
    "bfloat16": numpy.dtype(ml_dtypes.bfloat16),
    "float64": numpy.dtype(numpy.float64),
}
LAYOUTS = {"contiguous": numpy.ascontiguousarray, "channels_last": channels_last}

EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.fixture(autouse=True)
def on_the_host():
    """Import this into a test module, and its kernels run on the host runtime."""
    with runtime.using("host"):
        yield


def flushes_subnormals():
    """Whether subnormal numbers of float32 are made 0, as NVRTC's code does, and the host's own does not."""
    return ptx_architecture() is not None


def epsilon(dtype):
    """The distance from 1 to the next number: twice the largest relative error of a rounding."""
    return float(ml_dtypes.finfo(dtype).eps)


def wide(dtype):
    """What kernels compute in: float32 for 16-bit elements, otherwise the dtype itself."""
    return numpy.dtype(numpy.float32) if dtype.itemsize == 2 else dtype


def normal(shape, seed, dtype):
    return numpy.random.default_rng(seed).standard_normal(shape).astype(dtype)


def poisoned(shape, dtype, layout="contiguous"):
    """An array for a result, full of a number that no result here holds: what is not written shows."""
    return LAYOUTS[layout](numpy.full(shape, 54321, dtype)) if len(shape) == 4 else numpy.full(shape, 54321, dtype)


def placed(array, elements=0):
    """The same numbers, axes in the same order, in memory ``elements`` behind a multiple of 16 bytes."""
    order = sorted(range(array.ndim), key=lambda axis: (-array.strides[axis], -array.shape[axis]))
    memory = numpy.empty(array.nbytes + 16 + elements * array.itemsize, numpy.uint8)
    start = -memory.ctypes.data % 16 + elements * array.itemsize
    flat = memory[start : start + array.nbytes].view(array.dtype)
    view = flat.reshape([array.shape[axis] for axis in order]).transpose(numpy.argsort(order))
    view[...] = array
    return view


def follows(result, model):
    """Whether a result is contiguous where ``model`` is, and otherwise channels-last."""
    return (
        result.flags.c_contiguous if model.flags.c_contiguous else result.transpose(0, 2, 3, 1).flags.c_contiguous
    )


def assert_close(actual, expected, scale, label=""):
    """Each element within the rounding of its own storage, and four of the arithmetic at size ``scale``."""
    error = numpy.abs(numpy.asarray(actual, numpy.float64) - expected)
    dtype = actual.dtype
    bound = epsilon(dtype) * numpy.abs(expected) + 4 * epsilon(wide(dtype)) * scale
    if dtype == numpy.float16:
        bound = bound + 2.0**-24  # below its smallest normal number the spacing is constant
    assert actual.shape == expected.shape, label
    assert (error <= bound).all(), f"{label}: {float((error - bound).max()):.3g} over the bound"
