"""Winograd's convolution F(4x4, 3x3): 36 products for 16 outputs of a 3x3 kernel, where the plain sum takes 144.

Lavin and Gray, "Fast algorithms for convolutional neural networks", 2016. The image is cut into tiles of 4x4
outputs, which read 6x6 inputs. With the matrices B (6x6), G (6x3) and A (4x6), a tile's output is

    Y = A [ (G w G^T) * (B d B^T) ] A^T          * element by element, summed over the input channels

The sum over channels makes each of the 36 elements a matrix product of its own, (K, C) @ (C, tiles):

    forward          M[e] = U[e] (K, C) @ V[e] (C, T)      U = G w G^T,  V = B d B^T
    filter gradient  U'[e] = Z[e] (K, T) @ V[e] (T, C)     Z = A^T dy A, dw = G^T U' G: the adjoint
    input gradient   forward, of dy, with the kernel rotated by 180 degrees and its channels exchanged

Tiles are transformed by matrix products as well: with the 36 numbers of a tile along the first axis, B d B^T is
one product with the Kronecker product B x B. That takes more operations than the textbook's chains of additions,
but BLAS does them at its own speed, and the matrices may then hold any numbers. So the polynomials are evaluated
at 0, +-2/3, +-3/2 and infinity, in place of 0, +-1, +-2 and infinity: rounding errors are a quarter of that
choice's (measured: 4 times those of the plain sum in the mean, 5 at the largest).
"""

from __future__ import annotations

import itertools
import math
import os
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy
from numpy.typing import DTypeLike, NDArray

from gpucnn.ops.cpu.conv2d_blocks import SMALL_FLOPS, Block, runs
from gpucnn.ops.cpu.conv2d_data import rotated
from gpucnn.ops.cpu.im2col import inside
from gpucnn.ops.cpu.threads import parallel_for, scratch
from gpucnn_kernels.problem import Conv2dProblem

OUTPUT, KERNEL = 4, 3  # of a tile, along each axis
INPUT = OUTPUT + KERNEL - 1
POINTS = (Fraction(0), Fraction(2, 3), Fraction(-2, 3), Fraction(3, 2), Fraction(-3, 2))

# By measurement, on 2 MiB of second-level cache: fewer tiles make small products, more leave the cache.
_TILES = 160
_CHANNELS = 44  # the geometric mean of inputs and outputs from which it is faster than the plain sum
_LEAST_TILES = 48


def is_possible(direction: str, problem: Conv2dProblem) -> bool:
    """Whether the algorithm can do this problem: a 3x3 kernel at stride 1 without dilation, one group.

    The input gradient also needs padding of at most 2, or it would be a convolution of a part of dy.
    """
    return (
        (problem.R, problem.S) == (KERNEL, KERNEL)
        and problem.stride == (1, 1)
        and problem.dilation == (1, 1)
        and problem.groups == 1
        and (direction != "backward_data" or max(problem.padding) < KERNEL)
    )


def pays(direction: str, problem: Conv2dProblem, dtype: DTypeLike) -> bool:
    """Whether "auto" takes it: where it is possible, faster, and its rounding is welcome.

    By measurement against the plain sum (time over "rows", forward, one thread):

    ========  =====  =====  =====  =====  ============
    channels  56x56  28x28  14x14  7x7    28x28, N = 1
    ========  =====  =====  =====  =====  ============
    32        1.06   1.07   1.39   1.12   1.41
    64        0.74   0.82   1.05   0.97   1.02
    128       0.61   0.69   0.79   0.80   0.75
    256       0.59   0.68   0.84   0.75   0.74
    ========  =====  =====  =====  =====  ============

    Transforming tiles costs the same for any number of channels, and tiles that reach over the edge are done for
    nothing. float64 is asked for when digits count, so it is always summed plainly; ``GPUCNN_WINOGRAD=0`` sums
    float32 plainly too.
    """
    if not is_possible(direction, problem) or numpy.dtype(dtype).itemsize > 4:
        return False
    height, width = (problem.H, problem.W) if direction == "backward_data" else (problem.P, problem.Q)
    tiles = -(-height // OUTPUT) * -(-width // OUTPUT)
    waste = tiles * OUTPUT * OUTPUT / (height * width)
    wide = math.sqrt(problem.C * problem.K) >= _CHANNELS * waste**2
    return wide and problem.N * tiles >= _LEAST_TILES and os.environ.get("GPUCNN_WINOGRAD") != "0"


def _inverse(matrix: list[list[Fraction]]) -> list[list[Fraction]]:
    """The inverse, exactly, by Gauss and Jordan."""
    size = len(matrix)
    rows = [[*row, *(Fraction(int(i == j)) for j in range(size))] for i, row in enumerate(matrix)]
    for column in range(size):
        pivot = next(row for row in range(column, size) if rows[row][column])
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows[column] = [value / rows[column][column] for value in rows[column]]
        for row in range(size):
            if row != column:
                factor = rows[row][column]
                rows[row] = [a - factor * b for a, b in zip(rows[row], rows[column], strict=True)]
    return [row[size:] for row in rows]


def _powers(columns: int) -> list[list[Fraction]]:
    """A polynomial's values at the points from its coefficients; at infinity, its highest coefficient."""
    return [[point**j for j in range(columns)] for point in POINTS] + [
        [Fraction(0)] * (columns - 1) + [Fraction(1)]
    ]


@lru_cache(maxsize=4)
def _transforms(dtype: numpy.dtype[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """(input (36, 36), filter (36, 9), output (16, 36)): the Kronecker squares of B, G and A.

    A product of two polynomials of 3 and 4 coefficients is found from its values at 6 points (Toom and Cook):
    s = V6^-1 [(V3 g) * (V4 h)] with Vandermonde's matrices V. A convolution with g is the transpose of that map in
    h: y = V4^T [(V3 g) * (V6^-T d)], so G = V3, B = V6^-T and A = V4^T.
    """
    b = numpy.array(_inverse(_powers(INPUT)), float).T
    g = numpy.array(_powers(KERNEL), float)
    a = numpy.array(_powers(OUTPUT), float).T
    square_b, square_g, square_a = (numpy.kron(matrix, matrix).astype(dtype) for matrix in (b, g, a))
    return square_b, square_g, square_a


def _blocks(problem: Conv2dProblem, tiles: int) -> list[Block]:
    """The tiles in blocks of about ``tiles``: rows of tiles of one image, or whole images. Rows count in tiles."""
    high, wide = -(-problem.P // OUTPUT), -(-problem.Q // OUTPUT)
    if 2 * high * wide <= 3 * tiles:
        count = max(1, min(problem.N, tiles // (high * wide)))
        return [Block(n, min(n + count, problem.N), 0, high) for n in range(0, problem.N, count)]
    rows = -(-high // -(-high // max(1, tiles // wide)))  # of equal height
    return [Block(n, n + 1, top, min(top + rows, high)) for n in range(problem.N) for top in range(0, high, rows)]


def _tiles(
    name: str, source: NDArray[Any], block: Block, wide: int, size: int, padding: tuple[int, int]
) -> NDArray[Any]:
    """The block's tiles of ``source`` (N, C, H, W), ``size`` x ``size`` every 4: (size * size, C * T) in scratch.

    The tile at (0, 0) begins ``padding`` above and left of the image; places outside it are 0.
    """
    images = source[block.images].transpose(1, 0, 2, 3)
    channels, count, height, width = images.shape
    high = block.bottom - block.top
    tiles = scratch(name, (size, size, channels, count, high, wide), source.dtype)
    for i, j in itertools.product(range(size), range(size)):
        tile = tiles[i, j]
        rows, image_rows = inside(OUTPUT * block.top + i - padding[0], OUTPUT, high, height)
        columns, image_columns = inside(j - padding[1], OUTPUT, wide, width)
        if (rows.start, rows.stop, columns.start, columns.stop) != (0, high, 0, wide):
            tile[...] = 0
        tile[:, :, rows, columns] = images[:, :, image_rows, image_columns]
    return tiles.reshape(size * size, -1)


def forward(
    problem: Conv2dProblem, x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any] | None, out: NDArray[Any]
) -> None:
    """Y (N, K, P, Q) into ``out``, which may have any strides."""
    of_input, of_filter, of_output = _transforms(x.dtype)
    filters = (of_filter @ weight.reshape(-1, KERNEL * KERNEL).T).reshape(-1, problem.K, problem.C)
    wide = -(-problem.Q // OUTPUT)
    offsets = None if bias is None else bias.reshape(-1, 1, 1, 1)
    work = _blocks(problem, _TILES)

    def multiply(task: int) -> None:
        block = work[task]
        tiles = _tiles("tiles", x, block, wide, INPUT, (problem.padding[0], problem.padding[2]))
        transformed = scratch("transformed", tiles.shape, x.dtype)
        numpy.matmul(of_input, tiles, out=transformed)
        count = tiles.shape[1] // problem.C
        products = scratch("products", (len(filters), problem.K, count), x.dtype)
        numpy.matmul(filters, transformed.reshape(-1, problem.C, count), out=products)
        outputs = scratch("outputs", (OUTPUT * OUTPUT, problem.K * count), x.dtype)
        numpy.matmul(of_output, products.reshape(len(filters), -1), out=outputs)
        images, high = block.last - block.first, block.bottom - block.top
        places = outputs.reshape(OUTPUT, OUTPUT, problem.K, images, high, wide)
        target = out[block.images].transpose(1, 0, 2, 3)
        top, bottom = OUTPUT * block.top, min(OUTPUT * block.bottom, problem.P)
        for i, j in itertools.product(range(OUTPUT), range(OUTPUT)):
            part = target[:, :, top + i : bottom : OUTPUT, j::OUTPUT]
            values = places[i, j, :, :, : part.shape[2], : part.shape[3]]
            if offsets is None:
                part[...] = values
            else:
                numpy.add(values, offsets, out=part)

    parallel_for(len(work), multiply, small=problem.flops < SMALL_FLOPS)


def backward_data(problem: Conv2dProblem, dy: NDArray[Any], weight: NDArray[Any], out: NDArray[Any]) -> None:
    """Dx (N, C, H, W) into ``out``: the convolution of dy with the rotated kernel."""
    turned = rotated(weight, 1)
    top, bottom, left, right = (KERNEL - 1 - padding for padding in problem.padding)
    convolution = Conv2dProblem.from_shapes(dy.shape, turned.shape, padding=(top, bottom, left, right))
    forward(convolution, dy, turned, None, out)


def backward_filter(problem: Conv2dProblem, dy: NDArray[Any], x: NDArray[Any], out: NDArray[Any]) -> None:
    """Dw (K, C, 3, 3) into ``out``: partial sums over runs of blocks, then added in their order."""
    of_input, of_filter, of_output = _transforms(x.dtype)
    wide = -(-problem.Q // OUTPUT)
    # Each block adds 36 K C numbers to the sum: more tiles a block where there are many channels.
    work = _blocks(problem, max(_TILES, 2 * problem.K, 2 * problem.C))
    elements = INPUT * INPUT
    parts = runs(len(work), elements * problem.K * problem.C * x.itemsize)
    partial = numpy.empty((len(parts), elements, problem.K, problem.C), out.dtype)

    def sum_run(task: int) -> None:
        total = target = partial[task]
        for number in parts[task]:
            block = work[number]
            tiles = _tiles("tiles", x, block, wide, INPUT, (problem.padding[0], problem.padding[2]))
            transformed = scratch("transformed", tiles.shape, x.dtype)
            numpy.matmul(of_input, tiles, out=transformed)
            gradients = _tiles("gradients", dy, block, wide, OUTPUT, (0, 0))
            spread = scratch("products", (elements, gradients.shape[1]), dy.dtype)
            numpy.matmul(of_output.T, gradients, out=spread)
            count = tiles.shape[1] // problem.C
            by_channel = transformed.reshape(elements, problem.C, count)
            numpy.matmul(spread.reshape(elements, problem.K, count), by_channel.transpose(0, 2, 1), out=target)
            if target is not total:
                total += target
            else:
                target = scratch("outputs", total.shape, out.dtype)

    parallel_for(len(parts), sum_run, small=problem.flops < SMALL_FLOPS)
    result = partial[0]
    for other in itertools.islice(partial, 1, None):
        result += other
    gradient = of_filter.T @ result.reshape(elements, -1)
    out[...] = gradient.T.reshape(problem.K, problem.C, KERNEL, KERNEL)
