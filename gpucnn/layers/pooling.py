"""Pooling layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpucnn.layers.layer import Layer, check_gradient, check_input
from gpucnn.ops import Array, backend_of
from gpucnn.ops.memory_format import is_channels_last, result_for
from gpucnn_kernels.problem import IntOrPair, Pool2dProblem, pair


class MaxPool2d(Layer):
    """The largest value of each window, as ``torch.nn.MaxPool2d``: (N, C, H, W) -> (N, C, P, Q).

    Args:
        kernel_size: window height and width.
        stride: step between windows; the window's size unless given.
        padding: rows and columns around the image that never win, at most half a window.
        dilation: step between the window's points.
        ceil_mode: round the output size up, so that no row is left out at the border.
    """

    def __init__(
        self,
        kernel_size: IntOrPair,
        stride: IntOrPair | None = None,
        padding: IntOrPair = 0,
        dilation: IntOrPair = 1,
        ceil_mode: bool = False,
    ) -> None:
        self.kernel_size = pair(kernel_size, "kernel_size")
        self.stride = self.kernel_size if stride is None else pair(stride, "stride")
        self.padding, self.dilation = pair(padding, "padding", 0), pair(dilation, "dilation")
        self.ceil_mode = ceil_mode

    def forward(self, x: Array) -> Array:
        """Pool x (N, C, H, W)."""
        check_input(x, 4, "(N, C, H, W)")
        y, argmax = backend_of(x).max_pool2d_forward(
            x,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            ceil_mode=self.ceil_mode,
        )
        self._save(argmax, x.shape, is_channels_last(x))
        return y

    def backward(self, dy: Array) -> Array:
        """The gradient for x: each dy goes to its window's winner."""
        return self.backward_beginning(dy)

    def backward_beginning(self, dy: Array, **activation: Any) -> Array:
        """The gradient for what an activation before the pooling read, by one operation.

        ``activation`` is what that takes: y, which the pooling gave, and the activation.
        """
        argmax, input_shape, channels_last = self._take_saved()
        check_gradient(dy, argmax.shape, argmax)
        return backend_of(dy).max_pool2d_backward(
            dy,
            argmax,
            input_size=input_shape[2:],
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            ceil_mode=self.ceil_mode,
            out=result_for(input_shape, dy, channels_last),
            **activation,
        )

    def problem(self, shape: Sequence[int]) -> Pool2dProblem:
        """The pooling of images of this shape, (N, C, H, W). Raises ProblemError where the window does not fit."""
        return Pool2dProblem.from_shapes(
            shape,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            ceil_mode=self.ceil_mode,
        )

    def extra_repr(self) -> str:
        """The window, and what differs from the defaults."""
        text = f"kernel_size={self.kernel_size}, stride={self.stride}"
        for name, default in (("padding", (0, 0)), ("dilation", (1, 1)), ("ceil_mode", False)):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text


class AvgPool2d(Layer):
    """The mean of each window, as ``torch.nn.AvgPool2d``: (N, C, H, W) -> (N, C, P, Q).

    Args:
        kernel_size: window height and width.
        stride: step between windows; the window's size unless given.
        padding: zeros around the image, at most half a window.
        ceil_mode: round the output size up.
        count_include_pad: whether the padding's zeros count in the mean.
    """

    def __init__(
        self,
        kernel_size: IntOrPair,
        stride: IntOrPair | None = None,
        padding: IntOrPair = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> None:
        self.kernel_size = pair(kernel_size, "kernel_size")
        self.stride = self.kernel_size if stride is None else pair(stride, "stride")
        self.padding = pair(padding, "padding", 0)
        self.ceil_mode, self.count_include_pad = ceil_mode, count_include_pad

    def forward(self, x: Array) -> Array:
        """Pool x (N, C, H, W)."""
        check_input(x, 4, "(N, C, H, W)")
        y = backend_of(x).avg_pool2d_forward(
            x,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            ceil_mode=self.ceil_mode,
            count_include_pad=self.count_include_pad,
        )
        self._save(y.shape, x.shape, is_channels_last(x))
        return y

    def backward(self, dy: Array) -> Array:
        """The gradient for x: each dy spread evenly over its window."""
        output_shape, input_shape, channels_last = self._take_saved()
        check_gradient(dy, output_shape)
        return backend_of(dy).avg_pool2d_backward(
            dy,
            input_size=input_shape[2:],
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            ceil_mode=self.ceil_mode,
            count_include_pad=self.count_include_pad,
            out=result_for(input_shape, dy, channels_last),
        )

    def extra_repr(self) -> str:
        """The window, and what differs from the defaults."""
        text = f"kernel_size={self.kernel_size}, stride={self.stride}"
        for name, default in (("padding", (0, 0)), ("ceil_mode", False), ("count_include_pad", True)):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text


class AdaptiveAvgPool2d(Layer):
    """Means over windows that divide any image into ``output_size``, as ``torch.nn.AdaptiveAvgPool2d``."""

    def __init__(self, output_size: IntOrPair) -> None:
        self.output_size = pair(output_size, "output_size")

    def forward(self, x: Array) -> Array:
        """Pool x (N, C, H, W) to (N, C, *output_size)."""
        check_input(x, 4, "(N, C, H, W)")
        y = backend_of(x).adaptive_avg_pool2d_forward(x, output_size=self.output_size)
        self._save(y.shape, x.shape, is_channels_last(x))
        return y

    def backward(self, dy: Array) -> Array:
        """The gradient for x: each dy spread evenly over its window."""
        output_shape, input_shape, channels_last = self._take_saved()
        check_gradient(dy, output_shape)
        out = result_for(input_shape, dy, channels_last)
        return backend_of(dy).adaptive_avg_pool2d_backward(dy, input_size=input_shape[2:], out=out)

    def extra_repr(self) -> str:
        """The output size."""
        return f"{self.output_size}"
