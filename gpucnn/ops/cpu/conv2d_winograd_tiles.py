"""Winograd's tiles: taken from images, transformed, put back.

Tiles are transformed by matrix products as well: with the 36 numbers of a tile along the first axis, B d B^T is
one product with the Kronecker product B x B. That takes more operations than the textbook's chains of additions,
but BLAS does them at its own speed, and the matrices may then hold any numbers. So the polynomials are evaluated
at 0, +-2/3, +-3/2 and infinity, in place of 0, +-1, +-2 and infinity: rounding errors are a quarter of that
choice's (measured: 4 times those of the plain sum in the mean, 5 at the largest).
"""

from __future__ import annotations

import itertools
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.ops.cpu.conv2d_blocks import Block
from gpucnn.ops.cpu.im2col import inside
from gpucnn.ops.cpu.threads import scratch

INPUT = 6  # of a tile, along each axis
OUTPUTS = {3: 4, 5: 2}  # of a tile, for each size of the kernel
POINTS = (Fraction(0), Fraction(2, 3), Fraction(-2, 3), Fraction(3, 2), Fraction(-3, 2))


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
def transforms(kernel: int, dtype: numpy.dtype[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """(input (36, 36), filter (36, 9), output (16, 36)): the Kronecker squares of B, G and A, for a 3x3 kernel.

    A product of two polynomials of 3 and 4 coefficients is found from its values at 6 points (Toom and Cook):
    s = V6^-1 [(V3 g) * (V4 h)] with Vandermonde's matrices V. A convolution with g is the transpose of that map in
    h: y = V4^T [(V3 g) * (V6^-T d)], so G = V3, B = V6^-T and A = V4^T.
    """
    b = numpy.array(_inverse(_powers(INPUT)), float).T
    g = numpy.array(_powers(kernel), float)
    a = numpy.array(_powers(OUTPUTS[kernel]), float).T
    square_b, square_g, square_a = (numpy.kron(matrix, matrix).astype(dtype) for matrix in (b, g, a))
    return square_b, square_g, square_a


def filter_transform(kernel: int, dtype: numpy.dtype[Any], turned: bool) -> NDArray[Any]:
    """(36, kernel * kernel); where ``turned``, for kernels as they are before a rotation by 180 degrees."""
    of_filter = transforms(kernel, dtype)[1]
    return numpy.ascontiguousarray(of_filter[:, ::-1]) if turned else of_filter


def tiles_of(
    name: str, source: NDArray[Any], block: Block, wide: int, size: int, step: int, padding: tuple[int, int]
) -> NDArray[Any]:
    """The block's tiles of ``source`` (N, C, H, W), ``size`` x ``size`` every ``step``: (size * size, C * T).

    In scratch memory. The tile at (0, 0) begins ``padding`` above and left of the image; places outside it are 0.
    """
    images = source[block.images].transpose(1, 0, 2, 3)
    channels, count, height, width = images.shape
    high = block.bottom - block.top
    tiles = scratch(name, (size, size, channels, count, high, wide), source.dtype)
    for i, j in itertools.product(range(size), range(size)):
        tile = tiles[i, j]
        rows, image_rows = inside(step * block.top + i - padding[0], step, high, height)
        columns, image_columns = inside(j - padding[1], step, wide, width)
        if (rows.start, rows.stop, columns.start, columns.stop) != (0, high, 0, wide):
            tile[...] = 0
        tile[:, :, rows, columns] = images[:, :, image_rows, image_columns]
    return tiles.reshape(size * size, -1)


def place(
    outputs: NDArray[Any], block: Block, wide: int, size: int, bias: NDArray[Any] | None, out: NDArray[Any]
) -> None:
    """Write the ``outputs`` (size * size, K * T), plus ``bias``, where they belong in ``out`` (N, K, P, Q)."""
    images, high = block.last - block.first, block.bottom - block.top
    places = outputs.reshape(size, size, out.shape[1], images, high, wide)
    target = out[block.images].transpose(1, 0, 2, 3)
    top, bottom = size * block.top, min(size * block.bottom, out.shape[2])
    for i, j in itertools.product(range(size), range(size)):
        part = target[:, :, top + i : bottom : size, j::size]
        values = places[i, j, :, :, : part.shape[2], : part.shape[3]]
        if bias is None:
            part[...] = values
        else:
            numpy.add(values, bias.reshape(-1, 1, 1, 1), out=part)
