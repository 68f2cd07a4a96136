"""The NumPy backend for arrays in 16 bits, bfloat16 and float16: stored in 16 bits, computed in float32.

So a network that trains in 16 bits on a GPU runs on a machine without one, and rounds where it does there: what an
operation reads and writes has 16 bits, what it adds up inside has float32. Each operation is that of
:mod:`gpucnn.ops.cpu` on float32 copies, so it takes its compiled loops; the copies make it slower than float32.
bfloat16 is the dtype of the package ml_dtypes.

The losses, which networks give float32 logits, and all else are that module's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.ops import cpu
from gpucnn.ops.checks import check_out
from gpucnn.recycling import memory

DTYPES = ("bfloat16", "float16")

_COMPUTED_IN_FLOAT32 = (
    "adaptive_avg_pool2d_backward",
    "adaptive_avg_pool2d_forward",
    "avg_pool2d_backward",
    "avg_pool2d_forward",
    "batch_norm_inference",
    "batch_norm_inference_backward",
    "col2im",
    "conv2d_backward_bias",
    "conv2d_backward_data",
    "conv2d_backward_filter",
    "conv2d_forward",
    "conv2d_inference",
    "conv2d_max_pool2d_forward",
    "conv2d_max_pool2d_inference",
    "conv_transpose2d_backward_data",
    "conv_transpose2d_backward_filter",
    "conv_transpose2d_forward",
    "dropout_backward",
    "dropout_forward",
    "gelu_backward",
    "gelu_forward",
    "im2col",
    "leaky_relu_backward",
    "leaky_relu_forward",
    "linear_backward",
    "linear_backward_bias",
    "linear_backward_data",
    "linear_backward_weight",
    "linear_forward",
    "max_pool2d_backward",
    "max_pool2d_forward",
    "relu6_backward",
    "relu6_forward",
    "relu_backward",
    "relu_forward",
    "sigmoid_backward",
    "sigmoid_forward",
    "silu_backward",
    "silu_forward",
    "softmax_backward",
    "softmax_forward",
    "tanh_backward",
    "tanh_forward",
)


def is_narrow(array: Any) -> bool:
    """Whether it is a NumPy array in 16 bits."""
    return isinstance(array, numpy.ndarray) and array.dtype.itemsize == 2 and str(array.dtype) in DTYPES


def _widened(value: Any) -> Any:
    """A copy in float32 of an array in 16 bits, whose memory lies as the array's does; all else as it is."""
    if not is_narrow(value):
        return value
    dense = value.flags.c_contiguous
    wide = memory.empty(value.shape, numpy.float32) if dense else numpy.empty_like(value, numpy.float32)
    wide[...] = value
    return wide


def _rounded(wide: NDArray[Any], dtype: numpy.dtype[Any], out: NDArray[Any] | None) -> NDArray[Any]:
    """``wide`` in 16 bits, in ``out`` where it is given. What is too large becomes infinite."""
    if out is None:
        out = memory.empty(wide.shape, dtype) if wide.flags.c_contiguous else numpy.empty_like(wide, dtype)
    else:
        check_out(out, wide.shape, dtype)
    with numpy.errstate(over="ignore", invalid="ignore"):
        out[...] = wide
    return out


def _in_16_bits(operation: Callable[..., Any]) -> Callable[..., Any]:
    """``operation`` of cpu on a first array in 16 bits; the others may be so, too, or float32.

    Of several results the first is stored as that array is. The others are places and masks, or statistics and
    gradients of parameters, which stay float32 unless an option takes them in 16 bits.
    """

    @functools.wraps(operation)
    def run(first: Any, *others: Any, out: Any = None, **options: Any) -> Any:
        named = {name: _widened(value) for name, value in options.items()}
        result = operation(*map(_widened, (first, *others)), **named)
        for name, value in options.items():
            if name.startswith("out_") and is_narrow(value):
                _rounded(named[name], value.dtype, value)
        if not isinstance(result, tuple):
            return _rounded(result, first.dtype, out)
        taken = {id(named[name]): array for name, array in options.items() if is_narrow(array)}
        return None if result[0] is None else _rounded(result[0], first.dtype, out), *(
            _rounded(part, taken[id(part)].dtype, taken[id(part)]) if id(part) in taken else part
            for part in result[1:]
        )

    return run


_operations = {name: _in_16_bits(getattr(cpu, name)) for name in _COMPUTED_IN_FLOAT32}


def batch_norm_forward(
    x: NDArray[Any],
    weight: NDArray[Any] | None = None,
    bias: NDArray[Any] | None = None,
    running_mean: NDArray[Any] | None = None,
    running_var: NDArray[Any] | None = None,
    *,
    momentum: float = 0.1,
    epsilon: float = 1e-5,
    residual: NDArray[Any] | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    with_mask: bool = False,
    out: NDArray[Any] | None = None,
) -> tuple[Any, ...]:
    """As :func:`gpucnn.ops.cpu.batch_norm_forward`, whose own it is where running statistics have 16 bits, too."""
    options: dict[str, Any] = {"momentum": momentum, "epsilon": epsilon}
    options |= {"activation": activation, "negative_slope": negative_slope, "with_mask": with_mask}
    if is_narrow(running_mean):
        options |= {"residual": residual, "out": out}
        return cpu.batch_norm_forward(x, weight, bias, running_mean, running_var, **options)
    vectors = _widened(weight), _widened(bias), running_mean, running_var
    y, *kept = cpu.batch_norm_forward(_widened(x), *vectors, residual=_widened(residual), **options)
    return _rounded(y, x.dtype, out), *kept


def batch_norm_backward(
    dy: NDArray[Any],
    x: NDArray[Any],
    weight: NDArray[Any] | None,
    mean: NDArray[Any],
    inverse_std: NDArray[Any],
    *,
    y: NDArray[Any] | None = None,
    mask: None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    out: NDArray[Any] | None = None,
    out_weight: NDArray[Any] | None = None,
    out_bias: NDArray[Any] | None = None,
    out_residual: NDArray[Any] | None = None,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """As :func:`gpucnn.ops.cpu.batch_norm_backward`; the gradients of weight and bias are float32."""
    before = None if out_residual is None else _widened(out_residual)
    dx, dweight, dbias = cpu.batch_norm_backward(
        *map(_widened, (dy, x, weight, mean, inverse_std)),
        y=_widened(y),
        mask=mask,
        activation=activation,
        negative_slope=negative_slope,
        out_weight=out_weight,
        out_bias=out_bias,
        out_residual=before,
    )
    if before is not None:
        _rounded(before, dy.dtype, out_residual)
    return _rounded(dx, dy.dtype, out), dweight, dbias


def __getattr__(name: str) -> Any:
    """An operation in 16 bits, or what is cpu's own."""
    return _operations.get(name) or getattr(cpu, name)
