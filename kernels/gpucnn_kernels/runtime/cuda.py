"""Kernels on an NVIDIA GPU, through CuPy: NVRTC compiles, CuPy keeps the binary on disk, the driver launches.

CuPy is imported on first use and never at import. CuPy's disk cache is keyed by the source text, the options, the
architecture and NVRTC's version; our text has its headers in it, so an edited header is another key.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy

from gpucnn_kernels.arrays import JAX, library_of, numpy_dtype
from gpucnn_kernels.errors import ArgumentError, CompileError, DeviceError, DtypeError
from gpucnn_kernels.recording import recording
from gpucnn_kernels.runtime import Graph, Module, Pointer, Result, Take, cuda_graph
from gpucnn_kernels.source import Source

OPTIONS = ("-std=c++17",)
"""For NVRTC. CuPy adds the architecture and -ftz=true."""

DEFAULT_SHARED_BYTES = 48 << 10
_SAY_AFTER_SECONDS = 1.0


def status() -> tuple[bool, str]:
    """(whether a GPU can be used, the reason in words): a CuPy that imports is not yet a GPU that works."""
    import importlib.util

    if importlib.util.find_spec("cupy") is None:
        return False, (
            "CuPy is not installed; pip install 'gpucnn[cuda12]' (driver 525 or newer) or 'gpucnn[cuda13]' "
            "(driver 580 or newer)"
        )
    try:
        import cupy
    except Exception as error:  # a broken install raises many kinds; each is a reason to show
        return False, f"CuPy does not import: {_first_line(error)}; " + (
            import_advice(error) or "reinstall one of 'gpucnn[cuda12]' and 'gpucnn[cuda13]', and only one"
        )
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        return False, f"CuPy {cupy.__version__} finds no usable NVIDIA driver or GPU: {_explained(error)}"
    if count == 0:
        return False, f"CuPy {cupy.__version__} works, but there is no NVIDIA GPU"
    try:
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:
        return False, (
            f"NVRTC, which compiles the kernels, cannot be loaded: {_first_line(error)}; install it with "
            "pip install 'gpucnn[cuda12]' or 'gpucnn[cuda13]', whichever matches the driver"
        )
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return True, f"{name}, CuPy {cupy.__version__}"


def import_advice(error: Exception) -> str:
    """What to do where CuPy is well, and only finds no place for its cache; nothing for another error."""
    if isinstance(error, OSError) and error.filename is not None:
        return "it keeps what it compiles in ~/.cupy: set CUPY_CACHE_DIR to a folder that can be written"
    return ""


def _explained(error: Exception) -> str:
    text = _first_line(error)
    if "InsufficientDriver" in text:
        return (
            f"{text}; there is no driver, or it is older than CuPy's CUDA: update it, or install 'gpucnn[cuda12]'"
        )
    return text


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_CPU = 1  # DLPack's number for it


def _in_host_memory(value: Any) -> bool:
    if isinstance(value, numpy.ndarray):
        return True
    if hasattr(value, "is_cuda"):  # PyTorch's
        return not value.is_cuda
    device = getattr(value, "__dlpack_device__", None)
    return device is not None and int(device()[0]) == _CPU


class CudaRuntime:
    """CuPy's arrays, streams and compiler."""

    name = "cuda"

    def __init__(self) -> None:
        usable, reason = status()
        if not usable:
            raise DeviceError(
                f"no GPU can be used: {reason}. Without a GPU, GPUCNN_KERNELS_RUNTIME=host runs the kernels on "
                "NumPy arrays, slowly, for tests"
            )
        import cupy

        self._cupy = cupy
        self._modules: dict[tuple[str, int], _CudaModule] = {}
        self._lock = threading.Lock()

    def as_array(self, value: Any, name: str) -> Any:
        """A cupy.ndarray on the memory of ``value``, which may be CuPy's, PyTorch's, JAX's or Numba's."""
        cupy = self._cupy
        if isinstance(value, cupy.ndarray):
            return value
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if _in_host_memory(value):
            raise DeviceError(
                f"{name} is in the host's memory ({kind}); move it to the GPU first (cupy.asarray(...), or "
                "tensor.cuda())"
            )
        try:
            if kind.startswith("torch.") and str(value.dtype) == "torch.bfloat16":
                import torch

                return self._shared(value.detach().view(torch.int16)).view(numpy_dtype("bfloat16"))
            if kind.startswith("torch."):
                return self._shared(value.detach())
            # Not JAX's: it names no stream, so nothing would wait for the computation that makes the array.
            if hasattr(value, "__cuda_array_interface__") and library_of(value) not in JAX:
                return self._shared(value)
            if hasattr(value, "__dlpack__"):
                if hasattr(value, "block_until_ready"):  # JAX's computation is ordered with no stream of ours
                    value.block_until_ready()
                return cupy.from_dlpack(value)
        except (TypeError, ValueError, RuntimeError, BufferError, AttributeError) as error:
            raise DtypeError(f"{name}, a {kind}, cannot share its memory with CuPy: {error}") from error
        raise DtypeError(
            f"{name} must be a cupy.ndarray or another array on the GPU (__cuda_array_interface__ or DLPack), got "
            f"{kind}"
        )

    def _shared(self, value: Any) -> Any:
        """What has ``__cuda_array_interface__`` as a cupy.ndarray: made on another device than its own, a copy."""
        cupy = self._cupy
        pointer = int(value.__cuda_array_interface__["data"][0])
        place = getattr(getattr(value, "device", None), "index", None)  # PyTorch's; empty tensors have it, too
        if pointer and not isinstance(place, int):
            cupy.cuda.Device().use()  # the driver is asked, and wants a context
            place = cupy.cuda.runtime.pointerGetAttributes(pointer).device
        if not isinstance(place, int):
            return cupy.asarray(value)
        with cupy.cuda.Device(place):
            array = cupy.asarray(value)
        if pointer and int(array.data.ptr) != pointer:
            raise ValueError("CuPy made a copy of it")
        return array

    def address(self, array: Any) -> int:
        """The device pointer."""
        return int(array.data.ptr)

    def device(self, array: Any) -> int:
        """The device's number."""
        return int(array.device.id)

    def current_device(self) -> int:
        """The number of CuPy's current device."""
        return int(self._cupy.cuda.runtime.getDevice())

    def capability(self, device: int) -> tuple[int, int]:
        """The device's compute capability."""
        digits = self._cupy.cuda.Device(device).compute_capability  # "90" is 9.0
        return int(digits[:-1]), int(digits[-1])

    def empty(self, shape: Sequence[int], dtype: str, like: Any) -> Any:
        """A new cupy.ndarray on the current device."""
        del like
        return self._cupy.empty(tuple(shape), numpy_dtype(dtype))

    def memory(self, size: int, device: int) -> Any:
        """A MemoryPointer of CuPy's."""
        with self._cupy.cuda.Device(device):
            return self._cupy.cuda.alloc(size)

    def allocating(self, take: Take, device: int) -> contextlib.AbstractContextManager[Any]:
        """Of all arrays that CuPy makes in this thread."""
        cuda = self._cupy.cuda
        outside = cuda.get_allocator()

        def allocate(size: int) -> Any:
            with cuda.using_allocator(outside):  # what is taken may be made now, by whom it would have been before
                memory, offset, owner = take(size)
            return cuda.MemoryPointer(
                cuda.UnownedMemory(int(memory.ptr) + offset, size, (memory, owner), device), 0
            )

        context: contextlib.AbstractContextManager[Any] = cuda.using_allocator(allocate)
        return context

    def module(self, source: Source, device: int) -> Module:
        """The source compiled for a device."""
        key = source.fingerprint, device
        module = self._modules.get(key)
        if module is None:
            with self._lock:
                module = self._modules.get(key)
                if module is None:
                    module = self._modules[key] = _CudaModule(self._cupy, source, device)
        return module

    @contextlib.contextmanager
    def on(self, device: int, stream: Any) -> Iterator[Any]:
        """Make the device and the stream current: CuPy's stream, PyTorch's, Numba's, or a pointer."""
        place = self._cupy.cuda.Device(device)
        with place:
            place.use()  # even where it is current: a new thread has no context, which the driver wants to launch
            if stream is None:
                yield None
            else:
                with self._stream(stream):
                    yield None

    def wait(self) -> None:
        """Wait until all that the current stream was given is done."""
        self._cupy.cuda.get_current_stream().synchronize()

    def capture(self, run: Callable[[], Result], keep: Iterable[Any], device: int) -> tuple[Graph, Result]:
        """The work that ``run`` starts, as a CUDA graph."""
        with recording():
            return cuda_graph.capture(self._cupy, run, keep, device)

    def _stream(self, stream: Any) -> Any:
        cupy = self._cupy
        if isinstance(stream, (cupy.cuda.Stream, cupy.cuda.ExternalStream)):
            return stream
        pointer = getattr(stream, "cuda_stream", None)  # PyTorch
        handle: Any = getattr(stream, "handle", None)
        if pointer is None and hasattr(handle, "value"):  # Numba upon ctypes; None is its default stream
            pointer = handle.value or 0
        elif pointer is None and hasattr(handle, "__int__"):  # Numba upon NVIDIA's bindings
            pointer = int(handle)
        if pointer is None and hasattr(stream, "__cuda_stream__"):  # the protocol of cuda.core and others
            pointer = stream.__cuda_stream__()[1]
        if pointer is None and isinstance(stream, int) and not isinstance(stream, bool):
            pointer = stream
        if pointer is None:
            raise DtypeError(
                "stream must be a CuPy, PyTorch or Numba stream or the address of one, got "
                f"{type(stream).__module__}.{type(stream).__qualname__}"
            )
        return cupy.cuda.Stream.from_external(_ForeignStream(int(pointer), stream))


class _ForeignStream:
    """Another library's stream by the protocol that CuPy takes one by; it lives as long as CuPy uses it."""

    def __init__(self, pointer: int, owner: Any) -> None:
        self._pointer, self._owner = pointer, owner

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


class _CudaModule:
    def __init__(self, cupy: Any, source: Source, device: int) -> None:
        self._cupy, self._source = cupy, source
        # NVRTC takes the first of two architectures; CuPy's own, which lacks what only "sm_90a" has, comes behind.
        exact = () if source.architecture is None else (f"-arch={source.architecture}",)
        module = cupy.RawModule(code=source.text, options=(*OPTIONS, *exact), backend="nvrtc")
        began = time.perf_counter()
        timer = threading.Timer(_SAY_AFTER_SECONDS, _say_compiling, (source.title,))
        timer.daemon = True
        timer.start()
        try:
            with cupy.cuda.Device(device):
                self._kernels = {name: module.get_function(name) for name in source.kernels}
                self._functions = {name: kernel.kernel for name, kernel in self._kernels.items()}
        except cupy.cuda.compiler.CompileException as error:
            if "--gpu-architecture" in str(error):
                raise DeviceError(f"{source.title}: {self._too_new(device)}") from error
            raise CompileError(f"{source.title} does not compile for this GPU:\n{error}") from error
        except RuntimeError as error:  # no CUDA headers, no NVRTC, or a driver that does not load the binary
            if "NO_BINARY_FOR_GPU" in str(error):
                raise DeviceError(f"{source.title}: {self._too_new(device)}") from error
            raise DeviceError(f"{source.title} cannot be made ready for this GPU: {_first_line(error)}") from error
        finally:
            timer.cancel()
        self.seconds = time.perf_counter() - began
        self._shared: dict[str, int] = {}  # dynamic bytes that a kernel may be started with

    def _too_new(self, device: int) -> str:
        digits = self._cupy.cuda.Device(device).compute_capability
        version = ".".join(map(str, self._cupy.cuda.nvrtc.getVersion()))
        return (
            f"this GPU, of compute capability {digits[:-1]}.{digits[-1]}, is newer than the compiler, NVRTC "
            f"{version}; install a newer CUDA: pip install --upgrade 'gpucnn[cuda13]' (driver 580 or newer)"
        )

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Pointer | Any],
        shared_bytes: int,
        stream: Any,
    ) -> None:
        """Queue ``kernel`` on the current stream. Raises ArgumentError where the GPU lacks the shared memory."""
        del stream  # made current by ``on``
        if shared_bytes:
            self._allow(kernel, shared_bytes)
        values = [
            ctypes.c_void_p(0 if argument is None else argument.address)
            if argument is None or isinstance(argument, Pointer)
            else argument
            for argument in arguments
        ]
        addresses = (ctypes.c_void_p * max(len(values), 1))(*(ctypes.addressof(value) for value in values))
        current = self._cupy.cuda.get_current_stream()
        self._cupy.cuda.driver.launchKernel(
            self._functions[kernel].ptr, *grid, *block, shared_bytes, current.ptr, ctypes.addressof(addresses), 0
        )

    def _allow(self, kernel: str, shared_bytes: int) -> None:
        """Ask for more than the 48 KB, static and dynamic together, that a block gets unasked."""
        handle = self._kernels[kernel]
        if kernel not in self._shared:
            self._shared[kernel] = DEFAULT_SHARED_BYTES - handle.shared_size_bytes
        if shared_bytes <= self._shared[kernel]:
            return
        try:
            handle.max_dynamic_shared_size_bytes = shared_bytes
        except self._cupy.cuda.driver.CUDADriverError as error:
            most = self._cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]
            raise ArgumentError(
                f"{self._source.title}: {kernel}: {shared_bytes} bytes of shared memory a block beside its own "
                f"{handle.shared_size_bytes}; this GPU has {most} ({_first_line(error)})"
            ) from error
        self._shared[kernel] = shared_bytes


def _say_compiling(title: str) -> None:
    print(f"gpucnn_kernels: compiling {title} for this GPU, once ...", file=sys.stderr, flush=True)
