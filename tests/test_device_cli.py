"""The command line on device "cuda": the network and its batches go there, and what is printed is plain."""

from __future__ import annotations

import json
from pathlib import Path

import host_backend
import numpy
import pytest
from cli_cases import SMALL, call, write_idx, write_images
from PIL import Image

import gpucnn_kernels
from gpucnn import device
from gpucnn.cli import info, train
from gpucnn.cli.options import device_name
from gpucnn.cli.parser import parse
from gpucnn.errors import ArgumentError
from gpucnn.ops.cpu import compiled
from gpucnn.training import RunFolder
from gpucnn_kernels.catalog import variants
from gpucnn_kernels.errors import CompileError
from gpucnn_kernels.runtime import ahead
from gpucnn_kernels.runtime.host_array import HostArray


@pytest.fixture(autouse=True)
def host_runtime(monkeypatch, tmp_path):
    host_backend.use(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPUCNN_DATA", str(write_idx(tmp_path / "data")))
    monkeypatch.delenv("GPUCNN_DEVICE", raising=False)


def records(run):
    return [(r.train_loss, r.validation_loss, r.validation_accuracy) for r in RunFolder(run).read_history()]


def test_train_evaluate_and_predict(capsys, monkeypatch):
    trained = []
    finish = train.finish
    monkeypatch.setattr(train, "finish", lambda *arguments: trained.append(arguments[2]) or finish(*arguments))
    answer = call(capsys, "train", *SMALL, "--device", "cuda")
    assert answer.status == 0, answer.errors
    assert "device: cuda (asked for; GPUCNN_KERNELS_RUNTIME=host: kernels run on the host runtime" in answer.errors
    assert "note: the variable" not in answer.errors
    assert all(type(parameter.data) is HostArray for parameter in trained[0].parameters())
    assert json.loads(Path("run/config.json").read_text())["device"]["name"] == "cuda"
    on_cpu = [*SMALL[:-1], "run-cpu"]
    assert call(capsys, "train", *on_cpu, "--device", "cpu").status == 0
    assert records("run") == records("run-cpu")

    reports = [
        json.loads(call(capsys, "evaluate", "run", "--json", "--device", d).output) for d in ("cuda", "cpu")
    ]
    assert reports[0] == reports[1]
    Image.fromarray(numpy.zeros((14, 14), numpy.uint8)).save("x.png")
    shares = [
        json.loads(call(capsys, "predict", "run", "x.png", "--json", "--device", d).output)
        for d in ("cuda", "cpu")
    ]
    assert shares[0] == shares[1]


def test_a_run_goes_on_on_another_device(capsys):
    longer = [*SMALL, "--schedule", "constant"]
    assert call(capsys, "train", *longer, "--device", "cuda").status == 0
    answer = call(capsys, "train", "--resume", "run", "--epochs", "3", "--device", "cpu")
    assert answer.status == 0, answer.errors
    assert "device: cpu (asked for)" in answer.errors
    assert len(records("run")) == 3


def test_a_folder_of_images(capsys, tmp_path):
    pictures = write_images(tmp_path / "pictures", side=32)
    answer = call(
        capsys, "train", "--data", pictures, "--model", "vgg-small", "--image-size", "32", "--width", "2",
        "--epochs", "1", "--ema", "0.9", "--device", "cuda", "--output", "run", "--workers", "1",
    )  # fmt: skip
    assert answer.status == 0, answer.errors


def test_the_device_is_checked_by_name():
    assert [device_name(name) for name in ("auto", "cpu", "cuda", "cuda:1")] == ["auto", "cpu", "cuda", "cuda:1"]
    for name in ("gpu", "cuda:", 3):
        with pytest.raises(ValueError, match="unknown device"):
            device_name(name)


def test_a_gpu_that_is_not_there(capsys):
    answer = call(capsys, "train", *SMALL, "--device", "cuda:1")
    assert answer.status == 2
    assert "'cuda:1' cannot be used: GPUCNN_KERNELS_RUNTIME=host has one device" in answer.errors


def test_float64(capsys):
    assert call(capsys, "train", *SMALL, "--device", "cuda", "--precision", "float64").status == 0


def test_info_tells_the_runtime(capsys):
    answer = call(capsys, "info", "--device", "cuda")
    assert "device    cuda (asked for; GPUCNN_KERNELS_RUNTIME=host" in answer.output
    assert "\nruntime   host\n" in answer.output
    found = json.loads(call(capsys, "info", "--json").output)["cuda"]
    assert found["runtime"] == "host"
    assert found["usable"] is True


def test_info_tells_cupy_driver_and_gpus():
    gpu = {"name": "A GPU", "compute_capability": "9.0", "memory_bytes": 80 << 30, "free_bytes": 79 << 30}
    facts = {"runtime": "cuda", "cupy": "14.2.0", "cuda": "12.9", "driver": "13.0", "gpus": [gpu, gpu]}
    assert info.describe_cuda(facts) == [
        "runtime   cuda, CuPy 14.2.0 with CUDA 12.9, a driver for CUDA 13.0",
        "cuda:0    A GPU, compute capability 9.0, 79.0 of 80.0 GiB free",
        "cuda:1    A GPU, compute capability 9.0, 79.0 of 80.0 GiB free",
    ]
    assert "no driver" in info.describe_cuda(facts | {"driver": None, "gpus": []})[0]


def test_warm_up_compiles_and_says_what(capsys, monkeypatch):
    asked = []

    def warm_up(dtypes, progress, processes):
        asked.append((dtypes, processes))
        for number, name in enumerate(("relu", "conv2d"), start=1):
            progress(name, number, 2)
        return 2

    monkeypatch.setattr(gpucnn_kernels, "warm_up", warm_up, raising=False)
    monkeypatch.setattr(ahead, "cores", lambda: 40)
    answer = call(capsys, "warm-up")
    assert answer.status == 0, answer.errors
    assert answer.output.startswith("2 modules compiled in ")
    assert "[1/2] relu\n[2/2] conv2d\n" in answer.errors
    answer = call(capsys, "warm-up", "--precision", "float64", "--processes", "3", "--quiet")
    assert answer.errors == ""
    assert asked == [(("float32",), 16), (("float64",), 3)]
    assert "there is no conv2d.cu" in failing_warm_up(capsys, monkeypatch)


def failing_warm_up(capsys, monkeypatch):
    def warm_up(**_):
        raise CompileError("there is no conv2d.cu")

    monkeypatch.setattr(gpucnn_kernels, "warm_up", warm_up, raising=False)
    answer = call(capsys, "warm-up")
    assert answer.status == 2
    return answer.errors


def test_warm_up_of_the_cpu(capsys):
    answer = call(capsys, "warm-up", "--device", "cpu")
    assert answer.status == 0, answer.errors
    if compiled.available():
        assert answer.output.startswith("the CPU's loops are compiled, in ")
    with compiled.switched(False):
        answer = call(capsys, "warm-up", "--device", "cpu")
    assert (
        answer.output
        == "nothing to compile for the CPU, NumPy does the work: they are switched off for the moment\n"
    )


def test_warm_up_without_a_gpu(capsys, monkeypatch):
    monkeypatch.delenv("GPUCNN_KERNELS_RUNTIME")
    monkeypatch.setattr(device, "cuda_status", lambda index=0: (False, "no driver"))
    assert "'cuda' cannot be used: no driver" in call(capsys, "warm-up").errors
    with pytest.raises(ArgumentError, match="unknown command 'warmup'; did you mean 'warm-up'"):
        parse(["warmup"])


@pytest.mark.slow
@pytest.mark.compiler
def test_warm_up_compiles_the_kernels_themselves(capsys):
    answer = call(capsys, "warm-up", "--quiet")
    assert answer.status == 0, answer.errors
    assert int(answer.output.split()[0]) == len(variants(["float32"]))
