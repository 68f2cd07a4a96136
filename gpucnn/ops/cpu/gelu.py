"""GELU: Hendrycks and Gimpel, "Gaussian error linear units", 2016, with the exact Phi and in the tanh form."""

from __future__ import annotations

import math

import numpy

from gpucnn.ops.checks import require_choice
from gpucnn.ops.cpu.activations import backward, clipped, exp_of_minus, forward, gated_slope
from gpucnn.ops.cpu.compiled import activations as loops
from gpucnn.ops.cpu.error_function import erfc
from gpucnn.ops.cpu.memory import FloatArray
from gpucnn.ops.cpu.threads import scratch

_FAR = 50.0
"""Beyond it Phi is 0 or 1 in every dtype; inputs are cut there so that inf * 0 cannot arise."""

_FAR_FOR_TANH = 25.0
"""Likewise for the tanh form's derivative, whose numerator must stay finite as well."""

_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


# Phi(-a) = exp(-a^2 / 2) P(a) / Q(a): a fit of ours over 0 <= a <= 14.5, to a relative 1.8e-7 near 0, where a GELU
# has all its digits to lose, and to 7e-7 from a = 2 on, where a rounding of its input costs as much. From the
# highest power down; Q begins with a^4.
_ABOVE = (0.39888241616292464, 2.865660499875126, 8.804452969258875, 12.376707439035055)
_BELOW = (7.177214634658324, 23.164953015776888, 37.35903440293407, 24.753419265699254)


def _near(x: FloatArray, far: float = _FAR) -> FloatArray:
    return numpy.clip(x, -far, far, out=scratch("near", x.shape, x.dtype))


def _tail(x: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(Phi(-x), exp(-x^2 / 2)) of a float32 or float64 array x >= 0, to the digits of its dtype."""
    if x.dtype != numpy.float32:
        return 0.5 * erfc(x * math.sqrt(0.5)), numpy.exp(-0.5 * x * x)
    value, divisor = scratch("slope", x.shape, x.dtype), scratch("power", x.shape, x.dtype)
    numpy.multiply(x, _ABOVE[0], out=value)
    for coefficient in _ABOVE[1:-1]:
        value += coefficient
        value *= x
    value += _ABOVE[-1]
    numpy.add(x, _BELOW[0], out=divisor)
    for coefficient in _BELOW[1:]:
        divisor *= x
        divisor += coefficient
    value /= divisor
    power = numpy.multiply(x, x, out=divisor)
    power *= -0.5 * math.log2(math.e)
    numpy.exp2(power, out=power)
    value *= power
    return value, power


def _twice_the_argument(x: FloatArray, out: FloatArray) -> FloatArray:
    """V = 2 sqrt(2 / pi) (x + 0.044715 x^3): (1 + tanh(v / 2)) / 2 is sigmoid(v), which keeps its digits."""
    numpy.multiply(x, x, out=out)
    out *= 2 * _SQRT_2_OVER_PI * _CUBIC
    out += 2 * _SQRT_2_OVER_PI
    out *= x
    return out


def gelu_forward(x: FloatArray, *, approximate: str = "none", out: FloatArray | None = None) -> FloatArray:
    """X * Phi(x), Phi the normal distribution function; "tanh" takes Hendrycks and Gimpel's approximation."""
    require_choice(approximate, ("none", "tanh"), "approximate")

    def exact(out: FloatArray, x: FloatArray) -> None:
        # x Phi(x) is -|x| q for negative x and x - |x| q for positive, q = Phi(-|x|).
        near = _near(x)
        numpy.abs(near, out=near)
        tail, _ = _tail(near)
        tail *= near
        numpy.maximum(x, 0, out=out)
        numpy.subtract(out, tail, out=out)

    def tanh_form(out: FloatArray, x: FloatArray) -> None:
        near = numpy.maximum(x, -_FAR, out=scratch("near", x.shape, x.dtype))
        power = _twice_the_argument(near, scratch("power", x.shape, x.dtype))
        exp_of_minus(power, power)
        power += 1
        numpy.divide(near, power, out=out)

    if approximate == "none":
        return forward(exact, x, out, loops.gelu_forward)
    return forward(tanh_form, x, out, loops.gelu_tanh_forward)


def gelu_backward(
    dy: FloatArray, x: FloatArray, *, approximate: str = "none", out: FloatArray | None = None
) -> FloatArray:
    """Dy * (Phi(x) + x * phi(x)), or the tanh form's derivative."""
    require_choice(approximate, ("none", "tanh"), "approximate")

    def exact(out: FloatArray, dy: FloatArray, x: FloatArray) -> None:
        near = _near(x)
        size = numpy.abs(near, out=scratch("size", x.shape, x.dtype))
        tail, slope = _tail(size)
        slope *= size
        slope *= 1 / math.sqrt(2 * math.pi)
        # Phi(x) + x phi(x) is 1/2 + (1/2 - q + |x| phi) for positive x, and 1/2 - (the same) for negative: its
        # sign is flipped by x's sign bit.
        slope -= tail
        slope += 0.5
        integers = numpy.int32 if x.dtype == numpy.float32 else numpy.int64
        sign, bits = near.view(integers), slope.view(integers)
        numpy.bitwise_and(sign, numpy.iinfo(integers).min, out=sign)
        numpy.bitwise_xor(bits, sign, out=bits)
        slope += 0.5
        numpy.multiply(dy, slope, out=out)

    def tanh_form(out: FloatArray, dy: FloatArray, x: FloatArray) -> None:
        # y = x s with s = sigmoid(v), so dy/dx = s + x s (1 - s) v'.
        near = _near(x, _FAR_FOR_TANH)
        power = _twice_the_argument(near, scratch("power", x.shape, x.dtype))
        exp_of_minus(clipped(power, power), power)
        slope = numpy.multiply(near, near, out=scratch("slope", x.shape, x.dtype))
        slope *= 6 * _CUBIC * _SQRT_2_OVER_PI
        slope += 2 * _SQRT_2_OVER_PI
        slope *= near
        numpy.multiply(dy, gated_slope(slope, power), out=out)

    if approximate == "none":
        return backward(exact, dy, x, out, loops.gelu_backward)
    return backward(tanh_form, dy, x, out, loops.gelu_tanh_backward)
