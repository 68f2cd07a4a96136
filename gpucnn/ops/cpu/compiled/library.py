"""The compiled library: whether there is one, and its functions."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.errors import ArgumentError, GpucnnError
from gpucnn.ops.cpu.threads import thread_count

_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_reason: str | None = None
_tried = False
_switched_off = 0
_FLOAT32 = numpy.dtype(numpy.float32)


def available() -> bool:
    """Whether the compiled loops are used; the first call compiles them, or finds out that it cannot.

    Raises GpucnnError where ``GPUCNN_COMPILED=1`` asks for what cannot be had, ArgumentError where it is anything
    but 0, 1 or empty.
    """
    if not _tried:
        _open()
    return _library is not None and not _switched_off


def why_not() -> str | None:
    """Why there are no compiled loops here, or None where there are."""
    return None if available() else _reason or "they are switched off for the moment"


def usable(*arrays: NDArray[Any] | None) -> bool:
    """Whether the compiled loops take these arrays: float32, in C order, aligned; None is no array."""
    if not available():
        return False
    for array in arrays:
        if array is not None:
            flags = array.flags
            if array.dtype != _FLOAT32 or not flags.c_contiguous or not flags.aligned:
                return False
    return True


@contextlib.contextmanager
def switched(on: bool) -> Iterator[None]:
    """Inside, all threads go the NumPy way or, with ``on``, the compiled one; GpucnnError where there is none."""
    global _switched_off
    if on:
        if not available():
            raise GpucnnError(f"there are no compiled loops: {why_not()}")
        yield
        return
    with _lock:
        _switched_off += 1
    try:
        yield
    finally:
        with _lock:
            _switched_off -= 1


def _open() -> None:
    global _library, _reason, _tried
    with _lock:
        if _tried:
            return
        asked = os.environ.get("GPUCNN_COMPILED", "")
        if asked not in ("", "0", "1"):
            raise ArgumentError(f"GPUCNN_COMPILED must be 0 or 1, or unset to use what there is, got {asked!r}")
        if asked == "0":
            _reason = "GPUCNN_COMPILED=0 switches them off"
        else:
            # Loaded here: subprocess and what else compiling takes would slow the operations' import.
            from gpucnn.ops.cpu.compiled.build import build
            from gpucnn_kernels.runtime.compiler import HostCompileError, HostUnavailableError

            try:
                _library = ctypes.CDLL(str(build()))
            except (HostCompileError, OSError) as error:
                if asked == "1":
                    raise GpucnnError(
                        f"GPUCNN_COMPILED=1, but the CPU's loops cannot be compiled: {error}"
                    ) from error
                _reason = str(error)
                if not isinstance(error, HostUnavailableError):  # a compiler is there, and failed: worth a look
                    warnings.warn(
                        f"the CPU's loops could not be compiled, NumPy does their work (GPUCNN_COMPILED=0 says so "
                        f"without a try): {error}",
                        RuntimeWarning,
                        stacklevel=2,
                    )
        _tried = True


class Function:
    """A function of the library, called with arrays and numbers.

    The function's own arguments follow the number of threads, which is added here. Of an array the address of its
    first number is handed over: it must be in C order, and of the type that the C++ text says.
    """

    def __init__(self, name: str, kinds: str) -> None:
        self.name = name
        self._kinds = tuple(_KINDS[kind] for kind in kinds)
        self._written = tuple(index for index, kind in enumerate(kinds) if kind == "o")
        self._entry: Any = None
        self._large: Any = None
        self._release: Any = None

    def __call__(self, *arguments: Any) -> None:
        """Raises ArgumentError where an array to write is read-only, MemoryError without memory to work in."""
        entry = self._entry
        if entry is None:
            if not available() or _library is None:
                raise GpucnnError(f"the compiled {self.name} is not there: {why_not()}")
            entry = getattr(_library, f"gpucnn_{self.name}")
            entry.argtypes = (ctypes.c_int, *self._kinds)
            entry.restype = ctypes.c_int
            large = _library.gpucnn_large_scratch
            large.restype = ctypes.POINTER(ctypes.c_int)
            self._large = large().contents
            self._release = _library.gpucnn_release_large_scratch
            self._release.restype = None
            self._entry = entry
        given = [
            argument.__array_interface__["data"][0] if isinstance(argument, numpy.ndarray) else argument
            for argument in arguments
        ]
        for index in self._written:
            if arguments[index] is not None and not arguments[index].flags.writeable:
                raise ArgumentError(f"{self.name} cannot write its result to a read-only array; pass a copy of it")
        failed = entry(thread_count(), *given)
        if self._large.value:
            self._release()
        if failed:
            raise MemoryError(f"no memory left to work in for {self.name}")


_KINDS = {
    "p": ctypes.c_void_p,
    "o": ctypes.c_void_p,
    "i": ctypes.c_int64,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
}


def function(name: str, kinds: str) -> Function:
    """The library's ``gpucnn_<name>``, looked up when first called.

    ``kinds`` has a letter for each argument: p an array that is read, or None, o one that is written, or None,
    i an integer (int64), f a float, d a double.
    """
    return Function(name, kinds)
