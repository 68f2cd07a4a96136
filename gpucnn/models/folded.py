"""The layers that a model compiled for inference is made of: each has taken in those after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn import initializers
from gpucnn.device import to_cpu, to_device
from gpucnn.errors import StateError
from gpucnn.layers import (
    GELU,
    BatchNorm1d,
    BatchNorm2d,
    Conv2d,
    Layer,
    LeakyReLU,
    Linear,
    MaxPool2d,
    ReLU,
    ReLU6,
    Sequential,
    Sigmoid,
    SiLU,
    Tanh,
)
from gpucnn.ops import Array, backend_of
from gpucnn.ops.memory_format import is_channels_last, result_for
from gpucnn.parameters import Parameter
from gpucnn_kernels.problem import Pool2dProblem

ACTIVATIONS: dict[type[Layer], str] = {
    ReLU: "relu",
    LeakyReLU: "leaky_relu",
    Sigmoid: "sigmoid",
    Tanh: "tanh",
    GELU: "gelu",
    SiLU: "silu",
    ReLU6: "relu6",
}
"""The layers that a convolution can end with, and what the operations call them."""

NO_TRAINING = "a model compiled for inference only predicts; use the model that it was compiled from"


class FoldedConv2d(Conv2d):
    """A convolution that has taken in the batch norm and the activation after it."""

    def __init__(
        self, convolution: Conv2d, norm: BatchNorm2d | None = None, activation: Layer | None = None
    ) -> None:
        with initializers.skipped():
            super().__init__(
                convolution.in_channels,
                convolution.out_channels,
                convolution.kernel_size,
                convolution.stride,
                convolution.padding,
                convolution.dilation,
                convolution.groups,
                algorithm=convolution.algorithm,
            )
        self.activation, self.channels_last = activation, convolution.channels_last
        fold(convolution, norm, self)

    def forward(self, x: Array) -> Array:
        """activation(convolution of x (N, in_channels, H, W))."""
        return self.with_shortcut(x, None)

    def with_shortcut(self, x: Array, shortcut: Array | None) -> Array:
        """activation(convolution of x + shortcut), the shortcut of the result's shape or None."""
        self._check(x)
        assert self.bias is not None, "folding gives it one"
        return backend_of(x).conv2d_inference(
            x,
            self.weight.working,
            self.bias.working,
            shortcut,
            algorithm=self.algorithm["forward"],
            out=self._result_for(x),
            **self._options(),
        )

    def _options(self) -> dict[str, Any]:
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "activation": _operation_name(self.activation),
            "negative_slope": getattr(self.activation, "negative_slope", 0.01),
        }

    def backward(self, dy: Array) -> Array:
        """There is none: raises StateError."""
        raise StateError(NO_TRAINING)

    def extra_repr(self) -> str:
        """The convolution's arguments, and the activation."""
        return super().extra_repr() + ("" if self.activation is None else f", activation={self.activation}")


class FoldedMaxPool2d(FoldedConv2d):
    """A convolution that has also taken in the max pooling after its activation.

    On a GPU it is one kernel where :func:`gpucnn_kernels.conv2d_max_pool2d_pays` says so. On the CPU what rises
    with its input, as ReLU does, is applied to what the pooling leaves.
    """

    def __init__(
        self, convolution: Conv2d, norm: BatchNorm2d | None, activation: Layer | None, pool: MaxPool2d
    ) -> None:
        super().__init__(convolution, norm, activation)
        self.pool = pool

    def forward(self, x: Array) -> Array:
        """The largest values of windows of activation(convolution of x (N, in_channels, H, W))."""
        self._check(x)
        assert self.bias is not None, "folding gives it one"
        return backend_of(x).conv2d_max_pool2d_inference(
            x,
            self.weight.working,
            self.bias.working,
            pool_size=self.pool.kernel_size,
            pool_stride=self.pool.stride,
            pool_padding=self.pool.padding,
            pool_dilation=self.pool.dilation,
            ceil_mode=self.pool.ceil_mode,
            out=self._pooled_for(x),
            **self._options(),
        )

    def _pooled_for(self, x: Array) -> Array | None:
        """Where the output goes, if it is to lie otherwise than x."""
        if not self.channels_last or is_channels_last(x):
            return None
        pool = Pool2dProblem.from_shapes(
            self._problem(x).output_shape,
            self.pool.kernel_size,
            stride=self.pool.stride,
            padding=self.pool.padding,
            dilation=self.pool.dilation,
            ceil_mode=self.pool.ceil_mode,
        )
        return result_for(pool.output_shape, x, channels_last=True)

    def extra_repr(self) -> str:
        """The convolution's arguments, the activation and the pooling."""
        return f"{super().extra_repr()}, pool={self.pool}"


class FoldedResidual(Layer):
    """A residual block whose last convolution adds the shortcut and applies the activation as it stores its sums.

    Args:
        body: what comes before the last convolution.
        last: the last convolution of the body, with the activation if that is one it can apply.
        shortcut: what the input goes through on the other way; None adds the input itself.
        activation: what is still to be applied to the sum, if anything.
    """

    def __init__(
        self, body: Sequence[Layer], last: FoldedConv2d, shortcut: Layer | None, activation: Layer | None
    ) -> None:
        self.body, self.last = Sequential(*body), last
        self.shortcut, self.activation = shortcut, activation

    def forward(self, x: Array) -> Array:
        """The block's output for x."""
        y = self.body(x)
        other = x if self.shortcut is None else self.shortcut(x)
        y = self.last.with_shortcut(y, other)
        return y if self.activation is None else self.activation(y)

    def backward(self, dy: Array) -> Array:
        """There is none: raises StateError."""
        raise StateError(NO_TRAINING)


def fold(layer: Conv2d | Linear, norm: BatchNorm2d | BatchNorm1d | None, into: Conv2d | Linear) -> None:
    """Give ``into`` the weight and bias of ``layer`` followed by ``norm``."""
    weight = _float64(layer.weight)
    bias = numpy.zeros(len(weight)) if layer.bias is None else _float64(layer.bias)
    if norm is not None:
        variance, mean = to_cpu(norm.running_var).astype("f8"), to_cpu(norm.running_mean).astype("f8")
        gamma = numpy.ones(len(weight)) if norm.weight is None else _float64(norm.weight)
        beta = numpy.zeros(len(weight)) if norm.bias is None else _float64(norm.bias)
        share = gamma / numpy.sqrt(variance + norm.eps)
        weight = weight * share.reshape(-1, *[1] * (weight.ndim - 1))
        bias = (bias - mean) * share + beta
    dtype, device = layer.weight.dtype, layer.weight.device
    into.weight = Parameter(to_device(weight.astype(dtype), device))
    into.weight.lay(is_channels_last(layer.weight.data))
    into.bias = Parameter(to_device(bias.astype(dtype), device))


def _float64(parameter: Parameter) -> NDArray[numpy.float64]:
    return numpy.asarray(to_cpu(parameter.data), numpy.float64)


def _operation_name(activation: Layer | None) -> str:
    if activation is None:
        return "identity"
    approximate = isinstance(activation, GELU) and activation.approximate == "tanh"
    return "gelu_tanh" if approximate else ACTIVATIONS[type(activation)]
