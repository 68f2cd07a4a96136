"""Convolutions as plain loops in float64, and the same sums made plainly in another precision.

Nothing of gpucnn is used here. The ``*_loops`` functions are the definition, one Python statement a product, and
add each result's products up without rounding (math.fsum). They serve problems up to some 10^5 products. The
``plain_*`` functions add one product after the other in a given dtype, many results side by side: in float32 or
float64 they are the plain computation that ours is measured against, and in a wider type the truth for larger
problems; the tests of the oracles hold them to the loops.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import DTypeLike, NDArray


@dataclass(frozen=True)
class Geometry:
    """What a convolution does besides its arrays: padding is (top, bottom, left, right)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


def output_length(size: int, before: int, after: int, kernel: int, stride: int, dilation: int) -> int:
    """How many windows fit, by trying one place after the other."""
    count = 0
    while count * stride + (kernel - 1) * dilation < size + before + after:
        count += 1
    return count


def _terms(
    input_shape: tuple[int, ...], weight_shape: tuple[int, ...], geometry: Geometry
) -> Iterator[tuple[tuple[int, int, int, int], tuple[int, int, int, int], tuple[int, int, int, int]]]:
    """The indices (of x, of w, of y) of every product of the convolution that does not meet padding."""
    images, _, height, width = input_shape
    outputs, depth, kernel_height, kernel_width = weight_shape
    top, bottom, left, right = geometry.padding
    (stride_y, stride_x), (dilation_y, dilation_x) = geometry.stride, geometry.dilation
    rows = output_length(height, top, bottom, kernel_height, stride_y, dilation_y)
    columns = output_length(width, left, right, kernel_width, stride_x, dilation_x)
    for n in range(images):
        for k in range(outputs):
            group = k // (outputs // geometry.groups)
            for p in range(rows):
                for q in range(columns):
                    for c in range(depth):
                        for r in range(kernel_height):
                            for s in range(kernel_width):
                                y = p * stride_y - top + r * dilation_y
                                x = q * stride_x - left + s * dilation_x
                                if 0 <= y < height and 0 <= x < width:
                                    yield (n, group * depth + c, y, x), (k, c, r, s), (n, k, p, q)


def _sum_up(products: dict[tuple[int, ...], list[float]], shape: tuple[int, ...]) -> NDArray[numpy.float64]:
    total = numpy.zeros(shape)
    for index, values in products.items():
        total[index] = math.fsum(values)
    return total


def output_shape(
    input_shape: tuple[int, ...], weight_shape: tuple[int, ...], geometry: Geometry
) -> tuple[int, int, int, int]:
    top, bottom, left, right = geometry.padding
    return (
        input_shape[0],
        weight_shape[0],
        output_length(input_shape[2], top, bottom, weight_shape[2], geometry.stride[0], geometry.dilation[0]),
        output_length(input_shape[3], left, right, weight_shape[3], geometry.stride[1], geometry.dilation[1]),
    )


def forward_loops(
    x: NDArray[Any], weight: NDArray[Any], geometry: Geometry, bias: NDArray[Any] | None = None
) -> NDArray[numpy.float64]:
    """y[n, k, p, q] = bias[k] + the sum of x * w over the window."""
    products: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for at_x, at_w, at_y in _terms(x.shape, weight.shape, geometry):
        products[at_y].append(float(x[at_x]) * float(weight[at_w]))
    shape = output_shape(x.shape, weight.shape, geometry)
    if bias is not None:
        for index in numpy.ndindex(shape):
            products[index].append(float(bias[index[1]]))
    return _sum_up(products, shape)


def backward_data_loops(
    dy: NDArray[Any], weight: NDArray[Any], input_shape: tuple[int, ...], geometry: Geometry
) -> NDArray[numpy.float64]:
    """Each product x * w of the forward pass gives dy * w to the gradient of its x."""
    products: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for at_x, at_w, at_y in _terms(input_shape, weight.shape, geometry):
        products[at_x].append(float(dy[at_y]) * float(weight[at_w]))
    return _sum_up(products, input_shape)


def backward_filter_loops(
    dy: NDArray[Any], x: NDArray[Any], weight_shape: tuple[int, ...], geometry: Geometry
) -> NDArray[numpy.float64]:
    """Each product x * w of the forward pass gives dy * x to the gradient of its w."""
    products: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for at_x, at_w, at_y in _terms(x.shape, weight_shape, geometry):
        products[at_w].append(float(dy[at_y]) * float(x[at_x]))
    return _sum_up(products, weight_shape)


# ---------------------------------------------------------------- the plain computation in a given precision


class _Plain:
    """The loops over channels and kernel positions; images and pixels are added side by side."""

    def __init__(
        self,
        input_shape: tuple[int, ...],
        weight_shape: tuple[int, ...],
        geometry: Geometry,
        x: NDArray[Any] | None,
        dtype: DTypeLike,
    ) -> None:
        self.top, bottom, self.left, right = geometry.padding
        n, c, self.height, self.width = input_shape
        self.image = numpy.zeros((n, c, self.height + self.top + bottom, self.width + self.left + right), dtype)
        if x is not None:
            self.inside[...] = x
        self.weight_shape, self.geometry = weight_shape, geometry
        self.shape = output_shape(input_shape, weight_shape, geometry)

    @property
    def inside(self) -> NDArray[Any]:
        return self.image[:, :, self.top : self.top + self.height, self.left : self.left + self.width]

    @property
    def depths(self) -> Iterator[tuple[slice, slice, int]]:
        """For each group, its output channels, its input channels, and how many those are."""
        k, c = self.weight_shape[0] // self.geometry.groups, self.weight_shape[1]
        for group in range(self.geometry.groups):
            yield slice(group * k, (group + 1) * k), slice(group * c, (group + 1) * c), c

    def views(self) -> Iterator[tuple[int, int, NDArray[Any]]]:
        """For every kernel position (r, s), the pixels (N, C, P, Q) that it meets."""
        (stride_y, stride_x), (dilation_y, dilation_x) = self.geometry.stride, self.geometry.dilation
        rows, columns = self.shape[2:]
        for r in range(self.weight_shape[2]):
            for s in range(self.weight_shape[3]):
                y, x = r * dilation_y, s * dilation_x
                yield (
                    r,
                    s,
                    self.image[
                        :,
                        :,
                        y : y + (rows - 1) * stride_y + 1 : stride_y,
                        x : x + (columns - 1) * stride_x + 1 : stride_x,
                    ],
                )


def plain_forward(
    x: NDArray[Any],
    weight: NDArray[Any],
    geometry: Geometry,
    bias: NDArray[Any] | None = None,
    dtype: DTypeLike = numpy.float64,
) -> NDArray[Any]:
    """As :func:`forward_loops`, added in ``dtype`` one weight after the other, the bias last."""
    plain = _Plain(x.shape, weight.shape, geometry, x, dtype)
    weight = weight.astype(dtype)
    y = numpy.zeros(plain.shape, dtype)
    for r, s, view in plain.views():
        for outputs, inputs, depth in plain.depths:
            for c in range(depth):
                y[:, outputs] += weight[outputs, c, r, s, None, None] * view[:, inputs][:, c, None]
    return y if bias is None else y + bias.astype(dtype)[:, None, None]


def plain_backward_data(
    dy: NDArray[Any],
    weight: NDArray[Any],
    input_shape: tuple[int, ...],
    geometry: Geometry,
    dtype: DTypeLike = numpy.float64,
) -> NDArray[Any]:
    """As :func:`backward_data_loops`, added in ``dtype`` one weight after the other."""
    plain = _Plain(input_shape, weight.shape, geometry, None, dtype)
    weight, dy = weight.astype(dtype), dy.astype(dtype)
    for r, s, view in plain.views():
        for outputs, inputs, _ in plain.depths:
            for k in range(outputs.start, outputs.stop):
                view[:, inputs] += weight[k, :, r, s, None, None] * dy[:, k, None]
    return plain.inside.copy()


def plain_backward_filter(
    dy: NDArray[Any],
    x: NDArray[Any],
    weight_shape: tuple[int, ...],
    geometry: Geometry,
    dtype: DTypeLike = numpy.float64,
) -> NDArray[Any]:
    """As :func:`backward_filter_loops`, added in ``dtype`` one pixel after the other."""
    plain = _Plain(x.shape, weight_shape, geometry, x, dtype)
    dy = dy.astype(dtype)
    dw = numpy.zeros(weight_shape, dtype)
    for r, s, view in plain.views():
        for outputs, inputs, depth in plain.depths:
            for c in range(depth):
                products = (dy[:, outputs] * view[:, inputs][:, c, None]).transpose(1, 0, 2, 3)
                # cumsum adds one number after the other; sum would add pairwise, which is not the plain way.
                sums = numpy.cumsum(products.reshape(products.shape[0], -1), axis=1, dtype=dtype)
                dw[outputs, c, r, s] = sums[:, -1]
    return dw
