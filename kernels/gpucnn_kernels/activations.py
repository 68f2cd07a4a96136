"""Activations, forward and backward, on arrays of any shape and dense layout; ``out`` may be an input itself.

Every function takes float32, float16, bfloat16 or float64 arrays and computes in float32 (float64 for float64).
"""

from __future__ import annotations

from typing import Any

from gpucnn_kernels.errors import ArgumentError
from gpucnn_kernels.launch import Call, blocks_for_packs

SOURCE = "activations"
SOURCES: dict[str, tuple[dict[str, str], ...]] = {SOURCE: ({},)}

FUNCTIONS = {
    name: number
    for number, name in enumerate(
        ("identity", "relu", "leaky_relu", "sigmoid", "tanh", "gelu", "gelu_tanh", "silu", "relu6")
    )
}
"""The names by their numbers in activation.cuh."""


def _forward(function: str, x: Any, negative_slope: float, out: Any, stream: Any) -> Any:
    with Call(stream, x=x, out=out) as call:
        dtype = call.floating("x", "out")
        call.elementwise("x", "out")
        y = call.output(call["x"].shape, dtype, like=call["x"])
        call.launch(
            SOURCE,
            "activation_forward",
            blocks_for_packs(y.size, dtype),
            scalar=dtype,
            x=call["x"],
            y=y,
            count=y.size,
            function=FUNCTIONS[function],
            negative_slope=negative_slope,
        )
        return call.give(y)


def _backward(
    function: str, dy: Any, value: Any, value_name: str, negative_slope: float, out: Any, stream: Any
) -> Any:
    with Call(stream, dy=dy, **{value_name: value}, out=out) as call:
        dtype = call.floating("dy", value_name, "out")
        call.elementwise("dy", value_name, "out")
        dx = call.output(call["dy"].shape, dtype, like=call["dy"])
        call.launch(
            SOURCE,
            "activation_backward",
            blocks_for_packs(dx.size, dtype),
            scalar=dtype,
            dy=call["dy"],
            value=call[value_name],
            dx=dx,
            count=dx.size,
            function=FUNCTIONS[function],
            negative_slope=negative_slope,
        )
        return call.give(dx)


def _gelu(approximate: str) -> str:
    if approximate not in ("none", "tanh"):
        raise ArgumentError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    return "gelu" if approximate == "none" else "gelu_tanh"


def relu_forward(x: Any, *, out: Any = None, stream: Any = None) -> Any:
    """max(x, 0); a NaN stays a NaN."""
    return _forward("relu", x, 0.0, out, stream)


def relu_backward(dy: Any, y: Any, *, out: Any = None, stream: Any = None) -> Any:
    """Dy where the output y > 0, else 0."""
    return _backward("relu", dy, y, "y", 0.0, out, stream)


def relu6_forward(x: Any, *, out: Any = None, stream: Any = None) -> Any:
    """min(max(x, 0), 6); a NaN stays a NaN."""
    return _forward("relu6", x, 0.0, out, stream)


def relu6_backward(dy: Any, y: Any, *, out: Any = None, stream: Any = None) -> Any:
    """Dy where the output 0 < y < 6, else 0."""
    return _backward("relu6", dy, y, "y", 0.0, out, stream)


def leaky_relu_forward(x: Any, *, negative_slope: float = 0.01, out: Any = None, stream: Any = None) -> Any:
    """X where x > 0, else negative_slope * x."""
    return _forward("leaky_relu", x, negative_slope, out, stream)


def leaky_relu_backward(
    dy: Any, x: Any, *, negative_slope: float = 0.01, out: Any = None, stream: Any = None
) -> Any:
    """Dy where x > 0, else negative_slope * dy."""
    return _backward("leaky_relu", dy, x, "x", negative_slope, out, stream)


def sigmoid_forward(x: Any, *, out: Any = None, stream: Any = None) -> Any:
    """1 / (1 + exp(-x)), without overflow at any x."""
    return _forward("sigmoid", x, 0.0, out, stream)


def sigmoid_backward(dy: Any, y: Any, *, out: Any = None, stream: Any = None) -> Any:
    """Dy * y * (1 - y)."""
    return _backward("sigmoid", dy, y, "y", 0.0, out, stream)


def tanh_forward(x: Any, *, out: Any = None, stream: Any = None) -> Any:
    """tanh(x)."""
    return _forward("tanh", x, 0.0, out, stream)


def tanh_backward(dy: Any, y: Any, *, out: Any = None, stream: Any = None) -> Any:
    """Dy * (1 - y * y)."""
    return _backward("tanh", dy, y, "y", 0.0, out, stream)


def gelu_forward(x: Any, *, approximate: str = "none", out: Any = None, stream: Any = None) -> Any:
    """X * Phi(x), Phi the normal distribution function; "tanh" takes Hendrycks and Gimpel's approximation."""
    return _forward(_gelu(approximate), x, 0.0, out, stream)


def gelu_backward(dy: Any, x: Any, *, approximate: str = "none", out: Any = None, stream: Any = None) -> Any:
    """Dy * (Phi(x) + x * phi(x)), or the tanh form's derivative."""
    return _backward(_gelu(approximate), dy, x, "x", 0.0, out, stream)


def silu_forward(x: Any, *, out: Any = None, stream: Any = None) -> Any:
    """X * sigmoid(x)."""
    return _forward("silu", x, 0.0, out, stream)


def silu_backward(dy: Any, x: Any, *, out: Any = None, stream: Any = None) -> Any:
    """Dy * s * (1 + x * (1 - s)) with s = sigmoid(x)."""
    return _backward("silu", dy, x, "x", 0.0, out, stream)
