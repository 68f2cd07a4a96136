"""GELU: Hendrycks and Gimpel, "Gaussian error linear units", 2016, with the exact Phi and in the tanh form."""

from __future__ import annotations

import math

import numpy

from gpucnn.ops.cpu.activations import backward, forward
from gpucnn.ops.cpu.checks import require_choice
from gpucnn.ops.cpu.error_function import erfc
from gpucnn.ops.cpu.memory import FloatArray

_FAR = 50.0
"""Beyond it Phi is 0 or 1 in every dtype; inputs are cut there so that inf * 0 cannot arise."""

_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


def _normal_distribution(x: FloatArray) -> FloatArray:
    return 0.5 * erfc(x * -math.sqrt(0.5))


def gelu_forward(x: FloatArray, *, approximate: str = "none", out: FloatArray | None = None) -> FloatArray:
    """X * Phi(x), Phi the normal distribution function; "tanh" takes Hendrycks and Gimpel's approximation."""
    require_choice(approximate, ("none", "tanh"), "approximate")

    def exact(out: FloatArray, x: FloatArray) -> None:
        wide = numpy.maximum(x, -_FAR, dtype=numpy.float64)
        out[...] = wide * _normal_distribution(wide)

    def tanh_form(out: FloatArray, x: FloatArray) -> None:
        near = numpy.maximum(x, -_FAR)
        inner = near * near
        inner *= _CUBIC
        inner += 1
        inner *= near
        inner *= _SQRT_2_OVER_PI
        gate = numpy.tanh(inner, out=inner)
        gate += 1
        near *= 0.5
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
        # With u = c (x + a x^3): y = x (1 + tanh u) / 2, so dy/dx = (1 + t) / 2 + x (1 - t^2) u' / 2.
        near = numpy.clip(x, -_FAR, _FAR)
        square = near * near
        gate = numpy.tanh(_SQRT_2_OVER_PI * near * (1 + _CUBIC * square))
        slope = _SQRT_2_OVER_PI * (1 + 3 * _CUBIC * square)
        numpy.multiply(dy, 0.5 * (1 + gate) * (1 + near * (1 - gate) * slope), out=out)

    return backward(exact if approximate == "none" else tanh_form, dy, x, out)
