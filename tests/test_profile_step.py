"""scripts/profile_step.py: every launch of a step is counted once and timed, and nothing stays changed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.append(str(SCRIPTS))  # the benchmark's own parts are imported from there

from benchmarking.gpu_profile import Profiler, table  # noqa: E402

import gpucnn_kernels  # noqa: E402
from gpucnn_kernels import conv2d_forward_paths, launch, matmul  # noqa: E402
from tests.kernel_accuracy import on_the_host  # noqa: E402

__all__ = ["on_the_host"]


class Ticks:
    """A clock that every event moves on by a millisecond."""

    def __init__(self) -> None:
        self.now = 0

    def event(self) -> Ticks.Event:
        return Ticks.Event(self)

    class Event:
        def __init__(self, clock: Ticks) -> None:
            self.clock = clock

        def record(self) -> None:
            self.clock.now += 1
            self.at = self.clock.now


def test_launches_are_between_events_and_added_up() -> None:
    clock = Ticks()
    busy: list[float] = []
    profiler = Profiler(clock.event, lambda a, b: b.at - a.at, busy.append, lambda: None)
    x, weight = numpy.ones((2, 3, 5, 5), "float32"), numpy.ones((4, 3, 3, 3), "float32")

    def step() -> None:
        for _ in range(2):
            gpucnn_kernels.conv2d_forward(x, weight, algorithm="implicit_gemm")
        gpucnn_kernels.conv2d_forward(x, weight, algorithm="im2col")

    before = launch.Call.launch, matmul.matmul, conv2d_forward_paths.matmul
    entries, whole = profiler.profile(step, 3)
    assert (launch.Call.launch, matmul.matmul, conv2d_forward_paths.matmul) == before
    assert len(busy) == 3
    assert {(entry.name, entry.launches) for entry in entries} == {
        ("conv2d_implicit_gemm_small", 2), ("im2col_planes", 1), ("matrix product", 1),
    }  # fmt: skip
    by_name = {entry.name: entry for entry in entries}
    product = by_name["conv2d_implicit_gemm_small"]
    assert product.bytes == 2 * 4 * (x.size + weight.size + 2 * 4 * 3 * 3)
    assert product.shape == (2, 3, 5, 5)
    assert product.samples == [0.002] * 3  # a tick each
    assert entries[0] is product
    assert whole == pytest.approx(0.009)  # eight events of four launches, and the last
    page = table(entries, whole).splitlines()
    assert page[2] == "| `conv2d_implicit_gemm_small` | 2x3x5x5 | 2 | 2000.0 | 22.2% | 0.0 | 0.00 |"
    assert page[-2].startswith("| everything else, and between | | | 5000.0 | 55.6%")
    assert page[-1].startswith("| the step | | 4 | 9000.0 | 100%")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "profile_step.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_command(tmp_path: Path) -> None:
    done = run("lenet5 28 N128", "--runtime", "host", "--steps", "2", "--json", str(tmp_path / "profile.json"))
    assert done.returncode == 0, done.stderr
    assert "| `conv2d_max_pool_halves_narrow` |" in done.stdout
    found = json.loads((tmp_path / "profile.json").read_text())
    assert found["runtime"] == "host"
    assert sum(entry["seconds"] for entry in found["kernels"]) <= found["seconds"] * 1.5
    assert all(len(entry["samples"]) == 2 for entry in found["kernels"])
    wrong = run("lenet5")
    assert wrong.returncode == 2
    assert "resnet50 224 N128" in wrong.stderr
    assert run("lenet5 28 N128", "--steps", "0", "--runtime", "host").returncode == 2


def test_without_a_gpu_it_says_so() -> None:
    from gpucnn_kernels.runtime import cuda

    usable, _ = cuda.status()
    if usable:
        pytest.skip("there is a GPU")
    done = run("lenet5 28 N128")
    assert done.returncode == 2
    assert done.stderr.startswith("profile_step.py: device 'cuda:0' cannot be used")
