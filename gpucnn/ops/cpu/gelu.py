"""GELU: Hendrycks and Gimpel, "Gaussian error linear units", 2016, with the exact Phi and in the tanh form."""

from __future__ import annotations

import math

import numpy

from gpucnn.ops.checks import require_choice
from gpucnn.ops.cpu.activations import backward, clipped, forward, sigmoid_and_rest, sigmoid_in_place
from gpucnn.ops.cpu.error_function import erfc
from gpucnn.ops.cpu.memory import FloatArray

_FAR = 50.0
"""Beyond it Phi is 0 or 1 in every dtype; inputs are cut there so that inf * 0 cannot arise."""

_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


# Phi(-a) = exp(-a^2 / 2) t P(t) with t = 1 / (1 + 0.35 a): a minimax fit of ours over 0 <= a <= 14.5, to a
# relative 3.2e-8. From the highest power down.
_TAIL_SCALE = 0.35
_TAIL = (
    -0.0291578775,
    0.14403088,
    -0.255838924,
    0.159319605,
    -0.0232122929,
    0.105552477,
    0.119821294,
    0.139863515,
    0.139621307,
)


def _near(x: FloatArray) -> FloatArray:
    near = numpy.maximum(x, -_FAR)
    return numpy.minimum(near, _FAR, out=near)


def _tail(x: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(Phi(-|x|), exp(-x^2 / 2)) of a float32 or float64 array, with all the digits of its dtype."""
    if x.dtype != numpy.float32:
        size = numpy.abs(x)
        return 0.5 * erfc(size * math.sqrt(0.5)), numpy.exp(-0.5 * x * x)
    step = numpy.abs(x)
    step *= _TAIL_SCALE
    step += 1
    numpy.reciprocal(step, out=step)
    value = step * _TAIL[0]
    for coefficient in _TAIL[1:]:
        value += coefficient
        value *= step
    power = numpy.multiply(x, x, out=step)
    power *= -0.5
    numpy.exp(power, out=power)
    value *= power
    return value, power


def _twice_the_argument(x: FloatArray) -> FloatArray:
    """V = 2 sqrt(2 / pi) (x + 0.044715 x^3): (1 + tanh(v / 2)) / 2 is sigmoid(v), which keeps its digits."""
    value = x * x
    value *= _CUBIC
    value += 1
    value *= x
    value *= 2 * _SQRT_2_OVER_PI
    return value


def gelu_forward(x: FloatArray, *, approximate: str = "none", out: FloatArray | None = None) -> FloatArray:
    """X * Phi(x), Phi the normal distribution function; "tanh" takes Hendrycks and Gimpel's approximation."""
    require_choice(approximate, ("none", "tanh"), "approximate")

    def exact(out: FloatArray, x: FloatArray) -> None:
        # x Phi(x) is -|x| q for negative x and x - |x| q for positive, q = Phi(-|x|).
        near = _near(x)
        tail, _ = _tail(near)
        tail *= numpy.abs(near)
        numpy.subtract(numpy.maximum(x, 0), tail, out=out)

    def tanh_form(out: FloatArray, x: FloatArray) -> None:
        near = numpy.maximum(x, -_FAR)
        gate = numpy.empty_like(near)
        sigmoid_in_place(gate, _twice_the_argument(near))
        numpy.multiply(near, gate, out=out)

    return forward(exact if approximate == "none" else tanh_form, x, out)


def gelu_backward(
    dy: FloatArray, x: FloatArray, *, approximate: str = "none", out: FloatArray | None = None
) -> FloatArray:
    """Dy * (Phi(x) + x * phi(x)), or the tanh form's derivative."""
    require_choice(approximate, ("none", "tanh"), "approximate")

    def exact(out: FloatArray, dy: FloatArray, x: FloatArray) -> None:
        near = _near(x)
        tail, slope = _tail(near)
        slope *= near
        slope *= 1 / math.sqrt(2 * math.pi)
        # Phi(x) = 1/2 + sign(x) (1/2 - q).
        numpy.subtract(0.5, tail, out=tail)
        slope += numpy.copysign(tail, near, out=tail)
        slope += 0.5
        numpy.multiply(dy, slope, out=out)

    def tanh_form(out: FloatArray, dy: FloatArray, x: FloatArray) -> None:
        # y = x s with s = sigmoid(v), so dy/dx = s + x s (1 - s) v'.
        near = _near(x)
        gate, rest = sigmoid_and_rest(clipped(_twice_the_argument(near)))
        slope = near * near
        slope *= 6 * _CUBIC * _SQRT_2_OVER_PI
        slope += 2 * _SQRT_2_OVER_PI
        slope *= near
        slope *= rest
        slope += 1
        slope *= gate
        numpy.multiply(dy, slope, out=out)

    return backward(exact if approximate == "none" else tanh_form, dy, x, out)
