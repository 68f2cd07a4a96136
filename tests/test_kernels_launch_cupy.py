"""Launches through CuPy, on a stand-in for it: what the driver would get, and what is refused before."""

from __future__ import annotations

import ctypes
import struct
from types import SimpleNamespace
from typing import Any

import numpy
import pytest

import gpucnn_kernels
from gpucnn_kernels.errors import ArgumentError, DeviceError, DtypeError
from gpucnn_kernels.launch import Call
from gpucnn_kernels.source import load, source_from_text
from tests.kernel_stand_ins import StandInCupy, StandInKernel, StandInStream, gpu, stand_in_cupy

__all__ = ["stand_in_cupy"]


def test_what_the_driver_gets(stand_in_cupy: StandInCupy) -> None:
    stand_in_cupy.sizes = [8, 8, 8, 4, 4]
    x = gpu(numpy.ones((2, 3, 4, 5), numpy.float32), device=1)
    y = gpucnn_kernels.leaky_relu_forward(x, negative_slope=0.1)
    ((code, options, backend),) = stand_in_cupy.compiled
    assert code == load("activations", (("SCALAR", "float32"),)).text
    assert (options, backend) == (("-std=c++17",), "nvrtc")
    (made,) = stand_in_cupy.launches
    assert made.function == stand_in_cupy.kernels["activation_forward"].kernel.ptr
    assert (made.grid, made.block, made.shared_bytes, made.stream) == ((1, 1, 1), (256, 1, 1), 0, 0)
    assert made.values == [
        struct.pack("P", x.data.ptr),
        struct.pack("P", y.data.ptr),
        struct.pack("q", 120),
        struct.pack("i", 2),
        struct.pack("f", 0.1),
    ]
    assert y.device.id == 1
    assert set(stand_in_cupy.devices) == {1}


def test_a_module_is_compiled_once_a_device(stand_in_cupy: StandInCupy) -> None:
    for device in (0, 1, 0, 1):
        gpucnn_kernels.relu_forward(gpu(numpy.ones(4, numpy.float32), device))
    assert len(stand_in_cupy.compiled) == 2
    gpucnn_kernels.relu_forward(gpu(numpy.ones(4)))
    assert len(stand_in_cupy.compiled) == 3


def test_a_compile_that_fails_says_what_and_shows_the_lines(stand_in_cupy: StandInCupy) -> None:
    stand_in_cupy.fails = "activations.cu(3): error: expected a ';'"
    with pytest.raises(gpucnn_kernels.CompileError) as caught:
        gpucnn_kernels.relu_forward(gpu(numpy.ones(4, numpy.float32)))
    assert "activations (SCALAR float32) does not compile for this GPU" in str(caught.value)
    assert "expected a ';'" in str(caught.value)


@pytest.mark.usefixtures("stand_in_cupy")
def test_numpy_arrays_on_the_cuda_runtime() -> None:
    words = r"x is in the host's memory \(numpy.ndarray\); move it to the GPU first \(cupy.asarray"
    with pytest.raises(DeviceError, match=words):
        gpucnn_kernels.relu_forward(numpy.ones(3, numpy.float32))
    from gpucnn_kernels.runtime.host_array import host_arrays

    with pytest.raises(DeviceError, match=r"x is in the host's memory .*HostArray"):
        gpucnn_kernels.relu_forward(host_arrays.ones(3, "float32"))
    with pytest.raises(
        DtypeError, match=r"x must be a cupy.ndarray or another array on the GPU .* got builtins.list"
    ):
        gpucnn_kernels.relu_forward([1.0])
    with pytest.raises(DeviceError, match="out is in the host's memory"):
        gpucnn_kernels.relu_forward(gpu(numpy.ones(3, numpy.float32)), out=numpy.ones(3, numpy.float32))


@pytest.mark.usefixtures("stand_in_cupy")
def test_arrays_of_other_libraries_on_the_cuda_runtime() -> None:
    numba = SimpleNamespace(__cuda_array_interface__={"shape": (0,), "typestr": "<f4", "data": (0, False)})
    assert gpucnn_kernels.relu_forward(numba).shape == (0,)
    on_gpu = SimpleNamespace(__dlpack__=None, __dlpack_device__=lambda: (2, 1), shape=(3,))
    assert gpucnn_kernels.relu_forward(on_gpu).device.id == 1
    on_cpu = SimpleNamespace(__dlpack__=None, __dlpack_device__=lambda: (1, 0), shape=(3,))
    with pytest.raises(DeviceError, match="x is in the host's memory"):
        gpucnn_kernels.relu_forward(on_cpu)
    elsewhere = SimpleNamespace(__dlpack__=None, __dlpack_device__=lambda: (7, 0), shape=(3,))
    with pytest.raises(DtypeError, match=r"cannot share its memory with CuPy: CuPy is built against CUDA"):
        gpucnn_kernels.relu_forward(elsewhere)


class Handle:
    """A stream's handle as NVIDIA's Python bindings have it."""

    def __int__(self) -> int:
        return 77


def test_streams(stand_in_cupy: StandInCupy) -> None:
    x = gpu(numpy.ones(4, numpy.float32), 1)
    handle = ctypes.c_void_p
    for stream in (
        StandInStream(77),
        SimpleNamespace(cuda_stream=77),
        SimpleNamespace(handle=handle(77)),
        SimpleNamespace(handle=Handle()),
        SimpleNamespace(__cuda_stream__=lambda: (0, 77)),
        77,
        SimpleNamespace(handle=handle(0)),
        None,
    ):
        gpucnn_kernels.relu_forward(x, stream=stream)
    assert [made.stream for made in stand_in_cupy.launches] == [77, 77, 77, 77, 77, 77, 0, 0]
    for stream in ("77", True, object()):
        with pytest.raises(
            DtypeError, match="stream must be a CuPy, PyTorch or Numba stream or the address of one"
        ):
            gpucnn_kernels.relu_forward(x, stream=stream)


def test_dynamic_shared_memory(stand_in_cupy: StandInCupy) -> None:
    """Up to 48 KB, static and dynamic, nothing is asked for; beyond, once a larger size; too much is an error."""
    source = source_from_text('extern "C" __global__ void wide(float *x) { }', "wide")
    most = StandInKernel.most - StandInKernel.shared_size_bytes
    with Call(None, x=gpu(numpy.ones(4, numpy.float32))) as call:
        for size in (0, 40_000, 48_152, 48_153, 60_000, 50_000, most):
            call.launch(source, "wide", 1, x=call["x"], shared_bytes=size)
        with pytest.raises(ArgumentError) as caught:
            call.launch(source, "wide", 1, x=call["x"], shared_bytes=most + 1)
    assert "wide: 99001 bytes of shared memory a block beside its own 1000; this GPU has 100000" in str(
        caught.value
    )
    assert stand_in_cupy.kernels["wide"].allowed == [48_153, 60_000, most]
    assert [made.shared_bytes for made in stand_in_cupy.launches] == [
        0,
        40_000,
        48_152,
        48_153,
        60_000,
        50_000,
        most,
    ]


def test_a_slow_first_compile_says_so(
    stand_in_cupy: StandInCupy, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import time

    from gpucnn_kernels.runtime import cuda

    monkeypatch.setattr(cuda, "_SAY_AFTER_SECONDS", 0.05)
    module = stand_in_cupy.RawModule

    def slow(**options: Any) -> Any:
        made = module(**options)
        quick = made.get_function

        def get_function(name: str) -> Any:
            time.sleep(0.2)
            return quick(name)

        made.get_function = get_function
        return made

    monkeypatch.setattr(stand_in_cupy, "RawModule", slow)
    gpucnn_kernels.relu_forward(gpu(numpy.ones(4, numpy.float32)))
    gpucnn_kernels.relu_forward(gpu(numpy.ones(4, numpy.float32)))
    lines = capfd.readouterr().err.splitlines()
    assert lines == ["gpucnn_kernels: compiling activations (SCALAR float32) for this GPU, once ..."]
