"""Recycled memory: used again, but never while anybody holds a view of it."""

from __future__ import annotations

import gc
import multiprocessing
import threading
from collections import OrderedDict
from typing import Any

import numpy
import pytest

from gpucnn.data import ArrayDataset, Augmentation, Loader, Preprocessing
from gpucnn.ops import cpu
from gpucnn.recycling import ALIGNMENT, SMALL, Recycler, memory

LARGE = (SMALL // 4 + 3,)
"""The shape of an array of float32 that is recycled."""


def address(array: Any) -> int:
    place: int = array.__array_interface__["data"][0]
    return place


def test_what_was_dropped_is_used_again() -> None:
    recycler = Recycler(1 << 24)
    first = recycler.empty((40, 5000), numpy.float32)
    assert (first.shape, first.dtype, first.flags.c_contiguous) == ((40, 5000), numpy.float32, True)
    assert type(first) is numpy.ndarray
    assert first.flags.writeable
    place = address(first)
    assert place % ALIGNMENT == 0
    assert recycler.idle_bytes == 0
    del first
    assert recycler.idle_bytes >= 800_000
    again = recycler.empty((99_990, 2), numpy.float32)  # nearly as large: one of eight sizes up to twice as much
    assert address(again) == place
    assert recycler.idle_bytes == 0
    other = recycler.empty((40, 5000), numpy.float32)
    assert address(other) != place
    assert other.nbytes == 800_000


@pytest.mark.parametrize(
    "view",
    [
        lambda array: array[1:],
        lambda array: array[::-1][3:9],
        lambda array: array.reshape(-1, 1).T,
        lambda array: array.view(numpy.uint8),
        memoryview,
        lambda array: array.astype("float32", copy=False)[..., ::-1].transpose(),
        lambda array: numpy.lib.stride_tricks.sliding_window_view(array, 3),
        lambda array: numpy.asarray(memoryview(array)[4:]),
        lambda array: array.base,
        iter,
    ],
)
def test_a_view_keeps_the_memory(view: Any) -> None:
    recycler = Recycler(1 << 24)
    array = recycler.empty(LARGE, numpy.float32)
    place, held = address(array), view(array)
    del array
    gc.collect()
    others = [recycler.empty(LARGE, numpy.float32) for _ in range(3)]
    assert place not in [address(other) for other in others]
    del held
    gc.collect()
    assert address(recycler.empty(LARGE, numpy.float32)) == place


def test_copies_have_memory_of_their_own() -> None:
    recycler = Recycler(1 << 24)
    array = recycler.empty(LARGE, numpy.float32)
    array.fill(3)
    copies = [array.copy(), numpy.array(array), array + 1]
    del array
    idle = recycler.idle_bytes
    del copies
    gc.collect()
    assert recycler.idle_bytes == idle


def test_small_arrays_are_numpys() -> None:
    recycler = Recycler(1 << 24)
    for shape in ((), (0, 3), (SMALL // 4 - 1,)):
        array = recycler.empty(shape, numpy.float32)
        assert array.shape == shape
        assert array.flags.owndata
    assert recycler.idle_bytes == 0


def test_no_more_lies_idle_than_is_kept() -> None:
    recycler = Recycler(5 * SMALL)
    arrays = [recycler.empty((SMALL,), numpy.uint8) for _ in range(4)] + [recycler.empty((3 * SMALL,), "u1")]
    places = [address(array) for array in arrays]
    while arrays:
        del arrays[0]
    # What was asked for longest went first: two of the small ones are left beside the large one.
    assert recycler.idle_bytes == 5 * SMALL
    found = [recycler.empty((SMALL,), "u1"), recycler.empty((SMALL,), "u1"), recycler.empty((3 * SMALL,), "u1")]
    assert {address(array) for array in found} <= set(places)
    assert recycler.idle_bytes == 0
    too_large = recycler.empty((6 * SMALL,), "u1")
    del too_large
    assert recycler.idle_bytes == 0


def test_idle_memory_is_given_up_where_there_is_none_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpucnn import recycling

    recycler = Recycler(1 << 24)
    del [recycler.empty(LARGE, "f4")][0]
    assert recycler.idle_bytes
    plain = recycling._aligned

    def exhausted(size: int) -> Any:
        if recycler.idle_bytes or size > 4 * SMALL:
            raise MemoryError
        return plain(size)

    monkeypatch.setattr(recycling, "_aligned", exhausted)
    assert recycler.empty((3 * SMALL,), "u1").nbytes == 3 * SMALL
    with pytest.raises(MemoryError):
        recycler.empty((9 * SMALL,), "u1")


def test_many_threads() -> None:
    recycler = Recycler(1 << 24)
    wrong = []

    def work(number: int) -> None:
        for turn in range(300):
            array = recycler.empty(LARGE, numpy.int64)
            array[:] = number * 1000 + turn
            if not (array[:: len(array) // 7] == number * 1000 + turn).all():
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    # Each thread holds an array while it asks for the next one.
    assert 0 < recycler.idle_bytes <= 5 * 2 * 9 * LARGE[0]


def test_memory_that_comes_back_in_the_middle_of_a_request() -> None:
    """As the garbage collector or a signal's handler brings it; here, a step of taking idle memory does."""
    large = SMALL * 8

    class Interrupted(OrderedDict[int, Any]):
        def move_to_end(self, size: int, last: bool = True) -> None:
            super().move_to_end(size, last)
            dropped.clear()  # as much as may lie idle: what was idle before must go, the piece just found as well

    recycler = Recycler(large)
    idle = recycler.empty((SMALL,), numpy.uint8)
    del idle
    assert recycler.idle_bytes == SMALL
    dropped = [recycler.empty((large,), numpy.uint8)]
    recycler._idle = Interrupted(recycler._idle)
    array = recycler.empty((SMALL,), numpy.uint8)
    array[...] = 1
    recycler._idle = OrderedDict(recycler._idle)
    del array
    assert recycler.idle_bytes == sum(size * len(pieces) for size, pieces in recycler._idle.items()) <= large


def test_cycles_give_back_when_they_are_collected() -> None:
    recycler = Recycler(1 << 24)
    cycle: list[Any] = [recycler.empty(LARGE, "f4")]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert recycler.idle_bytes


def _in_the_child(array: Any, queue: Any) -> None:
    queue.put(float(cpu.relu_forward(array).sum(dtype="f8")))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_the_parents_lock() -> None:
    array = numpy.ones(300_000, "f4")
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    taken, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        with memory._lock:
            taken.set()
            let_go.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait(60)
    child = context.Process(target=_in_the_child, args=(array, queue))
    child.start()
    child.join(60)
    let_go.set()
    holder.join()
    assert child.exitcode == 0
    assert queue.get() == 300_000


def test_operations_take_it_and_results_stay_what_they_are() -> None:
    x = numpy.random.default_rng(0).standard_normal((4, 30, 40, 40)).astype("f4")
    first = cpu.relu_forward(x)
    kept = first.copy()
    place = address(first)
    second = cpu.tanh_forward(x)
    assert address(second) != place
    numpy.testing.assert_array_equal(first, kept)
    del first
    assert address(cpu.sigmoid_forward(x)) == place


def test_batches_that_are_held_keep_their_values() -> None:
    images = numpy.random.default_rng(0).integers(0, 256, (24, 120, 100, 3), dtype=numpy.uint8)
    dataset = ArrayDataset(images, [0] * 24)
    preprocessing = Preprocessing((120, 100), (0.5,) * 3, (0.25,) * 3)
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
