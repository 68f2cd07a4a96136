"""The choice of a device, with CuPy absent, broken, without a GPU, and working."""

import importlib.util
import sys
import types

import pytest

from gpucnn import device
from gpucnn.errors import ArgumentError, DeviceError


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("GPUCNN_DEVICE", raising=False)


@pytest.fixture
def installed(monkeypatch):
    """Pretend that the CUDA operations and a CuPy of the given behaviour are there."""

    def install(available=True, names=(b"A GPU",), error=None, found=True):
        def find_spec(name):
            return object() if name == "gpucnn.ops.cuda" or found else None

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)

        def is_available():
            if error:
                raise error
            return available

        cuda = types.SimpleNamespace(
            is_available=is_available,
            runtime=types.SimpleNamespace(getDeviceProperties=lambda index: {"name": names[index]}),
        )
        monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda))

    return install


def test_cpu_on_request():
    assert device.choose_device("cpu") == device.Device("cpu", "asked for")


def test_environment_is_second_to_the_argument(monkeypatch):
    monkeypatch.setenv("GPUCNN_DEVICE", "cpu")
    assert device.choose_device() == device.Device("cpu", "set by GPUCNN_DEVICE")
    monkeypatch.setenv("GPUCNN_DEVICE", "tpu")
    assert device.choose_device("cpu").name == "cpu"
    with pytest.raises(ArgumentError, match="unknown device 'tpu'; choose one of auto, cpu, cuda"):
        device.choose_device()


def test_auto_falls_back_and_says_why():
    usable, reason = device.cuda_status()
    chosen = device.choose_device("auto")
    assert chosen.name == ("cuda" if usable else "cpu")
    assert chosen.reason == f"auto: {reason}"
    assert device.choose_device() == chosen


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"found": False}, "CuPy is not installed"),
        ({"available": False}, "finds no usable NVIDIA GPU"),
        ({"error": RuntimeError("driver too old")}, "CuPy does not work here: driver too old"),
    ],
)
def test_cuda_that_cannot_be_used_is_an_error_with_the_reason(installed, state, reason):
    installed(**state)
    with pytest.raises(DeviceError, match=reason):
        device.choose_device("cuda")
    assert device.choose_device("auto").name == "cpu"


def test_without_cuda_operations_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match="no CUDA operations"):
        device.choose_device("cuda")


def test_a_working_gpu_is_chosen(installed):
    installed()
    assert device.choose_device("cuda") == device.Device("cuda", "asked for; A GPU found")
    assert device.choose_device() == device.Device("cuda", "auto: A GPU found")
