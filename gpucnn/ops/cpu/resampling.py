"""Changing the size of images and turning them, by bilinear interpolation of planar float32 arrays.

Only gathers and element-wise arithmetic: no BLAS, whose threads the training step needs, and whose sums depend on
how many there are.
"""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.ops.cpu.threads import scratch

_VALUES_AT_A_TIME = 1 << 14  # more images or channels at once would leave the second-level cache

Taps = tuple[NDArray[Any], NDArray[numpy.float32]]
"""Along one axis: pixel x of the result is the sum over k of weights[k, x] times pixel first[x] + k. (first
(target,), weights (taps, target))."""


def window(taps: Taps | None, length: int) -> tuple[slice, Taps | None]:
    """The pixels of an axis of ``length`` that ``taps`` weigh, and the taps within those; None where each is 1."""
    if taps is None:
        return slice(0, length), None
    first, weights = taps
    used = len(weights)
    while used > 1 and not weights[used - 1].any():  # what tables of several images are filled up with
        used -= 1
    start = int(first.min())
    stop = min(int(first.max()) + used, length)
    if used == 1 and stop - start == len(first) and (weights[0] == 1).all() and (numpy.diff(first) == 1).all():
        return slice(start, stop), None
    return slice(start, stop), ((first - start).astype(numpy.intp), weights[:used])


def resize(planar: NDArray[Any], rows: Taps | None, columns: Taps | None, out: NDArray[numpy.float32]) -> None:
    """Resize ``planar`` (..., height, width), of any type and layout, to fill ``out`` (..., height, width).

    Without taps an axis keeps its length. Taps that reach beyond the last pixel take that one.
    """
    if planar.ndim > 2 and max(planar[0].size, out[0].size) > _VALUES_AT_A_TIME:
        for part, target in zip(planar, out, strict=True):
            resize(part, rows, columns, target)
        return
    *images, height, width = planar.shape
    new_width = out.shape[-1]
    # Each axis is resized while it is the last but one, so that gathers move whole rows.
    turned = scratch("resize columns", (*images, width, height), numpy.float32)
    turned[:] = planar.swapaxes(-1, -2)
    if columns is not None:
        resized = scratch("resize resized columns", (*images, new_width, height), numpy.float32)
        _weighted_sum(turned, columns, resized)
        turned = resized
    if rows is None:
        out[:] = turned.swapaxes(-1, -2)
        return
    lines = scratch("resize rows", (*images, height, new_width), numpy.float32)
    lines[:] = turned.swapaxes(-1, -2)
    _weighted_sum(lines, rows, out)


def _weighted_sum(image: NDArray[numpy.float32], taps: Taps, out: NDArray[numpy.float32]) -> None:
    first, weights = taps
    # mode="clip" spares numpy a check and a copy, and keeps to the last pixel.
    numpy.take(image, first, axis=-2, mode="clip", out=out)
    out *= weights[0][:, None]
    term = scratch("resize term", out.shape, numpy.float32)
    for number in range(1, len(weights)):
        numpy.take(image, first + number, axis=-2, mode="clip", out=term)
        term *= weights[number][:, None]
        out += term


def rotate(planar: NDArray[Any], turns: NDArray[numpy.float32]) -> NDArray[numpy.float32]:
    """Images (count, channels, height, width), each turned counter-clockwise about its centre by its own angle.

    ``turns`` (count, 2) are cosines and sines. Bilinear; pixels that come from outside repeat the nearest one of
    the edge. The result is this thread's working memory, good until the next call. No side is below 2.
    """
    count, channels, height, width = planar.shape
    source = scratch("rotate source", planar.shape, numpy.float32)
    source[:] = planar
    turned = scratch("rotate turned", planar.shape, numpy.float32)
    cosine, sine = turns[:, 0, None, None], turns[:, 1, None, None]
    y = numpy.arange(height, dtype=numpy.float32)[:, None] - numpy.float32((height - 1) / 2)
    x = numpy.arange(width, dtype=numpy.float32) - numpy.float32((width - 1) / 2)
    grid = (count, height, width)
    down, right = scratch("rotate down", grid, numpy.float32), scratch("rotate right", grid, numpy.float32)
    numpy.add(cosine * y + numpy.float32((height - 1) / 2), sine * x, out=down)
    numpy.add(cosine * x + numpy.float32((width - 1) / 2), -sine * y, out=right)
    numpy.clip(down, 0, height - 1, out=down)
    numpy.clip(right, 0, width - 1, out=right)
    corner, column = scratch("rotate corner", grid, numpy.intp), scratch("rotate column", grid, numpy.intp)
    # The upper left of the four pixels that each is made of; never in the last row or column, so all four exist.
    numpy.copyto(corner, down, casting="unsafe")
    numpy.minimum(corner, height - 2, out=corner)
    numpy.copyto(column, right, casting="unsafe")
    numpy.minimum(column, width - 2, out=column)
    numpy.subtract(down, corner, out=down, casting="same_kind")
    numpy.subtract(right, column, out=right, casting="same_kind")
    corner *= width
    corner += column
    corner += (numpy.arange(count) * (channels * height * width))[:, None, None]
    flat = source.reshape(-1)
    for channel in range(channels):
        start = channel * height * width
        above = _between(flat[start:], flat[start + 1 :], corner, right, "rotate above")
        below = _between(flat[start + width :], flat[start + width + 1 :], corner, right, "rotate below")
        below -= above
        below *= down
        numpy.add(above, below, out=turned[:, channel])
    return turned


def _between(
    near: NDArray[numpy.float32],
    far: NDArray[numpy.float32],
    index: NDArray[numpy.intp],
    share: NDArray[numpy.float32],
    name: str,
) -> NDArray[numpy.float32]:
    """near[index] + share * (far[index] - near[index])."""
    result = scratch(name, index.shape, numpy.float32)
    difference = scratch("rotate difference", index.shape, numpy.float32)
    numpy.take(near, index, mode="clip", out=result)
    numpy.take(far, index, mode="clip", out=difference)
    difference -= result
    difference *= share
    result += difference
    return result
