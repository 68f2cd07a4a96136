"""Batches: the same whatever prepares them, and threads that are gone when they should be."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time

import numpy
import pytest

from gpucnn.data import ArrayDataset, Augmentation, Loader, Preprocessing, TensorDataset, load
from gpucnn.errors import ArgumentError, DataError


@pytest.fixture(scope="module")
def digits():
    return load("digits").train


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("gpucnn-loader")]


def assert_threads_end() -> None:
    deadline = time.monotonic() + 10
    while loader_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loader_threads() == []


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert_threads_end()


class Watched(ArrayDataset):
    """Sixteen images; counts what is asked for, can be slow, and can fail at one image."""

    def __init__(self, fails_at: int | None = None, seconds: float = 0.0) -> None:
        super().__init__(numpy.arange(16, dtype=numpy.uint8).reshape(16, 1, 1), [0] * 16)
        self.fails_at, self.seconds, self.asked = fails_at, seconds, 0

    def images(self, indices):
        self.asked += 1
        time.sleep(self.seconds)
        if self.fails_at is not None and self.fails_at in numpy.asarray(indices):
            raise DataError("image 7 is damaged")
        return super().images(indices)


PLAIN = Preprocessing((1, 1), (0.0,), (1 / 255,))


def test_an_epoch_has_every_image_once(digits):
    loader = Loader(digits, 64, shuffle=True)
    assert len(loader) == 18
    batches = list(loader)
    assert len(batches) == 18
    indices = numpy.concatenate([batch.indices for batch in batches])
    assert sorted(indices.tolist()) == list(range(len(digits)))
    assert indices.tolist() != list(range(len(digits)))
    first = batches[0]
    assert first.images.shape == (64, 1, 8, 8)
    assert first.images.dtype == numpy.float32
    assert (first.labels == digits.labels[first.indices]).all()
    assert [len(batch.labels) for batch in batches[-2:]] == [64, len(digits) - 17 * 64]


def test_unshuffled_keeps_the_order_and_normalizes(digits):
    batches = list(Loader(digits, 100))
    assert numpy.concatenate([batch.indices for batch in batches]).tolist() == list(range(len(digits)))
    values = numpy.concatenate([batch.images for batch in batches]).astype(numpy.float64)
    assert abs(values.mean()) <= 1e-4
    assert abs(values.std() - 1) <= 1e-4


def test_drop_last(digits):
    loader = Loader(digits, 64, drop_last=True)
    assert len(loader) == 17
    assert {len(batch.labels) for batch in loader} == {64}


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (2, 1), (3, 2), (5, 8), (40, 4)])
def test_content_does_not_depend_on_the_workers(digits, workers, prefetch):
    augmentation = Augmentation(shift=1, rotation=10.0, brightness=0.2)
    options = {"augmentation": augmentation, "shuffle": True, "seed": 5}
    inline = Loader(digits, 100, workers=0, **options)
    threaded = Loader(digits, 100, workers=workers, prefetch=prefetch, **options)
    for epoch in (0, 3):
        for mine, theirs in zip(inline.epoch(epoch), threaded.epoch(epoch), strict=True):
            assert (mine.images == theirs.images).all()
            assert (mine.indices == theirs.indices).all()


def test_an_image_changes_in_the_same_way_wherever_it_comes(digits):
    options = {"augmentation": Augmentation(shift=1, rotation=10.0), "seed": 5, "workers": 0}
    shuffled = next(Loader(digits, 1200, shuffle=True, **options).epoch(1))
    in_order = next(Loader(digits, 1200, **options).epoch(1))
    assert (shuffled.images == in_order.images[shuffled.indices]).all()


def test_epochs_and_seeds_differ(digits):
    orders = {
        tuple(Loader(digits, 64, shuffle=True, seed=seed, workers=0).order(epoch).tolist())
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    }
    assert len(orders) == 6


def test_an_epoch_can_be_continued_in_the_middle(digits):
    loader = Loader(digits, 64, augmentation=Augmentation(shift=1), shuffle=True)
    whole = list(loader.epoch(2))
    rest = list(loader.epoch(2, start_batch=15))
    assert len(rest) == 3
    for mine, theirs in zip(rest, whole[15:], strict=True):
        assert (mine.images == theirs.images).all()
    assert list(loader.epoch(2, start_batch=18)) == []


def test_a_resized_input(digits):
    batch = next(iter(Loader(digits, 4, preprocessing=Preprocessing((16, 12), (0.3,), (0.3,)), workers=0)))
    assert batch.images.shape == (4, 1, 16, 12)


def test_preprocessed_data_pass_through():
    x = numpy.random.default_rng(0).normal(size=(10, 2, 3, 3)).astype(numpy.float32)
    targets = numpy.linspace(0, 1, 10, dtype=numpy.float32)
    batches = list(Loader(TensorDataset(x, targets), 4))
    assert (numpy.concatenate([batch.images for batch in batches]) == x).all()
    assert (numpy.concatenate([batch.labels for batch in batches]) == targets).all()


def test_preprocessed_data_take_no_augmentation():
    dataset = TensorDataset(numpy.zeros((2, 1, 2, 2)), [0, 1])
    for options in ({"augmentation": Augmentation(shift=1)}, {"preprocessing": PLAIN}):
        with pytest.raises(ArgumentError, match="already preprocessed"):
            Loader(dataset, 2, **options)


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_an_error_comes_at_its_place_and_ends_the_epoch(workers):
    loader = Loader(Watched(fails_at=7), 2, preprocessing=PLAIN, workers=workers)
    epoch = loader.epoch(0)
    assert [next(epoch).indices[0] for _ in range(3)] == [0, 2, 4]
    with pytest.raises(DataError, match="image 7 is damaged"):
        next(epoch)
    assert loader_threads() == []
    with pytest.raises(StopIteration):
        next(epoch)


def test_prefetch_runs_ahead_and_no_further():
    dataset = Watched()
    with Loader(dataset, 1, preprocessing=PLAIN, workers=2, prefetch=3).epoch(0) as epoch:
        deadline = time.monotonic() + 10
        while dataset.asked < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        assert dataset.asked == 3
        next(epoch)
        while dataset.asked < 4 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        assert dataset.asked == 4
    assert loader_threads() == []


def test_workers_prepare_batches_side_by_side():
    together = threading.Barrier(4, timeout=30)  # lets four through at once, or none

    class Waiting(Watched):
        def images(self, indices):
            together.wait()
            return super().images(indices)

    assert len(list(Loader(Waiting(), 1, preprocessing=PLAIN, workers=4, prefetch=4))) == 16


def test_close_ends_the_epoch():
    epoch = Loader(Watched(), 1, preprocessing=PLAIN).epoch(0)
    next(epoch)
    assert len(loader_threads()) == 2
    epoch.close()
    epoch.close()
    assert loader_threads() == []
    with pytest.raises(StopIteration):
        next(epoch)


def test_close_ends_an_inline_epoch():
    with Loader(Watched(), 1, preprocessing=PLAIN, workers=0).epoch(0) as epoch:
        next(epoch)
        assert loader_threads() == []
    assert list(epoch) == []


def test_leaving_the_loop_ends_the_threads():
    for _ in Loader(Watched(), 1, preprocessing=PLAIN):
        break
    gc.collect()
    assert_threads_end()


def test_threads_end_while_they_wait_for_room():
    epoch = Loader(Watched(), 1, preprocessing=PLAIN, prefetch=1).epoch(0)
    next(epoch)
    time.sleep(0.05)
    del epoch
    gc.collect()
    assert_threads_end()


def test_close_from_another_thread_ends_a_wait():
    entered, release = threading.Event(), threading.Event()

    class Stuck(Watched):
        def images(self, indices):
            entered.set()
            assert release.wait(30)
            return super().images(indices)

    epoch = Loader(Stuck(), 1, preprocessing=PLAIN, workers=1).epoch(0)
    ends = []

    def take():
        ends.append(next(epoch, "the end"))

    taker = threading.Thread(target=take, daemon=True)
    taker.start()
    assert entered.wait(30)
    closer = threading.Thread(target=epoch.close, daemon=True)
    closer.start()
    time.sleep(0.05)
    release.set()
    for thread in (closer, taker):
        thread.join(10)
        assert not thread.is_alive()
    assert ends == ["the end"]


def test_numpy_integers_are_taken():
    loader = Loader(
        Watched(), numpy.int64(3), preprocessing=PLAIN, workers=numpy.uint8(1), prefetch=numpy.int32(2)
    )
    assert len(list(loader)) == 6
    assert (type(loader.batch_size), type(loader.workers), type(loader.prefetch)) == (int, int, int)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_inputs_in_the_dtype_asked_for(dtype):
    tensors = TensorDataset(numpy.full((2, 1, 1, 1), 0.1), [0, 1])
    for loader in (
        Loader(tensors, 2, workers=0, dtype=dtype),
        Loader(Watched(), 2, preprocessing=PLAIN, workers=0, dtype=dtype),
    ):
        assert next(iter(loader)).images.dtype == dtype
    assert next(iter(Loader(tensors, 2, workers=0))).images[0, 0, 0, 0] == 0.1


def test_an_exhausted_epoch_has_no_threads():
    epoch = Loader(Watched(), 4, preprocessing=PLAIN).epoch(0)
    assert len(list(epoch)) == 4
    assert loader_threads() == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no os.kill with SIGINT")
def test_ctrl_c_ends_the_wait_and_the_threads():
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        epoch = Loader(Watched(seconds=1.0), 1, preprocessing=PLAIN).epoch(0)
        start = time.monotonic()
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            next(epoch)
        assert time.monotonic() - start <= 5
    finally:
        signal.signal(signal.SIGINT, previous)
    assert loader_threads() == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number, 1 or more, got 0"),
        ({"batch_size": 2.0}, "batch_size"),
        ({"batch_size": True}, "batch_size"),
        ({"batch_size": numpy.bool_(True)}, "batch_size"),
        ({"batch_size": numpy.float64(4)}, "batch_size"),
        ({"batch_size": 4, "dtype": "float16"}, "dtype must be 'float32', 'float64' or None, got 'float16'"),
        ({"batch_size": 4, "workers": -1}, "workers"),
        ({"batch_size": 4, "prefetch": 0}, "prefetch"),
        ({"batch_size": 17, "drop_last": True}, "17 with drop_last leaves nothing of the 16 images"),
    ],
)
def test_unfit_options_are_refused(options, words):
    with pytest.raises(ArgumentError, match=words):
        Loader(Watched(), **options)


def test_unfit_places_are_refused():
    loader = Loader(Watched(), 4, preprocessing=PLAIN)
    with pytest.raises(ArgumentError, match="start_batch must be from 0 to 4"):
        loader.epoch(0, start_batch=5)
    with pytest.raises(ArgumentError, match="epoch number"):
        loader.epoch(-1)
