"""GELU: Hendrycks and Gimpel, "Gaussian error linear units", 2016, with the exact Phi and in the tanh form."""

from __future__ import annotations

import math

import numpy

from gpucnn.ops.cpu.activations import backward, forward, sigmoid_and_rest, sigmoid_in_place
from gpucnn.ops.cpu.checks import require_choice
from gpucnn.ops.cpu.error_function import erfc
from gpucnn.ops.cpu.memory import FloatArray

_FAR = 50.0
"""Beyond it Phi is 0 or 1 in every dtype; inputs are cut there so that inf * 0 cannot arise."""

_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


def _normal_distribution(x: FloatArray) -> FloatArray:
    return 0.5 * erfc(x * -math.sqrt(0.5))


def _twice_the_argument(x: FloatArray) -> FloatArray:
    """V = 2 sqrt(2 / pi) (x + 0.044715 x^3): (1 + tanh(v / 2)) / 2 is sigmoid(v), which keeps its digits near 0."""
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
        wide = numpy.maximum(x, -_FAR, dtype=numpy.float64)
        out[...] = wide * _normal_distribution(wide)

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
        wide = numpy.clip(x, -_FAR, _FAR, dtype=numpy.float64)
        density = numpy.exp(-0.5 * wide * wide)
        density *= wide
        density *= 1 / math.sqrt(2 * math.pi)
        density += _normal_distribution(wide)
        out[...] = dy * density

    def tanh_form(out: FloatArray, dy: FloatArray, x: FloatArray) -> None:
        # y = x s with s = sigmoid(v), so dy/dx = s + x s (1 - s) v'.
        near = numpy.clip(x, -_FAR, _FAR)
        gate, rest = sigmoid_and_rest(_twice_the_argument(near))
        slope = near * near
        slope *= 6 * _CUBIC * _SQRT_2_OVER_PI
        slope += 2 * _SQRT_2_OVER_PI
        slope *= near
        slope *= rest
        slope += 1
        slope *= gate
        numpy.multiply(dy, slope, out=out)

    return backward(exact if approximate == "none" else tanh_form, dy, x, out)
