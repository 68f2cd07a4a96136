"""Dropout: Srivastava et al., JMLR 15 (2014), scaled while training so that evaluation is the identity."""

from __future__ import annotations

import math

import numpy

from gpucnn import random
from gpucnn.errors import ArgumentError, ShapeError
from gpucnn.ops.cpu.checks import require_floating
from gpucnn.ops.cpu.memory import FloatArray, result_array


def _scale(probability: float) -> float:
    if not 0 <= probability <= 1:
        raise ArgumentError(f"the dropout probability must lie between 0 and 1, got {probability!r}")
    return 1 / (1 - probability) if probability < 1 else 0.0


def _masked(x: FloatArray, mask: numpy.ndarray, scale: float, out: FloatArray | None) -> FloatArray:
    result = numpy.empty_like(x, subok=False) if out is None else result_array(out, x.shape, x.dtype)
    with numpy.errstate(all="ignore"):
        # Not x * mask: a dropped infinity or NaN is 0.
        result[...] = numpy.where(mask, x * x.dtype.type(scale), x.dtype.type(0))
    return result


def dropout_forward(
    x: FloatArray,
    *,
    probability: float,
    seed: int,
    offset: int,
    per_channel: bool = False,
    out: FloatArray | None = None,
) -> tuple[FloatArray, FloatArray]:
    """(y, mask): x / (1 - probability) where the boolean mask holds, 0 elsewhere.

    Element i, in C order of the logical array (of (N, C) with ``per_channel``; the mask is then (N, C, 1, 1)), is
    kept where word i of the Philox stream (seed, from offset on) has ``word >= probability * 2**32``.
    Raises ArgumentError for a probability outside 0 .. 1, ShapeError for ``per_channel`` with fewer than 2 axes.
    """
    require_floating(x, "the input")
    scale = _scale(probability)
    shape = x.shape
    if per_channel:
        if x.ndim < 2:
            raise ShapeError(f"dropout of whole channels needs an input (N, C, ...), got shape {x.shape}")
        shape = x.shape[:2] + (1,) * (x.ndim - 2)
    threshold = math.ceil(probability * 2**32)
    count = math.prod(shape)
    if threshold > 0xFFFFFFFF:
        mask = numpy.zeros(shape, numpy.bool_)
    else:
        mask = (random.words(seed, offset, count) >= numpy.uint32(threshold)).reshape(shape)
    return _masked(x, mask, scale, out), mask


def dropout_backward(
    dy: FloatArray, mask: FloatArray, *, probability: float, out: FloatArray | None = None
) -> FloatArray:
    """Dy / (1 - probability) where the mask holds, 0 elsewhere."""
    require_floating(dy, "the output gradient")
    if mask.ndim != dy.ndim or any(m not in (1, d) for m, d in zip(mask.shape, dy.shape, strict=True)):
        raise ShapeError(f"a mask of shape {mask.shape} does not fit an output gradient of shape {dy.shape}")
    return _masked(dy, mask, _scale(probability), out)
