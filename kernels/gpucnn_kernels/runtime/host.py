"""CUDA kernels on the CPU, for tests: compiled by the machine's C++ compiler, launched on host memory.

The text is the one that NVRTC gets. The headers in ``host_include`` give it CUDA's execution model, and a launch
reports what hardware would hide as :class:`KernelFault`. docs/host-runtime.md is the manual.

    module = HostModule(text, ["vector_add"], sanitize=True)
    module.launch(
        "vector_add", (4, 1, 1), (256, 1, 1), [Memory(x.ctypes.data, x.nbytes, False), ctypes.c_int(1000)]
    )

``python -m gpucnn_kernels.runtime.host COMMAND...`` runs a command with every launch sanitized.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpucnn_kernels.runtime.compiler import HostCompileError, HostUnavailableError
from gpucnn_kernels.runtime.host_build import build, title_of

__all__ = [
    "HostCompileError",
    "HostModule",
    "HostUnavailableError",
    "KernelFault",
    "Memory",
    "order",
    "order_independent",
    "sanitized_environment",
]

ORDER_VARIABLE = "GPUCNN_KERNELS_HOST_ORDER"
SANITIZE_VARIABLE = "GPUCNN_KERNELS_HOST_SANITIZE"
MAXIMUM_THREADS = 1024
MAXIMUM_BLOCK = (1024, 1024, 64)
MAXIMUM_GRID = (2**31 - 1, 65535, 65535)
MAXIMUM_SHARED_BYTES = 227 << 10
ORDERS = (0, -1, 1, 2, 3)

Dimensions = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Memory:
    """A pointer argument: the bytes [address, address + size) are the kernel's, to read or also to write."""

    address: int
    size: int
    writable: bool


class KernelFault(RuntimeError):
    """What a launch found wrong in a kernel; its results are undefined.

    ``kernel``, ``block`` and ``thread`` say where, ``line`` in which line of the text (0: unknown), ``what`` what.
    """

    def __init__(
        self, message: str, kernel: str, block: Dimensions | None, thread: Dimensions | None, line: int, what: str
    ) -> None:
        super().__init__(message)
        self.kernel, self.block, self.thread, self.line, self.what = kernel, block, thread, line, what


class _Kernel(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("call", ctypes.c_void_p),
        ("parameter_count", ctypes.c_int),
        ("sizes", ctypes.POINTER(ctypes.c_ulong)),
        ("kinds", ctypes.c_char_p),
    )


class _Memory(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_ulonglong),
        ("size", ctypes.c_ulonglong),
        ("writable", ctypes.c_int),
        ("argument", ctypes.c_int),
    )


class _Launch(ctypes.Structure):  # gpucnn_host::Launch
    _fields_ = (
        ("kernel", ctypes.POINTER(_Kernel)),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_ulong),
        ("order", ctypes.c_longlong),
        ("memory", ctypes.POINTER(_Memory)),
        ("memory_count", ctypes.c_ulong),
        ("sanitize", ctypes.c_int),
        ("faulted", ctypes.c_int),
        ("line", ctypes.c_int),
        ("code_offset", ctypes.c_ulong),
        ("fault_block", ctypes.c_uint * 3),
        ("fault_thread", ctypes.c_uint * 3),
        ("fault_has_thread", ctypes.c_int),
        ("message", ctypes.c_char * 2048),
    )


_KINDS = {
    "p": "a pointer", "i": "an integer", "f": "a floating-point number", "s": "a struct",
    "w": "a pointer or an integer",
}  # fmt: skip

# Signal handlers and their stack are the process's, so one launch runs at a time, whatever the module.
_launching = threading.Lock()


class HostModule:
    """A text compiled for the host, and its kernels.

    ``text`` is a whole CUDA C++ translation unit and ``kernels`` the names of its ``extern "C" __global__``
    functions to launch. ``sanitize`` asks for address and undefined-behaviour checks; None:
    ``$GPUCNN_KERNELS_HOST_SANITIZE`` is "1". ``ptx`` names an architecture, such as "sm_90": then what runs is the
    PTX that NVRTC makes of the text for it. Raises HostCompileError; CompileError of NVRTC, or of PTX that is not
    known.
    """

    def __init__(
        self, text: str, kernels: Sequence[str], *, sanitize: bool | None = None, ptx: str | None = None
    ) -> None:
        self.sanitize = os.environ.get(SANITIZE_VARIABLE) == "1" if sanitize is None else sanitize
        self._lines = text.splitlines()
        self._path = build(text, kernels, self.sanitize, ptx)
        self._title = title_of(kernels)
        self._library = ctypes.CDLL(str(self._path))
        self._launch = self._library.gpucnn_host_launch
        self._launch.restype = None
        listing = self._library.gpucnn_host_kernels
        listing.restype = ctypes.POINTER(_Kernel)
        table = listing()
        self._kernels = {name: table[index] for index, name in enumerate(kernels)}

    def launch(
        self,
        name: str,
        grid: Dimensions,
        block: Dimensions,
        arguments: Sequence[Any],
        *,
        shared_bytes: int = 0,
        order: int | None = None,
    ) -> None:
        """Run a kernel to its end.

        An argument is a Memory (a pointer), None (a null pointer), or a ctypes value or Structure, passed by
        value. ``order`` is how threads run between barriers, and the blocks: 0 by index, -1 from the last to the
        first, any other number shuffled by this seed, anew after every barrier; None: what :func:`order` or
        ``$GPUCNN_KERNELS_HOST_ORDER`` says, else 0. Raises KernelFault for what the kernel does wrong, ValueError
        and TypeError for a launch that does not fit it.
        """
        kernel = self._kernels.get(name)
        if kernel is None:
            raise ValueError(f"the module has no kernel '{name}'; it was made for {', '.join(self._kernels)}")
        _check_dimensions(name, grid, block, shared_bytes)
        values, memory = _checked_arguments(name, kernel, arguments)
        launch = _Launch(
            kernel=ctypes.pointer(kernel),
            arguments=(ctypes.c_void_p * (len(values) + 1))(*(ctypes.addressof(value) for value in values)),
            grid=grid,
            block=block,
            shared_bytes=shared_bytes,
            order=_order(order),
            memory=(_Memory * (len(memory) + 1))(*memory),
            memory_count=len(memory),
            sanitize=self.sanitize,
        )
        with _launching:
            self._launch(ctypes.byref(launch))
        if launch.faulted:
            raise self._fault(name, launch)

    def _fault(self, name: str, launch: _Launch) -> KernelFault:
        what = launch.message.decode("utf-8", "replace")
        line = launch.line or (self._line_of(launch.code_offset) if launch.code_offset else 0)
        parts = [f"kernel {name}"]
        block = thread = None
        if launch.fault_has_thread:
            block, thread = tuple(launch.fault_block), tuple(launch.fault_thread)
            parts += [f"block {block}", f"thread {thread}"]
        if 0 < line <= len(self._lines):
            parts.append(f"line {line}")
            what = what.rstrip() + f"\n    {line} | {self._lines[line - 1].strip()}"
        return KernelFault(f"{', '.join(parts)}: {what}", name, block, thread, line, what)

    def _line_of(self, code_offset: int) -> int:
        """The line of the text that an instruction was compiled from; 0 where it cannot be found."""
        try:
            done = subprocess.run(
                ["addr2line", "-i", "-e", str(self._path), hex(code_offset)],
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError:  # no binutils: the fault is told without its line
            return 0
        for place in done.stdout.splitlines():  # from the innermost inlined function outwards
            file, _, line = place.partition(" ")[0].rpartition(":")
            if Path(file).name == self._title and line.isdigit():
                return int(line)
        return 0


def _check_dimensions(name: str, grid: Dimensions, block: Dimensions, shared_bytes: int) -> None:
    for what, given, limits in (("grid", grid, MAXIMUM_GRID), ("block", block, MAXIMUM_BLOCK)):
        fits = len(given) == 3 and all(1 <= size <= limit for size, limit in zip(given, limits, strict=True))
        if not fits:
            raise ValueError(
                f"{name}: {what} must be three numbers from (1, 1, 1) to {limits}, got {tuple(given)}"
            )
    if block[0] * block[1] * block[2] > MAXIMUM_THREADS:
        raise ValueError(f"{name}: a block has at most {MAXIMUM_THREADS} threads, got {tuple(block)}")
    if not 0 <= shared_bytes <= MAXIMUM_SHARED_BYTES:
        raise ValueError(f"{name}: shared_bytes must be from 0 to {MAXIMUM_SHARED_BYTES}, got {shared_bytes}")


def _checked_arguments(name: str, kernel: _Kernel, arguments: Sequence[Any]) -> tuple[list[Any], list[_Memory]]:
    """The arguments as ctypes values, and what the pointers among them point to."""
    if len(arguments) != kernel.parameter_count:
        raise TypeError(f"{name} has {kernel.parameter_count} parameters, got {len(arguments)} arguments")
    kinds = kernel.kinds.decode() if kernel.parameter_count else ""
    values: list[Any] = []
    memory: list[_Memory] = []
    for position, (argument, kind) in enumerate(zip(arguments, kinds, strict=True)):
        where = f"{name}: argument {position}"
        if isinstance(argument, Memory):
            memory.append(_Memory(argument.address, argument.size, argument.writable, position))
            value: Any = ctypes.c_void_p(argument.address)
            given = "p"
        elif argument is None:
            value, given = ctypes.c_void_p(None), "p"
        elif isinstance(argument, (ctypes.Structure, ctypes.Union)):
            value, given = argument, "s"
        elif isinstance(argument, ctypes._SimpleCData):
            value = argument
            letter = str(getattr(argument, "_type_", ""))
            given = "f" if letter in ("f", "d") else "i" if letter in tuple("?cbBhHiIlLqQ") else ""
        else:
            given = ""
        if not given:
            raise TypeError(
                f"{where} must be a Memory, None, a ctypes number or a ctypes.Structure, got "
                f"{type(argument).__name__}; a Python number has no width: write ctypes.c_int(n), say"
            )
        size = int(kernel.sizes[position])
        # A 16-bit float is a struct to C++ and a c_uint16 of its bits to ctypes.
        if given != kind and (kind, given) not in (("s", "i"), ("w", "p"), ("w", "i")):
            raise TypeError(f"{where} must be {_KINDS[kind]} of {size} bytes, got {_KINDS[given]} ({argument!r})")
        if ctypes.sizeof(value) != size:
            raise TypeError(
                f"{where} must have the {size} bytes of its parameter, got {ctypes.sizeof(value)} "
                f"({type(argument).__name__})"
            )
        # A launch may replace a pointer's value, so it has a copy.
        values.append(ctypes.c_void_p(value.value) if given == "p" else value)
    return values, memory


# ---- the order of threads ----

_orders: list[int] = []


@contextlib.contextmanager
def order(seed: int) -> Iterator[None]:
    """Launch in this order (see :meth:`HostModule.launch`) throughout a block of code, in all threads."""
    _orders.append(seed)
    try:
        yield
    finally:
        _orders.pop()


def _order(asked: int | None) -> int:
    if asked is None and _orders:
        asked = _orders[-1]
    if asked is None:
        text = os.environ.get(ORDER_VARIABLE) or "0"
        try:
            asked = int(text)
        except ValueError:
            raise ValueError(f"{ORDER_VARIABLE} must be a whole number, got '{text}'") from None
    return ctypes.c_longlong(asked).value


def order_independent(run: Callable[[], Any], orders: Sequence[int] = ORDERS) -> bool:
    """Whether ``run`` gives the same bytes in every order of threads.

    ``run`` launches kernels and returns an array, or a sequence of arrays, made anew in each call. A race that has
    a winner in some order shows here; atomic sums of floating-point numbers differ too, and rightly so.
    """
    if len(orders) < 2:
        raise ValueError(f"orders must be at least two, to compare, got {list(orders)}")
    results = []
    for seed in orders:
        with order(seed):
            results.append(_bytes(run()))
    return all(result == results[0] for result in results)


def _bytes(result: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
    import numpy

    arrays = result if isinstance(result, (list, tuple)) else [result]
    whole = [numpy.ascontiguousarray(array) for array in arrays]
    return [(str(array.dtype), array.shape, array.tobytes()) for array in whole]


# ---- a command with every launch sanitized ----


def sanitized_environment() -> dict[str, str]:
    """The environment of this process, and what makes every module sanitized: for ``subprocess.run(env=...)``.

    Nothing needs to be preloaded: the checks are part of the compiled modules.
    """
    return {**os.environ, SANITIZE_VARIABLE: "1"}


def main(arguments: Sequence[str]) -> int:
    """Run a command sanitized; its exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m gpucnn_kernels.runtime.host COMMAND [ARGUMENT ...]", file=sys.stderr)
        return 0 if arguments else 2
    try:
        return subprocess.run(list(arguments), env=sanitized_environment(), check=False).returncode
    except OSError as error:
        print(f"cannot run {arguments[0]}: {error.strerror}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
