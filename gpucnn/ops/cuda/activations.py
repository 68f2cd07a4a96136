"""Activations and softmax. ``out`` may be an input itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpucnn_kernels as kernels
from gpucnn.ops.checks import check_axis, check_gradient, require_choice, require_floating, require_shape
from gpucnn.ops.contract import Array
from gpucnn.ops.cuda.arrays import (
    call,
    check_devices,
    common_dtype,
    dense,
    finish,
    laid_out_as,
    usable_in_place,
)


def _forward(function: Callable[..., Any], x: Array, out: Array | None, **options: Any) -> Array:
    check_devices(x=x, out=out)
    require_floating(x, "the input")
    given = dense(x, x.dtype)
    y = call(function, given, **options, out=usable_in_place(out, given, x.dtype))
    return finish(y, out, x.dtype)


def _backward(
    function: Callable[..., Any], dy: Array, saved: Array, saved_name: str, out: Array | None, **options: Any
) -> Array:
    check_devices(dy=dy, **{saved_name: saved}, out=out)
    check_gradient(dy, saved)
    return _gradient(function, dy, saved, out, **options)


def _gradient(function: Callable[..., Any], dy: Array, saved: Array, out: Array | None, **options: Any) -> Array:
    dtype = common_dtype(dy, saved)
    kept = dense(saved, dtype)
    gradient = laid_out_as(kept, dy, dtype)  # so that the network's memory format, and no copy, is handed on
    dx = call(function, gradient, kept, **options, out=usable_in_place(out, gradient, dy.dtype, kept))
    return finish(dx, out, dy.dtype)


def relu_forward(x: Array, *, out: Array | None = None) -> Array:
    """max(x, 0); a NaN stays a NaN."""
    return _forward(kernels.relu_forward, x, out)


def relu_backward(dy: Array, y: Array, *, out: Array | None = None) -> Array:
    """Dy where the output y > 0, else 0."""
    return _backward(kernels.relu_backward, dy, y, "y", out)


def relu6_forward(x: Array, *, out: Array | None = None) -> Array:
    """min(max(x, 0), 6); a NaN stays a NaN."""
    return _forward(kernels.relu6_forward, x, out)


def relu6_backward(dy: Array, y: Array, *, out: Array | None = None) -> Array:
    """Dy where the output 0 < y < 6, else 0."""
    return _backward(kernels.relu6_backward, dy, y, "y", out)


def leaky_relu_forward(x: Array, *, negative_slope: float = 0.01, out: Array | None = None) -> Array:
    """X where x > 0, else negative_slope * x."""
    return _forward(kernels.leaky_relu_forward, x, out, negative_slope=negative_slope)


def leaky_relu_backward(dy: Array, x: Array, *, negative_slope: float = 0.01, out: Array | None = None) -> Array:
    """Dy where x > 0, else negative_slope * dy."""
    return _backward(kernels.leaky_relu_backward, dy, x, "x", out, negative_slope=negative_slope)


def sigmoid_forward(x: Array, *, out: Array | None = None) -> Array:
    """1 / (1 + exp(-x)), without overflow at any x."""
    return _forward(kernels.sigmoid_forward, x, out)


def sigmoid_backward(dy: Array, y: Array, *, out: Array | None = None) -> Array:
    """Dy * y * (1 - y)."""
    return _backward(kernels.sigmoid_backward, dy, y, "y", out)


def tanh_forward(x: Array, *, out: Array | None = None) -> Array:
    """tanh(x)."""
    return _forward(kernels.tanh_forward, x, out)


def tanh_backward(dy: Array, y: Array, *, out: Array | None = None) -> Array:
    """Dy * (1 - y * y)."""
    return _backward(kernels.tanh_backward, dy, y, "y", out)


def gelu_forward(x: Array, *, approximate: str = "none", out: Array | None = None) -> Array:
    """X * Phi(x), Phi the normal distribution function; "tanh" takes Hendrycks and Gimpel's approximation."""
    require_choice(approximate, ("none", "tanh"), "approximate")
    return _forward(kernels.gelu_forward, x, out, approximate=approximate)


def gelu_backward(dy: Array, x: Array, *, approximate: str = "none", out: Array | None = None) -> Array:
    """Dy * (Phi(x) + x * phi(x)), or the tanh form's derivative."""
    require_choice(approximate, ("none", "tanh"), "approximate")
    return _backward(kernels.gelu_backward, dy, x, "x", out, approximate=approximate)


def silu_forward(x: Array, *, out: Array | None = None) -> Array:
    """X * sigmoid(x); its limit 0 at minus infinity."""
    return _forward(kernels.silu_forward, x, out)


def silu_backward(dy: Array, x: Array, *, out: Array | None = None) -> Array:
    """Dy * s * (1 + x * (1 - s)) with s = sigmoid(x)."""
    return _backward(kernels.silu_backward, dy, x, "x", out)


def softmax_forward(x: Array, *, axis: int = -1, out: Array | None = None) -> Array:
    """exp(x - max) / sum, along ``axis``."""
    check_devices(x=x, out=out)
    require_floating(x, "the input")
    check_axis(x, axis)
    return _forward(kernels.softmax_forward, x, out, axis=axis)


def softmax_backward(dy: Array, y: Array, *, axis: int = -1, out: Array | None = None) -> Array:
    """Y * (dy - sum(dy * y)), along ``axis``."""
    check_devices(dy=dy, y=y, out=out)
    require_floating(dy, "the output gradient")
    require_shape(dy, y.shape, "the output gradient")
    check_axis(y, axis)
    return _gradient(kernels.softmax_backward, dy, y, out, axis=axis)
