"""Batch normalization (Ioffe and Szegedy 2015)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy

from gpucnn.errors import ArgumentError, ShapeError
from gpucnn.layers.convolution import check_positive
from gpucnn.layers.layer import Layer, check_device, check_gradient, check_input
from gpucnn.ops import Array, backend_of
from gpucnn.parameters import Parameter


class _BatchNorm(Layer):
    """What the one- and two-dimensional batch norm share."""

    buffer_names: ClassVar[tuple[str, ...]] = ("running_mean", "running_var", "num_batches_tracked")
    cpu_buffer_names: ClassVar[tuple[str, ...]] = ("num_batches_tracked",)
    dimensions: ClassVar[int]
    meaning: ClassVar[str]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        check_positive(num_features=num_features)
        if not eps > 0:
            raise ArgumentError(f"eps must be positive, got {eps}")
        if momentum is not None and not 0 <= momentum <= 1:
            raise ArgumentError(f"momentum must be between 0 and 1, or None for a plain average, got {momentum}")
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        self.weight = Parameter(numpy.ones(num_features, numpy.float32)) if affine else None
        self.bias = Parameter(numpy.zeros(num_features, numpy.float32)) if affine else None
        self.running_mean: Any = numpy.zeros(num_features, numpy.float32) if track_running_stats else None
        self.running_var: Any = numpy.ones(num_features, numpy.float32) if track_running_stats else None
        self.num_batches_tracked: Any = numpy.zeros((), numpy.int64) if track_running_stats else None

    def _affine(self) -> tuple[Array | None, Array | None]:
        return (None if self.weight is None else self.weight.data), (None if self.bias is None else self.bias.data)

    def forward(self, x: Array) -> Array:
        """Normalize each channel of x: by the batch in training, by the running statistics in evaluation."""
        weight = None if self.weight is None else self.weight.data
        self._check(x, weight)
        if self.training or not self.track_running_stats:
            return self._normalized(x)
        _, bias = self._affine()
        statistics = self.running_mean, self.running_var
        y = backend_of(x).batch_norm_inference(x, weight, bias, *statistics, epsilon=self.eps)
        if self.keeps_for_backward:
            trains = any(parameter.requires_grad for _, parameter in self._own_parameters())
            self._save(x if trains else None, None, x.shape)  # the gradient for x alone takes no x
        return y

    def forward_ending(self, x: Array, residual: Array | None = None, **activation: Any) -> Array:
        """activation(forward(x) + residual) by one operation, in training; ``activation`` is as that takes it."""
        self._check(x, None if self.weight is None else self.weight.data)
        return self._normalized(x, residual=residual, **activation)

    def _check(self, x: Array, weight: Array | None) -> None:
        check_input(x, self.dimensions, self.meaning, weight, narrow_too=True)  # statistics are float32 then, too
        if self.running_mean is not None:
            check_device(x, self.running_mean)
        if x.shape[1] != self.num_features:
            raise ShapeError(f"expected {self.num_features} channels, got {x.shape[1]} (shape {x.shape})")

    def _normalized(self, x: Array, **ending: Any) -> Array:
        """By the batch's statistics, with what it ends with; saves for backward."""
        momentum = self.momentum
        if self.training and self.track_running_stats:
            self.num_batches_tracked += 1
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        y, *saved = backend_of(x).batch_norm_forward(
            x,
            *self._affine(),
            self.running_mean,
            self.running_var,
            momentum=momentum if momentum is not None else 0.0,
            epsilon=self.eps,
            with_mask=self.training and "activation" in ending,
            **ending,
        )
        self._save(x, *saved)
        return y

    def backward(self, dy: Array) -> Array:
        """The gradient for x; adds to ``weight.gradient`` and ``bias.gradient``."""
        return self.backward_ending(dy)

    def backward_ending(self, dy: Array, **ending: Any) -> Array:
        """The same for dy of what :meth:`forward_ending` gave, by one operation.

        ``ending`` is what that takes besides: the result y, its activation, where the residual's gradient goes.
        """
        x, mean, rest, *mask = self._take_saved()
        if mean is None:
            return self._backward_for_given_statistics(dy, x, rest)
        check_gradient(dy, x.shape, x)
        trained, targets = self._targets(mean.dtype)
        if mask and ending:
            ending["mask"] = mask[0]
        dx, *gradients = backend_of(dy).batch_norm_backward(
            dy, x, self._affine()[0], mean, rest, **targets, **ending
        )
        self._took(trained, targets, gradients)
        return dx

    def _backward_for_given_statistics(self, dy: Array, x: Array | None, shape: tuple[int, ...]) -> Array:
        """In evaluation the running statistics are constants. x is None where no parameter is trained."""
        check_gradient(dy, shape, self.running_mean)
        trained, targets = self._targets(self.running_mean.dtype) if x is not None else ([], {})
        dx, *gradients = backend_of(dy).batch_norm_inference_backward(
            dy, x, self._affine()[0], self.running_mean, self.running_var, epsilon=self.eps, **targets
        )
        self._took(trained, targets, gradients)
        return dx

    def _targets(self, dtype: Any) -> tuple[list[Parameter], dict[str, Any]]:
        """The parameters, and where an operation that gives gradients of ``dtype`` is to write theirs."""
        trained = [] if self.weight is None or self.bias is None else [self.weight, self.bias]
        places = [_place(parameter, dtype) for parameter in trained]
        return trained, dict(zip(("out_weight", "out_bias"), places, strict=False))

    def _took(
        self, trained: list[Parameter], targets: Mapping[str, Array | None], gradients: Sequence[Array | None]
    ) -> None:
        """The operation gave these gradients: add those that are not in their places."""
        for parameter, place, gradient in zip(trained, targets.values(), gradients, strict=False):
            if place is None:
                parameter.add_gradient(gradient)
            else:
                parameter.first_gradient_is_there()

    def extra_repr(self) -> str:
        """The channels, and what differs from the defaults."""
        text = f"{self.num_features}"
        defaults = (("eps", 1e-5), ("momentum", 0.1), ("affine", True), ("track_running_stats", True))
        for name, default in defaults:
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text


def _place(parameter: Parameter, dtype: Any) -> Array | None:
    """Where its first gradient belongs, if that has this dtype."""
    place = parameter.first_gradient_place
    return place if place is not None and place.dtype == dtype else None


class BatchNorm2d(_BatchNorm):
    """Batch normalization of images (N, C, H, W) over N, H and W, as ``torch.nn.BatchNorm2d``.

    Training: y = (x - mean) / sqrt(variance + eps) * weight + bias with the batch's mean and biased variance;
    the running statistics move by ``momentum`` towards the mean and the unbiased variance (``None``: their plain
    average over all batches). Evaluation uses the running statistics, so any batch size works, one included.

    Fine-tuning often leaves the statistics as they are: ``layer.eval()`` of a batch norm inside a model that is in
    training has it use them, as numbers that have no gradient, forward and backward. ``weight`` and ``bias`` are
    still trained unless they are frozen, by ``layer.requires_grad_(False)``.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: how fast the running statistics move.
        affine: whether to learn ``weight`` and ``bias``, both (C,).
        track_running_stats: without it, evaluation normalizes by the batch too.
    """

    dimensions: ClassVar[int] = 4
    meaning: ClassVar[str] = "(N, C, H, W)"


class BatchNorm1d(_BatchNorm):
    """Batch normalization of features (N, C) over N, as ``torch.nn.BatchNorm1d``; see :class:`BatchNorm2d`."""

    dimensions: ClassVar[int] = 2
    meaning: ClassVar[str] = "(N, C)"
