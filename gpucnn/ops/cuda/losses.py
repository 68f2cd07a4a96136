"""Losses and their gradients.

A reduced loss is a 0-d array on the device, and nothing waits for it, but that the class numbers of a softmax
cross-entropy are checked: its forward pass waits once, unless it is told not to look, its backward pass does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpucnn_kernels as kernels
from gpucnn.device import module_of
from gpucnn.errors import ShapeError
from gpucnn.ops.checks import check_broadcast, check_classification, check_loss_pair
from gpucnn.ops.contract import Array
from gpucnn.ops.cuda.arrays import (
    accumulating_dtype,
    call,
    check_devices,
    common_dtype,
    contiguous,
    dense,
    finish,
    laid_out_as,
    usable_in_place,
)

_LABELS = ("uint8", "int32", "int64")

# ---------------------------------------------------------------- softmax cross-entropy


def classification(scores: Array, targets: Array, weight: Array | None) -> tuple[Array, Array, Array | None]:
    """The arguments of a classification's loss as the kernels take them."""
    labels = targets.ndim == 1
    dtype = scores.dtype if labels else common_dtype(scores, targets)
    wanted = (targets.dtype if str(targets.dtype) in _LABELS else "int64") if labels else dtype
    weights = None if weight is None else contiguous(weight, accumulating_dtype(dtype))
    return contiguous(scores, dtype), contiguous(targets, wanted), weights


def softmax_cross_entropy_forward(
    logits: Array,
    targets: Array,
    *,
    weight: Array | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    reduction: str = "mean",
    check_targets: bool = True,
) -> tuple[Array, Array]:
    """(loss, probabilities) for logits (N, C) and targets (N,) of class numbers or (N, C) of probabilities."""
    check_devices(logits=logits, targets=targets, weight=weight)
    check_classification(logits, "the logits", targets, weight, label_smoothing, reduction, ignore_index)
    if logits.shape[1] == 0:
        raise ShapeError(f"the logits must have at least one class, got shape {logits.shape}")
    scores, wanted, weights = classification(logits, targets, weight)
    loss, probabilities = call(
        kernels.softmax_cross_entropy_forward,
        scores,
        wanted,
        weight=weights,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
        check_targets=check_targets,
    )
    return finish(loss, None, logits.dtype), finish(probabilities, None, logits.dtype)


def softmax_cross_entropy_backward(
    probabilities: Array,
    targets: Array,
    *,
    weight: Array | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    reduction: str = "mean",
    out: Array | None = None,
) -> Array:
    """The gradient for the logits of the loss ("none": of the sum of the losses).

    It does not wait for the GPU: a sample whose class number is out of range gets a gradient of NaNs.
    """
    check_devices(probabilities=probabilities, targets=targets, weight=weight, out=out)
    check_classification(
        probabilities, "the probabilities", targets, weight, label_smoothing, reduction, ignore_index
    )
    scores, wanted, weights = classification(probabilities, targets, weight)
    gradient = call(
        kernels.softmax_cross_entropy_backward,
        scores,
        wanted,
        weight=weights,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
        out=usable_in_place(out, scores, probabilities.dtype, wanted, weights),
    )
    return finish(gradient, out, probabilities.dtype)


# ---------------------------------------------------------------- binary cross-entropy


_MOST_AXES = 4  # along which the kernels follow a weight that broadcasts


def _factor(factor: Array | None, name: str, first: Array) -> Array | None:
    check_broadcast(factor, first.shape, name)
    if factor is None:
        return None
    wide = accumulating_dtype(first.dtype)
    if first.ndim > _MOST_AXES and factor.size > 1:
        return laid_out_as(first, module_of(factor).broadcast_to(factor, first.shape), wide)
    return contiguous(factor, wide)


def _binary(
    function: Callable[..., Any],
    logits: Array,
    targets: Array,
    weight: Array | None,
    positive_weight: Array | None,
    reduction: str,
) -> tuple[Callable[..., Any], Array, Array]:
    """(the function with its options, logits, targets), checked and as the kernels take them."""
    check_loss_pair(logits, targets, reduction, "the logits", "the targets")
    first = dense(logits, common_dtype(logits, targets))
    second = laid_out_as(first, targets, first.dtype)
    options = {
        "weight": _factor(weight, "weight", first),
        "positive_weight": _factor(positive_weight, "positive_weight", first),
        "reduction": reduction,
    }
    return lambda **more: call(function, first, second, **options, **more), first, second


def binary_cross_entropy_with_logits_forward(
    logits: Array,
    targets: Array,
    *,
    weight: Array | None = None,
    positive_weight: Array | None = None,
    reduction: str = "mean",
) -> Array:
    """-(p * t * log(s) + (1 - t) * log(1 - s)) * w with s = sigmoid(logits), without overflow."""
    check_devices(logits=logits, targets=targets, weight=weight, positive_weight=positive_weight)
    function = kernels.binary_cross_entropy_with_logits_forward
    loss, _, _ = _binary(function, logits, targets, weight, positive_weight, reduction)
    return finish(loss(), None, logits.dtype)


def binary_cross_entropy_with_logits_backward(
    logits: Array,
    targets: Array,
    *,
    weight: Array | None = None,
    positive_weight: Array | None = None,
    reduction: str = "mean",
    out: Array | None = None,
) -> Array:
    """The gradient for the logits."""
    check_devices(logits=logits, targets=targets, weight=weight, positive_weight=positive_weight, out=out)
    function = kernels.binary_cross_entropy_with_logits_backward
    gradient, first, second = _binary(function, logits, targets, weight, positive_weight, reduction)
    target = usable_in_place(out, first, logits.dtype, second, weight, positive_weight)
    return finish(gradient(out=target), out, logits.dtype)


# ---------------------------------------------------------------- mean squared error


def _squared(prediction: Array, target: Array, reduction: str) -> tuple[Array, Array]:
    check_loss_pair(prediction, target, reduction, "the prediction", "the target")
    first = dense(prediction, common_dtype(prediction, target))
    return first, laid_out_as(first, target, first.dtype)


def mean_squared_error_forward(prediction: Array, target: Array, *, reduction: str = "mean") -> Array:
    """(prediction - target) ** 2, its mean or sum."""
    check_devices(prediction=prediction, target=target)
    first, second = _squared(prediction, target, reduction)
    loss = call(kernels.mean_squared_error_forward, first, second, reduction=reduction)
    return finish(loss, None, prediction.dtype)


def mean_squared_error_backward(
    prediction: Array, target: Array, *, reduction: str = "mean", out: Array | None = None
) -> Array:
    """2 * (prediction - target), over the element count for "mean"."""
    check_devices(prediction=prediction, target=target, out=out)
    first, second = _squared(prediction, target, reduction)
    gradient = call(
        kernels.mean_squared_error_backward,
        first,
        second,
        reduction=reduction,
        out=usable_in_place(out, first, prediction.dtype, second),
    )
    return finish(gradient, out, prediction.dtype)
