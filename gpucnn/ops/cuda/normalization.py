"""Batch normalization.

The kernels keep everything that is one number a channel in float32 (float64 for float64 inputs). Layers do so too;
arrays of other dtypes are converted here, running statistics back again.
"""

from __future__ import annotations

from typing import Any

import gpucnn_kernels as kernels
from gpucnn.device import device_of, module_of, on_device
from gpucnn.ops.checks import (
    ENDINGS,
    check_batch,
    check_batch_norm,
    check_batch_norm_inference_gradient,
    check_ending,
    check_out,
    check_residual,
    require_choice,
    require_floating,
    require_shape,
)
from gpucnn.ops.contract import Array
from gpucnn.ops.cuda.arrays import (
    accumulating_dtype,
    call,
    check_devices,
    common_dtype,
    contiguous,
    finish,
    is_contiguous,
    is_image,
    laid_out_as,
    usable_in_place,
    write_back,
)


def _values(array: Array, dtype: Any) -> Array:
    """(N, C) contiguous, or (N, C, H, W) contiguous or channels-last, as it is; otherwise a contiguous copy."""
    fits = array.dtype == dtype and (is_image(array) if array.ndim == 4 else is_contiguous(array))
    return array if fits else contiguous(array, dtype)


def _vectors(dtype: Any, **vectors: Array | None) -> dict[str, Array | None]:
    wide = accumulating_dtype(dtype)
    return {name: None if array is None else contiguous(array, wide) for name, array in vectors.items()}


def batch_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    *,
    momentum: float = 0.1,
    epsilon: float = 1e-5,
    residual: Array | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    with_mask: bool = False,
    out: Array | None = None,
) -> tuple[Array, ...]:
    """(y, mean, inverse_std) with statistics over all axes but 1 of x (N, C) or (N, C, H, W).

    y = activation((x - mean) * inverse_std * weight + bias + residual), rounded once. ``with_mask`` adds the mask
    that backward reads instead of y, or None where there is no gain in that.
    """
    given = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    check_devices(x=x, **given, residual=residual, out=out)
    check_batch_norm(x, **given)
    check_batch(x)
    require_choice(activation, ENDINGS, "activation")
    check_residual(residual, x.shape)
    values, vectors = _values(x, x.dtype), _vectors(x.dtype, **given)
    added = None if residual is None else laid_out_as(values, residual, values.dtype)
    y, mean, inverse_std, *mask = call(
        kernels.batch_norm_forward,
        values,
        **vectors,
        momentum=momentum,
        epsilon=epsilon,
        residual=added,
        activation=activation,
        negative_slope=negative_slope,
        with_mask=with_mask,
        out=usable_in_place(out, values, x.dtype, added),
    )
    for name in ("running_mean", "running_var"):
        if given[name] is not None:
            write_back(given[name], vectors[name])
    return finish(y, out, x.dtype), mean, inverse_std, *mask


def batch_norm_backward(
    dy: Array,
    x: Array,
    weight: Array | None,
    mean: Array,
    inverse_std: Array,
    *,
    y: Array | None = None,
    mask: Array | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    out: Array | None = None,
    out_weight: Array | None = None,
    out_bias: Array | None = None,
    out_residual: Array | None = None,
) -> tuple[Array, Array, Array]:
    """(dx, dweight, dbias) of the training-time batch norm, of dy of y, its result after the activation."""
    given = {"weight": weight, "mean": mean, "inverse_std": inverse_std}
    results = {"out": out, "out_weight": out_weight, "out_bias": out_bias, "out_residual": out_residual}
    check_devices(dy=dy, x=x, y=y, mask=mask, **given, **results)
    check_batch_norm(x, **given)
    require_floating(dy, "the output gradient")
    require_shape(dy, x.shape, "the output gradient")
    check_ending(activation, y, x.shape, negative_slope)
    dtype = common_dtype(dy, x)
    values = _values(x, dtype)
    gradient = laid_out_as(values, dy, dtype)  # so that the network's memory format, and no copy, is handed on
    result = None if y is None else laid_out_as(values, y, dtype)
    reads = (values, result)
    before = usable_in_place(out_residual, gradient, dy.dtype, *reads)
    if out_residual is not None and before is None:
        with on_device(device_of(gradient)):
            before = module_of(gradient).empty_like(gradient)
    dx, dweight, dbias = call(
        kernels.batch_norm_backward,
        gradient,
        values,
        **_vectors(dtype, **given),
        y=result,
        mask=mask if dtype == x.dtype else None,  # which is of numbers of forward's width
        activation=activation,
        negative_slope=negative_slope,
        out=usable_in_place(out, gradient, dy.dtype, *reads),
        out_weight=_usable_vector(out_weight, x, dtype),
        out_bias=_usable_vector(out_bias, x, dtype),
        out_residual=before,
    )
    if out_residual is not None:
        finish(before, out_residual, dy.dtype)
    # Weights that stay float32 beside values in 16 bits get gradients in float32, where float16 might overflow.
    kept = x.dtype if weight is None else weight.dtype
    return finish(dx, out, dy.dtype), finish(dweight, out_weight, kept), finish(dbias, out_bias, kept)


def _usable_vector(out: Array | None, x: Array, dtype: Any) -> Array | None:
    """``out`` where the kernel may write one number a channel straight to it."""
    if out is None:
        return None
    check_out(out, x.shape[1:2], out.dtype)
    return out if out.dtype == accumulating_dtype(dtype) and is_contiguous(out) else None


def batch_norm_inference(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    running_mean: Array,
    running_var: Array,
    *,
    epsilon: float = 1e-5,
    out: Array | None = None,
) -> Array:
    """(x - running_mean) / sqrt(running_var + epsilon) * weight + bias."""
    given = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    check_devices(x=x, **given, out=out)
    check_batch_norm(x, **given)
    values = _values(x, x.dtype)
    y = call(
        kernels.batch_norm_inference,
        values,
        **_vectors(x.dtype, **given),
        epsilon=epsilon,
        out=usable_in_place(out, values, x.dtype),
    )
    return finish(y, out, x.dtype)


def batch_norm_inference_backward(
    dy: Array,
    x: Array | None,
    weight: Array | None,
    running_mean: Array,
    running_var: Array,
    *,
    epsilon: float = 1e-5,
    out: Array | None = None,
    out_weight: Array | None = None,
    out_bias: Array | None = None,
) -> tuple[Array, Array | None, Array | None]:
    """(dx, dweight, dbias) of :func:`batch_norm_inference`; without x the last two are None."""
    given = {"weight": weight, "running_mean": running_mean, "running_var": running_var}
    check_devices(dy=dy, x=x, **given, out=out, out_weight=out_weight, out_bias=out_bias)
    check_batch_norm_inference_gradient(dy, x, **given)
    dtype = dy.dtype if x is None else common_dtype(dy, x)
    values = None if x is None else _values(x, dtype)
    gradient = _values(dy, dtype) if values is None else laid_out_as(values, dy, dtype)
    dx, dweight, dbias = call(
        kernels.batch_norm_inference_backward,
        gradient,
        values,
        **_vectors(dtype, **given),
        epsilon=epsilon,
        out=usable_in_place(out, gradient, dy.dtype, values),
        out_weight=None if values is None else _usable_vector(out_weight, dy, dtype),
        out_bias=None if values is None else _usable_vector(out_bias, dy, dtype),
    )
    if x is None:
        return finish(dx, out, dy.dtype), None, None
    kept = x.dtype if weight is None else weight.dtype
    return finish(dx, out, dy.dtype), finish(dweight, out_weight, kept), finish(dbias, out_bias, kept)
