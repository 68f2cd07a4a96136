"""Changing the size of images and turning them, by bilinear interpolation of planar float32 arrays.

Only gathers and element-wise arithmetic: no BLAS, whose threads the training step needs, and whose sums depend on
how many there are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.data.scratch import scratch

_VALUES_AT_A_TIME = 1 << 14  # more images or channels at once would leave the second-level cache

Taps = tuple[NDArray[numpy.intp], NDArray[numpy.float32]]


@lru_cache(maxsize=1024)
def taps(source: int, target: int) -> Taps:
    """Which source pixels make up each target pixel along one axis, and how much each weighs.

    A triangle filter about the target pixel's centre; where the image shrinks the triangle widens with the scale,
    so that every source pixel counts (the anti-aliased bilinear filter that Pillow uses too).

    Returns (first source index (target,), weights (taps, target)); pixel first + k has weight k. Weights sum to 1.
    """
    scale = source / target
    support = max(scale, 1.0)
    centre = (numpy.arange(target) + 0.5) * scale
    count = min(source, int(numpy.ceil(2 * support)))
    first = numpy.clip(numpy.floor(centre - support + 0.5).astype(numpy.intp), 0, source - count)
    distance = numpy.abs(first + numpy.arange(count)[:, None] + 0.5 - centre) / support
    weights = numpy.maximum(0.0, 1.0 - distance)
    weights /= weights.sum(axis=0)
    result = first, weights.astype(numpy.float32)
    for array in result:
        array.setflags(write=False)  # shared by every thread
    return result


def resize(planar: NDArray[Any], out: NDArray[numpy.float32]) -> None:
    """Resize ``planar`` (..., height, width), of any type and layout, to fill ``out`` (..., height, width)."""
    if planar.ndim > 2 and max(planar[0].size, out[0].size) > _VALUES_AT_A_TIME:
        for part, target in zip(planar, out, strict=True):
            resize(part, target)
        return
    *images, height, width = planar.shape
    new_height, new_width = out.shape[-2:]
    # Each axis is resized while it is the last but one, so that gathers move whole rows.
    columns = scratch.get("columns", (*images, width, height))
    columns[:] = planar.swapaxes(-1, -2)
    if width != new_width:
        resized = scratch.get("resized columns", (*images, new_width, height))
        _weighted_sum(columns, taps(width, new_width), resized)
        columns = resized
    if height == new_height:
        out[:] = columns.swapaxes(-1, -2)
        return
    rows = scratch.get("rows", (*images, height, new_width))
    rows[:] = columns.swapaxes(-1, -2)
    _weighted_sum(rows, taps(height, new_height), out)


def _weighted_sum(image: NDArray[numpy.float32], chosen: Taps, out: NDArray[numpy.float32]) -> None:
    first, weights = chosen
    # Every index is in range; mode="clip" spares numpy a check and a copy.
    numpy.take(image, first, axis=-2, mode="clip", out=out)
    out *= weights[0][:, None]
    term = scratch.get("term", out.shape)
    for number in range(1, len(weights)):
        numpy.take(image, first + number, axis=-2, mode="clip", out=term)
        term *= weights[number][:, None]
        out += term


def centre_box(source: tuple[int, int], target: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the largest box amid ``source`` with the aspect ratio of ``target``."""
    height = min(source[0], max(1, round(source[1] * target[0] / target[1])))
    width = min(source[1], max(1, round(source[0] * target[1] / target[0])))
    return (source[0] - height) // 2, (source[1] - width) // 2, height, width


def rotate(planar: NDArray[Any], degrees: NDArray[Any]) -> NDArray[numpy.float32]:
    """Images (count, channels, height, width), each turned counter-clockwise about its centre by its own angle.

    Bilinear; pixels that come from outside repeat the nearest one of the edge. The result is this thread's working
    memory, good until the next call. Height and width are at least 2.
    """
    count, channels, height, width = planar.shape
    source = scratch.get("unturned", planar.shape)
    source[:] = planar
    turned = scratch.get("turned", planar.shape)
    angle = numpy.deg2rad(degrees).astype(numpy.float32)[:, None, None]
    cosine, sine = numpy.cos(angle), numpy.sin(angle)
    y = numpy.arange(height, dtype=numpy.float32)[:, None] - numpy.float32((height - 1) / 2)
    x = numpy.arange(width, dtype=numpy.float32) - numpy.float32((width - 1) / 2)
    grid = (count, height, width)
    down, right = scratch.get("down", grid), scratch.get("right", grid)
    numpy.add(cosine * y + numpy.float32((height - 1) / 2), sine * x, out=down)
    numpy.add(cosine * x + numpy.float32((width - 1) / 2), -sine * y, out=right)
    numpy.clip(down, 0, height - 1, out=down)
    numpy.clip(right, 0, width - 1, out=right)
    corner, column = scratch.get("corner", grid, numpy.intp), scratch.get("column", grid, numpy.intp)
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
        above = _between(flat[start:], flat[start + 1 :], corner, right, "above")
        below = _between(flat[start + width :], flat[start + width + 1 :], corner, right, "below")
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
    result, difference = scratch.get(name, index.shape), scratch.get("difference", index.shape)
    numpy.take(near, index, mode="clip", out=result)
    numpy.take(far, index, mode="clip", out=difference)
    difference -= result
    difference *= share
    result += difference
    return result
