"""Losses and their gradients: softmax cross-entropy, binary cross-entropy with logits, mean squared error.

The definitions are PyTorch's, with its class weights, label smoothing and reductions. Sums run in float64.
"""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.errors import ShapeError
from gpucnn.ops.checks import check_broadcast, check_classification, check_loss_pair, label_error
from gpucnn.ops.cpu.memory import FloatArray, calculation_dtype, result_array


def _reduced(terms: NDArray[Any], reduction: str, divisor: float, dtype: Any) -> NDArray[Any]:
    if reduction == "none":
        return terms.astype(dtype, copy=False)
    total = terms.sum(dtype=numpy.float64)
    if reduction == "mean":
        total /= numpy.float64(divisor)  # 0 / 0, the mean of nothing, is NaN as in PyTorch
    return numpy.asarray(total, dtype)


# ---------------------------------------------------------------- softmax cross-entropy


def _check_labels(labels: NDArray[Any], classes: int) -> None:
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        position = int(numpy.argmax(outside))
        raise label_error(int(labels[position]), position, classes)


def _weighted_targets(
    shape: tuple[int, ...], targets: Any, weight: FloatArray | None, label_smoothing: float, dtype: Any
) -> tuple[FloatArray, float]:
    """The targets with smoothing and class weights, (N, C), and the divisor of "mean"."""
    n, classes = shape
    divisor = float(n)
    if targets.ndim == 1:
        _check_labels(targets, classes)
        smoothed = numpy.full(shape, label_smoothing / classes, dtype)
        smoothed[numpy.arange(n), targets] += dtype.type(1 - label_smoothing)
        if weight is not None:
            divisor = float(weight[targets].sum(dtype=numpy.float64))
    else:
        smoothed = targets.astype(dtype)
        if label_smoothing:
            smoothed *= dtype.type(1 - label_smoothing)
            smoothed += dtype.type(label_smoothing / classes)
    if weight is not None:
        smoothed *= weight.astype(dtype, copy=False)
    return smoothed, divisor


def softmax_cross_entropy_forward(
    logits: FloatArray,
    targets: NDArray[Any],
    *,
    weight: FloatArray | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    check_targets: bool = True,
) -> tuple[FloatArray, FloatArray]:
    """(loss, probabilities) for logits (N, C) and targets (N,) of class numbers or (N, C) of probabilities.

    With smoothing e, the target is (1 - e) * one_hot + e / C; a class weight multiplies each class's term, and for
    class numbers "mean" divides by the sum of the targets' weights. ``reduction`` is "mean", "sum" or "none" (loss
    then (N,)). Raises ArgumentError for a class number outside 0 .. C - 1, DtypeError for targets that are neither
    integers (N,) nor floating point (N, C). ``check_targets`` changes nothing: here it costs no wait to look.
    """
    check_classification(logits, "the logits", targets, weight, label_smoothing, reduction)
    dtype = calculation_dtype(logits.dtype)
    target, divisor = _weighted_targets(logits.shape, targets, weight, label_smoothing, dtype)
    if logits.shape[1] == 0:
        raise ShapeError(f"the logits must have at least one class, got shape {logits.shape}")
    with numpy.errstate(all="ignore"):
        wide = logits.astype(dtype, copy=False)
        shifted = wide - wide.max(axis=1, keepdims=True)
        probabilities = numpy.exp(shifted)
        total = probabilities.sum(axis=1, keepdims=True)
        probabilities /= total
        shifted -= numpy.log(total)
        if targets.ndim == 1:
            # A class that no target mentions must not matter, even where its logit is minus infinity.
            shifted[target == 0] = 0
        terms = -(target * shifted).sum(axis=1)
        loss = _reduced(terms, reduction, divisor, logits.dtype)
    return loss, probabilities.astype(logits.dtype, copy=False)


def softmax_cross_entropy_backward(
    probabilities: FloatArray,
    targets: NDArray[Any],
    *,
    weight: FloatArray | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    out: FloatArray | None = None,
) -> FloatArray:
    """The gradient for the logits of the loss ("none": of the sum of the losses)."""
    check_classification(probabilities, "the probabilities", targets, weight, label_smoothing, reduction)
    dtype = calculation_dtype(probabilities.dtype)
    target, divisor = _weighted_targets(probabilities.shape, targets, weight, label_smoothing, dtype)
    result = result_array(out, probabilities.shape, probabilities.dtype)
    with numpy.errstate(all="ignore"):
        gradient = probabilities * target.sum(axis=1, keepdims=True)
        gradient -= target
        if reduction == "mean":
            gradient /= dtype.type(divisor)
        result[...] = gradient
    return result


# ---------------------------------------------------------------- binary cross-entropy


def _broadcast(factor: FloatArray | None, shape: tuple[int, ...], name: str) -> Any:
    if factor is None:
        return 1
    check_broadcast(factor, shape, name)
    return numpy.broadcast_to(factor, shape)


def binary_cross_entropy_with_logits_forward(
    logits: FloatArray,
    targets: FloatArray,
    *,
    weight: FloatArray | None = None,
    positive_weight: FloatArray | None = None,
    reduction: str = "mean",
) -> FloatArray:
    """-(p * t * log(s) + (1 - t) * log(1 - s)) * w with s = sigmoid(logits), without overflow.

    ``targets`` has the shape of the logits; ``weight`` (w) and ``positive_weight`` (p) broadcast to it.
    """
    check_loss_pair(logits, targets, reduction, "the logits", "the targets")
    dtype = calculation_dtype(logits.dtype)
    x, t = logits.astype(dtype, copy=False), targets.astype(dtype, copy=False)
    w = _broadcast(weight, logits.shape, "weight")
    p = _broadcast(positive_weight, logits.shape, "positive_weight")
    with numpy.errstate(all="ignore"):
        # -log s and -log(1 - s) share log1p(exp(-|x|)). Each is a sum of positive numbers; one from the other,
        # by adding x, would lose the digits of the smaller.
        tail = numpy.log1p(numpy.exp(-numpy.abs(x)))
        terms = (p * t * (tail + numpy.maximum(-x, 0)) + (1 - t) * (tail + numpy.maximum(x, 0))) * w
        return _reduced(terms, reduction, terms.size, logits.dtype)


def binary_cross_entropy_with_logits_backward(
    logits: FloatArray,
    targets: FloatArray,
    *,
    weight: FloatArray | None = None,
    positive_weight: FloatArray | None = None,
    reduction: str = "mean",
    out: FloatArray | None = None,
) -> FloatArray:
    """The gradient for the logits."""
    check_loss_pair(logits, targets, reduction, "the logits", "the targets")
    dtype = calculation_dtype(logits.dtype)
    x, t = logits.astype(dtype, copy=False), targets.astype(dtype, copy=False)
    w = _broadcast(weight, logits.shape, "weight")
    p = _broadcast(positive_weight, logits.shape, "positive_weight")
    result = result_array(out, logits.shape, logits.dtype)
    with numpy.errstate(all="ignore"):
        # sigmoid(x) and 1 - sigmoid(x) = sigmoid(-x), each with all its digits at either end; where exp overflows,
        # the reciprocal is the right 0.
        gate, rest = 1 / (1 + numpy.exp(-x)), 1 / (1 + numpy.exp(x))
        gradient = ((1 - t) * gate - p * t * rest) * w
        if reduction == "mean":
            gradient = gradient / dtype.type(max(1, x.size))
        result[...] = gradient
    return result


# ---------------------------------------------------------------- mean squared error


def mean_squared_error_forward(
    prediction: FloatArray, target: FloatArray, *, reduction: str = "mean"
) -> FloatArray:
    """(prediction - target) ** 2, its mean or sum."""
    check_loss_pair(prediction, target, reduction, "the prediction", "the target")
    dtype = calculation_dtype(prediction.dtype)
    with numpy.errstate(all="ignore"):
        difference = numpy.subtract(prediction, target, dtype=dtype, casting="same_kind")
        return _reduced(difference * difference, reduction, difference.size, prediction.dtype)


def mean_squared_error_backward(
    prediction: FloatArray, target: FloatArray, *, reduction: str = "mean", out: FloatArray | None = None
) -> FloatArray:
    """2 * (prediction - target), over the element count for "mean"."""
    check_loss_pair(prediction, target, reduction, "the prediction", "the target")
    dtype = calculation_dtype(prediction.dtype)
    result = result_array(out, prediction.shape, prediction.dtype)
    factor = 2 / max(1, prediction.size) if reduction == "mean" else 2.0
    with numpy.errstate(all="ignore"):
        difference = numpy.subtract(prediction, target, dtype=dtype, casting="same_kind")
        result[...] = difference * dtype.type(factor)
    return result
