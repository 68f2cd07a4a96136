"""What the tests of the batch norm kernels share: their numbers, and the layouts that these come in."""

from __future__ import annotations

from functools import cache

import numpy

from tests.accuracy import channels_last
from tests.kernel_arrays import accumulated, cast, wide


@cache
def inputs(shape, mean=0.3, spread=2.0, seed=0):
    """x, weight, bias, dy in float64, of numbers that all four dtypes have."""
    random = numpy.random.default_rng(seed)
    x = mean + spread * random.standard_normal(shape)
    weight = 1 + 0.5 * random.standard_normal(shape[1])
    arrays = x, weight, random.standard_normal(shape[1]), random.standard_normal(shape)
    return tuple(wide(cast(array, "bfloat16")) for array in arrays)


def layouts(x):
    return (numpy.ascontiguousarray, channels_last) if x.ndim == 4 else (numpy.ascontiguousarray,)


def ending_inputs(shape, layout, dtype):
    """(x, residual, dy) in ``dtype``, (weight, bias) in what it accumulates in."""
    x, weight, bias, dy = inputs(shape)
    arrays = [layout(cast(array, dtype)) for array in (x, inputs(shape, seed=1)[0], dy)]
    return arrays, [array.astype(accumulated(dtype)) for array in (weight, bias)]
