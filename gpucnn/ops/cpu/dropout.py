"""Dropout: Srivastava et al., JMLR 15 (2014), scaled while training so that evaluation is the identity."""

from __future__ import annotations

import math

import numpy

from gpucnn import random
from gpucnn.ops.checks import check_mask, check_probability, dropout_mask_shape, require_floating
from gpucnn.ops.cpu import compiled
from gpucnn.ops.cpu.blocks import contiguously
from gpucnn.ops.cpu.compiled import dropout as loops
from gpucnn.ops.cpu.memory import FloatArray, result_like
from gpucnn.recycling import memory


def _scale(probability: float) -> float:
    check_probability(probability)
    return 1 / (1 - probability) if probability < 1 else 0.0


def _masked(x: FloatArray, mask: numpy.ndarray, scale: float, out: FloatArray | None) -> FloatArray:
    result = result_like(out, x)
    by_rows = mask.shape == (*x.shape[:2], *(1,) * (x.ndim - 2))  # a channel's numbers lie behind one another
    known = mask.dtype == numpy.bool_ and (mask.shape == x.shape or by_rows)
    if compiled.available() and x.dtype == numpy.float32 and known:
        bits = numpy.ascontiguousarray(mask)

        def multiply(values: FloatArray, kept: FloatArray) -> None:
            if bits.shape == values.shape:
                loops.dropout_multiply(values.size, scale, values, bits, kept)
            else:
                loops.dropout_rows(bits.size, math.prod(values.shape[2:]), scale, values, bits, kept)

        return contiguously(multiply, result, x)
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
    shape = dropout_mask_shape(x, per_channel)
    threshold = math.ceil(probability * 2**32)
    count = math.prod(shape)
    if threshold > 0xFFFFFFFF:
        mask = numpy.zeros(shape, numpy.bool_)
    elif compiled.available() and offset + count <= 1 << 64:  # the loops count words in 64 bits
        mask = memory.empty(shape, numpy.bool_)
        result = result_like(out, x)
        if not per_channel and compiled.usable(x, result):
            loops.dropout_forward(count, seed, offset, threshold, scale, x, mask, result)
            return result, mask
        loops.dropout_mask(count, seed, offset, threshold, mask)
    else:
        mask = (random.words(seed, offset, count) >= numpy.uint32(threshold)).reshape(shape)
    return _masked(x, mask, scale, out), mask


def dropout_backward(
    dy: FloatArray, mask: FloatArray, *, probability: float, out: FloatArray | None = None
) -> FloatArray:
    """Dy / (1 - probability) where the mask holds, 0 elsewhere."""
    check_mask(mask, dy)
    return _masked(dy, mask, _scale(probability), out)
