"""Activations and softmax. ``out`` may be the input itself: each block is read before it is written.

float32 is done by the compiled loops where there are such (``compiled/activations.py``). What
follows is of the NumPy way.

exp(-x) is taken as 2^(-x log2 e): NumPy's exp2 is twice as fast as its exp, and the factor costs no pass, as it
takes the sign's place. Its rounding moves the power by |x| roundings, as does a rounding of x itself.

Limit: reading the inputs and writing the result, 0.27 ns a number forward and 0.45 backward at the speed of a
copy. A pass costs some 0.1 ns, exp2 0.23, exp 0.44, a division 0.19. Measured on one thread, in turns, ns a number
of 3.2 million in float32, forward and backward, with exp and more passes before, and as now:

========  ==========  ==========
function  before      now
========  ==========  ==========
sigmoid   1.5   1.2   1.2   1.2
silu      1.6   2.8   1.4   2.3
gelu      5.1   5.7   3.7   4.4
========  ==========  ==========

Sigmoid as (1 + tanh(x / 2)) / 2 has as many passes and loses the digits of small results. GELU's polynomial as
powers times coefficients, a matrix product, was no faster than Horner's rule.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy

from gpucnn.ops.checks import check_axis, check_gradient, require_floating, require_shape
from gpucnn.ops.cpu import compiled
from gpucnn.ops.cpu.blocks import contiguously, elementwise
from gpucnn.ops.cpu.compiled import activations as loops
from gpucnn.ops.cpu.compiled import losses as row_loops
from gpucnn.ops.cpu.memory import FloatArray, calculation_dtype, result_like
from gpucnn.ops.cpu.selection import choose, keep
from gpucnn.ops.cpu.threads import scratch

_FAR = 1000.0
"""Below minus this, exp(-x) is infinite in every dtype; SiLU cuts its input there, as inf / inf is NaN."""


def forward(kernel: Any, x: FloatArray, out: FloatArray | None, loop: Any) -> FloatArray:
    """``kernel(out, x)`` block by block, or the compiled ``loop``."""
    require_floating(x, "the input")
    return elementwise(kernel, result_like(out, x), x, loop=loop)


def backward(kernel: Any, dy: FloatArray, saved: FloatArray, out: FloatArray | None, loop: Any) -> FloatArray:
    """``kernel(out, dy, saved)`` block by block, or the compiled ``loop``."""
    check_gradient(dy, saved)
    return elementwise(kernel, result_like(out, dy), dy, saved, loop=loop)


def relu_forward(x: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """max(x, 0); a NaN stays a NaN."""

    def kernel(out: FloatArray, x: FloatArray) -> None:
        numpy.maximum(x, x.dtype.type(0), out=out)

    return forward(kernel, x, out, loops.relu_forward)


def relu_backward(dy: FloatArray, y: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """Dy where the output y > 0, else 0."""

    def kernel(out: FloatArray, dy: FloatArray, y: FloatArray) -> None:
        keep(dy, y > 0, out)

    return backward(kernel, dy, y, out, loops.relu_backward)


def relu6_forward(x: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """min(max(x, 0), 6); a NaN stays a NaN."""
    y = relu_forward(x, out=out)
    return numpy.minimum(y, 6, out=y)


def relu6_backward(dy: FloatArray, y: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """Dy where the output 0 < y < 6, else 0."""
    # A choice by y, not a product of dy with 0 and 1: an infinity in dy must vanish where y was clipped.
    return relu_backward(dy, numpy.multiply(y, y < 6, out=numpy.empty_like(y)), out=out)


def leaky_relu_forward(
    x: FloatArray, *, negative_slope: float = 0.01, out: FloatArray | None = None
) -> FloatArray:
    """X where x > 0, else negative_slope * x."""

    def kernel(out: FloatArray, x: FloatArray) -> None:
        slope = x.dtype.type(negative_slope)
        if 0 <= negative_slope <= 1:
            # The larger of the two is the right one on both sides of zero; NaN passes through. 0 * inf must not.
            numpy.maximum(x, x * slope if slope else slope, out=out)
        else:
            numpy.multiply(x, choose(x > 0, 1.0, negative_slope, x.dtype), out=out)

    def loop(count: int, *arrays: FloatArray) -> None:
        loops.leaky_relu_forward(count, negative_slope, *arrays)

    return forward(kernel, x, out, loop)


def leaky_relu_backward(
    dy: FloatArray, x: FloatArray, *, negative_slope: float = 0.01, out: FloatArray | None = None
) -> FloatArray:
    """Dy where x > 0, else negative_slope * dy."""

    def kernel(out: FloatArray, dy: FloatArray, x: FloatArray) -> None:
        numpy.multiply(dy, choose(x > 0, 1.0, negative_slope, dy.dtype), out=out)

    def loop(count: int, *arrays: FloatArray) -> None:
        loops.leaky_relu_backward(count, negative_slope, *arrays)

    return backward(kernel, dy, x, out, loop)


_MINUS_LOG2_E = -1.4426950408889634


def exp_of_minus(x: FloatArray, out: FloatArray) -> FloatArray:
    """Out = exp(-x); ``out`` may be x."""
    numpy.multiply(x, _MINUS_LOG2_E, out=out)
    return numpy.exp2(out, out=out)


def sigmoid_in_place(out: FloatArray, x: FloatArray) -> None:
    """Out = 1 / (1 + exp(-x)): exp may reach infinity, whose reciprocal is the right 0."""
    exp_of_minus(x, out)
    numpy.add(out, 1, out=out)
    numpy.divide(1, out, out=out)


def clipped(x: FloatArray, out: FloatArray) -> FloatArray:
    """X cut to where exp(-x) is finite: beyond, sigmoid is 0 or 1 to rounding, and inf * 0 cannot arise."""
    limit = 80 if x.dtype == numpy.float32 else 700
    return numpy.clip(x, -limit, limit, out=out)


def gated_slope(slope: FloatArray, power: FloatArray) -> FloatArray:
    """S + slope * s * (1 - s) in ``slope``, s = 1 / (1 + power); ``power`` becomes 1 / s.

    It is (1 + power + slope * power) / (1 + power)^2, divided one at a time: the square may be infinite.
    """
    slope *= power
    power += 1
    slope += power
    slope /= power
    slope /= power
    return slope


def sigmoid_forward(x: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """1 / (1 + exp(-x)), without overflow at any x."""
    return forward(sigmoid_in_place, x, out, loops.sigmoid_forward)


def sigmoid_backward(dy: FloatArray, y: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """Dy * y * (1 - y)."""

    def kernel(out: FloatArray, dy: FloatArray, y: FloatArray) -> None:
        slope = numpy.subtract(1, y, out=scratch("slope", y.shape, y.dtype))
        slope *= y
        numpy.multiply(dy, slope, out=out)

    return backward(kernel, dy, y, out, loops.sigmoid_backward)


def tanh_forward(x: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """tanh(x)."""

    def kernel(out: FloatArray, x: FloatArray) -> None:
        numpy.tanh(x, out=out)

    return forward(kernel, x, out, loops.tanh_forward)


def tanh_backward(dy: FloatArray, y: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """Dy * (1 - y * y)."""

    def kernel(out: FloatArray, dy: FloatArray, y: FloatArray) -> None:
        # (1 - y)(1 + y) keeps its digits where y is near 1; 1 - y * y does not.
        slope = numpy.subtract(1, y, out=scratch("slope", y.shape, y.dtype))
        slope *= numpy.add(1, y, out=scratch("power", y.shape, y.dtype))
        numpy.multiply(dy, slope, out=out)

    return backward(kernel, dy, y, out, loops.tanh_backward)


def silu_forward(x: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """X * sigmoid(x); its limit 0 at minus infinity."""

    def kernel(out: FloatArray, x: FloatArray) -> None:
        near = numpy.maximum(x, -_FAR, out=out)
        power = exp_of_minus(near, scratch("power", x.shape, x.dtype))
        power += 1
        numpy.divide(near, power, out=out)

    return forward(kernel, x, out, loops.silu_forward)


def silu_backward(dy: FloatArray, x: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """Dy * s * (1 + x * (1 - s)) with s = sigmoid(x)."""

    def kernel(out: FloatArray, dy: FloatArray, x: FloatArray) -> None:
        near = clipped(x, scratch("slope", x.shape, x.dtype))
        power = exp_of_minus(near, scratch("power", x.shape, x.dtype))
        numpy.multiply(dy, gated_slope(near, power), out=out)

    return backward(kernel, dy, x, out, loops.silu_backward)


def _last(x: FloatArray, axis: int) -> bool:
    """Whether numbers along ``axis`` are neighbors in C order."""
    return math.prod(x.shape[axis % x.ndim + 1 :]) == 1


def _rows(x: FloatArray, axis: int) -> tuple[int, int]:
    return x.size // x.shape[axis], x.shape[axis]


def softmax_forward(x: FloatArray, *, axis: int = -1, out: FloatArray | None = None) -> FloatArray:
    """exp(x - max) / sum, along ``axis``."""
    require_floating(x, "the input")
    check_axis(x, axis)
    result = result_like(out, x)
    if x.size == 0:
        return result
    if _last(x, axis) and compiled.available() and x.dtype == result.dtype == numpy.float32:
        return contiguously(functools.partial(row_loops.softmax_forward, *_rows(x, axis)), result, x)
    wide = x.astype(calculation_dtype(x.dtype), copy=False)
    # A row of minus infinities has no softmax: it becomes NaN, quietly, as inf - inf does.
    with numpy.errstate(all="ignore"):
        power = numpy.exp(wide - wide.max(axis=axis, keepdims=True))
        result[...] = power / power.sum(axis=axis, keepdims=True)
    return result


def softmax_backward(
    dy: FloatArray, y: FloatArray, *, axis: int = -1, out: FloatArray | None = None
) -> FloatArray:
    """Y * (dy - sum(dy * y)), along ``axis``."""
    require_floating(dy, "the output gradient")
    require_shape(dy, y.shape, "the output gradient")
    check_axis(y, axis)
    result = result_like(out, dy)
    float32 = dy.dtype == y.dtype == result.dtype == numpy.float32
    if dy.size and _last(y, axis) and compiled.available() and float32:
        return contiguously(functools.partial(row_loops.softmax_backward, *_rows(y, axis)), result, dy, y)
    wide = calculation_dtype(dy.dtype)
    gradient, probability = dy.astype(wide, copy=False), y.astype(wide, copy=False)
    with numpy.errstate(all="ignore"):
        mean = (gradient * probability).sum(axis=axis, keepdims=True)
        result[...] = probability * (gradient - mean)
    return result
