"""Batches on their way to a GPU, copied while the step before them is computed.

A thread of the loader copies a batch into page-locked memory, from where the GPU fetches it by itself, in one
copy, on a stream of its own; there the GPU also does what work is left to do on it. Three rules keep that right,
and each has an event that is waited for:

1. The copy and the work write memory that the compute stream may have used until a moment ago (the pool hands out
   what was freed, in the compute stream's order): the copy stream first waits for all that the compute stream was
   given.
2. The step reads the batch: the compute stream waits for the end of the batch's copy and work.
3. The page-locked buffer is filled again: the thread that does it waits for the copy out of it.

:class:`Memory` is all that it needs of a GPU; the tests put a recorder in its place.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy
from numpy.typing import NDArray

from gpucnn.device import Device, is_host_runtime, split_name, to_device
from gpucnn.errors import DeviceError

_ALIGNMENT = 256  # of each array in a buffer, as device memory has it
_PER_THREAD = 2  # cudaStreamPerThread, the handle that is another stream in every thread


class Part(NamedTuple):
    """Where an array lies among the bytes that are sent together."""

    place: int
    shape: tuple[int, ...]
    dtype: numpy.dtype[Any]

    def of(self, octets: Any) -> Any:
        """The array in ``octets``, bytes of the CPU or a device."""
        size = int(numpy.prod(self.shape, dtype=numpy.int64)) * self.dtype.itemsize
        return octets[self.place : self.place + size].view(self.dtype).reshape(self.shape)


class Work(NamedTuple):
    """What is to be done on the device with the arrays that were sent, into a new array of this form."""

    shape: tuple[int, ...]
    dtype: str
    run: Callable[[list[Any], Any], object]
    """Called with the arrays on the device and the new one; what it launches goes to the current stream."""


class Memory(Protocol):
    """What a transfer needs of a device."""

    def pinned(self, size: int) -> NDArray[numpy.uint8]:
        """``size`` bytes of page-locked memory."""

    def start(
        self, octets: NDArray[numpy.uint8], parts: list[Part], work: Work | None
    ) -> tuple[list[Any], Any, Any]:
        """The copy of the octets and the work under way; the arrays, and the events of the copy's and all's end.

        The arrays are those of the parts on the device, after the one that the work makes, where there is some.
        """

    def order_after(self, event: Any) -> None:
        """Have the current stream wait for the event."""

    def wait(self, event: Any) -> None:
        """Have this thread wait for the event."""


class InFlight(NamedTuple):
    """A batch under way: its arrays on the device, and the event of the end of its copy and work."""

    number: int
    arrays: list[Any]
    event: Any


class Transfer:
    """Copies arrays to a device through a few page-locked buffers that are used in turn.

    Args:
        memory: the device.
        buffers: how many buffers there are: as many threads can fill one at a time.
    """

    def __init__(self, memory: Memory, buffers: int) -> None:
        self._memory = memory
        self._free: collections.deque[_Buffer] = collections.deque(_Buffer() for _ in range(buffers))
        self._available = threading.Semaphore(buffers)
        self._pending: dict[int, InFlight] = {}
        self._started = 0
        self._lock = threading.Lock()

    def start(self, arrays: list[NDArray[Any]], work: Work | None = None) -> InFlight:
        """Begin to copy, and have ``work`` done; what comes back is handed to :meth:`arrive`. For any thread."""
        self._available.acquire()
        buffer = self._free.popleft()
        try:
            if buffer.copied is not None:
                self._memory.wait(buffer.copied)  # rule 3
                buffer.copied = None
            made, buffer.copied, buffer.end = self._memory.start(*self._fill(buffer, arrays), work)
        finally:
            self._free.append(buffer)
            self._available.release()
        with self._lock:
            # Kept until it arrives: memory that is freed may be handed out again while it is still written.
            self._started += 1
            in_flight = self._pending[self._started] = InFlight(self._started, made, buffer.end)
        return in_flight

    def _fill(self, buffer: _Buffer, arrays: list[NDArray[Any]]) -> tuple[NDArray[numpy.uint8], list[Part]]:
        parts, size = [], 0
        for array in arrays:
            parts.append(Part(size, array.shape, array.dtype))
            size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        if buffer.octets is None or len(buffer.octets) < size:
            buffer.octets = self._memory.pinned(max(size, 1))
        octets = buffer.octets[:size]
        for part, array in zip(parts, arrays, strict=True):
            part.of(octets)[...] = array
        return octets, parts

    def arrive(self, in_flight: InFlight) -> list[Any]:
        """The arrays on the device, after that of the work; the current stream finds them filled from now on."""
        self._memory.order_after(in_flight.event)  # rule 2
        with self._lock:
            self._pending.pop(in_flight.number, None)
        return in_flight.arrays

    def close(self) -> None:
        """Wait for every copy under way, so that all memory may go. May be called more than once."""
        with self._lock:
            pending, self._pending = list(self._pending.values()), {}
        for in_flight in pending:
            self._memory.wait(in_flight.event)
        for buffer in self._free:
            if buffer.end is not None:
                self._memory.wait(buffer.end)

    def __del__(self) -> None:
        self.close()


class _Buffer:
    def __init__(self) -> None:
        self.octets: NDArray[numpy.uint8] | None = None
        self.copied: Any = None  # events: the copy out of it, and the work on that
        self.end: Any = None


class CudaMemory:
    """A GPU through CuPy, with a copy stream beside the stream that is current where this is made.

    Raises DeviceError where that is CuPy's per-thread default stream: the loader's threads have other ones.
    """

    def __init__(self, cupy: Any, index: int) -> None:
        self._cupy, self._device = cupy, cupy.cuda.Device(index)
        with self._device:
            self._compute = cupy.cuda.get_current_stream()
            if self._compute.ptr == _PER_THREAD:
                raise DeviceError(
                    "the current stream is CuPy's per-thread default stream "
                    "(CUPY_CUDA_PER_THREAD_DEFAULT_STREAM=1), for which threads that load batches cannot wait; "
                    "unset the variable, or train inside 'with cupy.cuda.Stream():'"
                )
            self._stream = cupy.cuda.Stream(non_blocking=True)

    def pinned(self, size: int) -> NDArray[numpy.uint8]:
        """``size`` bytes of page-locked memory."""
        with self._device:
            return numpy.frombuffer(self._cupy.cuda.alloc_pinned_memory(size), numpy.uint8, size)

    def start(
        self, octets: NDArray[numpy.uint8], parts: list[Part], work: Work | None
    ) -> tuple[list[Any], Any, Any]:
        """The copy and the work under way on the copy stream; the arrays, and the events of their ends."""
        cupy = self._cupy
        with self._device:
            with self._compute:  # the memory is the compute stream's: in its order it is freed and handed out
                block = cupy.empty(octets.shape, octets.dtype)
                made = None if work is None else cupy.empty(work.shape, work.dtype)
                self._stream.wait_event(self._compute.record(self._event()))  # rule 1
            if octets.nbytes:
                block.set(octets, stream=self._stream)
            copied = self._stream.record(self._event())
            arrays = [part.of(block) for part in parts]
            if work is None:
                return arrays, copied, copied
            try:
                with self._stream:
                    work.run(arrays, made)
            except BaseException:
                self._stream.synchronize()  # the memory goes, and must not be written any more
                raise
            return [made, *arrays], copied, self._stream.record(self._event())

    def _event(self) -> Any:
        return self._cupy.cuda.Event(block=True, disable_timing=True)

    def order_after(self, event: Any) -> None:
        """Have the current stream wait for the event."""
        with self._device:
            self._cupy.cuda.get_current_stream().wait_event(event)

    def wait(self, event: Any) -> None:
        """Have this thread wait for the event."""
        event.synchronize()


class HostMemory:
    """The host runtime: a plain copy, finished when it returns."""

    def pinned(self, size: int) -> NDArray[numpy.uint8]:
        """``size`` bytes."""
        return numpy.empty(size, numpy.uint8)

    def start(
        self, octets: NDArray[numpy.uint8], parts: list[Part], work: Work | None
    ) -> tuple[list[Any], Any, Any]:
        """Copies in what stands for device memory, the work done; there is nothing to wait for."""
        arrays = [to_device(part.of(octets), "cuda") for part in parts]
        if work is None:
            return arrays, None, None
        made = to_device(numpy.empty(work.shape, work.dtype), "cuda")
        work.run(arrays, made)
        return [made, *arrays], None, None

    def order_after(self, event: Any) -> None:
        """Nothing: the copy is finished."""

    def wait(self, event: Any) -> None:
        """Nothing: the copy is finished."""


def make_transfer(device: str | Device, buffers: int) -> Transfer | None:
    """The way to ``device``; None for the CPU, where the batches are already.

    Raises DeviceError, with the reason, where the device cannot be used.
    """
    name, index = split_name(device)
    if name != "cuda":
        return None
    to_device(numpy.zeros(1, numpy.uint8), device)  # says what is wrong before any thread begins
    if is_host_runtime():
        return Transfer(HostMemory(), buffers)
    import cupy

    return Transfer(CudaMemory(cupy, index), buffers)
