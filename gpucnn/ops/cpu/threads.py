"""Work spread over threads: a small pool, BLAS kept to one thread each, scratch memory that is used again.

NumPy releases the interpreter lock while it copies and multiplies, so a few Python threads keep all cores busy.
An operation cuts its work into tasks whose number and size depend on the problem alone, never on the number of
threads; each task writes its own part of the result, or a partial sum that is added in task order afterwards. So
results are the same bit for bit with one thread or many.

The number of threads is ``GPUCNN_NUM_THREADS`` where that is set, otherwise the cores this process may use.
"""

from __future__ import annotations

import math
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
from numpy.typing import DTypeLike, NDArray

from gpucnn.errors import ArgumentError

_KEPT_SCRATCH_BYTES = 32 << 20  # a larger buffer is given back to the system as soon as its task is done


def thread_count() -> int:
    """How many threads work on one operation.

    Raises ArgumentError where ``GPUCNN_NUM_THREADS`` is set to anything but a positive integer.
    """
    text = os.environ.get("GPUCNN_NUM_THREADS", "")
    if not text:
        return _available_cores()
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ArgumentError(f"GPUCNN_NUM_THREADS must be a positive integer, got {text!r}; unset it for all cores")
    return int(text)


def _available_cores() -> int:
    # Absent on macOS and Windows, where the machine's core count is all there is to know.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


# ---------------------------------------------------------------- one BLAS thread


class _BlasLimit:
    """Holds every BLAS library of the process at one thread while anyone is inside.

    threadpoolctl's own context manager asks each library for all its properties, 25 us a time; reading and setting
    the thread count alone takes 3. The count of those inside makes nesting and concurrent use safe: the first
    one in lowers the setting, the last one out restores it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._libraries: list[Any] | None = None
        self._saved: list[int] = []

    def __enter__(self) -> None:
        with self._lock:
            if self._libraries is None:
                self._libraries = _blas_libraries()
            if self._inside == 0:
                self._saved = [library.get_num_threads() for library in self._libraries]
                self._set([1] * len(self._saved))
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._set(self._saved)

    def _set(self, counts: list[int]) -> None:
        for library, count, saved in zip(self._libraries or (), counts, self._saved, strict=True):
            if saved != 1:
                library.set_num_threads(count)


def _blas_libraries() -> list[Any]:
    from threadpoolctl import ThreadpoolController

    return list(ThreadpoolController().select(user_api="blas").lib_controllers)


_blas_limit = _BlasLimit()


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """While inside, BLAS calls (matmul, dot) of this process use one thread each."""
    with _blas_limit:
        yield


# ---------------------------------------------------------------- the pool


class _Job:
    """Tasks 0 .. count - 1 of one call, taken one at a time by whichever thread is free."""

    def __init__(self, count: int, function: Callable[[int], None]) -> None:
        self._count = count
        self._function = function
        self._lock = threading.Lock()
        self._next = 0
        self._running = 0
        self._idle = threading.Condition(self._lock)
        self._errors: dict[int, BaseException] = {}

    def work(self) -> None:
        """Do tasks until none are left; an exception ends the job and is kept for :meth:`finish`."""
        while True:
            with self._lock:
                if self._next >= self._count:
                    return
                task = self._next
                self._next += 1
                self._running += 1
            try:
                with numpy.errstate(all="ignore"):  # a thread's own setting, so each makes it anew
                    self._function(task)
            except BaseException as error:
                with self._lock:
                    self._errors[task] = error
                    self._next = self._count
            finally:
                with self._idle:
                    self._running -= 1
                    if self._running == 0:
                        self._idle.notify_all()

    def finish(self) -> None:
        """Wait for the tasks that other threads still work on; raise the first task's exception."""
        with self._idle:
            while self._running:
                self._idle.wait()
        if self._errors:
            raise self._errors[min(self._errors)]


class _Pool:
    """Daemon threads that help with jobs; they start when first needed and wait on a queue otherwise."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._helpers = 0

    def run(self, job: _Job, helpers: int) -> None:
        with self._lock:
            while self._helpers < helpers:
                self._helpers += 1
                threading.Thread(target=self._help, name=f"gpucnn-{self._helpers}", daemon=True).start()
        for _ in range(helpers):
            self._jobs.put(job)
        job.work()
        job.finish()

    def _help(self) -> None:
        _local.inside = True
        while True:
            self._jobs.get().work()


_local = threading.local()
_pool = _Pool()


def _after_fork() -> None:
    # Threads do not survive a fork, and a lock may have been held by one of them: the child starts anew.
    global _pool, _blas_limit
    _pool, _blas_limit = _Pool(), _BlasLimit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def parallel_for(count: int, function: Callable[[int], None], *, small: bool = False) -> None:
    """Call ``function(0)`` .. ``function(count - 1)``, spread over the threads, with BLAS at one thread each.

    The calls must not depend on one another. ``small`` says that waking other threads (some 50 us) would cost more
    than it saves: all calls are then made here, in order. So they are inside another ``parallel_for``, which
    already uses every core. The first task's exception is raised, after the tasks already begun have ended.
    Infinities and NaNs are results like others here: no floating-point warnings.
    """
    with _blas_limit:
        workers = min(thread_count(), count)
        if small or workers <= 1 or getattr(_local, "inside", False):
            with numpy.errstate(all="ignore"):
                for task in range(count):
                    function(task)
            return
        _local.inside = True
        try:
            _pool.run(_Job(count, function), workers - 1)
        finally:
            _local.inside = False


# ---------------------------------------------------------------- scratch memory


def scratch(name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An uninitialized array of this thread's, which the next call with the same ``name`` overwrites.

    Memory fresh from the system costs a page fault every 4 KiB, more than the work on it: so buffers are kept, one
    a name and thread, up to 32 MiB each.
    """
    dtype = numpy.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    buffers: dict[str, NDArray[numpy.uint8]] = _local.__dict__.setdefault("buffers", {})
    buffer = buffers.get(name)
    if buffer is None or buffer.size < size:
        buffer = numpy.empty(size, numpy.uint8)
        if size <= _KEPT_SCRATCH_BYTES:
            buffers[name] = buffer
    return buffer[:size].view(dtype).reshape(shape)
