"""Convolution layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy

from gpucnn import initializers
from gpucnn.device import is_device_array
from gpucnn.errors import ArgumentError, ShapeError
from gpucnn.layers.layer import Layer, check_gradient, check_input
from gpucnn.ops import Array, backend_of
from gpucnn.ops.memory_format import is_channels_last, result_for
from gpucnn.parameters import Parameter
from gpucnn_kernels.problem import (
    Conv2dProblem,
    IntOrPair,
    Padding,
    Pool2dProblem,
    conv_transpose2d_problem,
    pair,
    resolve_padding,
)


def check_positive(**values: int) -> None:
    """Raise ArgumentError unless each named value is a positive integer."""
    for name, value in values.items():
        if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
            raise ArgumentError(f"{name} must be a positive integer, got {value!r}")


def _check_groups(in_channels: int, out_channels: int, groups: int) -> None:
    check_positive(in_channels=in_channels, out_channels=out_channels, groups=groups)
    if in_channels % groups or out_channels % groups:
        raise ArgumentError(
            f"groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}"
        )


def _gradient_place(parameter: Parameter, dy: Array) -> Array | None:
    """Where a kernel may write a first gradient that it makes of dy; None where the gradient is to be added."""
    place = parameter.first_gradient_place if is_device_array(dy) else None
    fits = place is not None and (place.dtype == dy.dtype or (place.dtype == "float32" and dy.dtype.itemsize == 2))
    return place if fits else None


def _add_gradient(
    parameter: Parameter, place: Array | None, operation: Callable[..., Array], *arrays: Array, **options: Any
) -> None:
    """Add ``operation(*arrays, **options)``, right where it belongs if that is known."""
    if place is None:
        parameter.add_gradient_by(operation, *arrays, **options)
    else:
        operation(*arrays, **options, out=place)
        parameter.first_gradient_is_there()


class Conv2d(Layer):
    """Two-dimensional convolution (cross-correlation), as ``torch.nn.Conv2d``.

    Input (N, in_channels, H, W), output (N, out_channels, P, Q) with
    P = floor((H + padding - dilation * (kernel - 1) - 1) / stride) + 1, padding counted on both sides.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: kernel height and width; even and rectangular kernels are fine.
        stride: step between windows.
        padding: zeros around the image: an integer, (height, width), (top, bottom, left, right), "same" (keeps
            the size, stride 1) or "valid" (none).
        dilation: step between the kernel's points.
        groups: the channels are split into this many separate convolutions; ``in_channels`` is depthwise.
        bias: whether to add a learned number to each output channel.
        algorithm: how to compute: "auto", or a dict of names by direction, such as
            {"backward_data": "dilated"}; ``gpucnn.ops.cpu.conv2d_algorithms(direction)`` lists the names.

    Attributes:
        channels_last: whether the output lies in a GPU's memory channels-last, and not as the input does;
            :func:`gpucnn.layers.precision.set_precision` sets it.

    Parameters: ``weight`` (out_channels, in_channels / groups, kH, kW), ``bias`` (out_channels,); both start
    uniform in +-1 / sqrt(fan_in).

    Example:
        >>> layer = Conv2d(3, 16, kernel_size=3, stride=2)
        >>> layer(numpy.zeros((4, 3, 224, 224), numpy.float32)).shape
        (4, 16, 111, 111)
    """

    channels_last: bool = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: Padding = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        algorithm: str | dict[str, str] = "auto",
    ) -> None:
        _check_groups(in_channels, out_channels, groups)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = pair(kernel_size, "kernel_size")
        self.stride, self.dilation = pair(stride, "stride"), pair(dilation, "dilation")
        resolve_padding(
            padding, self.kernel_size, self.stride, self.dilation
        )  # raises now, not at the first batch
        self.padding = padding
        self.algorithm = {"forward": "auto", "backward_data": "auto", "backward_filter": "auto"}
        if isinstance(algorithm, dict):
            if unknown := set(algorithm) - set(self.algorithm):
                raise ArgumentError(
                    f"unknown direction {sorted(unknown)} in algorithm; use {list(self.algorithm)}"
                )
            self.algorithm |= algorithm
        elif algorithm != "auto":
            raise ArgumentError(
                f"algorithm must be 'auto' or a dict by direction ({', '.join(self.algorithm)}), got {algorithm!r}"
            )
        self.weight = Parameter(
            numpy.empty((out_channels, in_channels // groups, *self.kernel_size), numpy.float32)
        )
        self.bias = Parameter(numpy.empty(out_channels, numpy.float32)) if bias else None
        initializers.default_weight_and_bias(self.weight.data, None if self.bias is None else self.bias.data)

    def forward(self, x: Array) -> Array:
        """Convolve x (N, in_channels, H, W)."""
        self._check(x)
        y = backend_of(x).conv2d_forward(
            x,
            self.weight.working,
            None if self.bias is None else self.bias.working,
            **self._geometry(),
            algorithm=self.algorithm["forward"],
            out=self._result_for(x),
        )
        self._save(x, y.shape)
        return y

    def forward_ending(self, x: Array, **activation: Any) -> Array:
        """activation(forward(x)) by one operation, which takes ``activation`` so."""
        self._check(x)
        y = backend_of(x).conv2d_inference(
            x,
            self.weight.working,
            None if self.bias is None else self.bias.working,
            **self._geometry(),
            **activation,
            algorithm=self.algorithm["forward"],
            out=self._result_for(x),
        )
        self._save(x, y.shape)
        return y

    def forward_pooled(self, x: Array, pool: Pool2dProblem, **activation: Any) -> tuple[Array, Array]:
        """(y, argmax) of the max pooling ``pool`` of activation(forward(x)), by one operation."""
        self._check(x)
        out = None
        if self.channels_last and not is_channels_last(x):
            out = result_for(pool.output_shape, x, channels_last=True)
        y, argmax = backend_of(x).conv2d_max_pool2d_forward(
            x,
            self.weight.working,
            None if self.bias is None else self.bias.working,
            pool_size=(pool.R, pool.S),
            pool_stride=pool.stride,
            pool_padding=pool.padding,
            pool_dilation=pool.dilation,
            ceil_mode=pool.ceil_mode,
            **self._geometry(),
            **activation,
            out=out,
        )
        self._save(x, pool.input_shape)
        return y, argmax

    def _check(self, x: Array) -> None:
        check_input(x, 4, f"(N, {self.in_channels}, H, W)", self.weight.working)
        if x.shape[1] != self.in_channels:
            raise ShapeError(f"expected {self.in_channels} input channels, got {x.shape[1]} (shape {x.shape})")

    def _geometry(self) -> dict[str, Any]:
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    def _problem(self, x: Array) -> Conv2dProblem:
        return Conv2dProblem.from_shapes(
            x.shape,
            self.weight.shape,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def _result_for(self, x: Array) -> Array | None:
        """Where the output goes, if it is to lie otherwise than x."""
        if not self.channels_last or is_channels_last(x):
            return None
        return result_for(self._problem(x).output_shape, x, channels_last=True)

    def backward(self, dy: Array) -> Array:
        """The gradient for x; adds to ``weight.gradient`` and ``bias.gradient``."""
        return self._backward(dy, None)

    def backward_adding(self, dy: Array, residual: Array) -> Array:
        """backward(dy) + ``residual``, another gradient for x, added by the operation that makes the first."""
        return self._backward(dy, residual)

    def _backward(self, dy: Array, residual: Array | None) -> Array:
        x, output_shape = self._take_saved()
        check_gradient(dy, output_shape, x)
        ops = backend_of(dy)
        bias = None if self.bias is None else _gradient_place(self.bias, dy)
        weight = _gradient_place(self.weight, dy)
        options = {**self._geometry(), "algorithm": self.algorithm["backward_filter"]}
        if (
            self.bias is not None and bias is not None and weight is not None
        ):  # by one pass over dy, where the way makes them so
            ops.conv2d_backward_filter(dy, x, kernel_size=self.kernel_size, **options, out=weight, out_bias=bias)
            self.bias.first_gradient_is_there()
            self.weight.first_gradient_is_there()
        else:
            if self.bias is not None:
                _add_gradient(self.bias, bias, ops.conv2d_backward_bias, dy)
            _add_gradient(
                self.weight, weight, ops.conv2d_backward_filter, dy, x, kernel_size=self.kernel_size, **options
            )
        if not self.input_needs_gradient:
            return None
        return ops.conv2d_backward_data(
            dy,
            self.weight.working,
            input_size=x.shape[2:],
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            algorithm=self.algorithm["backward_data"],
            residual=residual,
            out=result_for(x.shape, dy, is_channels_last(x)),
        )

    def skip_input_gradient(self, skip: bool = True) -> None:
        """Leave the gradient for x out of backward (or, with False, compute it again)."""
        self.input_needs_gradient = not skip

    def extra_repr(self) -> str:
        """The arguments that differ from the defaults, and the sizes."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.padding != 0:
            text += f", padding={self.padding!r}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        return text if self.bias is not None else text + ", bias=False"


class ConvTranspose2d(Layer):
    """Transposed convolution, as ``torch.nn.ConvTranspose2d``: the input gradient of a convolution, as a layer.

    Input (N, in_channels, H, W), output (N, out_channels, H', W') with
    H' = (H - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1.

    Parameters: ``weight`` (in_channels, out_channels / groups, kH, kW), ``bias`` (out_channels,).

    ``channels_last`` is :class:`Conv2d`'s.
    """

    channels_last: bool = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: IntOrPair = 0,
        output_padding: IntOrPair = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: IntOrPair = 1,
    ) -> None:
        _check_groups(in_channels, out_channels, groups)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = pair(kernel_size, "kernel_size")
        self.stride, self.dilation = pair(stride, "stride"), pair(dilation, "dilation")
        self.padding = pair(padding, "padding", 0)
        self.output_padding = pair(output_padding, "output_padding", 0)
        self.weight = Parameter(
            numpy.empty((in_channels, out_channels // groups, *self.kernel_size), numpy.float32)
        )
        self.bias = Parameter(numpy.empty(out_channels, numpy.float32)) if bias else None
        initializers.default_weight_and_bias(self.weight.data, None if self.bias is None else self.bias.data)

    def forward(self, x: Array) -> Array:
        """Spread x (N, in_channels, H, W) through the kernel."""
        check_input(x, 4, f"(N, {self.in_channels}, H, W)", self.weight.working)
        if x.shape[1] != self.in_channels:
            raise ShapeError(f"expected {self.in_channels} input channels, got {x.shape[1]} (shape {x.shape})")
        y = backend_of(x).conv_transpose2d_forward(
            x,
            self.weight.working,
            None if self.bias is None else self.bias.working,
            stride=self.stride,
            padding=self.padding,
            output_padding=self.output_padding,
            dilation=self.dilation,
            groups=self.groups,
            out=self._result_for(x),
        )
        self._save(x, y.shape)
        return y

    def _result_for(self, x: Array) -> Array | None:
        """Where the output goes, if it is to lie otherwise than x."""
        if not self.channels_last or is_channels_last(x):
            return None
        problem = conv_transpose2d_problem(
            x.shape,
            self.weight.shape,
            stride=self.stride,
            padding=self.padding,
            output_padding=self.output_padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        return result_for(problem.input_shape, x, channels_last=True)

    def backward(self, dy: Array) -> Array:
        """The gradient for x; adds to ``weight.gradient`` and ``bias.gradient``."""
        x, output_shape = self._take_saved()
        check_gradient(dy, output_shape, x)
        ops = backend_of(dy)
        if self.bias is not None:
            self.bias.add_gradient_by(ops.conv2d_backward_bias, dy)
        self.weight.add_gradient_by(
            ops.conv_transpose2d_backward_filter,
            dy,
            x,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        if not self.input_needs_gradient:
            return None
        return ops.conv_transpose2d_backward_data(
            dy,
            self.weight.working,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            out=result_for(x.shape, dy, is_channels_last(x)),
        )

    def skip_input_gradient(self, skip: bool = True) -> None:
        """Leave the gradient for x out of backward (or, with False, compute it again)."""
        self.input_needs_gradient = not skip

    def extra_repr(self) -> str:
        """The sizes and the arguments that differ from the defaults."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, default in (
            ("padding", (0, 0)),
            ("output_padding", (0, 0)),
            ("dilation", (1, 1)),
            ("groups", 1),
        ):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text if self.bias is not None else text + ", bias=False"
