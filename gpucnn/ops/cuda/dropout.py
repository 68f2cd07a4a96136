"""Dropout: the mask is a function of the random stream alone, the same on every backend and in every layout."""

from __future__ import annotations

from typing import Any

import gpucnn_kernels as kernels
from gpucnn.device import module_of
from gpucnn.ops.checks import check_mask, check_probability, dropout_mask_shape, require_floating
from gpucnn.ops.contract import Array
from gpucnn.ops.cuda.arrays import (
    call,
    check_devices,
    contiguous,
    finish,
    is_contiguous,
    is_image,
    usable,
    usable_in_place,
)


def _has_planes(array: Array) -> bool:
    return is_image(array) if array.ndim == 4 else is_contiguous(array)


def _planes(array: Array, dtype: Any) -> Array:
    """Contiguous, or (N, C, H, W) and channels-last, as it is; otherwise a contiguous copy."""
    return array if array.dtype == dtype and _has_planes(array) else contiguous(array, dtype)


def dropout_forward(
    x: Array,
    *,
    probability: float,
    seed: int,
    offset: int,
    per_channel: bool = False,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """(y, mask): x / (1 - probability) where the boolean mask holds, 0 elsewhere."""
    check_devices(x=x, out=out)
    require_floating(x, "the input")
    check_probability(probability)
    dropout_mask_shape(x, per_channel)
    given = _planes(x, x.dtype)
    y, mask = call(
        kernels.dropout_forward,
        given,
        probability=probability,
        seed=seed,
        offset=offset,
        per_channel=per_channel,
        out=usable_in_place(out, given, x.dtype),
    )
    return finish(y, out, x.dtype), mask


def dropout_backward(dy: Array, mask: Array, *, probability: float, out: Array | None = None) -> Array:
    """Dy / (1 - probability) where the mask holds, 0 elsewhere."""
    check_devices(dy=dy, mask=mask, out=out)
    check_mask(mask, dy)
    check_probability(probability)
    gradient = _planes(dy, dy.dtype)
    if mask.shape not in (dy.shape, (*dy.shape[:2], *(1,) * (dy.ndim - 2))):
        mask = module_of(mask).broadcast_to(mask, dy.shape)
    places = _planes(mask, "bool")
    if out is gradient:
        target = usable_in_place(out, gradient, dy.dtype, places)
    else:
        target = usable(out, dy.shape, dy.dtype, dy.dtype, gradient, places, layout=_has_planes)
    return finish(
        call(kernels.dropout_backward, gradient, places, probability=probability, out=target), out, dy.dtype
    )
