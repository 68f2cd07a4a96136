"""Batch normalization: Ioffe and Szegedy, ICML 2015.

float32 is done by the compiled loops where there are such (``compiled/normalization.py``). What follows is of the
NumPy way.

Each task takes a few channels, small enough to stay in the cache, and makes all its passes over them there: a sum
(a dot product with ones, twice as fast as NumPy's sum), a sum of squares, a product and an addition. Where the
mean turns out to be larger than a standard deviation, it is subtracted first and the sums are taken once more
(shifted data: Chan, Golub and LeVeque, The American Statistician 37, 1983). So a large mean over a small variance
costs no digits. Sums over long rows are split into pieces that are added in float64.

Limit: x read and y written, and dy read backward, 0.27 and 0.41 ns a number at the speed of a copy. Measured on
one thread, in turns, 16 x 64 x 56 x 56 in float32, ns a number forward and backward: 2.3 and 3.4 with an estimate
of the mean always subtracted and NumPy's sums, 1.7 and 2.6 as now.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

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
from gpucnn.ops.cpu import compiled
from gpucnn.ops.cpu.activations import (
    leaky_relu_backward,
    leaky_relu_forward,
    relu6_backward,
    relu6_forward,
    relu_backward,
    relu_forward,
)
from gpucnn.ops.cpu.blocks import PLANE_BYTES, SMALL, contiguously, ranges
from gpucnn.ops.cpu.compiled import normalization as loops
from gpucnn.ops.cpu.memory import FloatArray, calculation_dtype, result_like
from gpucnn.ops.cpu.threads import parallel_for, scratch

_PIECE = 512  # numbers added in the calculation dtype before float64 takes over
_LONG = 128  # pixels of an image from which on a channel is worked on where it lies, and not copied together
_PIECE_BYTES = 1 << 18  # bytes of images whose passes of the backward pass are made one after the other
_CHANNEL_BYTES = 1 << 18  # bytes of input in a block of channels


def _by_channel(x: FloatArray) -> FloatArray:
    """A view (C, N, H, W) or (C, N, 1, 1)."""
    return x.swapaxes(0, 1) if x.ndim == 4 else x.T[:, :, None, None]


def _channel_blocks(x: FloatArray) -> list[slice]:
    values = x.size // max(1, x.shape[1])
    return ranges(x.shape[1], max(1, _CHANNEL_BYTES // max(1, values * calculation_dtype(x.dtype).itemsize)))


def _row_sums(images: FloatArray) -> NDArray[numpy.float64]:
    """Sums a channel of a contiguous (C, N, H, W), of short pieces in its own dtype, the pieces in float64."""
    rows = images.reshape(len(images), -1)
    whole = rows.shape[1] // _PIECE * _PIECE
    pieces = rows[:, :whole].reshape(rows.shape[0], -1, _PIECE)
    ones = numpy.ones(_PIECE, rows.dtype)
    sums: NDArray[numpy.float64] = numpy.matmul(pieces, ones).sum(axis=1, dtype=numpy.float64)
    sums += rows[:, whole:].sum(axis=1)
    return sums


def _row_products(a: FloatArray, b: FloatArray) -> NDArray[numpy.float64]:
    """Dot products a channel of two such arrays, in pieces as above."""
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    whole = a.shape[1] // _PIECE * _PIECE
    shape = (a.shape[0], -1, _PIECE)
    sums: NDArray[numpy.float64] = numpy.vecdot(a[:, :whole].reshape(shape), b[:, :whole].reshape(shape)).sum(
        axis=1, dtype=numpy.float64
    )
    sums += numpy.vecdot(a[:, whole:], b[:, whole:])
    return sums


def _has_planes(images: FloatArray, dtype: Any) -> bool:
    """Whether (C, N, H, W) is of ``dtype`` and its images are long rows of memory, to be worked on in place."""
    _, _, h, w = images.shape
    rows = images.strides[3] == images.itemsize and images.strides[2] == w * images.itemsize
    return rows and h * w >= _LONG and images.dtype == dtype


def _sums(images: FloatArray) -> NDArray[numpy.float64]:
    """Sums a channel of (C, N, H, W), whose images are contiguous: of each image first, then in float64."""
    c, n, h, w = images.shape
    ones = numpy.ones(h * w, images.dtype)
    sums: NDArray[numpy.float64] = numpy.vecdot(images.reshape(c, n, h * w), ones).sum(1, numpy.float64)
    return sums


def _products(a: FloatArray, b: FloatArray) -> NDArray[numpy.float64]:
    """Dot products a channel of two such arrays, likewise."""
    c, n, h, w = a.shape
    shape = c, n, h * w
    products: NDArray[numpy.float64] = numpy.vecdot(a.reshape(shape), b.reshape(shape)).sum(1, numpy.float64)
    return products


def _spread(values: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """Per-channel values in the calculation dtype, to go with (C, N, H, W)."""
    return values.astype(dtype)[:, None, None, None]


def _sizes(x: FloatArray) -> tuple[int, int, int]:
    """(N, C, pixels) of x (N, C) or (N, C, H, W)."""
    return x.shape[0], x.shape[1], math.prod(x.shape[2:])


def _takes_loops(images: Sequence[FloatArray], per_channel: Sequence[FloatArray | None]) -> bool:
    """Whether the compiled loops do it: float32 images of any layout, and arrays a channel as they take them."""
    return compiled.usable(*per_channel) and all(array.dtype == numpy.float32 for array in images)


def batch_norm_forward(
    x: FloatArray,
    weight: FloatArray | None = None,
    bias: FloatArray | None = None,
    running_mean: FloatArray | None = None,
    running_var: FloatArray | None = None,
    *,
    momentum: float = 0.1,
    epsilon: float = 1e-5,
    residual: FloatArray | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    with_mask: bool = False,
    out: FloatArray | None = None,
) -> tuple[Any, ...]:
    """(y, mean, inverse_std) with statistics over all axes but 1 of x (N, C) or (N, C, H, W).

    y = activation((x - mean) * inverse_std * weight + bias + residual), inverse_std = 1 / sqrt(biased variance +
    epsilon). The running statistics, where given, move in place by ``momentum`` towards the mean and the
    *unbiased* variance. Raises ShapeError with fewer than two values a channel.

    The residual and the activation are passes of their own: on the CPU nobody gains by them but who compares. Nor
    would backward gain by a mask: ``with_mask`` adds None.
    """
    require_choice(activation, ENDINGS, "activation")
    given = (x, weight, bias, running_mean, running_var)
    nothing = (None,) if with_mask else ()
    if residual is None and activation == "identity":
        return *_forward(*given, momentum, epsilon, out), *nothing
    check_residual(residual, x.shape)
    if out is not None:
        check_out(out, x.shape, x.dtype)
    y, mean, inverse_std = _forward(*given, momentum, epsilon, None)
    with numpy.errstate(all="ignore"):
        if residual is not None:
            y += residual
    if activation == "relu":
        relu_forward(y, out=y)
    elif activation == "relu6":
        relu6_forward(y, out=y)
    elif activation == "leaky_relu":
        leaky_relu_forward(y, negative_slope=negative_slope, out=y)
    if out is None:
        return y, mean, inverse_std, *nothing
    out[...] = y
    return out, mean, inverse_std, *nothing


def _forward(
    x: FloatArray,
    weight: FloatArray | None,
    bias: FloatArray | None,
    running_mean: FloatArray | None,
    running_var: FloatArray | None,
    momentum: float,
    epsilon: float,
    out: FloatArray | None,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Without a residual and an activation."""
    check_batch_norm(x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    channels = x.shape[1]
    count = x.size // max(1, channels)
    check_batch(x)
    y = result_like(out, x)
    if _takes_loops((x, y), (weight, bias, running_mean, running_var)):
        found_mean, inverse_std = numpy.empty((2, channels), numpy.float32)
        moments = (weight, bias, running_mean, running_var, momentum, epsilon)

        def normalize(images: FloatArray, result: FloatArray) -> None:
            sizes = _sizes(images)
            loops.batch_norm_forward(*sizes, images, *moments, result, found_mean, inverse_std)

        return contiguously(normalize, y, x), found_mean, inverse_std
    wide = calculation_dtype(x.dtype)
    mean, variance = numpy.empty(channels, numpy.float64), numpy.empty(channels, numpy.float64)
    source, target = _by_channel(x), _by_channel(y)
    blocks = _channel_blocks(x)

    def task(number: int) -> None:
        part = blocks[number]
        values = scratch("batch_norm", source[part].shape, wide)
        rows, sums, products = source[part], _sums, _products
        with numpy.errstate(all="ignore"):
            if not _has_planes(rows, wide):
                numpy.copyto(values, rows)
                rows, sums, products = values, _row_sums, _row_products
            correction, square = sums(rows) / count, products(rows, rows) / count
            middle = numpy.zeros_like(correction)
            for _ in range(2):  # once more where the mean itself was inexact beside the standard deviation
                reliable = (correction * correction <= square - correction * correction) & numpy.isfinite(square)
                if reliable.all():
                    break
                shift = numpy.where(reliable, 0, correction).astype(wide)
                rows = numpy.subtract(rows, shift[:, None, None, None], out=values)
                middle += shift
                # Another channel's trouble changes no bit of a reliable one.
                correction = numpy.where(reliable, correction, _row_sums(values) / count)
                square = numpy.where(reliable, square, _row_products(values, values) / count)
            mean[part] = middle + correction
            variance[part] = numpy.maximum(square - correction * correction, 0)
            factor = 1 / numpy.sqrt(variance[part] + epsilon)
            if weight is not None:
                factor = factor * weight[part]
            offset = -correction * factor
            if bias is not None:
                offset = offset + bias[part]
            numpy.multiply(rows, _spread(factor, wide), out=values)
            numpy.add(values, _spread(offset, wide), out=target[part], casting="same_kind")

    parallel_for(len(blocks), task, small=x.size < SMALL)
    with numpy.errstate(all="ignore"):
        if running_mean is not None:
            running_mean += (momentum * (mean - running_mean)).astype(running_mean.dtype)
        if running_var is not None:
            unbiased = variance * (count / max(1, count - 1))
            running_var += (momentum * (unbiased - running_var)).astype(running_var.dtype)
        return y, mean.astype(wide), (1 / numpy.sqrt(variance + epsilon)).astype(wide)


def batch_norm_backward(
    dy: FloatArray,
    x: FloatArray,
    weight: FloatArray | None,
    mean: FloatArray,
    inverse_std: FloatArray,
    *,
    y: FloatArray | None = None,
    mask: None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    out: FloatArray | None = None,
    out_weight: FloatArray | None = None,
    out_bias: FloatArray | None = None,
    out_residual: FloatArray | None = None,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(dx, dweight, dbias) of the training-time batch norm, of dy of y, its result after the activation."""
    check_ending(activation, y, x.shape, negative_slope)
    if y is not None and activation == "relu":
        dy = relu_backward(dy, y)
    elif y is not None and activation == "relu6":
        dy = relu6_backward(dy, y)
    elif y is not None and activation == "leaky_relu":
        dy = leaky_relu_backward(dy, y, negative_slope=negative_slope)
    if out_residual is not None:
        check_out(out_residual, x.shape, dy.dtype)
        out_residual[...] = dy
    dx, dweight, dbias = _backward(dy, x, weight, mean, inverse_std, out)
    return dx, _brought_to(out_weight, dweight), _brought_to(out_bias, dbias)


def _brought_to(out: FloatArray | None, result: FloatArray) -> FloatArray:
    if out is None:
        return result
    check_out(out, result.shape, out.dtype)
    out[...] = result
    return out


def _backward(
    dy: FloatArray,
    x: FloatArray,
    weight: FloatArray | None,
    mean: FloatArray,
    inverse_std: FloatArray,
    out: FloatArray | None,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Without an activation."""
    check_batch_norm(x, weight=weight, mean=mean, inverse_std=inverse_std)
    require_floating(dy, "the output gradient")
    require_shape(dy, x.shape, "the output gradient")
    channels = x.shape[1]
    count = max(1, x.size // max(1, channels))
    dx = result_like(out, dy)
    if _takes_loops((x, dy, dx), (weight, mean, inverse_std)) and x.size:
        loop_dweight, loop_dbias = numpy.empty((2, channels), numpy.float32)

        def differentiate(gradient: FloatArray, images: FloatArray, result: FloatArray) -> None:
            moments = (weight, mean, inverse_std)
            loops.batch_norm_backward(*_sizes(x), gradient, images, *moments, result, loop_dweight, loop_dbias)

        return contiguously(differentiate, dx, dy, x), loop_dweight, loop_dbias
    wide = calculation_dtype(x.dtype)
    dweight, dbias = numpy.empty(channels, numpy.float64), numpy.empty(channels, numpy.float64)
    source, gradient, target = _by_channel(x), _by_channel(dy), _by_channel(dx)
    blocks = _channel_blocks(x)

    def task(number: int) -> None:
        part = blocks[number]
        values = scratch("batch_norm", source[part].shape, wide)
        rows, slopes = source[part], gradient[part]
        pieces, sums, products = [slice(0, x.shape[0])], _row_sums, _row_products
        with numpy.errstate(all="ignore"):
            scale = inverse_std[part].astype(numpy.float64)
            middle = mean[part].astype(numpy.float64)
            if _has_planes(slopes, wide) and _has_planes(rows, wide):
                pieces = ranges(x.shape[0], max(1, _PIECE_BYTES // (values[:, :1].nbytes or 1)))
                sums, products = _sums, _products
            else:
                slopes = scratch("batch_norm_gradient", values.shape, wide)
                numpy.copyto(slopes, gradient[part])
                rows = values
                numpy.copyto(rows, source[part])
            # A mean of more than a standard deviation is taken out before numbers are multiplied, to keep their
            # digits; what its rounding left in them is ``middle``, and taken out of the sums.
            small = numpy.abs(middle) * scale <= 1
            if not small.all():
                rows = numpy.subtract(rows, _spread(numpy.where(small, 0, mean[part]), wide), out=values)
                middle = numpy.where(small, middle, _row_sums(values) / count)
            total, product = numpy.zeros((2, len(values)), numpy.float64)
            for images in pieces:
                total += sums(slopes[:, images])
                product += products(rows[:, images], slopes[:, images])
            product = (product - middle * total) * scale
            dbias[part], dweight[part] = total, product
            factor = scale if weight is None else scale * weight[part]
            # dx = factor * (dy - total / n - (x - mean) * scale * product / n)
            slant = -factor * scale * product / count
            offset = _spread(-factor * total / count - slant * middle, wide)
            slant, factor = _spread(slant, wide), _spread(factor, wide)
            for images in pieces:
                piece = numpy.multiply(rows[:, images], slant, out=values[:, images])
                share = scratch("batch_norm_share", piece.shape, wide)
                piece += numpy.multiply(slopes[:, images], factor, out=share)
                numpy.add(piece, offset, out=target[part][:, images], casting="same_kind")

    parallel_for(len(blocks), task, small=x.size < SMALL)
    with numpy.errstate(all="ignore"):
        return dx, dweight.astype(x.dtype), dbias.astype(x.dtype)


def batch_norm_inference(
    x: FloatArray,
    weight: FloatArray | None,
    bias: FloatArray | None,
    running_mean: FloatArray,
    running_var: FloatArray,
    *,
    epsilon: float = 1e-5,
    out: FloatArray | None = None,
) -> FloatArray:
    """(x - running_mean) / sqrt(running_var + epsilon) * weight + bias."""
    check_batch_norm(x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    y = result_like(out, x)
    if _takes_loops((x, y), (weight, bias, running_mean, running_var)):

        def apply(images: FloatArray, result: FloatArray) -> None:
            moments = (weight, bias, running_mean, running_var, epsilon)
            loops.batch_norm_inference(*_sizes(images), images, *moments, result)

        return contiguously(apply, y, x)
    wide = calculation_dtype(x.dtype)
    shape = (1, -1) + (1,) * (x.ndim - 2)
    with numpy.errstate(all="ignore"):
        factor = 1 / numpy.sqrt(running_var.astype(numpy.float64) + epsilon)
        if weight is not None:
            factor = factor * weight
        factor = factor.astype(wide).reshape(shape)
        middle = running_mean.astype(wide).reshape(shape)
        offset = None if bias is None else bias.astype(wide).reshape(shape)
        step = max(1, PLANE_BYTES // max(1, x[:1].size * wide.itemsize))
        blocks = ranges(x.shape[0], step)

    def task(number: int) -> None:
        part = blocks[number]
        with numpy.errstate(all="ignore"):
            values = y[part] if wide == y.dtype else numpy.empty(y[part].shape, wide)
            numpy.subtract(x[part], middle, out=values)
            values *= factor
            if offset is not None:
                values += offset
            if wide != y.dtype:
                y[part] = values

    parallel_for(len(blocks), task, small=x.size < SMALL)
    return y


def batch_norm_inference_backward(
    dy: FloatArray,
    x: FloatArray | None,
    weight: FloatArray | None,
    running_mean: FloatArray,
    running_var: FloatArray,
    *,
    epsilon: float = 1e-5,
    out: FloatArray | None = None,
    out_weight: FloatArray | None = None,
    out_bias: FloatArray | None = None,
) -> tuple[FloatArray, FloatArray | None, FloatArray | None]:
    """(dx, dweight, dbias) of :func:`batch_norm_inference`, whose statistics are constants; see the contract.

    dx is made as inference makes y, of dy, for no mean and no bias.
    """
    check_batch_norm_inference_gradient(dy, x, weight=weight, running_mean=running_mean, running_var=running_var)
    dweight = dbias = None
    if x is not None:
        dweight, dbias = _gradients_for_given_statistics(dy, x, running_mean, running_var, epsilon)
        dweight, dbias = _brought_to(out_weight, dweight), _brought_to(out_bias, dbias)
    nothing = numpy.zeros_like(running_mean)
    return batch_norm_inference(dy, weight, None, nothing, running_var, epsilon=epsilon, out=out), dweight, dbias


def _gradients_for_given_statistics(
    dy: FloatArray, x: FloatArray, mean: FloatArray, variance: FloatArray, epsilon: float
) -> tuple[FloatArray, FloatArray]:
    """(dweight, dbias): sums over each channel of dy * (x - mean) / sqrt(variance + epsilon) and of dy."""
    wide = calculation_dtype(x.dtype)
    dweight, dbias = numpy.empty(x.shape[1], numpy.float64), numpy.empty(x.shape[1], numpy.float64)
    source, gradient, middle = _by_channel(x), _by_channel(dy), _spread(mean, wide)
    blocks = _channel_blocks(x)

    def task(number: int) -> None:
        part = blocks[number]
        values = scratch("batch_norm", source[part].shape, wide)
        slopes = scratch("batch_norm_gradient", values.shape, wide)
        with numpy.errstate(all="ignore"):
            numpy.subtract(source[part], middle[part], out=values)
            numpy.copyto(slopes, gradient[part])
            dweight[part], dbias[part] = _row_products(values, slopes), _row_sums(slopes)

    parallel_for(len(blocks), task, small=x.size < SMALL)
    with numpy.errstate(all="ignore"):
        dweight /= numpy.sqrt(variance.astype(numpy.float64) + epsilon)
        return dweight.astype(x.dtype), dbias.astype(x.dtype)
