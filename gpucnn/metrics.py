"""How good predictions are: accuracies, and what a confusion matrix tells of each class.

A share that has nothing to be a share of (the accuracy of a class without images, the precision of a class
that was never predicted) is NaN, not zero: "not known" and "all wrong" are different news.

Arrays may be on any device; they are counted on the CPU, and results are NumPy's.
"""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.device import to_cpu
from gpucnn.errors import ArgumentError, DtypeError, ShapeError


def accuracy(logits: Any, labels: Any) -> float:
    """The share of rows of ``logits`` (N, C) whose largest value is at the row's label, of ``labels`` (N,).

    On ties the first class counts as the prediction; a label's own NaN is never right.
    """
    return top_k_accuracy(logits, labels, 1)


def top_k_accuracy(logits: Any, labels: Any, k: int = 5) -> float:
    """The share of rows of ``logits`` (N, C) that have their label among the ``k`` largest values.

    On ties the class with the smaller number goes first. Raises ArgumentError for ``k`` outside 1 .. C, for no
    rows at all and for labels outside 0 .. C - 1; ShapeError where the shapes do not fit.
    """
    logits, labels = to_cpu(logits), _class_numbers(labels, "labels")
    if logits.ndim != 2 or logits.shape[0] != labels.size:
        raise ShapeError(
            f"expected logits (N, C) and labels (N,), got shapes {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    count, classes = logits.shape
    if count == 0:
        raise ArgumentError("the accuracy of no predictions is not defined")
    if isinstance(k, bool) or not hasattr(k, "__index__") or not 1 <= k <= classes:
        raise ArgumentError(f"k must be an integer from 1 to the number of classes, {classes}, got {k!r}")
    _check_range(labels, classes, "labels")
    own = numpy.take_along_axis(logits, labels[:, None], axis=1)
    before = numpy.arange(classes) < labels[:, None]
    # "not smaller or equal" also holds for NaN, which therefore counts as larger than anything.
    ahead = ~(logits <= own) | ((logits == own) & before)
    return float(numpy.mean(ahead.sum(axis=1) < k))


def confusion_matrix(labels: Any, predictions: Any, classes: int) -> NDArray[numpy.int64]:
    """How often each true class was predicted as each: int64 (classes, classes), rows true, columns predicted.

    ``labels`` and ``predictions`` are class numbers (N,). Raises ShapeError where their lengths differ,
    ArgumentError for a number outside 0 .. classes - 1.
    """
    if isinstance(classes, bool) or not hasattr(classes, "__index__") or classes < 1:
        raise ArgumentError(f"classes must be an integer of at least 1, got {classes!r}")
    true, predicted = _class_numbers(labels, "labels"), _class_numbers(predictions, "predictions")
    if true.size != predicted.size:
        raise ShapeError(f"got {true.size} labels but {predicted.size} predictions")
    _check_range(true, classes, "labels")
    _check_range(predicted, classes, "predictions")
    counts = numpy.bincount(true * classes + predicted, minlength=classes * classes)
    return counts.astype(numpy.int64).reshape(classes, classes)


def per_class_accuracy(confusion: NDArray[Any]) -> NDArray[numpy.float64]:
    """The share of each true class that was recognized, (classes,); NaN for a class that did not occur."""
    return recall(confusion)


def recall(confusion: NDArray[Any]) -> NDArray[numpy.float64]:
    """Of the images of each class, the share predicted as it, (classes,); NaN where there are none."""
    confusion = _square(confusion)
    return _share(confusion.diagonal(), confusion.sum(axis=1))


def precision(confusion: NDArray[Any]) -> NDArray[numpy.float64]:
    """Of the predictions of each class, the share that was right, (classes,); NaN where there are none."""
    confusion = _square(confusion)
    return _share(confusion.diagonal(), confusion.sum(axis=0))


def f1(confusion: NDArray[Any]) -> NDArray[numpy.float64]:
    """The harmonic mean of precision and recall, (classes,): 2 TP / (2 TP + FP + FN).

    NaN for a class that neither occurred nor was predicted.
    """
    confusion = _square(confusion)
    return _share(2 * confusion.diagonal(), confusion.sum(axis=0) + confusion.sum(axis=1))


def _class_numbers(values: Any, name: str) -> NDArray[numpy.int64]:
    numbers: NDArray[Any] = to_cpu(values)
    if numbers.ndim != 1:
        raise ShapeError(f"{name} must be class numbers of shape (N,), got shape {tuple(numbers.shape)}")
    if numbers.size and numbers.dtype.kind not in "iu":
        raise DtypeError(f"{name} must be integers, got dtype {numbers.dtype}")
    return numbers.astype(numpy.int64)


def _check_range(numbers: NDArray[numpy.int64], classes: int, name: str) -> None:
    outside = numbers[(numbers < 0) | (numbers >= classes)]
    if outside.size:
        raise ArgumentError(f"{name} must be class numbers from 0 to {classes - 1}, got {int(outside[0])}")


def _square(confusion: NDArray[Any]) -> NDArray[Any]:
    matrix: NDArray[Any] = to_cpu(confusion)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ShapeError(f"a confusion matrix is square, got shape {tuple(matrix.shape)}")
    return matrix


def _share(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[numpy.float64]:
    share = numpy.full(part.shape, numpy.nan)
    numpy.divide(part, whole, out=share, where=whole > 0)
    return share
