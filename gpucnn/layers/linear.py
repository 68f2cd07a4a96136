"""The fully connected layer, and Flatten, which leads to it."""

from __future__ import annotations

import math
from typing import Any

import numpy

from gpucnn import initializers
from gpucnn.errors import ArgumentError, DtypeError, ShapeError
from gpucnn.layers.convolution import check_positive
from gpucnn.layers.layer import Layer, check_gradient, check_input
from gpucnn.ops import Array, backend_of
from gpucnn.ops.memory_format import is_channels_last, to_channels_last, to_contiguous
from gpucnn.parameters import Parameter


class Linear(Layer):
    """y = x @ weight.T + bias, as ``torch.nn.Linear``: (N, in_features) -> (N, out_features).

    It works on the last axis, and any number of others, or none, may stand before it: (N, L, in_features) ->
    (N, L, out_features).

    Parameters: ``weight`` (out_features, in_features), ``bias`` (out_features,); both start uniform in
    +-1 / sqrt(in_features).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        check_positive(in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        self.weight = Parameter(numpy.empty((out_features, in_features), numpy.float32))
        self.bias = Parameter(numpy.empty(out_features, numpy.float32)) if bias else None
        initializers.default_weight_and_bias(self.weight.data, None if self.bias is None else self.bias.data)

    def forward(self, x: Array) -> Array:
        """Apply to x (..., in_features)."""
        return self.forward_ending(x)

    def forward_ending(self, x: Array, **activation: Any) -> Array:
        """activation(forward(x)) by one operation, which takes ``activation`` so."""
        check_input(x, None, f"(..., {self.in_features})", self.weight.working)
        if x.shape[-1] != self.in_features:
            raise ShapeError(
                f"expected {self.in_features} input features, got {x.shape[-1]} (shape {x.shape}); an image of "
                "another size than the network was made for does this"
                + (", and so does a Flatten that is missing before this layer" if x.ndim == 4 else "")
            )
        bias = None if self.bias is None else self.bias.working
        rows = _rows(x)
        y = backend_of(x).linear_forward(rows, self.weight.working, bias, **activation)
        self._save(rows, x.shape, is_channels_last(x))
        return y if rows is x else y.reshape(*x.shape[:-1], self.out_features)

    def backward(self, dy: Array) -> Array:
        """The gradient for x; adds to ``weight.gradient`` and ``bias.gradient``."""
        if self.trains_all:
            return self.backward_ending(dy)
        dy, x, shape, channels_last = self._taken(dy)
        ops = backend_of(dy)
        if self.bias is not None:
            self.bias.add_gradient_by(ops.linear_backward_bias, dy)
        self.weight.add_gradient_by(ops.linear_backward_weight, dy, x)
        if not self.input_needs_gradient:
            return None
        return _as_it_lay(ops.linear_backward_data(dy, self.weight.working), shape, channels_last)

    def _taken(self, dy: Array) -> tuple[Array, Array, tuple[int, ...], bool]:
        """dy and x of the last forward as matrices, the shape of x and whether it lay channels-last."""
        x, shape, channels_last = self._take_saved()
        check_gradient(dy, (*shape[:-1], self.out_features), x)
        return _rows(dy), x, shape, channels_last

    @property
    def trains_all(self) -> bool:
        """Whether none of its parameters is frozen: one operation then makes all gradients."""
        return all(parameter.requires_grad for _, parameter in self._own_parameters())

    def backward_ending(self, dy: Array, **ending: Any) -> Array:
        """:meth:`backward` for dy of y, which :meth:`forward_ending` gave; ``ending`` is y and the activation.

        For layers that train all of their parameters, whose gradients come right where the first ones belong.
        """
        dy, x, shape, channels_last = self._taken(dy)
        if "y" in ending:
            ending["y"] = _rows(ending["y"])
        trained = [self.weight] if self.bias is None else [self.weight, self.bias]
        places = [parameter.first_gradient_place for parameter in trained]
        options: dict[str, Any] = dict(zip(("weight_gradient", "bias_gradient"), places, strict=False))
        dx, *gradients = backend_of(dy).linear_backward(
            dy,
            x,
            self.weight.working,
            with_input=self.input_needs_gradient,
            with_bias=self.bias is not None,
            **options,
            **ending,
        )
        for parameter, place, gradient in zip(trained, places, gradients, strict=False):
            if place is None:
                parameter.add_gradient(gradient)
            else:
                parameter.first_gradient_is_there()
        return None if dx is None else _as_it_lay(dx, shape, channels_last)

    def skip_input_gradient(self, skip: bool = True) -> None:
        """Leave the gradient for x out of backward (or, with False, compute it again)."""
        self.input_needs_gradient = not skip

    def extra_repr(self) -> str:
        """The sizes."""
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        return text if self.bias is not None else text + ", bias=False"


def _rows(x: Array) -> Array:
    """x (..., features) as a matrix: itself where it is one, otherwise a view of x or of a copy in C order."""
    if x.ndim == 2:
        return x
    if is_channels_last(x):
        x = to_contiguous(x)
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _as_it_lay(rows: Array, shape: tuple[int, ...], channels_last: bool) -> Array:
    """A matrix with the ``shape`` of the input whose rows it has, in its memory format."""
    if len(shape) == 2:
        return rows
    dx = rows.reshape(shape)
    return to_channels_last(dx) if channels_last else dx


class Flatten(Layer):
    """Joins all dimensions from ``start_dim`` on, as ``torch.nn.Flatten``: (N, C, H, W) -> (N, C * H * W).

    The features' order is that of the dimensions, however x lies in memory: channels-last images are transposed.
    """

    def __init__(self, start_dim: int = 1) -> None:
        if start_dim < 1:
            raise ArgumentError(f"start_dim must be at least 1 (dimension 0 is the batch), got {start_dim}")
        self.start_dim = start_dim

    def forward(self, x: Array) -> Array:
        """Reshape x."""
        if not hasattr(x, "reshape"):
            raise DtypeError(f"expected an array, got {type(x).__name__}")
        channels_last = is_channels_last(x)
        self._save(x.shape, channels_last)
        if channels_last:
            x = to_contiguous(x)
        return x.reshape(*x.shape[: self.start_dim], math.prod(x.shape[self.start_dim :]))

    def backward(self, dy: Array) -> Array:
        """Reshape dy back, to images that lie in memory as x did."""
        shape, channels_last = self._take_saved()
        dx = dy.reshape(shape)
        return to_channels_last(dx) if channels_last else dx

    def extra_repr(self) -> str:
        """The argument, where it is not the default."""
        return "" if self.start_dim == 1 else f"start_dim={self.start_dim}"
