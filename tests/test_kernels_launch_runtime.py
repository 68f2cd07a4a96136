"""The runtime that launches: by which name it is chosen, and what is said where CuPy or a GPU is missing."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy
import pytest

import gpucnn_kernels
from gpucnn_kernels import launch, runtime
from gpucnn_kernels.errors import ArgumentError, DeviceError
from gpucnn_kernels.source import FOLDER
from tests.kernel_stand_ins import RecordingRuntime, StandInCupy, gpu, recording, stand_in_cupy

__all__ = ["recording", "stand_in_cupy"]


def refusal() -> str:
    with pytest.raises(DeviceError) as caught:
        gpucnn_kernels.relu_forward(numpy.ones(3, numpy.float32))
    return str(caught.value)


def test_no_cupy_says_which_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cupy" else find(name))
    monkeypatch.setattr(runtime, "_runtimes", {})
    monkeypatch.setattr(runtime, "_chosen", ["cuda"])
    message = refusal()
    assert "no GPU can be used: CuPy is not installed" in message
    assert "pip install 'gpucnn[cuda12]'" in message
    assert "'gpucnn[cuda13]'" in message
    assert "GPUCNN_KERNELS_RUNTIME=host" in message


def test_a_cupy_array_without_a_gpu(stand_in_cupy: StandInCupy) -> None:
    def fail() -> int:
        raise RuntimeError(
            "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"
        )

    stand_in_cupy.cuda.runtime.getDeviceCount = fail
    with pytest.raises(DeviceError) as caught:
        gpucnn_kernels.relu_forward(gpu(numpy.ones(3, numpy.float32)))
    message = str(caught.value)
    assert "CuPy 14.2 finds no usable NVIDIA driver or GPU: cudaErrorInsufficientDriver" in message
    assert "there is no driver, or it is older than CuPy's CUDA: update it, or install 'gpucnn[cuda12]'" in message


def test_cupy_with_no_gpu_in_the_machine_and_with_no_nvrtc(stand_in_cupy: StandInCupy) -> None:
    stand_in_cupy.cuda.runtime.getDeviceCount = lambda: 0
    assert "CuPy 14.2 works, but there is no NVIDIA GPU" in refusal()
    stand_in_cupy.cuda.runtime.getDeviceCount = lambda: 1

    def fail() -> tuple[int, int]:
        raise OSError("libnvrtc.so.12: cannot open shared object file")

    stand_in_cupy.cuda.nvrtc.getVersion = fail
    message = refusal()
    assert "NVRTC, which compiles the kernels, cannot be loaded: libnvrtc.so.12" in message
    assert "pip install 'gpucnn[cuda12]'" in message


def test_a_cupy_that_does_not_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "cupy.py").write_text("raise ImportError('libcublas.so.12: no such file\\nmore lines')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(runtime, "_runtimes", {})
    monkeypatch.setattr(runtime, "_chosen", ["cuda"])
    message = refusal()
    assert "CuPy does not import: libcublas.so.12: no such file; reinstall one of" in message
    (tmp_path / "cupy.py").write_text("open('/no/such/folder/.cupy')\n")
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    message = refusal()
    assert "No such file or directory: '/no/such/folder/.cupy'; it keeps what it compiles in ~/.cupy" in message
    assert "set CUPY_CACHE_DIR" in message
    assert "reinstall" not in message


def test_the_runtime_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_chosen", [])
    monkeypatch.setenv(runtime.VARIABLE, "host")
    assert runtime.current().name == "host"
    monkeypatch.setenv(runtime.VARIABLE, "gpu")
    with pytest.raises(ArgumentError, match="GPUCNN_KERNELS_RUNTIME must be one of cuda, host, got 'gpu'"):
        runtime.current_name()
    with pytest.raises(ArgumentError, match="a runtime is one of cuda, host, got 'gpu'"), runtime.using("gpu"):
        pass
    monkeypatch.delenv(runtime.VARIABLE)
    assert runtime.current_name() == "cuda"


def test_importing_loads_no_gpu_no_compiler_and_no_numpy() -> None:
    code = (
        "import sys, gpucnn_kernels\n"
        "heavy = {'cupy', 'numpy', 'torch', 'gpucnn_kernels.runtime.cuda', 'gpucnn_kernels.runtime.host'}\n"
        "print(sorted(heavy & {*sys.modules}), sorted(set(gpucnn_kernels.__all__) - set(dir(gpucnn_kernels))))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == "[] []"


def test_an_unknown_name_of_the_package() -> None:
    with pytest.raises(AttributeError, match="module 'gpucnn_kernels' has no attribute 'conv3d'"):
        _ = gpucnn_kernels.conv3d


def test_the_launcher_uses_the_runtime_in_use(recording: RecordingRuntime) -> None:
    assert launch.current() is recording
