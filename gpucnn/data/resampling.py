"""Changing the size of images and turning them, by bilinear interpolation of planar float32 arrays.

Only gathers and element-wise arithmetic: no BLAS, whose threads the training step needs, and whose sums depend on
how many there are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy
from numpy.typing import NDArray

Taps = tuple[NDArray[numpy.int64], NDArray[numpy.float32]]


@lru_cache(maxsize=1024)
def taps(source: int, target: int) -> Taps:
    """Which source pixels make up each target pixel along one axis, and how much each weighs.

    A triangle filter about the target pixel's centre; where the image shrinks the triangle widens with the scale, so
    every source pixel counts (the anti-aliased bilinear filter of Heckbert's "zoom", which Pillow uses too).

    Returns (first source index (target,), weights (taps, target)); pixel first + k has weight k. Weights sum to 1.
    """
    scale = source / target
    support = max(scale, 1.0)
    centre = (numpy.arange(target) + 0.5) * scale
    count = min(source, int(numpy.ceil(2 * support)))
    first = numpy.clip(numpy.floor(centre - support + 0.5).astype(numpy.int64), 0, source - count)
    distance = numpy.abs(first + numpy.arange(count)[:, None] + 0.5 - centre) / support
    weights = numpy.maximum(0.0, 1.0 - distance)
    weights /= weights.sum(axis=0)
    result = first, weights.astype(numpy.float32)
    for array in result:
        array.setflags(write=False)  # shared by every thread
    return result


def resize(planar: NDArray[Any], size: tuple[int, int]) -> NDArray[numpy.float32]:
    """``planar`` (..., height, width) resized to ``size`` (height, width), as float32."""
    image = planar.astype(numpy.float32, copy=False)
    if image.shape[-2] != size[0]:
        first, weights = taps(image.shape[-2], size[0])
        image = _weighted_sum(image, first, weights[:, :, None], axis=-2)
    if image.shape[-1] != size[1]:
        first, weights = taps(image.shape[-1], size[1])
        image = _weighted_sum(image, first, weights, axis=-1)
    return image


def _weighted_sum(
    image: NDArray[numpy.float32], first: NDArray[numpy.int64], weights: NDArray[numpy.float32], axis: int
) -> NDArray[numpy.float32]:
    # Every index is in range; mode="clip" spares numpy the check, which doubles the time of a gather.
    total = numpy.take(image, first, axis=axis, mode="clip")
    total *= weights[0]
    for number in range(1, len(weights)):
        term = numpy.take(image, first + number, axis=axis, mode="clip")
        term *= weights[number]
        total += term
    return total


def centre_box(source: tuple[int, int], target: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the largest box in the middle of ``source`` with the aspect ratio of ``target``."""
    height = min(source[0], max(1, round(source[1] * target[0] / target[1])))
    width = min(source[1], max(1, round(source[0] * target[1] / target[0])))
    return (source[0] - height) // 2, (source[1] - width) // 2, height, width


def rotate(planar: NDArray[Any], degrees: NDArray[Any]) -> NDArray[numpy.float32]:
    """Images (count, channels, height, width), each turned counter-clockwise about its centre by its own angle.

    Bilinear; pixels that come from outside repeat the nearest one of the edge.
    """
    count, channels, height, width = planar.shape
    angle = numpy.deg2rad(degrees).astype(numpy.float32)[:, None, None]
    cosine, sine = numpy.cos(angle), numpy.sin(angle)
    y = numpy.arange(height, dtype=numpy.float32)[:, None] - (height - 1) / 2
    x = numpy.arange(width, dtype=numpy.float32) - (width - 1) / 2
    source_y = numpy.clip(cosine * y + sine * x + (height - 1) / 2, 0, height - 1)
    source_x = numpy.clip(cosine * x - sine * y + (width - 1) / 2, 0, width - 1)
    top, left = source_y.astype(numpy.int32), source_x.astype(numpy.int32)
    down, right = (source_y - top)[:, None], (source_x - left)[:, None]
    image = numpy.arange(count * channels, dtype=numpy.int32).reshape(count, channels, 1, 1) * (height * width)
    corner = image + (top * width + left)[:, None]
    step_down = numpy.where(top < height - 1, width, 0).astype(numpy.int32)[:, None]
    step_right = (left < width - 1).astype(numpy.int32)[:, None]
    flat = planar.astype(numpy.float32, copy=False).reshape(-1)

    def row(start: NDArray[numpy.int32]) -> Any:
        near = numpy.take(flat, start, mode="clip")
        far = numpy.take(flat, start + step_right, mode="clip")
        far -= near
        far *= right
        far += near
        return far

    above, below = row(corner), row(corner + step_down)
    below -= above
    below *= down
    below += above
    return below  # type: ignore[no-any-return]  # numpy.take of float32 is float32
