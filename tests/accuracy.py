"""Bounds by comparison: our error against float64 may be at most twice that of a plain computation."""

import numpy


def max_error(actual, reference):
    """The largest absolute difference; NaN if there is one anywhere, which fails every ``<=``."""
    difference = numpy.abs(numpy.asarray(actual, numpy.float64) - reference)
    return float(difference.max()) if difference.size else 0.0


def error_bound(plain, reference, scale=0.0):
    """Twice the error of ``plain``, which may be exact by luck: so two roundings of the largest value on top.

    ``scale`` is the size of the terms where the result is a sum that cancels.
    """
    plain = numpy.asarray(plain)
    largest = max(float(numpy.abs(reference).max()) if numpy.size(reference) else 0.0, float(scale))
    return 2 * max_error(plain, reference) + 2 * float(numpy.finfo(plain.dtype).eps) * largest


def awkward(array):
    """The same numbers in a view with neither C nor Fortran order, and a negative stride on the last axis."""
    spaced = numpy.zeros((*array.shape[:-1], 2 * array.shape[-1] + 1), array.dtype)
    view = spaced[..., -2::-2] if array.shape[-1] else spaced[..., :0]
    view[...] = array
    return view


def channels_last(array):
    """The same numbers (N, C, H, W) with memory that runs N, H, W, C."""
    return numpy.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
