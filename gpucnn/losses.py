"""Losses: PyTorch's names, definitions and defaults.

``value = loss(prediction, target)`` is a number (an array with reduction="none"), ``loss.backward()`` the
gradient for the prediction. With the default reduction "mean", gradients are batch means.
"""

from __future__ import annotations

from typing import Any

import numpy

from gpucnn.errors import ArgumentError, DtypeError, ShapeError, StateError
from gpucnn.ops import Array, backend_of


class Loss:
    """The base of the losses.

    Args:
        reduction: "mean", "sum", or "none" for one value an element (its ``backward`` is the sum's).
    """

    _saved: Any = None

    def __init__(self, reduction: str = "mean") -> None:
        if reduction not in ("mean", "sum", "none"):
            raise ArgumentError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        self.reduction = reduction

    def forward(self, prediction: Array, target: Array) -> Any:
        """The loss of a batch."""
        raise TypeError(f"{type(self).__name__} does not define forward(prediction, target)")

    def __call__(self, prediction: Array, target: Array) -> Any:
        """``forward(prediction, target)``, as a Python float unless the reduction is "none"."""
        value = self.forward(prediction, target)
        return value if self.reduction == "none" else float(value)

    def _take_saved(self) -> Any:
        saved = self._saved
        if saved is None:
            raise StateError(f"{type(self).__name__}: backward needs a forward before it, one for each backward")
        self._saved = None
        return saved


class CrossEntropyLoss(Loss):
    """Softmax cross-entropy of logits (N, C), as ``torch.nn.CrossEntropyLoss``.

    Targets are class numbers (N,) or probabilities (N, C). With class numbers and weights, "mean" divides by the
    sum of the targets' weights.

    Args:
        weight: a weight for each class, (C,).
        label_smoothing: the share e of the target spread evenly: (1 - e) * one_hot + e / C (Szegedy et al. 2016).
        reduction: "mean", "sum" or "none".
    """

    def __init__(self, weight: Any | None = None, label_smoothing: float = 0.0, reduction: str = "mean") -> None:
        super().__init__(reduction)
        if not 0 <= label_smoothing <= 1:
            raise ArgumentError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
        self.weight = None if weight is None else numpy.asarray(weight)
        if self.weight is not None and not (self.weight.ndim == 1 and bool((self.weight >= 0).all())):
            raise ArgumentError("class weights must be one non-negative number a class")
        self.label_smoothing = label_smoothing

    def forward(self, prediction: Array, target: Array) -> Any:
        """The loss of logits (N, C) against ``target``."""
        weight = None if self.weight is None else self.weight.astype(prediction.dtype)
        loss, probabilities = backend_of(prediction).softmax_cross_entropy_forward(
            prediction, target, weight=weight, label_smoothing=self.label_smoothing, reduction=self.reduction
        )
        self._saved = probabilities, target, weight
        return loss

    def backward(self) -> Array:
        """The gradient for the logits, (N, C)."""
        probabilities, target, weight = self._take_saved()
        return backend_of(probabilities).softmax_cross_entropy_backward(
            probabilities, target, weight=weight, label_smoothing=self.label_smoothing, reduction=self.reduction
        )


def _check_pair(prediction: Array, target: Array) -> None:
    if getattr(target, "shape", None) is None:
        raise DtypeError(f"the target must be an array, got {type(target).__name__}")
    if tuple(prediction.shape) != tuple(target.shape):
        raise ShapeError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must have the same shape"
        )


class BCEWithLogitsLoss(Loss):
    """Binary cross-entropy of sigmoid(logits), stable at any logit, as ``torch.nn.BCEWithLogitsLoss``.

    Args:
        weight: multiplies each element's loss; anything that broadcasts to the logits.
        pos_weight: multiplies the positive term, for rare positives; broadcasts likewise.
        reduction: "mean", "sum" or "none".
    """

    def __init__(self, weight: Any | None = None, pos_weight: Any | None = None, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.weight = None if weight is None else numpy.asarray(weight)
        self.pos_weight = None if pos_weight is None else numpy.asarray(pos_weight)

    def _weights(self, dtype: Any) -> dict[str, Any]:
        return {
            "weight": None if self.weight is None else self.weight.astype(dtype),
            "positive_weight": None if self.pos_weight is None else self.pos_weight.astype(dtype),
        }

    def forward(self, prediction: Array, target: Array) -> Any:
        """The loss of logits against targets (of the same shape) between 0 and 1."""
        _check_pair(prediction, target)
        self._saved = prediction, target
        return backend_of(prediction).binary_cross_entropy_with_logits_forward(
            prediction, target, reduction=self.reduction, **self._weights(prediction.dtype)
        )

    def backward(self) -> Array:
        """The gradient for the logits."""
        prediction, target = self._take_saved()
        return backend_of(prediction).binary_cross_entropy_with_logits_backward(
            prediction, target, reduction=self.reduction, **self._weights(prediction.dtype)
        )


class MSELoss(Loss):
    """The squared difference, as ``torch.nn.MSELoss``."""

    def forward(self, prediction: Array, target: Array) -> Any:
        """(prediction - target) ** 2, reduced."""
        _check_pair(prediction, target)
        self._saved = prediction, target
        return backend_of(prediction).mean_squared_error_forward(prediction, target, reduction=self.reduction)

    def backward(self) -> Array:
        """The gradient for the prediction."""
        prediction, target = self._take_saved()
        return backend_of(prediction).mean_squared_error_backward(prediction, target, reduction=self.reduction)
