"""Recycled memory: used again, but never while anybody holds a view of it."""

from __future__ import annotations

import gc

import numpy
import pytest

from gpucnn.data import ArrayDataset, Augmentation, Loader, Preprocessing
from gpucnn.data.recycling import Recycler


def address(array) -> int:
    return array.__array_interface__["data"][0]


def test_what_was_dropped_is_used_again():
    recycler = Recycler(2)
    first = recycler.empty((4, 5), numpy.float32)
    assert (first.shape, first.dtype, first.flags.c_contiguous) == ((4, 5), numpy.float32, True)
    assert first.flags.writeable
    assert type(first) is numpy.ndarray
    place = address(first)
    del first
    again = recycler.empty((10, 8), numpy.uint8)
    assert address(again) == place


@pytest.mark.parametrize(
    "view",
    [
        lambda array: array[1:],
        lambda array: array.T,
        lambda array: array.reshape(-1).view(numpy.uint8),
        memoryview,
        lambda array: array.astype("float32", copy=False)[..., ::-1].transpose(),
    ],
)
def test_a_view_keeps_the_memory(view):
    recycler = Recycler(2)
    array = recycler.empty((4, 5), numpy.float32)
    place, held = address(array), view(array)
    del array
    gc.collect()
    others = [recycler.empty((4, 5), numpy.float32) for _ in range(3)]
    assert place not in [address(other) for other in others]
    del held
    gc.collect()
    assert address(recycler.empty((4, 5), numpy.float32)) == place


def test_too_little_is_given_up_and_too_much_is_taken():
    recycler = Recycler(2)
    small = recycler.empty((3,), numpy.uint8)
    del small
    large = recycler.empty((1000,), numpy.uint8)
    place = address(large)
    del large
    part = recycler.empty((7,), numpy.uint8)
    assert (address(part), part.shape) == (place, (7,))
    del part
    whole = recycler.empty((1000,), numpy.uint8)
    assert address(whole) == place, "a smaller array gives back all that it stood in"
    assert recycler.empty((0, 3), numpy.float32).shape == (0, 3)


def test_no_more_lies_idle_than_is_kept():
    recycler = Recycler(2)
    arrays = [recycler.empty((64,), numpy.uint8) for _ in range(5)]
    del arrays
    assert len(recycler._idle) == 2


def test_batches_that_are_held_keep_their_values():
    images = numpy.random.default_rng(0).integers(0, 256, (24, 9, 8, 3), dtype=numpy.uint8)
    dataset = ArrayDataset(images, [0] * 24)
    preprocessing = Preprocessing((9, 8), (0.5,) * 3, (0.25,) * 3)
    loader = Loader(
        dataset, 4, preprocessing=preprocessing, augmentation=Augmentation(horizontal_flip=True), workers=2
    )
    held = list(loader.epoch(0))
    dropped = [address(batch.images) for _ in range(3) for batch in loader.epoch(0)]
    assert len(set(dropped)) < len(dropped)
    assert not set(dropped) & {address(batch.images) for batch in held}
    for batch in held:
        expected = preprocessing.apply(
            images[batch.indices], Augmentation(horizontal_flip=True), indices=batch.indices
        )
        assert (batch.images == expected).all()
