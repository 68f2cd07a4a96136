"""The CUDA runtime beside threads, other GPUs and other libraries, on a stand-in for CuPy.

The stand-in does here what CuPy 14.2 and the driver do by their sources: a launch in a thread without a context
fails, ``asarray`` copies what is on another device, and ``ExternalStream`` warns.
"""

from __future__ import annotations

import struct
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy
import pytest

import gpucnn_kernels
from gpucnn_kernels.errors import DeviceError, DtypeError
from tests.kernel_stand_ins import StandInCupy, StandInStream, gpu, stand_in_cupy

__all__ = ["stand_in_cupy"]


def test_the_first_launch_of_a_thread(stand_in_cupy: StandInCupy) -> None:
    """The driver wants a context in the thread that launches; nothing before the launch need have made one."""
    x, failures = gpu(numpy.ones(4, numpy.float32)), []
    gpucnn_kernels.relu_forward(x)  # compiled here

    def launch() -> None:
        try:
            gpucnn_kernels.relu_forward(x)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=launch)
    thread.start()
    thread.join()
    assert failures == []
    assert len(stand_in_cupy.launches) == 2


def test_memory_on_another_gpu_than_the_current_one_is_shared(stand_in_cupy: StandInCupy) -> None:
    """cupy.asarray copies what is on another device; a result written to the copy would be lost."""
    stand_in_cupy.places = {4096: 1, 8192: 1}
    x, out = (
        SimpleNamespace(__cuda_array_interface__={"shape": (4,), "typestr": "<f4", "data": (address, False)})
        for address in stand_in_cupy.places
    )
    stand_in_cupy.sizes = [8, 8]
    assert gpucnn_kernels.relu_forward(x, out=out) is out
    assert stand_in_cupy.launches[-1].values == [struct.pack("P", 4096), struct.pack("P", 8192)]
    assert stand_in_cupy.devices[-1] == 1


def test_jax_arrays_are_waited_for_and_never_written(
    stand_in_cupy: StandInCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = []

    class Array:
        shape = (3,)
        __cuda_array_interface__: ClassVar[dict[str, Any]] = {}  # it says nothing of a stream: not to be used
        __dlpack__ = None

        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 1

        def block_until_ready(self) -> None:
            ready.append(self)

    Array.__module__ = "jaxlib._jax"
    jax = ModuleType("jax")
    jax.dlpack = SimpleNamespace(from_dlpack=lambda array: ("jax", array))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jax", jax)
    monkeypatch.setattr(StandInStream, "synchronized", [])
    x = Array()
    kind, y = gpucnn_kernels.relu_forward(x, stream=77)
    assert (kind, y.shape) == ("jax", (3,))
    assert ready == [x]
    assert StandInStream.synchronized == [77]
    with pytest.raises(DtypeError, match="out is a JAX array, which never changes; take the result"):
        gpucnn_kernels.relu_forward(gpu(numpy.ones(3, numpy.float32), 1), out=x)
    with pytest.raises(DtypeError, match="out is a JAX array"):
        gpucnn_kernels.linear_forward(*(gpu(numpy.ones((3, 3), numpy.float32), 1),) * 2, out=matrix(Array))
    with pytest.raises(DtypeError, match="x is a JAX array"):
        gpucnn_kernels.scale(x, 2.0)


def matrix(kind: type[Any]) -> Any:
    made = kind()
    made.shape = (3, 3)
    return made


def test_a_module_that_cannot_be_loaded(stand_in_cupy: StandInCupy) -> None:
    stand_in_cupy.refuses = "Failed to find CUDA headers. Please install CUDA toolkit headers"
    with pytest.raises(DeviceError, match=r"activations .*cannot be made ready for this GPU: Failed to find CUDA"):
        gpucnn_kernels.relu_forward(gpu(numpy.ones(4, numpy.float32)))


@pytest.mark.parametrize("said_by", ["compiler", "driver"])
def test_a_gpu_that_the_compiler_does_not_know_yet(said_by: str, stand_in_cupy: StandInCupy) -> None:
    if said_by == "compiler":
        stand_in_cupy.fails = "nvrtc: error: invalid value for --gpu-architecture (-arch)"
    else:
        stand_in_cupy.refuses = "CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image is available for execution"
    words = r"this GPU, of compute capability 9\.0, is newer than the compiler, NVRTC 12\.9; install a newer CUDA"
    with pytest.raises(DeviceError, match=words):
        gpucnn_kernels.relu_forward(gpu(numpy.ones(4, numpy.float32)))
