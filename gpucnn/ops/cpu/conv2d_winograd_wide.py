"""Winograd's convolution where the filters are larger than the images: many channels, few tiles.

The transformed filters of 512 to 512 channels are 38 MB, four times the filters, and making them costs as much as
multiplying by them. So here the tiles of the whole batch are transformed first, a part of their channels a task,
and the filters are taken a few output channels at a time, transformed, used while they are in the cache, and
forgotten; a filter gradient is done with as soon as its task is, without partial sums.

Milliseconds of one thread, beside the limit (operations of the plain sum at 150 GFLOP/s):

    =============  =====  =============  ===============
    layer          limit  forward        filter gradient
                          by tile  this  by tile    this
    =============  =====  =======  ====  =======  ======
    512 7x7 N16     24.7     35.9  26.0     29.9    28.6
    512 14x14 N8    49.3     50.3  44.0     46.4    43.5
    256 14x14 N16   24.7     28.3  27.1     27.9    26.3
    512 2x2 N16      2.0     24.5  11.9     19.7    12.9
    =============  =====  =======  ====  =======  ======

By tile, the sum of 38 MB was also kept once only, and so by one thread.
"""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.ops.cpu.blocks import ranges
from gpucnn.ops.cpu.conv2d_blocks import Block
from gpucnn.ops.cpu.conv2d_winograd_tiles import INPUT, OUTPUTS, filter_transform, place, tiles_of, transforms
from gpucnn.ops.cpu.threads import parallel_for, scratch
from gpucnn_kernels.problem import Conv2dProblem

_ELEMENTS = INPUT * INPUT
_FILTER_BYTES = 4 << 20  # of transformed filters, from which they are worth forgetting
_TILE_BYTES = 16 << 20  # of the batch's transformed tiles, at most
_PART = 1 << 16  # filters (of one input and one output channel) of a task, at most
_TASKS = 4  # that there should be at least
_VALUES = 1 << 19  # numbers of the tiles that a task transforms


def fits(problem: Conv2dProblem, itemsize: int) -> bool:
    """Whether the filters are many enough and the batch small enough."""
    tiles = problem.N * _tiles(problem)
    filters = _ELEMENTS * problem.K * problem.C * itemsize
    return filters >= _FILTER_BYTES and _ELEMENTS * max(problem.C, problem.K) * tiles * itemsize <= _TILE_BYTES


def _tiles(problem: Conv2dProblem) -> int:
    size = OUTPUTS[problem.R]
    return -(-problem.P // size) * -(-problem.Q // size)


def _parts(problem: Conv2dProblem) -> list[slice]:
    """The output channels of each task."""
    return ranges(problem.K, max(1, min(_PART // problem.C, problem.K // _TASKS)))


def _transformed(problem: Conv2dProblem, x: NDArray[Any]) -> NDArray[Any]:
    """V (36, C, T) of the whole batch."""
    of_input = transforms(problem.R, x.dtype)[0]
    size, padding = OUTPUTS[problem.R], (problem.padding[0], problem.padding[2])
    high, wide = -(-problem.P // size), -(-problem.Q // size)
    count = problem.N * high * wide
    result = scratch("batch", (_ELEMENTS, problem.C, count), x.dtype)
    parts = ranges(problem.C, max(1, _VALUES // (_ELEMENTS * count)))

    def transform(task: int) -> None:
        part = parts[task]
        tiles = tiles_of("tiles", x[:, part], Block(0, problem.N, 0, high), wide, INPUT, size, padding)
        columns = slice(part.start * count, part.stop * count)
        numpy.matmul(of_input, tiles, out=result.reshape(_ELEMENTS, -1)[:, columns])

    parallel_for(len(parts), transform)
    return result


def convolve(
    problem: Conv2dProblem,
    x: NDArray[Any],
    weight: NDArray[Any],
    bias: NDArray[Any] | None,
    out: NDArray[Any],
    *,
    turned: bool,
) -> None:
    """Y (N, K, P, Q) into ``out``, which may have any strides; a ``turned`` weight is (C, K, R, S), unrotated."""
    of_output = transforms(problem.R, x.dtype)[2]
    of_filter = filter_transform(problem.R, x.dtype, turned)
    size = OUTPUTS[problem.R]
    high, wide = -(-problem.P // size), -(-problem.Q // size)
    transformed = _transformed(problem, x)
    count = transformed.shape[2]
    parts = _parts(problem)

    def multiply(task: int) -> None:
        part = parts[task]
        k = part.stop - part.start
        kernels = weight[:, part] if turned else weight[part]
        filters = scratch("filters", (_ELEMENTS, *kernels.shape[:2]), x.dtype)
        numpy.matmul(of_filter, kernels.reshape(-1, problem.R * problem.S).T, out=filters.reshape(_ELEMENTS, -1))
        if turned:
            filters = filters.transpose(0, 2, 1)
        products = scratch("products", (_ELEMENTS, k, count), x.dtype)
        numpy.matmul(filters, transformed, out=products)
        outputs = scratch("outputs", (size * size, k * count), x.dtype)
        numpy.matmul(of_output, products.reshape(_ELEMENTS, -1), out=outputs)
        block = Block(0, problem.N, 0, high)
        place(outputs, block, wide, size, None if bias is None else bias[part], out[:, part])

    parallel_for(len(parts), multiply)


def backward_filter(problem: Conv2dProblem, dy: NDArray[Any], x: NDArray[Any], out: NDArray[Any]) -> None:
    """Dw (K, C, R, S) into ``out``."""
    _, of_filter, of_output = transforms(problem.R, x.dtype)
    size = OUTPUTS[problem.R]
    high, wide = -(-problem.P // size), -(-problem.Q // size)
    transformed = _transformed(problem, x)
    count = transformed.shape[2]
    parts = _parts(problem)

    def multiply(task: int) -> None:
        part = parts[task]
        k = part.stop - part.start
        gradients = tiles_of("tiles", dy[:, part], Block(0, problem.N, 0, high), wide, size, size, (0, 0))
        spread = scratch("products", (_ELEMENTS, k * count), dy.dtype)
        numpy.matmul(of_output.T, gradients, out=spread)
        sums = scratch("filters", (_ELEMENTS, k, problem.C), dy.dtype)
        numpy.matmul(spread.reshape(_ELEMENTS, k, count), transformed.transpose(0, 2, 1), out=sums)
        numpy.matmul(sums.reshape(_ELEMENTS, -1).T, of_filter, out=out[part].reshape(-1, problem.R * problem.S))

    parallel_for(len(parts), multiply)
