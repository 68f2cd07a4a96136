"""The CUDA runtime beside threads, other GPUs and other libraries, on a stand-in for CuPy.

The stand-in does here what CuPy 14.2 and the driver do by their sources: a launch in a thread without a context
fails, ``asarray`` copies what is on another device, and ``ExternalStream`` warns.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy
import pytest

import gpucnn_kernels
from gpucnn_kernels.errors import DeviceError
from tests.kernel_stand_ins import StandInArray, StandInCupy, stand_in_cupy

__all__ = ["stand_in_cupy"]


def gpu(values: Any, device: int = 0) -> Any:
    return StandInArray(numpy.asarray(values), device)


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


def test_a_module_that_cannot_be_loaded(stand_in_cupy: StandInCupy) -> None:
    stand_in_cupy.refuses = "Failed to find CUDA headers. Please install CUDA toolkit headers"
    with pytest.raises(DeviceError, match=r"activations .*cannot be made ready for this GPU: Failed to find CUDA"):
        gpucnn_kernels.relu_forward(gpu(numpy.ones(4, numpy.float32)))
