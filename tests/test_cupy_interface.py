"""CuPy itself has what is used of it: wherever it is installed, with a GPU or without."""

from __future__ import annotations

import contextlib
import gc
import weakref
from typing import Any

import numpy
import pytest

from gpucnn.data import transfer
from gpucnn_kernels.errors import CompileError
from gpucnn_kernels.runtime.cuda import OPTIONS, _ForeignStream
from gpucnn_kernels.source import Source, load

cupy: Any = pytest.importorskip("cupy")
pytestmark = pytest.mark.skipif(
    not cupy.__version__.startswith("14."), reason="looks at what is private in CuPy 14, where there is no GPU"
)


def test_a_foreign_stream_is_taken() -> None:
    owner = object()
    stream = cupy.cuda.Stream.from_external(_ForeignStream(77, owner))
    assert isinstance(stream, cupy.cuda.Stream)
    assert (stream.ptr, stream.device_id) == (77, -1)
    assert stream._foreign_stream_ref._owner is owner, "kept while CuPy uses it"


def test_the_per_thread_stream_has_its_number() -> None:
    assert cupy.cuda.runtime.streamPerThread == transfer._PER_THREAD


def test_the_driver_is_called_with_as_many_numbers() -> None:
    with pytest.raises(TypeError, match="exactly 11 positional arguments"):
        cupy.cuda.driver.launchKernel()
    assert issubclass(cupy.cuda.driver.CUDADriverError, RuntimeError)


@pytest.mark.parametrize(
    ("name", "dtypes", "result"),
    [
        ("add", ("bfloat16", "bfloat16"), "bfloat16"),
        ("add", ("float32", "bfloat16"), "float32"),
        ("add", ("float32", "float16"), "float32"),
        ("minimum", ("bfloat16", int), "bfloat16"),
        ("minimum", ("float16", int), "float16"),
        ("less", ("bfloat16", int), "bool"),
        ("absolute", ("bfloat16",), "bfloat16"),
        ("isfinite", ("bfloat16",), "bool"),
        ("multiply", ("float32", float), "float32"),
        ("sqrt", ("float32",), "float32"),
    ],
)
def test_operations_of_layers_and_training_exist_in_these_dtypes(name: str, dtypes: Any, result: str) -> None:
    pytest.importorskip("ml_dtypes")
    weak = tuple(dtype if isinstance(dtype, type) else False for dtype in dtypes)
    found = getattr(cupy, name)._ops._guess_routine_from_in_types(tuple(map(numpy.dtype, dtypes)), weak)
    assert found is not None
    assert [str(dtype) for dtype in found.out_types] == [result]


def test_the_options_find_the_headers_and_the_compiler_takes_them() -> None:
    """As CuPy compiles: its own options after ours, its bundled headers first. Without a GPU, for one of them."""
    from cupy._core.core import assemble_cupy_compiler_options
    from cupy.cuda import compiler

    options = assemble_cupy_compiler_options(OPTIONS)
    options += ("-ftz=true", "--device-as-default-execution-space", "-arch=sm_80")
    for name, dtype in (("activations", "float16"), ("conv2d_implicit_gemm", "bfloat16")):
        source = load(name, (("SCALAR", dtype),))
        binary, _ = compiler._NVRTCProgram(source.text, "kern.cu", method="cubin").compile(options)
        assert all(kernel.encode() in binary for kernel in source.kernels)
    with pytest.raises(compiler.CompileException, match="identifier"):
        compiler._NVRTCProgram("wrong here;", "kern.cu", method="cubin").compile(options)


def test_a_source_that_does_not_compile_is_told_by_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpucnn_kernels.runtime.cuda import _CudaModule

    class Refusing:
        def get_function(self, name: str) -> Any:
            raise cupy.cuda.compiler.CompileException("kern.cu(1): error: wrong", "", "", (), "nvrtc")

    monkeypatch.setattr(cupy, "RawModule", lambda **options: Refusing())
    monkeypatch.setattr(cupy.cuda, "Device", lambda index: contextlib.nullcontext())
    source = load("activations", (("SCALAR", "float32"),))
    assert isinstance(source, Source)
    with pytest.raises(CompileError, match=r"does not compile for this GPU:\nkern\.cu\(1\): error: wrong"):
        _CudaModule(cupy, source, 0)


def test_what_a_capture_asks_for_is_there() -> None:
    cuda = cupy.cuda
    pool = cuda.MemoryPool(lambda size: cuda.MemoryPointer(cuda.Memory(size), 0))
    with cuda.using_allocator(pool.malloc):
        assert cuda.get_allocator() == pool.malloc
    assert cuda.get_allocator() != pool.malloc
    for name in ("begin_capture", "end_capture", "is_capturing"):
        assert callable(getattr(cuda.Stream, name))
    assert callable(cuda.Graph.launch)
    assert callable(cupy.get_default_memory_pool().free_all_blocks)


def test_every_new_array_lies_where_an_arena_says_and_its_views_hold_its_place() -> None:
    from gpucnn_kernels.runtime.cuda import CudaRuntime

    class Token:
        """What tells an arena that an array is gone."""

    runtime = CudaRuntime.__new__(CudaRuntime)  # without a GPU
    runtime._cupy = cupy
    memory = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(1 << 20, 1 << 16, None, 0), 0)
    asked: list[int] = []
    tokens: list[Any] = []

    def take(size: int) -> tuple[Any, int, Any]:
        token = Token()
        asked.append(size)
        tokens.append(weakref.ref(token))
        return memory, 512 * len(asked), token

    with runtime.allocating(take, 0):
        array = cupy.empty((2, 3, 4), "float32")
        nothing = cupy.empty((0, 3), "float32")
        other = cupy.ndarray((5,), "float16")
    assert asked[0] == 96
    assert asked[-1] == 10
    assert (array.data.ptr, other.data.ptr) == ((1 << 20) + 512, (1 << 20) + 512 * len(asked))
    assert array.device.id == 0
    assert nothing.size == 0
    view = array.transpose(2, 0, 1)[1:]
    del array
    assert tokens[0]() is not None, "held by the view"
    del view
    assert tokens[0]() is None
    assert tokens[-1]() is not None


def test_an_arena_records_what_cupy_makes_of_cupys_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """``alloc`` asks the allocator in force: while one is put in its place, that of before has to serve it."""
    from gpucnn_kernels.arena import Arena
    from gpucnn_kernels.runtime.cuda import CudaRuntime

    runtime = CudaRuntime.__new__(CudaRuntime)  # without a GPU
    runtime._cupy = cupy
    arena = Arena.__new__(Arena)
    arena._runtime, arena._device, arena._lifetimes = runtime, 0, None
    monkeypatch.setattr(cupy.cuda, "Device", lambda number: contextlib.nullcontext())
    made: list[int] = []

    def own(size: int) -> Any:
        made.append(size)
        return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(len(made) << 20, size, None, 0), 0)

    with cupy.cuda.using_allocator(own):
        with arena.recorded():
            kept = cupy.empty(300, "float32")
            assert kept.data.ptr == 1 << 20
        assert made == [1200, arena.size]
        with arena.in_use():
            assert cupy.empty(300, "float32").data.ptr == 2 << 20
    assert len(made) == 2


def test_a_pool_that_is_dropped_keeps_what_was_freed() -> None:
    """Why a graph's memory is given back by hand (runtime/cuda_graph.py)."""
    from cupy.cuda import memory

    class Owner:
        """What the memory under test keeps alive."""

    owner = Owner()
    alive = weakref.ref(owner)
    pool = memory.SingleDeviceMemoryPool.__new__(memory.SingleDeviceMemoryPool)
    arena = memory._Arena()
    chunk = memory._Chunk(memory.UnownedMemory(1 << 20, 1024, owner, 0), 0, 1024, arena)
    pooled = memory.PooledMemory(chunk, weakref.ref(pool))
    del owner, arena, chunk
    pooled.free()  # as an array's memory is when the array is dropped
    del pooled, pool
    gc.collect()
    assert alive() is not None
    assert callable(cupy.cuda.MemoryPool.free_all_blocks)


def test_a_new_array_like_another_lies_as_it_does_and_views_know_their_owner() -> None:
    """What keeps networks channels-last and their weights in flat buffers."""
    memory = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(1 << 20, 1 << 16, None, 0), 0)
    with cupy.cuda.using_allocator(lambda size: memory):
        flat = cupy.empty(300, "float32")
        image = flat[8:264].reshape(2, 4, 4, 8).transpose(0, 3, 1, 2)
        narrow = cupy.empty_like(image, dtype="float16")
        assert cupy.empty_like(image).strides == image.strides == (512, 4, 128, 32)
    assert narrow.strides == (256, 2, 64, 16)
    assert image.base is flat
    assert (image.flags.c_contiguous, image.transpose(0, 2, 3, 1).flags.c_contiguous) == (False, True)


def test_what_tells_of_free_memory_is_there() -> None:
    assert cupy.cuda.Device.mem_info is not None
    assert callable(cupy.get_default_memory_pool().free_bytes)


def test_arrays_that_are_sent_as_one_lie_in_it_and_keep_it() -> None:
    class Owner:
        """Of the memory, which is given back when it goes."""

    owner = Owner()
    kept = weakref.ref(owner)
    memory = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(1 << 20, 1 << 16, owner, 0), 0)
    block = cupy.ndarray((1024,), numpy.uint8, memptr=memory)
    del owner, memory
    parts = [
        transfer.Part(0, (5, 3, 4, 2), numpy.dtype("uint8")),
        transfer.Part(256, (5, 2), numpy.dtype("int32")),
        transfer.Part(512, (5,), numpy.dtype("bool")),
        transfer.Part(768, (5, 3), numpy.dtype("float64")),
        transfer.Part(1024, (0, 2), numpy.dtype("float32")),
    ]
    arrays = [part.of(block) for part in parts]
    del block
    for part, array in zip(parts, arrays, strict=True):
        assert array.shape == part.shape
        assert array.dtype == part.dtype
        assert array.flags.c_contiguous
        assert array.size == 0 or array.data.ptr == (1 << 20) + part.place
    pixels = arrays[0].transpose(0, 2, 3, 1)  # as images in planes are handed to the kernel
    assert pixels.shape == (5, 4, 2, 3)
    assert pixels.strides == (24, 2, 1, 8)
    del arrays, array
    assert kept() is not None
    del pixels
    assert kept() is None


def test_cublas_itself_is_reached_through_cupys_module() -> None:
    """Each function is there and takes its arguments: without a handle it answers "not initialized", 1."""
    from cupy.cuda import cublas

    from gpucnn_kernels.runtime.cublas import beside

    library = beside(cublas.__file__)
    assert library is not None
    sizes, matrix, batched = (0, 0, 2, 2, 2), (0, 0, 2), (0, 0, 2, 4)
    calls = {
        "SetStream": lambda: library.prepare(0, 0, 0, 0),
        "GetMathMode": lambda: library.getMathMode(0),
        "SetMathMode": lambda: library.setMathMode(0, 16),
        "GemmEx": lambda: library.gemmEx(0, *sizes, 0, *matrix, *matrix, 0, *matrix, 68, -1),
        "GemmStridedBatchedEx": lambda: library.gemmStridedBatchedEx(
            0, *sizes, 0, *batched, *batched, 0, *batched, 3, 68, -1
        ),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=f"cublas{name} answered with status 1 "):
            call()


def test_what_tuning_and_the_benchmark_time_and_ask_by() -> None:
    with pytest.raises(TypeError, match="exactly 19 positional arguments"):
        cupy.cuda.cublas.gemmEx()
    for place, names in (
        (cupy.cuda.Event, ("record", "synchronize")),
        (cupy.cuda, ("get_elapsed_time", "get_current_stream")),
        (cupy.cuda.MemoryPointer, ("memset_async", "copy_from_device_async")),
        (cupy.cuda.Device, ("attributes",)),
        (cupy.cuda.runtime, ("getDeviceProperties", "driverGetVersion", "runtimeGetVersion")),
    ):
        assert [name for name in names if not hasattr(place, name)] == []
    # gpucnn_kernels.gpu asks for these by what is left of their names.
    for name in ("ClockRate", "MemoryClockRate", "GlobalMemoryBusWidth", "MultiProcessorCount"):
        assert hasattr(cupy.cuda.runtime, f"cudaDevAttr{name}")
