"""What stands for a GPU where there is none: a runtime that records launches, and a module that plays CuPy.

They compute nothing. They show what would reach the driver: the kernel, the grid, the bytes of each argument.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy
import pytest

from gpucnn_kernels import launch, runtime
from gpucnn_kernels.runtime import ITEM_SIZES
from gpucnn_kernels.source import Source

# ------------------------------------------------------------ a runtime that records


@dataclass
class Flags:
    """As NumPy's."""

    writeable: bool = True


@dataclass
class RecordedArray:
    """An array of any size on any device, without memory."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    device: int = 0
    steps: tuple[int, ...] | None = None  # strides in elements; None is C order
    address: int = 1 << 40
    flags: Flags = field(default_factory=Flags)

    @property
    def strides(self) -> tuple[int, ...]:
        steps, step = [], 1
        for length in reversed(self.shape):
            steps.insert(0, step)
            step *= length
        return tuple(step * ITEM_SIZES[self.dtype] for step in (self.steps or steps))

    def transpose(self, axes: Sequence[int]) -> RecordedArray:
        steps = [stride // ITEM_SIZES[self.dtype] for stride in self.strides]
        shape, steps = (tuple(values[axis] for axis in axes) for values in (self.shape, steps))
        return RecordedArray(shape, self.dtype, self.device, steps, self.address)


@dataclass
class RecordedLaunch:
    """What a driver would have got."""

    source: Source
    device: int
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    arguments: dict[str, Any]
    shared_bytes: int
    stream: Any


class RecordingRuntime:
    """Takes RecordedArrays on devices 0, 1, ...; remembers every launch."""

    name = "recording"

    def __init__(self) -> None:
        self.launches: list[RecordedLaunch] = []
        self.compiled: list[tuple[str, int]] = []
        self.entered: list[tuple[int, Any]] = []
        self.capabilities: dict[int, tuple[int, int]] = {}  # of devices that are not of 9.0

    def as_array(self, value: Any, name: str) -> Any:
        assert isinstance(value, RecordedArray), name
        return value

    def address(self, array: RecordedArray) -> int:
        return array.address

    def device(self, array: RecordedArray) -> int:
        return array.device

    def current_device(self) -> int:
        return 0

    def capability(self, device: int) -> tuple[int, int]:
        return self.capabilities.get(device, (9, 0))

    def empty(self, shape: Sequence[int], dtype: str, like: RecordedArray) -> RecordedArray:
        return RecordedArray(tuple(shape), dtype, like.device)

    def module(self, source: Source, device: int) -> Any:
        self.compiled.append((source.title, device))

        def remember(
            kernel: str, grid: Any, block: Any, arguments: Sequence[Any], shared_bytes: int, stream: Any
        ) -> None:
            names = [parameter.name for parameter in source.kernels[kernel].parameters]
            named = dict(zip(names, arguments, strict=True))
            self.launches.append(RecordedLaunch(source, device, kernel, grid, block, named, shared_bytes, stream))

        return SimpleNamespace(launch=remember)

    def on(self, device: int, stream: Any) -> contextlib.AbstractContextManager[Any]:
        self.entered.append((device, stream))
        return contextlib.nullcontext()


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> RecordingRuntime:
    """The runtime in use for the test."""
    stand_in = RecordingRuntime()
    monkeypatch.setattr(launch, "current", lambda: stand_in)
    return stand_in


# ------------------------------------------------------------ a module that plays CuPy


class StandInArray:
    """cupy.ndarray as far as the launcher asks; its memory is NumPy's."""

    def __init__(self, memory: numpy.ndarray[Any, Any], device: int = 0, address: int | None = None) -> None:
        self.memory = memory
        self.shape, self.strides, self.dtype = memory.shape, memory.strides, memory.dtype
        self.data = SimpleNamespace(ptr=memory.ctypes.data if address is None else address)
        self.device = SimpleNamespace(id=device)
        self.flags = SimpleNamespace(c_contiguous=memory.flags.c_contiguous)  # CuPy's flags know no writeable

    def transpose(self, axes: Sequence[int]) -> StandInArray:
        return StandInArray(self.memory.transpose(axes), self.device.id)

    def view(self, dtype: Any) -> StandInArray:
        return StandInArray(self.memory.view(dtype), self.device.id)


StandInArray.__module__ = "cupy"
StandInArray.__qualname__ = "ndarray"


def gpu(values: Any, device: int = 0) -> Any:
    """An array on the GPU of a stand-in for CuPy."""
    return StandInArray(numpy.asarray(values), device)


class StandInStream:
    """cupy.cuda.Stream: making it current is remembered."""

    current: Any = None
    synchronized: ClassVar[list[int]] = []

    def __init__(self, pointer: int = 0) -> None:
        self.ptr = pointer

    @classmethod
    def from_external(cls, stream: Any) -> StandInStream:
        """As CuPy: by the protocol alone."""
        version, pointer = stream.__cuda_stream__()
        assert version == 0
        return cls(pointer)

    def synchronize(self) -> None:
        StandInStream.synchronized.append(self.ptr)

    def __enter__(self) -> None:
        self.before, StandInStream.current = StandInStream.current, self

    def __exit__(self, *exception: object) -> None:
        StandInStream.current = self.before


class StandInExternalStream(StandInStream):
    """cupy.cuda.ExternalStream, which is deprecated in CuPy 14: it warns, and warnings are errors here."""

    def __init__(self, pointer: int, device: int = -1) -> None:
        super().__init__(pointer)
        self.device = device
        warnings.warn("ExternalStream is deprecated", DeprecationWarning, stacklevel=2)


class CompileException(Exception):
    """cupy.cuda.compiler.CompileException."""


class CUDADriverError(RuntimeError):
    """cupy.cuda.driver.CUDADriverError."""


class StandInKernel:
    """cupy.RawKernel of a module; device shared memory of ``most`` bytes a block."""

    shared_size_bytes = 1000  # static
    most = 100_000

    def __init__(self, name: str) -> None:
        self.name = name
        self.kernel = SimpleNamespace(ptr=id(self), name=name)
        self.allowed: list[int] = []

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self.allowed[-1] if self.allowed else 49152 - self.shared_size_bytes

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        if size + self.shared_size_bytes > self.most:
            raise CUDADriverError("CUDA_ERROR_INVALID_VALUE: invalid argument")
        self.allowed.append(size)


@dataclass
class DriverLaunch:
    """The arguments of cuLaunchKernel, with a reader of what the addresses point to."""

    function: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    stream: int
    values: list[bytes]


class StandInCupy(ModuleType):
    """The module ``cupy``."""

    def __init__(self, sizes: Sequence[int] = ()) -> None:
        super().__init__("cupy")
        self.__spec__ = ModuleSpec("cupy", None)
        self.__version__ = "14.2"
        self.ndarray = StandInArray
        self.launches: list[DriverLaunch] = []
        self.compiled: list[tuple[str, tuple[str, ...], str]] = []
        self.kernels: dict[str, StandInKernel] = {}
        self.devices: list[int] = []
        self.sizes = list(sizes)  # bytes of each argument of the next launches
        self.fails: str | None = None  # what the compiler says
        self.refuses: str | None = None  # what CuPy or the driver says
        self.threads = threading.local()  # which of them have a context
        self.places: dict[int, int] = {}  # the device of memory that other libraries own, by address
        runtime_module = SimpleNamespace(
            pointerGetAttributes=lambda address: SimpleNamespace(device=self.places[address]),
            getDeviceCount=lambda: 2,
            getDevice=lambda: 1,
            getDeviceProperties=lambda number: {"name": b"NVIDIA Stand-in"},
        )
        self.cuda = SimpleNamespace(
            runtime=runtime_module,
            nvrtc=SimpleNamespace(getVersion=lambda: (12, 9)),
            compiler=SimpleNamespace(CompileException=CompileException),
            driver=SimpleNamespace(launchKernel=self._launch, CUDADriverError=CUDADriverError),
            Device=self._device,
            Stream=StandInStream,
            ExternalStream=StandInExternalStream,
            get_current_stream=lambda: StandInStream.current or StandInStream(),
        )
        self.device_now = 0

    @contextlib.contextmanager
    def _entered(self, number: int) -> Iterator[None]:
        self.devices.append(number)
        before, self.device_now = self.device_now, number
        yield
        self.device_now = before

    def _device(self, number: int = 0) -> Any:
        context: Any = self._entered(number)
        context.attributes = {"MaxSharedMemoryPerBlockOptin": StandInKernel.most}
        context.compute_capability = "90"
        context.use = lambda: setattr(self.threads, "has_context", True)
        return context

    def empty(self, shape: Sequence[int], dtype: Any) -> StandInArray:
        return StandInArray(numpy.empty(shape, dtype), self.devices[-1])

    def asarray(self, value: Any) -> StandInArray:
        """Of something that has ``__cuda_array_interface__``: a copy, unless its device is the current one."""
        described = value.__cuda_array_interface__
        address = described["data"][0]
        shared = self.places.get(address, self.device_now) == self.device_now
        memory = numpy.empty(described["shape"], described["typestr"])
        return StandInArray(memory, self.device_now, address if shared else None)

    def from_dlpack(self, value: Any) -> StandInArray:
        """Of something whose ``__dlpack_device__`` says CUDA."""
        kind, number = value.__dlpack_device__()
        if kind != 2:
            raise RuntimeError("CuPy is built against CUDA, different from the backend of the DLPack tensor")
        return StandInArray(numpy.zeros(value.shape, numpy.float32), number)

    def RawModule(self, *, code: str, options: tuple[str, ...], backend: str) -> Any:
        self.compiled.append((code, options, backend))

        def get_function(name: str) -> StandInKernel:
            if self.fails is not None:
                raise CompileException(self.fails)
            if self.refuses is not None:
                raise RuntimeError(self.refuses)
            return self.kernels.setdefault(name, StandInKernel(name))

        return SimpleNamespace(get_function=get_function)

    def _launch(self, function: int, *numbers: int) -> None:
        gx, gy, gz, bx, by, bz, shared, stream, parameters, extra = numbers
        assert extra == 0
        if not getattr(self.threads, "has_context", False):
            raise CUDADriverError("CUDA_ERROR_INVALID_CONTEXT: invalid device context")
        pointers = (ctypes.c_void_p * max(len(self.sizes), 1)).from_address(parameters)
        values = [ctypes.string_at(pointers[index] or 0, size) for index, size in enumerate(self.sizes)]
        self.launches.append(DriverLaunch(function, (gx, gy, gz), (bx, by, bz), shared, stream, values))


@pytest.fixture
def stand_in_cupy(monkeypatch: pytest.MonkeyPatch) -> StandInCupy:
    """A CuPy with two GPUs that remembers, and the cuda runtime upon it."""
    module = StandInCupy()
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(runtime, "_runtimes", {})
    monkeypatch.setattr(runtime, "_chosen", ["cuda"])
    return module
