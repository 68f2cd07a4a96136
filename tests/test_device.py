"""The choice of a device, with CuPy absent, broken, without a GPU, and working; and arrays that change devices."""

import contextlib
import importlib.metadata
import importlib.util
import sys
import types

import numpy
import pytest

from gpucnn import device, ops
from gpucnn.errors import ArgumentError, DeviceError, DtypeError
from gpucnn_kernels.runtime.host_array import HostArray, host_arrays


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("GPUCNN_DEVICE", raising=False)
    monkeypatch.delenv("GPUCNN_KERNELS_RUNTIME", raising=False)
    monkeypatch.setattr(device, "_checked", set())


def raises(error):
    def function(*_):
        raise error

    return function


@pytest.fixture
def installed(monkeypatch):
    """Pretend that a CuPy of the given behaviour is there."""

    def install(
        *,
        found=True,
        wheels=("cupy-cuda12x",),
        count=1,
        count_error=None,
        driver=12090,
        runtime=12090,
        capability=(9, 0),
        nvrtc_error=None,
        cublas_error=None,
    ):
        distributions = [types.SimpleNamespace(metadata={"Name": name}) for name in (*wheels, "numpy")]
        monkeypatch.setattr(importlib.metadata, "distributions", lambda: distributions)
        find, spec = importlib.util.find_spec, object() if found else None  # coverage asks for its own packages
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *more: spec if name == "cupy" else find(name, *more)
        )
        properties = {"name": b"A GPU", "major": capability[0], "minor": capability[1]}

        class Cuda(types.SimpleNamespace):
            @property
            def cublas(self):
                return None if cublas_error is None else raises(cublas_error)()

        cupy = types.SimpleNamespace(
            __version__="14.2.0",
            cuda=Cuda(
                runtime=types.SimpleNamespace(
                    getDeviceCount=raises(count_error) if count_error else lambda: count,
                    getDeviceProperties=lambda index: properties,
                    driverGetVersion=lambda: driver,
                    runtimeGetVersion=lambda: runtime,
                    memGetInfo=lambda: (3 << 30, 4 << 30),
                ),
                nvrtc=types.SimpleNamespace(getVersion=raises(nvrtc_error) if nvrtc_error else lambda: (12, 9)),
                Device=lambda index: contextlib.nullcontext(),
            ),
        )
        monkeypatch.setitem(sys.modules, "cupy", cupy if found else None)

    return install


def test_cpu_on_request():
    assert device.choose_device("cpu") == device.Device("cpu", "asked for")


def test_environment_is_second_to_the_argument(monkeypatch):
    monkeypatch.setenv("GPUCNN_DEVICE", "cpu")
    assert device.choose_device() == device.Device("cpu", "set by GPUCNN_DEVICE")
    monkeypatch.setenv("GPUCNN_DEVICE", "tpu")
    assert device.choose_device("cpu").name == "cpu"
    with pytest.raises(ArgumentError, match=r"unknown device 'tpu'.*there is auto, cpu, cuda"):
        device.choose_device()


def test_auto_falls_back_and_says_why():
    usable, reason = device.cuda_status()
    chosen = device.choose_device("auto")
    assert chosen.name == ("cuda" if usable else "cpu")
    assert chosen.reason == f"auto: {reason}"
    assert device.choose_device() == chosen


DRIVER_ERROR = RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"found": False}, r"CuPy is not installed; pip install 'gpucnn\[cuda12\]' .* or 'gpucnn\[cuda13\]'"),
        (
            {"wheels": ("cupy-cuda12x", "cupy-cuda13x")},
            r"cupy-cuda12x and cupy-cuda13x are both installed .*pip uninstall -y cupy-cuda12x cupy-cuda13x, then",
        ),
        ({"count_error": DRIVER_ERROR, "driver": 0}, "finds no usable NVIDIA GPU or driver; install the driver"),
        (
            {"count_error": DRIVER_ERROR, "driver": 12040, "runtime": 13000},
            r"serves CUDA 12\.4, older than CuPy's CUDA 13; update it to 580 or newer, or install 'gpucnn\[cuda12",
        ),
        (
            {"count_error": DRIVER_ERROR, "driver": 11080},
            r"serves CUDA 11\.8, older than CuPy's CUDA 12; update it",
        ),
        ({"count_error": RuntimeError("cudaErrorUnknown\nmore")}, "does not work here: cudaErrorUnknown"),
        ({"count": 0}, "there is no NVIDIA GPU"),
        (
            {"capability": (7, 0), "runtime": 13000, "driver": 13000},
            r"A GPU has compute capability 7\.0, and CUDA 13 needs 7\.5; install 'gpucnn\[cuda12\]' instead",
        ),
        ({"capability": (3, 5)}, r"compute capability 3\.5, and CUDA 12 needs 5\.0; it is too old"),
        (
            {"nvrtc_error": RuntimeError("libnvrtc.so.12: cannot open")},
            r"NVRTC.* cannot be loaded \(libnvrtc\.so\.12: cannot open\).*pip install 'gpucnn\[cuda12\]'",
        ),
        (
            {"cublas_error": ImportError("libcublas.so.12: cannot open"), "runtime": 13000, "driver": 13000},
            r"cuBLAS.* cannot be loaded \(libcublas\.so\.12: cannot open\).*pip install 'gpucnn\[cuda13\]'",
        ),
    ],
)
def test_cuda_that_cannot_be_used_is_an_error_with_the_reason(installed, state, reason):
    installed(**state)
    with pytest.raises(DeviceError, match=reason):
        device.choose_device("cuda")
    assert device.choose_device("auto").name == "cpu"
    with pytest.raises(DeviceError, match=reason):
        device.to_device(numpy.zeros(3), "cuda")


def test_a_cupy_that_does_not_import_is_told(installed, monkeypatch, tmp_path):
    installed()
    (tmp_path / "cupy.py").write_text("raise ImportError('libcublas.so.12: cannot open shared object file')")
    monkeypatch.delitem(sys.modules, "cupy")
    monkeypatch.syspath_prepend(tmp_path)
    usable, reason = device.cuda_status()
    assert not usable
    assert "CuPy does not import: libcublas.so.12" in reason
    assert "gpucnn[cuda12]" in reason
    (tmp_path / "cupy.py").write_text("open('/no/such/folder/.cupy')")
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    _, reason = device.cuda_status()
    assert reason.endswith("set CUPY_CACHE_DIR to a folder that can be written")


def test_a_working_gpu_is_chosen(installed):
    installed()
    assert device.choose_device("cuda") == device.Device("cuda", "asked for; A GPU found")
    assert device.choose_device() == device.Device("cuda", "auto: A GPU found")
    facts = device.cuda_facts()
    assert (facts["driver"], facts["cuda"], facts["cupy"]) == ("12.9", "12.9", "14.2.0")
    assert facts["gpus"] == [
        {"name": "A GPU", "compute_capability": "9.0", "memory_bytes": 4 << 30, "free_bytes": 3 << 30}
    ]


def test_one_of_several_gpus_is_named_by_its_number(installed):
    installed(count=2)
    chosen = device.choose_device("cuda:1")
    assert (chosen.name, chosen.index, str(chosen)) == ("cuda", 1, "cuda:1")
    assert str(device.choose_device("cuda:0")) == "cuda"
    with pytest.raises(
        DeviceError, match=r"'cuda:2' cannot be used: .*there is 2 GPUs, cuda:0 to cuda:1, no cuda:2"
    ):
        device.choose_device("cuda:2")
    for name in ("cuda:", "cuda:x", "cuda:-1", "gpu", 3, None):
        with pytest.raises(ArgumentError, match="unknown device"):
            device.split_name(name)


def test_the_host_runtime_is_taken_on_request_alone(monkeypatch):
    monkeypatch.setenv("GPUCNN_KERNELS_RUNTIME", "host")
    chosen = device.choose_device("cuda")
    assert chosen.name == "cuda"
    assert "on the CPU, for tests and not for speed" in chosen.reason
    chosen = device.choose_device("auto")
    assert chosen.name == "cpu"
    assert "host runtime" in chosen.reason
    with pytest.raises(DeviceError, match="one device, cuda:0, and no cuda:1"):
        device.choose_device("cuda:1")
    assert device.cuda_facts()["runtime"] == "host"
    monkeypatch.setenv("GPUCNN_KERNELS_RUNTIME", "tpu")
    with pytest.raises(ArgumentError, match="GPUCNN_KERNELS_RUNTIME must be one of"):
        device.choose_device("auto")


def test_arrays_go_to_a_device_and_back(monkeypatch):
    monkeypatch.setenv("GPUCNN_KERNELS_RUNTIME", "host")
    plain = numpy.arange(6, dtype=numpy.float32).reshape(2, 3)
    moved = device.to_device(plain, "cuda")
    assert type(moved) is HostArray
    assert moved.dtype == numpy.float32
    moved[0, 0] = 9
    assert plain[0, 0] == 0, "a transfer copies"
    assert device.to_device(moved, "cuda:0") is moved
    assert device.to_device(plain, "cpu") is plain
    back = device.to_cpu(moved)
    assert type(back) is numpy.ndarray
    assert back.tolist() == [[9, 1, 2], [3, 4, 5]]
    assert (device.device_of(plain), device.device_of(moved)) == ("cpu", "cuda:0")
    assert device.to_cpu([1, 2]).tolist() == [1, 2]
    device.copy_into(moved, numpy.zeros((2, 3)))
    assert device.to_cpu(moved).tolist() == [[0, 0, 0], [0, 0, 0]]
    device.copy_into(plain, moved)
    assert plain.tolist() == [[0, 0, 0], [0, 0, 0]]
    device.synchronize("cuda")
    device.synchronize("cpu")
    with pytest.raises(ArgumentError, match="'auto' is no place for an array"):
        device.to_device(plain, "auto")
    with pytest.raises(DeviceError, match=r"one is on cpu, the other on cuda:0"):
        device.require_same_device(plain, moved, "one is on {array}, the other on {other}")


def test_the_array_chooses_module_and_backend(monkeypatch):
    host = host_arrays.zeros(3)
    assert ops.array_module(host) is host_arrays
    assert ops.array_module(numpy.zeros(3)) is numpy
    memory_map = numpy.zeros(3).view(numpy.memmap)
    assert ops.array_module(memory_map) is numpy
    assert ops.backend_of(memory_map) is ops.cpu
    backend = types.ModuleType("gpucnn.ops.cuda")
    monkeypatch.setitem(sys.modules, "gpucnn.ops.cuda", backend)
    assert ops.backend_of(host) is backend
    for function in (ops.backend_of, ops.array_module, device.device_of):
        with pytest.raises(DtypeError, match=r"got builtins\.list; use numpy\.asarray"):
            function([1.0])


class Gpus:
    """A stand-in for the module ``cupy`` on a machine of two GPUs: which array is where, and nothing else."""

    __version__ = "14.2.0"

    def __init__(self):
        self.current, self.synchronized = [0], []
        gpus = self

        class Array:
            """What CuPy's ndarray is: made on the current device, and copied there."""

            def __init__(self, values):
                self.values, self.device = numpy.array(values), types.SimpleNamespace(id=gpus.current[-1])

            def get(self):
                assert gpus.current[-1] == self.device.id, "CuPy takes the current device's stream"
                return self.values.copy()

            def copy(self):
                return Array(self.values)

            def __setitem__(self, index, value):
                assert type(value) is Array, "CuPy refuses NumPy's arrays"
                assert value.device.id == self.device.id == gpus.current[-1]
                self.values[index] = value.values

        class Device:
            def __init__(self, index):
                self.index = index

            def __enter__(self):
                gpus.current.append(self.index)

            def __exit__(self, *_):
                gpus.current.pop()

            def synchronize(self):
                gpus.synchronized.append(self.index)

        self.ndarray, self.cuda = Array, types.SimpleNamespace(Device=Device)

    def asarray(self, values):
        return values if isinstance(values, self.ndarray) else self.ndarray(values)


@pytest.fixture
def gpus(monkeypatch):
    module = Gpus()
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(device, "cuda_status", lambda index=0: (index < 2, "there are two"))
    return module


def test_an_array_goes_to_the_gpu_that_is_named(gpus):
    plain = numpy.arange(3.0)
    first, second = device.to_device(plain, "cuda"), device.to_device(plain, "cuda:1")
    assert (device.device_of(first), device.device_of(second)) == ("cuda:0", "cuda:1")
    assert device.module_of(first) is gpus
    assert device.to_device(first, "cuda:0") is first
    moved = device.to_device(first, "cuda:1")
    assert device.device_of(moved) == "cuda:1"
    assert device.to_cpu(moved).tolist() == [0, 1, 2]
    with pytest.raises(DeviceError, match="one is on cuda:0, the other on cuda:1"):
        device.require_same_device(first, second, "one is on {array}, the other on {other}")
    with pytest.raises(DeviceError, match="'cuda:2' cannot be used: there are two"):
        device.to_device(plain, "cuda:2")
    device.copy_into(second, first)
    device.copy_into(second, numpy.zeros(3))
    assert device.to_cpu(second).tolist() == [0, 0, 0]
    device.copy_into(plain, moved)
    device.synchronize("cuda:1")
    assert gpus.synchronized == [1]
    assert gpus.current == [0], "nothing stays switched over"
    with device.on_device("cuda:1"):
        assert gpus.current[-1] == 1
    with device.on_device("cpu"):
        assert gpus.current == [0]


def test_a_host_array_of_another_runtime_is_brought_over(gpus):
    found = device.to_device(host_arrays.ones(2), "cuda:1")
    assert type(found) is gpus.ndarray
    assert device.device_of(found) == "cuda:1"
