"""The host runtime as the launcher sees it: NumPy arrays, and anything on the CPU that shares its memory."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy

from gpucnn_kernels.arrays import numpy_dtype
from gpucnn_kernels.errors import ArgumentError, CompileError, DeviceError, DtypeError
from gpucnn_kernels.recording import recording
from gpucnn_kernels.runtime import Graph, Module, Pointer, Result, Take, host_graph
from gpucnn_kernels.runtime.host import HostCompileError, HostModule, Memory
from gpucnn_kernels.runtime.nvrtc import ARCHITECTURES
from gpucnn_kernels.source import Source

PTX_VARIABLE = "GPUCNN_KERNELS_HOST_PTX"
_ALIGNMENT = 512  # of memory in parts, as a GPU's


class HostRuntime:
    """Kernels compiled by the machine's C++ compiler, run on host memory."""

    name = "host"

    def __init__(self) -> None:
        self._modules: dict[str, _HostLaunchModule] = {}
        self._local = threading.local()

    def as_array(self, value: Any, name: str) -> Any:
        """A NumPy array on the memory of ``value``."""
        if isinstance(value, numpy.ndarray):
            return value
        kind = type(value).__module__.split(".")[0]
        if kind == "cupy" or (kind != "torch" and hasattr(value, "__cuda_array_interface__")):
            raise DeviceError(
                f"{name} is a GPU array ({type(value).__module__}.{type(value).__qualname__}), but kernels run "
                "on the host runtime (GPUCNN_KERNELS_RUNTIME=host); pass NumPy arrays, or unset the variable"
            )
        try:
            if kind == "torch" and str(value.dtype) == "torch.bfloat16":
                import torch

                return value.detach().view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
            if kind == "torch":
                return value.detach().numpy()  # by DLPack it may come read-only
            if hasattr(value, "__dlpack__"):
                return numpy.from_dlpack(value)
            if hasattr(value, "__array_interface__"):
                return numpy.asarray(value)
        except (TypeError, ValueError, RuntimeError, BufferError) as error:
            raise DtypeError(
                f"{name}, a {type(value).__module__}.{type(value).__qualname__}, cannot share its memory: {error}"
            ) from error
        raise DtypeError(
            f"{name} must be a numpy.ndarray or another array on the CPU that speaks DLPack, got "
            f"{type(value).__module__}.{type(value).__qualname__}; use numpy.asarray(...) first"
        )

    def address(self, array: Any) -> int:
        """Where the first element is."""
        return int(array.ctypes.data)

    def device(self, array: Any) -> int:
        """0: there is one host."""
        del array
        return 0

    def current_device(self) -> int:
        """0: there is one host."""
        return 0

    def capability(self, device: int) -> tuple[int, int]:
        """9.0: the host compiles kernels with __CUDA_ARCH__ at 900. Of PTX, that of its architecture."""
        del device
        number = int((ptx_architecture() or "sm_90").removeprefix("sm_"))
        return divmod(number, 10)

    def empty(self, shape: Sequence[int], dtype: str, like: Any) -> Any:
        """A new array, of the subclass of ``like`` if it is one, filled with 0xFF so that a gap shows as NaN."""
        array = self._new(tuple(shape), numpy_dtype(dtype))
        array.view(numpy.uint8).fill(0xFF) if array.ndim else array.reshape(1).view(numpy.uint8).fill(0xFF)
        if (recorder := host_graph.recording()) is not None and self._take is None:
            recorder.own(array)
        return array if like is None else array.view(type(like))

    def _new(self, shape: tuple[int, ...], dtype: numpy.dtype[Any]) -> Any:
        if self._take is None:
            return numpy.empty(shape, dtype)
        memory, offset, owner = self._take(math.prod(shape) * dtype.itemsize)
        if host_graph.recording() is not None:
            owner = None  # the recorder holds arrays for longer than the program does
        part = _Part(memory[offset : offset + math.prod(shape) * dtype.itemsize], owner)
        return numpy.asarray(part).view(dtype).reshape(shape)

    def memory(self, size: int, device: int) -> Any:
        """An array of bytes."""
        del device
        raw = numpy.empty(size + _ALIGNMENT, numpy.uint8)
        first = -raw.ctypes.data % _ALIGNMENT
        return raw[first : first + size]

    @contextlib.contextmanager
    def allocating(self, take: Take, device: int) -> Iterator[None]:
        """Of the arrays that kernels' functions make in this thread."""
        del device
        before = self._take
        self._local.take = take
        try:
            yield
        finally:
            self._local.take = before

    @property
    def _take(self) -> Take | None:
        return getattr(self._local, "take", None)

    def module(self, source: Source, device: int) -> Module:
        """The source compiled for this machine."""
        del device
        if source.fingerprint not in self._modules:
            host_graph.refuse(f"compile {source.title}")
            self._modules[source.fingerprint] = _HostLaunchModule(source)
        return self._modules[source.fingerprint]

    def on(self, device: int, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Nothing: launches are done when they return."""
        del device, stream
        return contextlib.nullcontext()

    def wait(self) -> None:
        """Nothing: what was launched is done. Raises RuntimeError while work is captured, as a stream does."""
        host_graph.refuse("wait")

    def capture(self, run: Callable[[], Result], keep: Iterable[Any], device: int) -> tuple[Graph, Result]:
        """The work that ``run`` starts, recorded."""
        del device
        with recording():
            return host_graph.capture(run, keep)


def ptx_architecture() -> str | None:
    """The architecture whose PTX runs in place of the kernels' text, by the environment; None: the text itself."""
    chosen = os.environ.get(PTX_VARIABLE) or None
    if chosen is not None and chosen not in ARCHITECTURES:
        raise ArgumentError(f"{PTX_VARIABLE} must be one of {', '.join(ARCHITECTURES)}, got '{chosen}'")
    return chosen


class _Part:
    """A piece of memory as NumPy takes it: an array made of it keeps ``owner`` alive, too."""

    def __init__(self, memory: Any, owner: Any) -> None:
        self._memory, self._owner = memory, owner
        self.__array_interface__ = {
            "data": (memory.ctypes.data, False), "shape": memory.shape, "typestr": "|u1", "version": 3,
        }  # fmt: skip


class _HostLaunchModule:
    def __init__(self, source: Source) -> None:
        try:
            architecture = ptx_architecture()
            if architecture is not None:
                architecture = source.architecture or architecture
            self._module = HostModule(source.text, list(source.kernels), ptx=architecture)
        except HostCompileError as error:
            raise CompileError(f"{source.title}: {error}") from error

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Pointer | Any],
        shared_bytes: int,
        stream: Any,
    ) -> None:
        """Run ``kernel`` to its end."""
        del stream
        memory = [
            Memory(argument.address, argument.size, argument.writable)
            if isinstance(argument, Pointer)
            else argument
            for argument in arguments
        ]

        def start() -> None:
            self._module.launch(kernel, grid, block, memory, shared_bytes=shared_bytes)

        recorder = host_graph.recording()
        if recorder is None:
            start()
            return
        for argument in memory:
            if isinstance(argument, Memory):
                recorder.uses(argument.address, argument.size)
        recorder.actions.append(start)
