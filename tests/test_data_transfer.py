"""Copies to a GPU beside its computing, on a simulated GPU whose streams run as late and as unevenly as they may.

The simulation is CuPy's interface as far as the transfer uses it. What is given to a stream happens some time
later, in that stream's order; memory goes back to the pool when the Python object goes, whatever the streams have
still to do with it; and a copy reads page-locked memory when it happens, not when it is asked for. Leaving out any
of the three rules of :mod:`gpucnn.data.transfer` then gives wrong numbers, which is tested too.
"""

from __future__ import annotations

import contextlib
import gc
import math
import random
import threading

import numpy
import pytest

from gpucnn.data import ArrayDataset, Augmentation, Loader, Preprocessing
from gpucnn.data import device_preprocessing as device_module
from gpucnn.data import loader as loader_module
from gpucnn.data.transfer import CudaMemory, HostMemory, Transfer, Work
from gpucnn.errors import DataError, DeviceError
from gpucnn.ops import cpu


class Simulation:
    """Streams, each a queue of things to do; :meth:`advance` does one of them, of a stream chosen by chance."""

    def __init__(self, seed: int) -> None:
        self.random, self.lock = random.Random(seed), threading.RLock()
        self.streams: list[Stream] = []
        self.copy_is_preferred = seed % 2 == 0

    def advance(self) -> bool:
        with self.lock:
            able = [stream for stream in self.streams if stream.queue and not stream.blocked()]
            if not able:
                return False
            preferred = [stream for stream in able if stream.copies == self.copy_is_preferred]
            chosen = preferred if preferred and self.random.random() < 0.8 else able
            action = self.random.choice(chosen).queue.pop(0)
            action()
            return True

    def drain(self) -> None:
        while self.advance():
            pass
        assert all(not stream.queue for stream in self.streams), "streams wait for each other"


class Event:
    def __init__(self, simulation: Simulation) -> None:
        self.simulation, self.done = simulation, False

    def synchronize(self) -> None:
        while not self.done:
            assert self.simulation.advance(), "an event that never comes"


class Stream:
    ptr = 77

    def __init__(self, gpu: Gpu, copies: bool) -> None:
        self.gpu, self.copies = gpu, copies
        self.queue: list = []
        gpu.simulation.streams.append(self)

    def blocked(self) -> bool:
        waits_for = getattr(self.queue[0], "event", None)
        return waits_for is not None and not waits_for.done

    def give(self, action) -> None:
        with self.gpu.simulation.lock:
            self.queue.append(action)

    def wait_event(self, event: Event) -> None:
        def wait() -> None:
            assert event.done

        wait.event = event
        self.give(wait)

    def record(self, event: Event) -> Event:
        self.give(lambda: setattr(event, "done", True))
        return event

    def synchronize(self) -> None:
        self.record(event := Event(self.gpu.simulation))
        event.synchronize()

    def __enter__(self) -> None:
        self.gpu.current().append(self)

    def __exit__(self, *_) -> None:
        self.gpu.current().pop()


class DeviceArray:
    """An array on the simulated GPU; what runs later knows its block of memory, not this object."""

    def __init__(self, gpu: Gpu, shape, dtype) -> None:
        self.gpu, self.shape, self.dtype = gpu, tuple(shape), numpy.dtype(dtype)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize
        self.pool = gpu.pool(gpu.current()[-1], self.nbytes)
        with gpu.simulation.lock:
            self.block = self.pool.pop() if self.pool else numpy.full(self.nbytes, 0xFF, numpy.uint8)

    def set(self, source, stream) -> None:
        assert source.shape == self.shape
        assert source.dtype == self.dtype
        assert source.base is not None, "not page-locked: the copy would not run by itself"
        block, octets = self.block, source.reshape(-1).view(numpy.uint8)
        stream.give(lambda: numpy.copyto(block, octets))

    def values(self):
        return self.block.view(self.dtype).reshape(self.shape)

    def __getitem__(self, part: slice) -> View:
        return View(self, self.values()[part])

    def __del__(self) -> None:
        with self.gpu.simulation.lock:
            self.pool.append(self.block)


class View:
    """A part of an array, whose memory it keeps."""

    def __init__(self, base: DeviceArray, part) -> None:
        self.base, self.part = base, part

    def values(self):
        return self.part

    def view(self, dtype) -> View:
        return View(self.base, self.part.view(dtype))

    def reshape(self, shape) -> View:
        return View(self.base, self.part.reshape(shape))

    def transpose(self, *axes) -> View:
        return View(self.base, self.part.transpose(axes))


class Operations:
    """Operations on the simulated GPU, done when the stream that is current comes to them."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def augment_images(self, images, *, out, **options) -> None:
        def memory(value):  # what runs later does not hold the arrays
            if isinstance(value, tuple):
                return tuple(map(memory, value))
            return value.values() if isinstance(value, (DeviceArray, View)) else value

        pixels, target = memory(images), memory(out)
        options = {name: memory(value) for name, value in options.items()}
        self.gpu.current()[-1].give(lambda: cpu.augment_images(pixels, out=target, **options))


class Gpu:
    """What stands for the module ``cupy``, with itself as ``cupy.cuda``."""

    def __init__(self, seed: int) -> None:
        self.simulation = Simulation(seed)
        self.cuda = self
        self.compute = Stream(self, copies=False)
        self.pools: dict = {}
        self.threads = threading.local()
        self.pinned_bytes: list[int] = []

    def current(self) -> list[Stream]:
        if not hasattr(self.threads, "streams"):
            self.threads.streams = [self.compute]
        return self.threads.streams

    def pool(self, stream: Stream, size: int) -> list:
        return self.pools.setdefault((id(stream), size), [])

    def Device(self, index: int):
        return contextlib.nullcontext()

    def Stream(self, non_blocking: bool) -> Stream:
        assert non_blocking, "a blocking stream waits for all that the default stream does"
        return Stream(self, copies=True)

    def Event(self, block: bool, disable_timing: bool) -> Event:
        return Event(self.simulation)

    def get_current_stream(self) -> Stream:
        return self.current()[-1]

    def alloc_pinned_memory(self, size: int) -> bytearray:
        self.pinned_bytes.append(size)
        return bytearray(size)

    def empty(self, shape, dtype) -> DeviceArray:
        return DeviceArray(self, shape, dtype)


IMAGES = numpy.random.default_rng(7).integers(0, 256, (90, 3, 3)).astype(numpy.uint8)
DATA = ArrayDataset(IMAGES, numpy.arange(90) % 5)
PREPROCESSING = Preprocessing((3, 3), (0.5,), (0.25,))
AUGMENTATION = Augmentation(shift=2, horizontal_flip=True)


def loader_to(gpu: Gpu, monkeypatch, data=DATA, **options) -> Loader:
    monkeypatch.setattr(
        loader_module, "make_transfer", lambda device, buffers: Transfer(CudaMemory(gpu, 0), buffers)
    )
    monkeypatch.setattr(device_module, "backend_of", lambda array: Operations(gpu))
    return Loader(
        data,
        5,
        preprocessing=PREPROCESSING,
        augmentation=AUGMENTATION,
        device="cuda",
        keep_on_device=False,
        **options,
    )


def train_on(gpu: Gpu, monkeypatch, workers: int) -> bool:
    """Whether each of 18 steps saw its batch, though everything on the GPU happened later."""
    loader = loader_to(gpu, monkeypatch, shuffle=True, workers=workers, prefetch=3)
    seen: list = []

    def step(batch) -> None:
        blocks = batch.images.values(), batch.labels.values()
        # Activations, as large as the images and as what was sent.
        temporary = gpu.empty(batch.images.shape, batch.images.dtype), gpu.empty(batch.labels.base.shape, "uint8")
        places = [array.values() for array in temporary]
        gpu.compute.give(lambda: seen.append([block.copy() for block in blocks]))
        gpu.compute.give(lambda: [place.fill(77) for place in places])

    with loader.epoch(0) as batches:
        for batch in batches:
            step(batch)
            del batch
            for _ in range(gpu.simulation.random.randrange(4)):
                gpu.simulation.advance()
    gpu.simulation.drain()
    monkeypatch.undo()
    plain = Loader(DATA, 5, preprocessing=PREPROCESSING, augmentation=AUGMENTATION, shuffle=True, workers=0)
    return len(seen) == len(plain) and all(
        numpy.array_equal(images, batch.images) and numpy.array_equal(labels, batch.labels)
        for (images, labels), batch in zip(seen, plain, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_step_sees_its_batch_however_late_the_gpu_is(monkeypatch, workers):
    for seed in range(30):
        gpu = Gpu(seed)
        assert train_on(gpu, monkeypatch, workers)
        assert len(gpu.pinned_bytes) <= max(workers, 1), "a bounded number of buffers, used again"


def without_waiting_for_the_compute_stream(monkeypatch):
    plain = Stream.wait_event
    monkeypatch.setattr(Stream, "wait_event", lambda self, event: None if self.copies else plain(self, event))


def without_waiting_for_the_copy(monkeypatch):
    monkeypatch.setattr(CudaMemory, "order_after", lambda self, event: None)


def without_waiting_for_the_buffer(monkeypatch):
    monkeypatch.setattr(CudaMemory, "wait", lambda self, event: None)


def with_the_work_on_another_stream(monkeypatch):
    plain = Stream.__enter__
    monkeypatch.setattr(Stream, "__enter__", lambda self: plain(self.gpu.compute if self.copies else self))


@pytest.mark.parametrize(
    "fault",
    [
        without_waiting_for_the_compute_stream,
        without_waiting_for_the_copy,
        without_waiting_for_the_buffer,
        with_the_work_on_another_stream,
    ],
)
def test_each_rule_is_needed(fault):
    outcomes = []
    for seed in range(30):
        with pytest.MonkeyPatch.context() as outer, pytest.MonkeyPatch.context() as inner:
            fault(outer)
            outcomes.append(train_on(Gpu(seed), inner, 1))
    assert False in outcomes


@pytest.mark.parametrize("closed", [True, False])
def test_no_copy_is_under_way_once_an_epoch_is_left(monkeypatch, closed):
    gpu = Gpu(1)
    loader = loader_to(gpu, monkeypatch, workers=2, prefetch=4)
    batches = loader.epoch(0)
    next(batches)
    threads = batches._threads
    if closed:
        batches.close()
        with pytest.raises(StopIteration):
            next(batches)
    del batches
    for thread in threads:
        thread.join(10)
    gc.collect()
    copies = next(stream for stream in gpu.simulation.streams if stream.copies)
    assert not copies.queue


def test_a_stream_that_other_threads_do_not_have():
    gpu = Gpu(0)
    gpu.compute.ptr = 2
    with pytest.raises(DeviceError, match=r"PER_THREAD_DEFAULT_STREAM=1.*unset the variable, or train inside"):
        CudaMemory(gpu, 0)


def test_what_fails_in_a_worker_arrives(monkeypatch):
    class Damaged(ArrayDataset):
        def images(self, indices):
            if 12 in indices:
                raise DataError("image 12 is damaged")
            return super().images(indices)

    gpu = Gpu(0)
    loader = loader_to(gpu, monkeypatch, Damaged(IMAGES, numpy.zeros(90, int)))
    with pytest.raises(DataError, match="image 12"), loader.epoch(0) as batches:
        list(batches)


def test_work_that_fails_leaves_no_copy_under_way_and_its_buffer_free():
    gpu = Gpu(0)
    transfer = Transfer(CudaMemory(gpu, 0), 1)

    def fail(sent, made) -> None:
        raise DeviceError("does not compile")

    for _ in range(2):
        with pytest.raises(DeviceError, match="does not compile"):
            transfer.start([numpy.arange(9)], Work((3,), "float32", fail))
        assert not any(stream.queue for stream in gpu.simulation.streams if stream.copies)
    transfer.close()


def test_images_travel_as_bytes(monkeypatch):
    gpu = Gpu(0)
    with loader_to(gpu, monkeypatch, workers=0).epoch(0) as batches:
        batch = next(batches)
    gpu.simulation.drain()
    # 45 bytes of images, 5 of flips, 40 of shifts and 40 of labels, each from a multiple of 256 on.
    assert batch.labels.base.nbytes == 4 * 256
    assert batch.images.dtype == numpy.float32


def test_a_batch_may_be_empty_or_grow_and_dtypes_keep_their_alignment():
    gpu = Gpu(0)
    transfer = Transfer(CudaMemory(gpu, 0), 1)
    for sizes in ((3, 1), (0, 0), (700, 9), (2, 5)):
        sources = [numpy.arange(sizes[0], dtype=numpy.uint8), numpy.arange(sizes[1], dtype=numpy.float64)]
        arrays = transfer.arrive(transfer.start(sources))
        gpu.simulation.drain()
        assert all(numpy.array_equal(a.values(), s) for a, s in zip(arrays, sources, strict=True))
    assert len(gpu.pinned_bytes) == 2, "allocated once, and again when it had to grow"
    transfer.close()
    transfer.close()


def test_the_host_runtimes_memory_is_a_plain_copy(monkeypatch):
    monkeypatch.setenv("GPUCNN_KERNELS_RUNTIME", "host")
    transfer = Transfer(HostMemory(), 2)
    source = numpy.arange(5.0)
    (copied,) = transfer.arrive(transfer.start([source]))
    source[0] = 9
    transfer.start([source])
    assert copied.get().tolist() == [0, 1, 2, 3, 4]
    transfer.close()
