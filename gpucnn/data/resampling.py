"""From which pixels, and by which weights, an image is resized: the tables that ``augment_images`` takes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy
from numpy.typing import NDArray

Taps = tuple[NDArray[numpy.intp], NDArray[numpy.float32]]
Tables = tuple[NDArray[numpy.int32], NDArray[numpy.float32]]


@lru_cache(maxsize=1024)
def taps(source: int, target: int) -> Taps:
    """Which source pixels make up each target pixel along one axis, and how much each weighs.

    A triangle filter about the target pixel's centre; where the image shrinks the triangle widens with the scale,
    so that every source pixel counts (the anti-aliased bilinear filter that Pillow uses too).

    Returns (first source index (target,), weights (taps, target)); pixel first + k has weight k. Weights sum to 1.
    An axis that keeps its length has one tap, of weight 1.
    """
    scale = source / target
    support = max(scale, 1.0)
    centre = (numpy.arange(target) + 0.5) * scale
    count = 1 if source == target else min(source, int(numpy.ceil(2 * support)))
    first = numpy.clip(numpy.floor(centre - support + 0.5).astype(numpy.intp), 0, source - count)
    distance = numpy.abs(first + numpy.arange(count)[:, None] + 0.5 - centre) / support
    weights = numpy.maximum(0.0, 1.0 - distance)
    weights /= weights.sum(axis=0)
    result = first, weights.astype(numpy.float32)
    for array in result:
        array.setflags(write=False)  # shared by every thread
    return result


def tables(starts: Sequence[int], sources: Sequence[int], target: int) -> Tables:
    """The taps of several stretches of an axis, each from ``start`` on and ``source`` pixels long, to ``target``.

    Returns (first (count, target), weights (count, taps, target)), filled up with weights of 0 where some have
    more taps than others.
    """
    found = [taps(source, target) for source in sources]
    most = max((len(weights) for _, weights in found), default=1)
    first = numpy.empty((len(found), target), numpy.int32)
    weights = numpy.zeros((len(found), most, target), numpy.float32)
    for number, (start, (places, shares)) in enumerate(zip(starts, found, strict=True)):
        numpy.add(places, start, out=first[number], casting="unsafe")
        weights[number, : len(shares)] = shares
    return first, weights


def centre_box(source: tuple[int, int], target: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the largest box amid ``source`` with the aspect ratio of ``target``."""
    height = min(source[0], max(1, round(source[1] * target[0] / target[1])))
    width = min(source[1], max(1, round(source[0] * target[1] / target[0])))
    return (source[0] - height) // 2, (source[1] - width) // 2, height, width
