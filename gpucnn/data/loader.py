"""Batches for the model, prepared by background threads a few ahead of the step that uses them."""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray

from gpucnn.data.dataset import Dataset
from gpucnn.data.device_preprocessing import to_pick, to_send
from gpucnn.data.resident import Resident, resident
from gpucnn.data.transfer import Transfer, make_transfer
from gpucnn.data.transforms import Augmentation, Preprocessing
from gpucnn.device import Device
from gpucnn.errors import ArgumentError
from gpucnn.random import permutation

_SHUFFLE_STREAM = 1 << 32  # the epoch is added; augmentation owns 2 << 32 and splitting 3 << 32
_WAKE_SECONDS = 0.5  # how long a wait lasts before it looks around: Windows delivers Ctrl-C only between waits


class Batch(NamedTuple):
    """Model inputs, floats (count, channels, height, width); their labels; their numbers in the data set.

    Images and labels are on the loader's device, the numbers are on the CPU.
    """

    images: Any
    labels: Any
    indices: NDArray[numpy.int64]


class Loader:
    """The batches of a data set, an epoch at a time.

    Args:
        dataset: where images and labels come from.
        batch_size: images a batch; the last one of an epoch may be smaller.
        preprocessing: how images become inputs; by default normalized by the data set's own statistics. A
            preprocessed data set takes none.
        augmentation: random changes to the images; None for evaluation.
        shuffle: a new random order each epoch; False keeps the data set's order.
        seed: decides the orders and what is random about each image.
        drop_last: leave out a last batch that is smaller than ``batch_size``.
        workers: background threads; 0 prepares each batch when it is asked for.
        prefetch: how many batches may be ready or under way ahead of the one in use.
        dtype: "float32" or "float64": what to convert inputs to; None leaves them as they come.
        device: where batches go: "cpu", "cuda" or "cuda:1". To a GPU images travel as bytes, with what is drawn
            for each, and are augmented and normalized there; with workers while it computes on the ones before.
        keep_on_device: whether a data set in memory is copied to the GPU once, where it takes no more than an
            eighth of the free memory; then only the images' numbers travel. Its array must not change meanwhile.

    The order and every value depend on ``seed``, the epoch and the image's number alone, not on ``workers``,
    ``prefetch`` or where the epoch was started. Raises ArgumentError for sizes out of range.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        preprocessing: Preprocessing | None = None,
        augmentation: Augmentation | None = None,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        workers: int = 2,
        prefetch: int = 4,
        dtype: str | None = None,
        device: str | Device = "cpu",
        keep_on_device: bool = True,
    ) -> None:
        batch_size = whole_number("batch_size", batch_size, 1)
        workers, prefetch = whole_number("workers", workers, 0), whole_number("prefetch", prefetch, 1)
        if dtype not in (None, "float32", "float64"):
            raise ArgumentError(f"dtype must be 'float32', 'float64' or None, got {dtype!r}")
        if drop_last and batch_size > len(dataset):
            raise ArgumentError(
                f"batch_size {batch_size} with drop_last leaves nothing of the {len(dataset)} images of "
                f"'{dataset.name}'; use a smaller batch_size"
            )
        if dataset.preprocessed and (preprocessing is not None or augmentation):
            raise ArgumentError(
                f"'{dataset.name}' holds inputs that are already preprocessed; it takes no preprocessing and no "
                "augmentation (ArrayDataset, with uint8 images, takes both)"
            )
        if preprocessing is None and not dataset.preprocessed:
            preprocessing = Preprocessing.for_dataset(dataset)
        self.dataset, self.batch_size = dataset, batch_size
        self.preprocessing, self.augmentation = preprocessing, augmentation
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.workers, self.prefetch, self.dtype, self.device = workers, prefetch, dtype, device
        self.keep_on_device = keep_on_device

    def __len__(self) -> int:
        whole, rest = divmod(len(self.dataset), self.batch_size)
        return whole + bool(rest and not self.drop_last)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def order(self, number: int) -> NDArray[numpy.int64]:
        """The images' numbers in the order in which epoch ``number`` takes them."""
        if not self.shuffle:
            return numpy.arange(len(self.dataset))
        return permutation(self.seed, _SHUFFLE_STREAM | number, len(self.dataset))

    def epoch(self, number: int, start_batch: int = 0) -> EpochIterator:
        """The batches of epoch ``number`` from ``start_batch`` on.

        The iterator's threads end when it is exhausted, closed (``close`` or the end of a ``with`` block) or
        dropped, or has raised what preparing a batch raised. Raises ArgumentError for numbers out of range,
        DeviceError, with the reason, where the loader's device cannot be used.
        """
        if not 0 <= number < 1 << 32:
            raise ArgumentError(f"epoch number must be from 0 to 2**32 - 1, got {number}")
        if not 0 <= start_batch <= len(self):
            raise ArgumentError(
                f"start_batch must be from 0 to {len(self)}, the batches of an epoch, got {start_batch}"
            )
        order = self.order(number)
        transfer = make_transfer(self.device, max(self.workers, 1))
        there = None
        if transfer is not None and self.preprocessing is not None and self.keep_on_device:
            there = resident(self.dataset, self.device)

        def prepare(batch: int) -> Batch:
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            if transfer is None:
                return self._prepared(number, indices)
            return self._sent(transfer, there, number, indices)

        return EpochIterator(prepare, start_batch, len(self), self.workers, self.prefetch, transfer)

    def _prepared(self, epoch: int, indices: NDArray[numpy.int64]) -> Batch:
        """The batch of these images on the CPU."""
        images = self.dataset.images(indices)
        if self.preprocessing is not None:
            images = self.preprocessing.apply(
                images, self.augmentation, seed=self.seed, epoch=epoch, indices=indices
            )
        if self.dtype is not None:
            images = images.astype(self.dtype, copy=False)
        return Batch(images, self.dataset.labels[indices], indices)

    def _sent(
        self, transfer: Transfer, there: Resident | None, epoch: int, indices: NDArray[numpy.int64]
    ) -> Batch:
        """The batch on its way to the device; until it arrives, what the transfer gave stands for the images."""
        if self.preprocessing is None:
            images, labels, _ = self._prepared(epoch, indices)
            return Batch(transfer.start([images, labels]), None, indices)
        images = self.dataset.images(indices) if there is None else there.form_of(len(indices))
        changes = self.preprocessing.changes(
            images, self.augmentation, seed=self.seed, epoch=epoch, indices=indices
        )
        dtype = self.dtype or self.preprocessing.dtype
        if there is None:
            arrays, work = to_send(images, self.preprocessing, changes, dtype)
        else:
            arrays, work = to_pick(there, indices, self.preprocessing, changes, dtype)
        return Batch(transfer.start([*arrays, self.dataset.labels[indices]], work), None, indices)


def whole_number(name: str, value: Any, least: int) -> int:
    """``value``, which may be NumPy's integer, as Python's. Raises ArgumentError for anything else."""
    is_count = hasattr(value, "__index__") and not isinstance(value, (bool, numpy.bool_))
    if not is_count or value < least:
        raise ArgumentError(f"{name} must be a whole number, {least} or more, got {value!r}")
    return operator.index(value)


class EpochIterator(Iterator[Batch]):
    """The batches ``start`` .. ``stop`` - 1 of one epoch, in order. Made by :meth:`Loader.epoch`.

    ``prepare`` makes a batch by its number; with a ``transfer``, one whose images are what its ``start`` gave: the
    first and the last of the arrays that arrive are then the images and the labels.
    """

    def __init__(
        self,
        prepare: Callable[[int], Batch],
        start: int,
        stop: int,
        workers: int,
        prefetch: int,
        transfer: Transfer | None = None,
    ) -> None:
        self._transfer = transfer
        self._queue = _Queue(prepare, start, stop, prefetch)
        # The threads know the queue but not this object: when it is dropped, the finalizer tells them to end.
        self._threads = [
            threading.Thread(target=self._queue.work, name=f"gpucnn-loader-{number}", daemon=True)
            for number in range(min(workers, stop - start))
        ]
        self._finalizer = weakref.finalize(self, self._queue.stop)
        for thread in self._threads:
            thread.start()

    def __next__(self) -> Batch:
        try:
            found = self._queue.get(inline=not self._threads)
            if self._transfer is None:
                return found
            images, *_, labels = self._transfer.arrive(found.images)
            return Batch(images, labels, found.indices)
        except BaseException:  # the end, an error in a worker, or Ctrl-C: in each case it is over
            self.close()
            raise

    def close(self) -> None:
        """End the threads and forget prepared batches; further ``next`` calls raise StopIteration."""
        self._finalizer()
        for thread in self._threads:
            thread.join()
        if self._transfer is not None:
            self._transfer.close()

    def __enter__(self) -> EpochIterator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Queue:
    """Batch numbers handed out in order, results handed over in order, never more than ``prefetch`` ahead.

    Waking a thread takes the one that wakes it some 20 us, as long as a small batch: so a thread is woken one at a
    time, for room of half of ``prefetch``, and the one that asks only when its own batch is there.
    """

    def __init__(self, prepare: Callable[[int], Batch], start: int, stop: int, prefetch: int) -> None:
        self._prepare, self._end, self._prefetch = prepare, stop, prefetch
        self._to_prepare = self._to_hand_over = start
        self._ready: dict[int, Batch | BaseException] = {}
        self._stopped = False
        # One lock, and reentrant: the garbage collector may call stop() in a thread that holds it.
        lock = threading.RLock()
        self._arrived, self._room = threading.Condition(lock), threading.Condition(lock)

    def get(self, inline: bool) -> Batch:
        number = self._to_hand_over
        if self._stopped or number >= self._end:
            raise StopIteration
        if inline:
            result: Batch | BaseException = self._prepare(number)
        else:
            with self._arrived:
                while number not in self._ready:
                    if self._stopped:  # closed by another thread: nobody prepares it any more
                        raise StopIteration
                    self._arrived.wait(_WAKE_SECONDS)
                result = self._ready.pop(number)
        with self._room:
            self._to_hand_over = number + 1
            if self._free_places() >= self._prefetch // 2:
                self._room.notify()
        if not isinstance(result, BaseException):
            return result
        try:
            raise result
        finally:
            del result  # the error's traceback holds this frame; the frame must not hold the error

    def work(self) -> None:
        while (number := self._next_number()) is not None:
            try:
                result: Batch | BaseException = self._prepare(number)
            except BaseException as error:  # handed over to whoever asks for this batch
                result = error
            with self._arrived:
                if not self._stopped:
                    self._ready[number] = result
                if number == self._to_hand_over:
                    self._arrived.notify_all()
            del result  # a batch may be large, and the next one can be long in coming

    def _next_number(self) -> int | None:
        with self._room:
            while not self._stopped and self._to_prepare < self._end:
                if self._free_places():
                    self._to_prepare += 1
                    return self._to_prepare - 1
                self._room.wait(_WAKE_SECONDS)
            self._room.notify_all()  # the others need not wait to see that nothing is left
            return None

    def _free_places(self) -> int:
        """How many more batches may be begun."""
        return self._to_hand_over + self._prefetch - self._to_prepare

    def stop(self) -> None:
        with self._room:
            self._stopped = True
            self._ready.clear()
            self._room.notify_all()
            self._arrived.notify_all()
