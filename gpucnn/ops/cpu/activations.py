"""Activations and softmax. ``out`` may be the input itself: each block is read before it is written."""

from __future__ import annotations

from typing import Any

import numpy

from gpucnn.ops.checks import check_axis, check_gradient, require_floating, require_shape
from gpucnn.ops.cpu.blocks import elementwise
from gpucnn.ops.cpu.memory import FloatArray, calculation_dtype, result_array
from gpucnn.ops.cpu.selection import choose, keep

_FAR = 1000.0
"""Below minus this, exp(-x) is infinite in every dtype; SiLU cuts its input there, as inf / inf is NaN."""


def _result(out: FloatArray | None, x: FloatArray) -> FloatArray:
    return numpy.empty_like(x, subok=False) if out is None else result_array(out, x.shape, x.dtype)


def forward(kernel: Any, x: FloatArray, out: FloatArray | None) -> FloatArray:
    """``kernel(out, x)`` block by block."""
    require_floating(x, "the input")
    return elementwise(kernel, _result(out, x), x)


def backward(kernel: Any, dy: FloatArray, saved: FloatArray, out: FloatArray | None) -> FloatArray:
    """``kernel(out, dy, saved)`` block by block."""
    check_gradient(dy, saved)
    return elementwise(kernel, _result(out, dy), dy, saved)


def relu_forward(x: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """max(x, 0); a NaN stays a NaN."""

    def kernel(out: FloatArray, x: FloatArray) -> None:
        numpy.maximum(x, x.dtype.type(0), out=out)

    return forward(kernel, x, out)


def relu_backward(dy: FloatArray, y: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """Dy where the output y > 0, else 0."""

    def kernel(out: FloatArray, dy: FloatArray, y: FloatArray) -> None:
        keep(dy, y > 0, out)

    return backward(kernel, dy, y, out)


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

    return forward(kernel, x, out)


def leaky_relu_backward(
    dy: FloatArray, x: FloatArray, *, negative_slope: float = 0.01, out: FloatArray | None = None
) -> FloatArray:
    """Dy where x > 0, else negative_slope * dy."""

    def kernel(out: FloatArray, dy: FloatArray, x: FloatArray) -> None:
        numpy.multiply(dy, choose(x > 0, 1.0, negative_slope, dy.dtype), out=out)

    return backward(kernel, dy, x, out)


def sigmoid_in_place(out: FloatArray, x: FloatArray) -> None:
    """Out = 1 / (1 + exp(-x)): exp may reach infinity, whose reciprocal is the right 0."""
    numpy.negative(x, out=out)
    numpy.exp(out, out=out)
    numpy.add(out, 1, out=out)
    numpy.reciprocal(out, out=out)


def clipped(x: FloatArray) -> FloatArray:
    """X cut to where exp(-x) is finite: beyond, sigmoid is 0 or 1 to rounding, and inf * 0 cannot arise."""
    limit = 80 if x.dtype == numpy.float32 else 700
    near = numpy.maximum(x, -limit)
    return numpy.minimum(near, limit, out=near)


def sigmoid_and_rest(x: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(s, 1 - s) with s = sigmoid(x), both with all their digits, for x within :func:`clipped`."""
    power = numpy.negative(x)
    numpy.exp(power, out=power)
    gate = power + 1
    numpy.reciprocal(gate, out=gate)
    power *= gate
    return gate, power


def sigmoid_forward(x: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """1 / (1 + exp(-x)), without overflow at any x."""
    return forward(sigmoid_in_place, x, out)


def sigmoid_backward(dy: FloatArray, y: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """Dy * y * (1 - y)."""

    def kernel(out: FloatArray, dy: FloatArray, y: FloatArray) -> None:
        slope = numpy.subtract(1, y)
        slope *= y
        numpy.multiply(dy, slope, out=out)

    return backward(kernel, dy, y, out)


def tanh_forward(x: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """tanh(x)."""

    def kernel(out: FloatArray, x: FloatArray) -> None:
        numpy.tanh(x, out=out)

    return forward(kernel, x, out)


def tanh_backward(dy: FloatArray, y: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """Dy * (1 - y * y)."""

    def kernel(out: FloatArray, dy: FloatArray, y: FloatArray) -> None:
        # (1 - y)(1 + y) keeps its digits where y is near 1; 1 - y * y does not.
        slope = numpy.subtract(1, y)
        slope *= 1 + y
        numpy.multiply(dy, slope, out=out)

    return backward(kernel, dy, y, out)


def silu_forward(x: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """X * sigmoid(x); its limit 0 at minus infinity."""

    def kernel(out: FloatArray, x: FloatArray) -> None:
        numpy.maximum(x, -_FAR, out=out)
        power = numpy.negative(out)
        numpy.exp(power, out=power)
        power += 1
        numpy.divide(out, power, out=out)

    return forward(kernel, x, out)


def silu_backward(dy: FloatArray, x: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    """Dy * s * (1 + x * (1 - s)) with s = sigmoid(x)."""

    def kernel(out: FloatArray, dy: FloatArray, x: FloatArray) -> None:
        near = clipped(x)
        gate, rest = sigmoid_and_rest(near)
        near *= rest
        near += 1
        near *= gate
        numpy.multiply(dy, near, out=out)

    return backward(kernel, dy, x, out)


def softmax_forward(x: FloatArray, *, axis: int = -1, out: FloatArray | None = None) -> FloatArray:
    """exp(x - max) / sum, along ``axis``."""
    require_floating(x, "the input")
    check_axis(x, axis)
    result = _result(out, x)
    if x.size == 0:
        return result
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
    result = _result(out, dy)
    wide = calculation_dtype(dy.dtype)
    gradient, probability = dy.astype(wide, copy=False), y.astype(wide, copy=False)
    with numpy.errstate(all="ignore"):
        mean = (gradient * probability).sum(axis=axis, keepdims=True)
        result[...] = probability * (gradient - mean)
    return result
