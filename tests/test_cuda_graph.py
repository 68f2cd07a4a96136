"""Capturing on a GPU, on stand-ins: what CuPy is asked for, in which order, and what is held on to afterwards."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy
import pytest

from gpucnn_kernels.runtime import cuda_graph
from gpucnn_kernels.runtime.cublas import Cublas, beside, workspace_bytes
from tests.played_cublas import PlayedCublas


class Memory:
    """cupy.cuda.Memory and MemoryPointer in one."""

    def __init__(self, size: Any, offset: int = 0) -> None:
        self.size = size


class PlayedCupy:
    """CuPy as far as a capture asks, by the sources of its version 14: notes what happens."""

    def __init__(self, refuses: bool = False) -> None:
        self.events: list[str] = []
        self.allocators: list[Any] = []
        self.made: list[Any] = []
        played = self

        class Stream:
            def __init__(self, non_blocking: bool) -> None:
                assert non_blocking, "the default stream's work would wait for a blocking one's"

            def __enter__(self) -> None:
                played.events.append("stream")

            def __exit__(self, *error: Any) -> None:
                played.events.append("stream left")

            def begin_capture(self) -> None:
                played.events.append("begin")

            def end_capture(self) -> Any:
                played.events.append("end")
                if refuses:
                    raise RuntimeError("cudaErrorStreamCaptureInvalidated: operation failed")
                return SimpleNamespace(launch=lambda: played.events.append("launch"))

        class MemoryPool:
            def __init__(self, allocator: Any) -> None:
                self._allocator = allocator
                played.made.append(weakref.ref(self))

            def malloc(self, size: int) -> Any:
                return self._allocator(size)

            def free_all_blocks(self) -> None:
                played.events.append("give back")

        self.cuda = SimpleNamespace(
            Device=self._noted("device"),
            Stream=Stream,
            MemoryPool=MemoryPool,
            Memory=Memory,
            MemoryPointer=Memory,
            using_allocator=self._using_allocator,
        )

    def get_default_memory_pool(self) -> Any:
        return SimpleNamespace(free_all_blocks=lambda: self.events.append("free blocks"))

    def _noted(self, name: str) -> Any:
        @contextlib.contextmanager
        def noted(number: int) -> Iterator[None]:
            self.events.append(f"{name} {number}")
            yield
            self.events.append(f"{name} left")

        return noted

    @contextlib.contextmanager
    def _using_allocator(self, allocator: Any) -> Iterator[None]:
        self.allocators.append(allocator)
        try:
            yield
        finally:
            self.allocators.pop()

    def empty(self, size: int) -> Any:
        """An array's memory, by the allocator in use."""
        memory = self.allocators[-1](size)
        self.made.append(weakref.ref(memory))
        return memory


def test_a_capture_and_its_launches() -> None:
    cupy, kept = PlayedCupy(), Memory(1)
    alive = weakref.ref(kept)

    def run() -> str:
        cupy.events.append("work")
        cupy.empty(4096)
        return "result"

    graph, result = cuda_graph.capture(cupy, run, [kept], 3)
    del kept
    assert result == "result"
    assert cupy.events == [
        *("device 3", "free blocks", "stream", "begin", "work", "end", "stream left", "device left"),
    ]
    assert cupy.allocators == []
    assert alive() is not None
    assert all(made() is not None for made in cupy.made), "the pool and what it gave live as long as the graph"
    graph.launch()
    graph.launch()
    assert cupy.events[-2:] == ["launch", "launch"]
    del graph
    assert cupy.events[-4:] == ["launch", "device 3", "give back", "device left"], "CuPy's pool would keep it"
    assert alive() is None
    assert all(made() is None for made in cupy.made)


@pytest.mark.parametrize("error", [RuntimeError("the current stream is capturing"), KeyboardInterrupt()])
@pytest.mark.parametrize("refuses", [False, True])
def test_a_capture_that_breaks_off_is_ended(error: BaseException, refuses: bool) -> None:
    """A stream left in capture would take all later work for the graph's; the first error is the one to tell."""
    cupy = PlayedCupy(refuses)

    def run() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        cuda_graph.capture(cupy, run, [], 0)
    assert caught.value is error
    assert cupy.events[3:6] == ["begin", "end", "stream left"]
    assert cupy.allocators == []
    del caught
    error.__traceback__ = None  # which holds what the capture had
    assert "give back" in cupy.events


def test_a_graph_that_cuda_refuses() -> None:
    cupy = PlayedCupy(refuses=True)
    with pytest.raises(RuntimeError, match="cudaErrorStreamCaptureInvalidated"):
        cuda_graph.capture(cupy, lambda: None, [], 0)
    assert cupy.allocators == []


# ------------------------------------------------------------ cuBLAS itself


class PlayedLibrary:
    """libcublas on the host's memory: its functions under their own names, each with a status."""

    def __init__(self, missing: str = "") -> None:
        self.played, self.called, self.status = PlayedCublas(), [], 0
        names = ["SetStream_v2", "SetWorkspace_v2", "GetMathMode", "SetMathMode", "GemmEx", "GemmStridedBatchedEx"]
        for name in (f"cublas{name}" for name in names if name != missing):
            setattr(self, name, self._function(name))

    def _function(self, name: str) -> Any:
        def function(*arguments: Any) -> int:
            self.called.append((name, arguments))
            assert len(arguments) == len(function.argtypes)
            if name == "cublasGetMathMode":
                arguments[1]._obj.value = self.played.mode
            elif name == "cublasSetMathMode":
                self.played.setMathMode(*arguments)
            elif name == "cublasGemmEx":
                self.played.gemmEx(*arguments)
            elif name == "cublasGemmStridedBatchedEx":
                self.played.gemmStridedBatchedEx(*arguments)
            return self.status

        return function


@pytest.mark.parametrize("batches", [1, 3])
def test_products_by_cublas_itself(batches: int) -> None:
    from gpucnn_kernels import runtime
    from gpucnn_kernels.arrays import device_array
    from gpucnn_kernels.matmul import multiply_by_cublas

    library = PlayedLibrary()
    library.played.mode = 3
    direct, random = Cublas(library), numpy.random.default_rng(0)
    a, b = random.random((batches, 3, 4), "float32"), random.random((batches, 4, 2), "float32")
    out = numpy.empty((batches, 3, 2), "float32")
    with runtime.using("host") as host:
        arrays = [device_array(host, array, name) for array, name in ((a, "a"), (b, "b"), (out, "out"))]
    direct.prepare(77, 5, 4096, 1 << 22)
    multiply_by_cublas(direct, 77, *arrays, False)
    assert numpy.abs(out - a @ b).max() <= 1e-6
    assert [arguments for name, arguments in library.called[:2]] == [(77, 5), (77, 4096, 1 << 22)]
    assert (library.played.mode, library.played.modes) == (3, [16])


def test_what_cublas_refuses_is_an_error() -> None:
    library = PlayedLibrary()
    direct, library.status = Cublas(library), 15
    with pytest.raises(RuntimeError, match="cublasSetStream answered with status 15"):
        direct.prepare(77, 5, 4096, 1 << 22)


def test_where_cublas_cannot_be_reached() -> None:
    assert beside(None) is None
    assert beside("/nowhere/cublas.so") is None
    with pytest.raises(AttributeError):
        Cublas(PlayedLibrary(missing="GemmEx"))


def test_the_workspace_is_as_large_as_cublas_own() -> None:
    sizes = [workspace_bytes(capability) for capability in ("75", "80", "89", "90", "100", "120")]
    assert sizes == [size << 20 for size in (4, 4, 4, 32, 32, 32)]
