"""Losses: PyTorch's names, definitions and defaults.

``value = loss(prediction, target)`` is a number (an array with reduction="none"), ``loss.backward()`` the
gradient for the prediction. With the default reduction "mean", gradients are batch means. The target must be on
the prediction's device; weights follow the prediction by themselves.
"""

from __future__ import annotations

from typing import Any, Self

import numpy
from numpy.typing import NDArray

from gpucnn.device import Device, device_of, require_same_device, to_cpu, to_device
from gpucnn.errors import ArgumentError, DtypeError, ShapeError, StateError
from gpucnn.ops import Array, backend_of
from gpucnn.ops.checks import check_ignore_index


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

    def to(self, device: str | Device) -> Self:
        """Move the weights to ``device`` now, before the first prediction there needs them; returns itself."""
        for weight in vars(self).values():
            if isinstance(weight, _Weight):
                weight.move(device)
        return self

    def arrays(self) -> list[Array]:
        """What it reads beside prediction and target: its weights, where and as they were needed last."""
        return [value._copy for value in vars(self).values() if isinstance(value, _Weight)]

    def _take_saved(self) -> Any:
        saved = self._saved
        if saved is None:
            raise StateError(f"{type(self).__name__}: backward needs a forward before it, one for each backward")
        self._saved = None
        return saved


class _Weight:
    """A loss's weights as they were given, and the copy in the dtype and on the device that were last needed."""

    def __init__(self, values: Any) -> None:
        self.values = numpy.asarray(to_cpu(values))
        self._copy: Array = self.values

    def move(self, device: str | Device) -> None:
        self._copy = to_device(self._copy, device)

    def like(self, prediction: Array) -> Array:
        if self._copy.dtype != prediction.dtype:
            self._copy = self.values.astype(prediction.dtype)
        if type(self._copy) is not numpy.ndarray or type(prediction) is not numpy.ndarray:
            self._copy = to_device(self._copy, device_of(prediction))
        return self._copy


def _weight(values: Any | None) -> _Weight | None:
    return None if values is None else _Weight(values)


def _check_target(prediction: Array, target: Any) -> None:
    """Raise DtypeError unless the target is an array, DeviceError unless it is where the prediction is."""
    if getattr(target, "shape", None) is None:
        raise DtypeError(f"the target must be an array, got {type(target).__name__}")
    require_same_device(
        target,
        prediction,
        "the target is on {array} but the prediction on {other}; move the target with "
        "gpucnn.device.to_device(target, '{other}')",
    )


class CrossEntropyLoss(Loss):
    """Softmax cross-entropy of logits (N, C), as ``torch.nn.CrossEntropyLoss``.

    Targets are class numbers (N,) or probabilities (N, C). With class numbers and weights, "mean" divides by the
    sum of the targets' weights. Samples whose class number is ``ignore_index`` have neither loss nor gradient, and
    "mean" does not count them: over nothing but such samples it is NaN.

    Args:
        weight: a weight for each class, (C,).
        label_smoothing: the share e of the target spread evenly: (1 - e) * one_hot + e / C (Szegedy et al. 2016).
        reduction: "mean", "sum" or "none".
        ignore_index: the class number whose samples are left out, any integer; None leaves out none. With
            probabilities it must be negative or None.

    Attributes:
        check_targets: whether each forward looks for class numbers out of range, for which a GPU has to be waited
            for. Who has looked at all labels before may set it to False: the loss of such a one is then NaN.
    """

    check_targets: bool = True

    def __init__(
        self,
        weight: Any | None = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        ignore_index: int | None = -100,
    ) -> None:
        super().__init__(reduction)
        check_ignore_index(ignore_index)
        self.ignore_index = ignore_index
        if not 0 <= label_smoothing <= 1:
            raise ArgumentError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
        self._weight = _weight(weight)
        if self.weight is not None and not (self.weight.ndim == 1 and bool((self.weight >= 0).all())):
            raise ArgumentError("class weights must be one non-negative number a class")
        self.label_smoothing = label_smoothing

    @property
    def weight(self) -> NDArray[Any] | None:
        """The class weights as they were given."""
        return None if self._weight is None else self._weight.values

    def weight_like(self, prediction: Array) -> Array | None:
        """The class weights in the dtype and on the device of ``prediction``."""
        return None if self._weight is None else self._weight.like(prediction)

    def forward(self, prediction: Array, target: Array) -> Any:
        """The loss of logits (N, C) against ``target``."""
        ops = backend_of(prediction)
        _check_target(prediction, target)
        weight = self.weight_like(prediction)
        loss, probabilities = ops.softmax_cross_entropy_forward(
            prediction,
            target,
            weight=weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            check_targets=self.check_targets,
        )
        self._saved = probabilities, target, weight
        return loss

    def backward(self) -> Array:
        """The gradient for the logits, (N, C)."""
        probabilities, target, weight = self._take_saved()
        return backend_of(probabilities).softmax_cross_entropy_backward(
            probabilities,
            target,
            weight=weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )


def _check_pair(prediction: Array, target: Array) -> None:
    _check_target(prediction, target)
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
        self._weight, self._pos_weight = _weight(weight), _weight(pos_weight)

    @property
    def weight(self) -> NDArray[Any] | None:
        """The weights of the elements as they were given."""
        return None if self._weight is None else self._weight.values

    @property
    def pos_weight(self) -> NDArray[Any] | None:
        """The weights of the positive term as they were given."""
        return None if self._pos_weight is None else self._pos_weight.values

    def _weights(self, prediction: Array) -> dict[str, Array | None]:
        return {
            "weight": None if self._weight is None else self._weight.like(prediction),
            "positive_weight": None if self._pos_weight is None else self._pos_weight.like(prediction),
        }

    def forward(self, prediction: Array, target: Array) -> Any:
        """The loss of logits against targets (of the same shape) between 0 and 1."""
        _check_pair(prediction, target)
        self._saved = prediction, target
        return backend_of(prediction).binary_cross_entropy_with_logits_forward(
            prediction, target, reduction=self.reduction, **self._weights(prediction)
        )

    def backward(self) -> Array:
        """The gradient for the logits."""
        prediction, target = self._take_saved()
        return backend_of(prediction).binary_cross_entropy_with_logits_backward(
            prediction, target, reduction=self.reduction, **self._weights(prediction)
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
