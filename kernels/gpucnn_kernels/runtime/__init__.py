"""Where kernels run: CUDA through CuPy, or the host runtime, which compiles the same text for the CPU.

``GPUCNN_KERNELS_RUNTIME`` chooses ("cuda", the default, or "host"); :func:`using` chooses for a block of code.
The host runtime is for tests and for projects whose CI has no GPU; see docs/host-runtime.md.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from gpucnn_kernels.errors import ArgumentError
from gpucnn_kernels.source import Source

VARIABLE = "GPUCNN_KERNELS_RUNTIME"
NAMES = ("cuda", "host")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Pointer:
    """An array argument of a launch: ``size`` bytes from ``address`` on."""

    address: int
    size: int
    writable: bool


class Module(Protocol):
    """A compiled source."""

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Pointer | Any],
        shared_bytes: int,
        stream: Any,
    ) -> None:
        """Start ``kernel``; arguments are Pointers, None (a null one) or ctypes values of their types."""


class Graph(Protocol):
    """Work that was captured."""

    def launch(self) -> None:
        """Start it all again, with one call, on the current stream."""


Take = Callable[[int], tuple[Any, int, Any]]
"""A number of bytes -> (a runtime's ``memory``, the first byte in it, what the array on it shall keep alive)."""


class Runtime(Protocol):
    """What the launcher needs of a place where kernels run. Arrays are ``array_type``'s: NumPy's or CuPy's."""

    name: str

    def as_array(self, value: Any, name: str) -> Any:
        """``value`` as an array of this runtime, sharing its memory; DtypeError or DeviceError if it is none."""

    def address(self, array: Any) -> int:
        """Where the first element is."""

    def device(self, array: Any) -> int:
        """The number of the device that holds it."""

    def current_device(self) -> int:
        """The number of the device in use where no array says another."""

    def capability(self, device: int) -> tuple[int, int]:
        """The compute capability of a device: (9, 0) is what a compiler calls sm_90."""

    def empty(self, shape: Sequence[int], dtype: str, like: Any) -> Any:
        """A new C-contiguous array of the kind of ``like``, on its device, its values undefined."""

    def memory(self, size: int, device: int) -> Any:
        """``size`` bytes of a device, which ``allocating`` can hand out parts of."""

    def allocating(self, take: Take, device: int) -> contextlib.AbstractContextManager[Any]:
        """A context in which the memory of new arrays on ``device`` is what ``take`` gives for their bytes."""

    def module(self, source: Source, device: int) -> Module:
        """The source compiled for a device, from memory or disk where it was compiled before."""

    def on(self, device: int, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """A context in which allocations and launches go to this device and stream."""

    def wait(self) -> None:
        """Inside that context: wait until all that the stream was given is done."""

    def capture(self, run: Callable[[], Result], keep: Iterable[Any], device: int) -> tuple[Graph, Result]:
        """(the graph of what ``run`` starts on ``device``, what it returns), without doing any of it.

        ``keep`` are the arrays, made before, that it reads and writes: the graph holds on to them, and to all that
        is allocated meanwhile, which lies in memory that nothing else uses. All kernels must have run before. What
        cannot be captured raises, and leaves all arrays as they were.
        """


_chosen: list[str] = []
_runtimes: dict[str, Runtime] = {}


def current_name() -> str:
    """Either "cuda" or "host". Raises ArgumentError where the environment names another."""
    if _chosen:
        return _chosen[-1]
    name = os.environ.get(VARIABLE) or "cuda"
    if name not in NAMES:
        raise ArgumentError(f"{VARIABLE} must be one of {', '.join(NAMES)}, got '{name}'")
    return name


def current() -> Runtime:
    """The runtime in use, made on first use."""
    name = current_name()
    if name not in _runtimes:
        if name == "host":
            from gpucnn_kernels.runtime.host_launch import HostRuntime

            _runtimes[name] = HostRuntime()
        else:
            from gpucnn_kernels.runtime.cuda import CudaRuntime

            _runtimes[name] = CudaRuntime()
    return _runtimes[name]


@contextlib.contextmanager
def using(name: str) -> Iterator[Runtime]:
    """Run the kernels of a block on this runtime, whatever the environment says."""
    if name not in NAMES:
        raise ArgumentError(f"a runtime is one of {', '.join(NAMES)}, got '{name}'")
    _chosen.append(name)
    try:
        yield current()
    finally:
        _chosen.pop()


def itemsize(dtype: str) -> int:
    """Bytes of an element of ``dtype``, by name."""
    return ITEM_SIZES[dtype]


ITEM_SIZES: Mapping[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int32": 4,
    "uint32": 4,
    "int64": 8,
    "uint64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
}
"""Bytes an element, by the dtypes that kernels take."""
