"""The CPU's compiled loops: how they come to be, when they are used, and the threads inside."""

from __future__ import annotations

import multiprocessing
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy
import pytest

from gpucnn.errors import GpucnnError
from gpucnn.ops import cpu
from gpucnn.ops.cpu import compiled
from gpucnn.ops.cpu.compiled import build as building

pytestmark = pytest.mark.compiler
ROOT = Path(__file__).resolve().parent.parent

RELU = """
import numpy
from gpucnn.ops import cpu
from gpucnn.ops.cpu import compiled
y = cpu.relu_forward(numpy.array([-1, 2], "f4"))
assert y.tolist() == [0, 2], y
print(compiled.available(), compiled.why_not())
"""


def python(code: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process of its own, which keeps what it compiles in ``tmp_path``."""
    variables = {key: value for key, value in os.environ.items() if key not in ("GPUCNN_COMPILED", "CXX")}
    variables |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "GPUCNN_KERNELS_CACHE": str(tmp_path)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=variables | environment, check=False
    )


def failing_compiler(tmp_path: Path, says: str) -> str:
    """A compiler that gives its version and then compiles nothing."""
    path = tmp_path / "g++"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo stand-in 1.0 && exit\necho "{says}" >&2\nexit 1\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


# ---------------------------------------------------------------- compiling


def test_they_are_here() -> None:
    assert compiled.available(), compiled.why_not()
    assert compiled.why_not() is None


def test_compiled_once_and_kept(tmp_path: Path) -> None:
    first = python(RELU, tmp_path)
    assert first.stdout == "True None\n", first.stderr
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cpu").iterdir()}
    assert sum(path.suffix == ".so" for path in kept) == 1
    # A compiler that can do nothing any more is not asked: what was kept is taken.
    again = python(RELU, tmp_path)
    assert again.stdout == "True None\n"
    assert again.stderr == ""
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cpu").iterdir()} == kept


def test_without_a_compiler_numpy_does_the_work(tmp_path: Path) -> None:
    done = python(RELU, tmp_path, PATH=str(tmp_path))
    assert (
        done.stdout
        == "False no C++ compiler is there; install g++ (apt install g++, dnf install gcc-c++) or clang++\n"
    )
    assert done.stderr == ""


def test_a_compiler_that_fails_is_spoken_of_and_numpy_does_the_work(tmp_path: Path) -> None:
    done = python(RELU, tmp_path, CXX=failing_compiler(tmp_path, "out of cheese"))
    assert done.stdout.startswith("False "), done.stderr
    assert "RuntimeWarning: the CPU's loops could not be compiled, NumPy does their work" in done.stderr
    assert "out of cheese" in done.stderr
    assert not list((tmp_path / "cpu").iterdir())  # nothing half-made is left


@pytest.mark.parametrize(
    ("asked", "answer"),
    [("0", "False GPUCNN_COMPILED=0 switches them off"), ("1", "True None"), ("", "True None")],
)
def test_the_switch(tmp_path: Path, asked: str, answer: str) -> None:
    cache = os.environ.get("GPUCNN_KERNELS_CACHE", str(building.cache_folder("cpu").parent))
    done = python(RELU, tmp_path, GPUCNN_COMPILED=asked, GPUCNN_KERNELS_CACHE=cache)
    assert done.stdout == answer + "\n", done.stderr


@pytest.mark.parametrize(
    ("environment", "error"),
    [
        ({"GPUCNN_COMPILED": "yes"}, "GPUCNN_COMPILED must be 0 or 1, or unset to use what there is, got 'yes'"),
        ({"GPUCNN_COMPILED": "1", "CXX": "/no/such/compiler"}, "GPUCNN_COMPILED=1, but the CPU's loops cannot be"),
    ],
)
def test_a_switch_that_cannot_be_obeyed(tmp_path: Path, environment: dict[str, str], error: str) -> None:
    done = python(RELU, tmp_path, **environment)
    assert done.returncode != 0
    assert error in done.stderr


def test_every_source_is_compiled_without_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUCNN_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(building, "FLAGS", (*building.FLAGS, "-Werror", "-O1"))
    assert building.build().is_file()


# ---------------------------------------------------------------- when they are used


def test_what_they_take() -> None:
    array = numpy.zeros((4, 6), "f4")
    assert compiled.usable(array, None)
    unaligned = numpy.zeros(97, "u1")[1:].view("f4")
    for other in (array.astype("f8"), array.astype("f2"), array.T, array[:, ::2], array.astype(">f4"), unaligned):
        assert not compiled.usable(array, other)
    with compiled.switched(False):
        assert not compiled.usable(array)
        assert compiled.why_not() == "they are switched off for the moment"
        with compiled.switched(False):
            pass
        assert not compiled.available()
        with pytest.raises(GpucnnError, match="switched off"), compiled.switched(True):
            pass
        with pytest.raises(GpucnnError, match=r"the compiled no_such is not there.*switched off"):
            compiled.function("no_such", "")()
    assert compiled.usable(array)


def test_a_function_that_is_not_in_the_library() -> None:
    with pytest.raises(AttributeError, match="gpucnn_no_such"):
        compiled.function("no_such", "i")(1)


def read_only(shape: tuple[int, ...]) -> Any:
    array = numpy.ones(shape, "f4")
    array.flags.writeable = False
    return array


def test_read_only_arrays_are_not_written() -> None:
    x, locked = numpy.full((2, 3, 4, 4), -1, "f4"), read_only((2, 3, 4, 4))
    statistics, row = read_only((3,)), numpy.ones(6, "f4")
    writes = [
        lambda: cpu.relu_forward(x, out=locked),
        lambda: cpu.softmax_forward(x, out=locked),
        lambda: cpu.dropout_forward(x, probability=0.5, seed=1, offset=0, out=locked),
        lambda: cpu.batch_norm_forward(x, out=locked),
        lambda: cpu.batch_norm_forward(x, running_mean=statistics, running_var=numpy.ones(3, "f4")),
        lambda: cpu.avg_pool2d_forward(x, kernel_size=1, out=locked),
        lambda: cpu.max_pool2d_backward(
            x, numpy.zeros(x.shape, "u1"), input_size=(4, 4), kernel_size=1, out=locked
        ),
        lambda: cpu.conv2d_forward(x, numpy.ones((3, 3, 3, 3), "f4"), padding=1, out=locked),
        lambda: cpu.conv2d_forward(x, numpy.ones((3, 1, 3, 3), "f4"), padding=1, groups=3, out=locked),
        lambda: cpu.conv2d_forward(x, numpy.ones((3, 3, 3, 3), "f4"), padding=1, algorithm="winograd", out=locked),
        lambda: cpu.conv2d_backward_bias(x, out=statistics),
        lambda: cpu.mean_squared_error_backward(x, x, out=locked),
        lambda: cpu.scale(locked, 2.0),
        lambda: cpu.sgd_step(row, row, read_only((6,)), lr=0.1, momentum=0.9),
        lambda: cpu.adam_step(row, row, row.copy(), read_only((6,)), lr=0.1),
        lambda: cpu.rmsprop_step(read_only((6,)), row, row.copy(), None, None, lr=0.1),
    ]
    for write in writes:
        for on in (True, False):
            with compiled.switched(on), pytest.raises(ValueError, match="read-only"):
                write()
    assert (locked == 1).all()
    assert (statistics == 1).all()


def test_switches_may_be_numpy_s() -> None:
    steps = []
    for on in (True, False):
        parameter, velocity = numpy.ones(5, "f4"), numpy.ones(5, "f4")
        with compiled.switched(on):
            cpu.sgd_step(
                parameter,
                numpy.full(5, 2, "f4"),
                velocity,
                lr=0.5,
                momentum=0.5,
                nesterov=True,
                first_step=numpy.bool_(True),  # type: ignore[arg-type]
            )
        steps.append((parameter, velocity))
    numpy.testing.assert_array_equal(steps[0], steps[1])
    numpy.testing.assert_array_equal(steps[0][0], 1 - 0.5 * 3)


# ---------------------------------------------------------------- scratch memory


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not say how much is in memory")
def test_a_large_problem_does_not_keep_its_scratch_memory() -> None:
    channels = 5000  # the weights are packed: 100 MB
    x, weight = numpy.ones((1, channels, 1, 1), "f4"), numpy.ones((channels, channels, 1, 1), "f4")
    cpu.conv2d_forward(x, weight[:16], algorithm="direct")
    before = resident()
    for _ in range(2):
        y = cpu.conv2d_forward(x, weight, algorithm="direct")
        assert (y == channels).all()
    assert resident() - before < weight.nbytes // 4


# ---------------------------------------------------------------- threads


def sums(threads: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("GPUCNN_NUM_THREADS", threads)
    x = numpy.random.default_rng(3).standard_normal((8, 40, 33, 31)).astype("f4")
    return cpu.batch_norm_forward(x, None, None)[1], cpu.relu_forward(x)


def test_the_same_bits_with_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = sums("1", monkeypatch)
    for threads in ("2", "3", "16"):
        for expected, found in zip(alone, sums(threads, monkeypatch), strict=True):
            numpy.testing.assert_array_equal(found, expected)


def test_calls_from_many_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUCNN_NUM_THREADS", "3")
    arrays = [numpy.random.default_rng(i).standard_normal(300_001).astype("f4") for i in range(6)]
    right = [0] * len(arrays)

    def work(number: int) -> None:
        for _ in range(40):
            right[number] += numpy.array_equal(cpu.relu_forward(arrays[number]), numpy.maximum(arrays[number], 0))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert right == [40] * len(arrays)


def _in_the_child(array: Any, queue: Any) -> None:
    queue.put(float(cpu.relu_forward(array).sum(dtype="f8")))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUCNN_NUM_THREADS", "3")
    array = numpy.random.default_rng(1).standard_normal(1_000_003).astype("f4")
    expected = float(cpu.relu_forward(array).sum(dtype="f8"))  # the parent's threads are running now
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_the_child, args=(array, queue))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert queue.get() == expected
