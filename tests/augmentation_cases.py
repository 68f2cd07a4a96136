"""Pictures, and changes to them drawn by hypothesis: for the kernel's tests and the operation's."""

import numpy
from hypothesis import strategies as st

MEAN = (0.49, 0.1, 0.9, 0.0, 0.3, 0.5, 1.0, 0.2, 0.7)
STD = (0.25, 0.1, 1.5, 1.0, 0.3, 0.2, 0.5, 0.4, 0.6)


def size_of_terms(options, shape):
    """What the terms of a result (..., h, w) come to, for bounds of their rounding.

    1 / the smallest std; with colour the product of three factors up to 1.8 each; turned, a place that is as many
    pixels from the middle is off by so many roundings, and a value by as much of its neighbours' difference.
    """
    size = 1 / min(options["std"])
    size *= 6 if options.get("colour") is not None else 1
    return size * (max(shape[-2:]) if options.get("rotation") is not None else 1)


def pictures(shape, seed=0):
    return numpy.random.default_rng(seed).integers(0, 256, shape, numpy.uint8)


def tables(random, count, length, target, taps):
    """(first, weights) with weights that sum to 1, the last of them 0 where they lie outside."""
    first = random.integers(0, length, (count, target)).astype(numpy.int32)
    weights = random.uniform(0.1, 1, (count, taps, target))
    weights[(first[:, None] + numpy.arange(taps)[:, None]) >= length] = 0
    return first, (weights / weights.sum(axis=1, keepdims=True)).astype(numpy.float32)


def changes_of(random, names, count, height, width):
    """The arguments of augment_images called ``names`` for so many images of this size, anywhere and beyond."""
    h, w = height, width
    changes = {}
    for name, length in (("rows", height), ("columns", width)):
        if name in names:
            target = int(random.integers(2, 9))
            h, w = (target, w) if name == "rows" else (h, target)
            one_for_all = random.integers(0, 2) or count == 0
            changes[name] = tables(random, 1 if one_for_all else count, length, target, int(random.integers(1, 5)))
    if "flip" in names:
        changes["flip"] = random.integers(0, 2, count).astype(bool)
    if "rotation" in names and min(h, w) > 1:
        angles = random.uniform(-numpy.pi, numpy.pi, count)
        changes["rotation"] = numpy.stack([numpy.cos(angles), numpy.sin(angles)], 1).astype(numpy.float32)
    if "shift" in names:
        changes["shift"] = random.integers(-h - 1, h + 2, (count, 2)).astype(numpy.int32)
    if "colour" in names:
        changes["colour"] = random.uniform(0.2, 1.8, (count, 3))
    if "cutout" in names:
        changes["cutout"] = random.integers(-4, max(h, w) + 2, (count, 2)).astype(numpy.int32)
        changes["cutout_size"] = int(random.integers(0, 6))
    return changes


NAMES = ("rows", "columns", "flip", "rotation", "shift", "colour", "cutout")


@st.composite
def cases(draw, most_channels=9):
    """(images, {"mean", "std", ...changes})."""
    count, channels = draw(st.integers(0, 3)), draw(st.integers(1, most_channels))
    height, width = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    names = draw(st.sets(st.sampled_from(NAMES)))
    seed = draw(st.integers(0, 2**32 - 1))
    stored = draw(st.integers(1, 5)) if draw(st.booleans()) else None
    images = pictures((stored or count, height, width, channels), seed)
    options = {"mean": MEAN[:channels], "std": STD[:channels]}
    if stored:
        options["index"] = numpy.random.default_rng(seed).integers(0, stored, count)
    return images, options | changes_of(numpy.random.default_rng(seed), names, count, height, width)


def in_planes(images):
    """The same (N, H, W, C), with planes in memory."""
    return numpy.ascontiguousarray(images.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
