"""What tests of kernels share: dtypes, layouts, and how far a result may be from the truth."""

from __future__ import annotations

import numpy

from gpucnn_kernels.arrays import numpy_dtype
from tests.accuracy import channels_last, max_error

DTYPES = ("float32", "float16", "bfloat16", "float64")
LAYOUTS = {"contiguous": numpy.ascontiguousarray, "channels_last": channels_last}
EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7, "float64": 2.0**-52}
"""From 1 to the next number."""


def accumulated(dtype):
    """The dtype in which kernels compute with arrays of ``dtype``."""
    return "float64" if dtype == "float64" else "float32"


def cast(array, dtype):
    """``array`` rounded to ``dtype``."""
    return array.astype(numpy_dtype(dtype))


def wide(array):
    """The same numbers in float64."""
    return numpy.asarray(array).astype(numpy.float64)


def error_bound(plain, reference, dtype):
    """Twice the error of ``plain``, a plain sum in the accumulating dtype, once it is rounded to ``dtype``.

    It may be exact by luck: so one rounding of the largest number, and two in the accumulating dtype, on top.
    """
    largest = float(numpy.abs(reference).max()) if reference.size else 0.0
    roundings = EPSILON[dtype] / 2 + 2 * EPSILON[accumulated(dtype)]
    return 2 * max_error(wide(cast(plain, dtype)), reference) + roundings * largest
