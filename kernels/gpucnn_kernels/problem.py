"""Convolution and pooling problems: every shape formula of the project, written once.

The letters are those of cuDNN and CUTLASS: N C H W for the input, K for the output channels, R S for the
filter (or pooling window), P Q for the output. A problem is immutable and checks itself when it is made, so
code that holds one needs no further shape checks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

IntOrPair = int | Sequence[int]
Padding = int | Sequence[int] | str

_INTEGERS = {int}
_set = object.__setattr__  # of a frozen dataclass, while it is made


class ProblemError(ValueError):
    """The shapes and parameters of an operation do not fit together."""


def pair(value: IntOrPair, name: str, minimum: int = 1) -> tuple[int, int]:
    """``value`` as (height, width): an integer is used for both.

    Raises ProblemError where it is neither an integer nor two integers, or is smaller than ``minimum``.
    """
    numbers = _integers(value, name)
    if len(numbers) == 1:
        numbers = numbers * 2
    if len(numbers) != 2:
        raise ProblemError(f"{name} must be an integer or a (height, width) pair, got {value!r}")
    if min(numbers) < minimum:
        raise ProblemError(f"{name} must be at least {minimum}, got {value!r}")
    return numbers[0], numbers[1]


def resolve_padding(
    padding: Padding, kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Padding as (top, bottom, left, right).

    An integer pads all four sides, a pair is (height, width), four integers are taken as they are, "valid" is
    none and "same" keeps the image size at stride 1; where "same" needs an odd number of rows, the extra one
    goes to the bottom (and right), as in PyTorch.
    """
    if isinstance(padding, str):
        if padding == "valid":
            return 0, 0, 0, 0
        if padding != "same":
            raise ProblemError(f"padding must be numbers, 'same' or 'valid', got {padding!r}")
        if stride != (1, 1):
            raise ProblemError(f"padding='same' needs stride 1, got stride {stride}; give the padding as numbers")
        total_h, total_w = (d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True))
        return total_h // 2, total_h - total_h // 2, total_w // 2, total_w - total_w // 2
    numbers = _integers(padding, "padding")
    if len(numbers) == 1:
        numbers = numbers * 4
    elif len(numbers) == 2:
        numbers = (numbers[0], numbers[0], numbers[1], numbers[1])
    if len(numbers) != 4:
        raise ProblemError(
            f"padding must be an integer, (height, width) or (top, bottom, left, right), got {padding!r}"
        )
    if min(numbers) < 0:
        raise ProblemError(f"padding must not be negative, got {padding!r}")
    return numbers[0], numbers[1], numbers[2], numbers[3]


def _integers(value: IntOrPair, name: str) -> tuple[int, ...]:
    if type(value) is tuple and set(map(type, value)) == _INTEGERS:
        return value  # as a layer has it, at every step
    values = (value,) if not isinstance(value, Sequence) else tuple(value)
    numbers = []
    for number in values:
        if isinstance(number, (bool, str)) or not hasattr(number, "__index__"):
            raise ProblemError(f"{name} must be made of integers, got {value!r}")
        numbers.append(int(number))
    return tuple(numbers)


def window_extent(kernel: int, dilation: int) -> int:
    """How many input rows a dilated window of ``kernel`` rows spans: d(k - 1) + 1."""
    return dilation * (kernel - 1) + 1


def _check_image(shape: Sequence[int], what: str) -> tuple[int, int, int, int]:
    if len(shape) != 4:
        raise ProblemError(f"{what} must have 4 dimensions (N, C, H, W), got shape {tuple(shape)}")
    return int(shape[0]), int(shape[1]), int(shape[2]), int(shape[3])


def _check_window(
    size: tuple[int, int], padding: tuple[int, int, int, int], extent: tuple[int, int], what: str
) -> None:
    padded = size[0] + padding[0] + padding[1], size[1] + padding[2] + padding[3]
    if extent[0] > padded[0] or extent[1] > padded[1]:
        raise ProblemError(
            f"{what} of {extent[0]}x{extent[1]} (dilation counted in) is larger than the padded input of "
            f"{padded[0]}x{padded[1]} ({size[0]}x{size[1]} plus padding {padding}); use a smaller window, "
            "more padding or a larger image"
        )


@dataclass(frozen=True, slots=True)
class Conv2dProblem:
    """A two-dimensional convolution (cross-correlation, as in every deep-learning library).

    y[n, k, p, q] = sum over c, r, s of x[n, c, p * stride_h - pad_top + r * dilation_h, ...] * w[k, c, r, s]

    with c running over the C / groups input channels of output channel k's group. Make one with
    :meth:`from_shapes`, which takes the arguments that users write and checks them.
    """

    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, bottom, left, right
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    # What follows from these, worked out once: a step asks for it hundreds of times.
    extent: tuple[int, int] = field(init=False, repr=False, compare=False)
    """Rows and columns of the input that one (dilated) kernel covers."""
    P: int = field(init=False, repr=False, compare=False)
    """Output height: floor((H + top + bottom - extent) / stride) + 1."""
    Q: int = field(init=False, repr=False, compare=False)
    """Output width: floor((W + left + right - extent) / stride) + 1."""

    def __post_init__(self) -> None:
        for name in ("C", "H", "W", "K", "R", "S", "groups"):
            if getattr(self, name) < 1:
                raise ProblemError(f"convolution: {name} must be at least 1, got {getattr(self, name)}")
        if self.N < 0:
            raise ProblemError(f"convolution: N must not be negative, got {self.N}")
        if self.C % self.groups or self.K % self.groups:
            raise ProblemError(
                f"convolution: groups={self.groups} must divide both the {self.C} input channels and the "
                f"{self.K} output channels"
            )
        extent = window_extent(self.R, self.dilation[0]), window_extent(self.S, self.dilation[1])
        _check_window((self.H, self.W), self.padding, extent, "the kernel")
        top, bottom, left, right = self.padding
        _set(self, "extent", extent)
        _set(self, "P", (self.H + top + bottom - extent[0]) // self.stride[0] + 1)
        _set(self, "Q", (self.W + left + right - extent[1]) // self.stride[1] + 1)

    @classmethod
    def from_shapes(
        cls,
        input_shape: Sequence[int],
        weight_shape: Sequence[int],
        *,
        stride: IntOrPair = 1,
        padding: Padding = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
    ) -> Conv2dProblem:
        """The problem of convolving (N, C, H, W) with weights (K, C / groups, R, S).

        Raises ProblemError, in words, where the shapes and parameters do not fit together.
        """
        parts = input_shape, weight_shape, stride, padding, dilation, groups
        # A network asks for the same few problems at every step. A tuple with a True in it equals one with a 1.
        if all(map(_is_plain, parts)):
            return _conv2d_problem(*parts)
        return _conv2d_problem.__wrapped__(*parts)

    @classmethod
    def from_output(
        cls,
        output_shape: Sequence[int],
        weight_shape: Sequence[int],
        input_size: Sequence[int],
        *,
        stride: IntOrPair = 1,
        padding: Padding = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
    ) -> Conv2dProblem:
        """The problem whose output gradient has ``output_shape`` and whose input is ``input_size`` high, wide.

        Raises ProblemError where a convolution of that input gives another output shape.
        """
        n, k, p, q = _check_image(output_shape, "the output gradient of a 2d convolution")
        c = int(weight_shape[1]) * groups
        problem = cls.from_shapes(
            (n, c, *input_size),
            weight_shape,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )
        if problem.output_shape != (n, k, p, q):
            raise ProblemError(
                f"the output gradient has shape {tuple(output_shape)}, but convolving an input of shape "
                f"{problem.input_shape} with weights of shape {problem.weight_shape} gives {problem.output_shape}"
            )
        return problem

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        return self.N, self.C, self.H, self.W

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """(K, C / groups, R, S)."""
        return self.K, self.C // self.groups, self.R, self.S

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """(N, K, P, Q)."""
        return self.N, self.K, self.P, self.Q

    @property
    def flops(self) -> int:
        """Floating-point operations of the forward pass, a multiply-add counted as two."""
        return 2 * self.N * self.K * self.P * self.Q * (self.C // self.groups) * self.R * self.S


def _is_plain(value: Any) -> bool:
    return type(value) in (int, str) or (type(value) is tuple and set(map(type, value)) == _INTEGERS)


@functools.lru_cache(maxsize=1024)
def _conv2d_problem(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: IntOrPair,
    padding: Padding,
    dilation: IntOrPair,
    groups: int,
) -> Conv2dProblem:
    n, c, h, w = _check_image(input_shape, "the input of a 2d convolution")
    if len(weight_shape) != 4:
        raise ProblemError(
            "the weight of a 2d convolution must have 4 dimensions (out channels, in channels / groups, "
            f"kernel height, kernel width), got shape {tuple(weight_shape)}"
        )
    k, c_per_group, r, s = (int(size) for size in weight_shape)
    if groups < 1:
        raise ProblemError(f"groups must be at least 1, got {groups}")
    if c != c_per_group * groups:
        raise ProblemError(
            f"the input has {c} channels (shape {tuple(input_shape)}) but the weight of shape "
            f"{tuple(weight_shape)} with groups={groups} expects {c_per_group * groups}"
        )
    stride_pair = pair(stride, "stride")
    dilation_pair = pair(dilation, "dilation")
    pads = resolve_padding(padding, (r, s), stride_pair, dilation_pair)
    return Conv2dProblem(n, c, h, w, k, r, s, stride_pair, pads, dilation_pair, groups)


def conv_transpose2d_problem(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    output_padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
) -> Conv2dProblem:
    """The convolution whose input gradient is the transposed convolution asked for.

    ``input_shape`` is (N, C_in, H_in, W_in), ``weight_shape`` (C_in, C_out / groups, R, S) as in PyTorch. The
    answer's *input* is the transposed convolution's output, of height
    (H_in - 1) * stride - 2 * padding + dilation * (R - 1) + output_padding + 1.
    """
    n, c_in, h, w = _check_image(input_shape, "the input of a transposed 2d convolution")
    if len(weight_shape) != 4:
        raise ProblemError(
            "the weight of a transposed 2d convolution must have 4 dimensions (in channels, "
            f"out channels / groups, kernel height, kernel width), got shape {tuple(weight_shape)}"
        )
    if c_in != weight_shape[0]:
        raise ProblemError(
            f"the input has {c_in} channels (shape {tuple(input_shape)}) but the weight of shape "
            f"{tuple(weight_shape)} expects {weight_shape[0]}"
        )
    strides, dilations = pair(stride, "stride"), pair(dilation, "dilation")
    pads, extra = pair(padding, "padding", 0), pair(output_padding, "output_padding", 0)
    sizes = []
    for axis, (size, kernel) in enumerate(zip((h, w), weight_shape[2:], strict=True)):
        if extra[axis] >= max(strides[axis], dilations[axis]):
            raise ProblemError(
                f"output_padding {extra} must be smaller than the stride {strides} or the dilation {dilations}"
            )
        length = (size - 1) * strides[axis] - 2 * pads[axis] + dilations[axis] * (kernel - 1) + extra[axis] + 1
        if length < 1:
            raise ProblemError(
                f"a transposed convolution of {h}x{w} with kernel {tuple(weight_shape[2:])}, stride {strides} and "
                f"padding {pads} would have an output of {length} rows or columns; use less padding"
            )
        sizes.append(length)
    return Conv2dProblem.from_output(
        (n, c_in, h, w),
        weight_shape,
        sizes,
        stride=strides,
        padding=pads,
        dilation=dilations,
        groups=groups,
    )


@dataclass(frozen=True, slots=True)
class Pool2dProblem:
    """A two-dimensional pooling over windows of R x S; the channels do not mix."""

    N: int
    C: int
    H: int
    W: int
    R: int
    S: int
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False

    def __post_init__(self) -> None:
        if self.padding[0] * 2 > self.R or self.padding[1] * 2 > self.S:
            raise ProblemError(
                f"pooling padding {self.padding} must be at most half of the window {self.R}x{self.S}, or whole "
                "windows would lie in the padding"
            )
        pads = (self.padding[0], self.padding[0], self.padding[1], self.padding[1])
        _check_window((self.H, self.W), pads, self.extent, "the pooling window")

    @classmethod
    def from_shapes(
        cls,
        input_shape: Sequence[int],
        kernel_size: IntOrPair,
        *,
        stride: IntOrPair | None = None,
        padding: IntOrPair = 0,
        dilation: IntOrPair = 1,
        ceil_mode: bool = False,
    ) -> Pool2dProblem:
        """The problem of pooling (N, C, H, W); ``stride`` defaults to the window, as in PyTorch."""
        n, c, h, w = _check_image(input_shape, "the input of 2d pooling")
        r, s = pair(kernel_size, "kernel_size")
        strides = (r, s) if stride is None else pair(stride, "stride")
        return cls(n, c, h, w, r, s, strides, pair(padding, "padding", 0), pair(dilation, "dilation"), ceil_mode)

    @property
    def extent(self) -> tuple[int, int]:
        """Rows and columns of the input that one (dilated) window covers."""
        return window_extent(self.R, self.dilation[0]), window_extent(self.S, self.dilation[1])

    def _output_length(self, axis: int) -> int:
        size, padding, stride = (self.H, self.W)[axis], self.padding[axis], self.stride[axis]
        room = size + 2 * padding - self.extent[axis]
        if not self.ceil_mode:
            return room // stride + 1
        length = -(-room // stride) + 1
        # A window that would start beyond the input and its left padding holds nothing: PyTorch drops it too.
        return length - 1 if (length - 1) * stride >= size + padding else length

    @property
    def P(self) -> int:
        """Output height; rounded up with ``ceil_mode``, a window that holds only padding left out."""
        return self._output_length(0)

    @property
    def Q(self) -> int:
        """Output width; rounded up with ``ceil_mode``, a window that holds only padding left out."""
        return self._output_length(1)

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        return self.N, self.C, self.H, self.W

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """(N, C, P, Q)."""
        return self.N, self.C, self.P, self.Q
