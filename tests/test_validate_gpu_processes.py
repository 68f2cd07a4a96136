"""A validation whose process breaks, hangs or loses the GPU: that is one failure, and all else is checked."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest

from gpucnn_kernels import runtime
from scripts import validate_gpu
from scripts.gpu_validation import machine, supervisor
from scripts.gpu_validation.bench import Bench, ContextLostError
from scripts.gpu_validation.parts import CAPTURED, FAMILY, TRAINING, Part, Settings, as_text, runs
from scripts.gpu_validation.supervisor import Found, Supervisor, run_here

SETTINGS = Settings("host", 3, ("float64",), False)
TRIAL = Part(FAMILY, "trial")

CHILD = """
import os, sys, time
import numpy
from scripts.gpu_validation import parts
from scripts.gpu_validation.bench import Bench

lost = []
Bench.works = lambda self: not lost

def lose():
    lost.append(True)
    raise RuntimeError("an illegal memory access")

def outside():
    raise ValueError("not in a check")

ENDS = {"aborts": os.abort, "hangs": lambda: time.sleep(1000), "loses": lose}

def trial(*names):
    def check(bench):
        for name in names:
            if name == "leaves":
                os._exit(7)
            if name == "raises":
                outside()
            for problem in ("p", "q"):
                run = ENDS.get(name, lambda: numpy.zeros(1))
                bench.check(name, problem, "float64", run, [numpy.zeros(1)], [0.0])
    return check

parts.families = lambda: {
    "trial": trial("first", *sys.argv[2].split(","), "last"), "next": trial("after"),
}
sys.exit(parts.main(sys.argv[1]))
"""


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("GPUCNN_KERNELS_RUNTIME", "host")
    with runtime.using("host") as made:
        yield made


def supervised(middle: str, monkeypatch: pytest.MonkeyPatch, seconds: float = 60) -> Found:
    """What is found of a family whose checks in the middle end in such a way, and of the next one."""
    monkeypatch.setattr(supervisor, "PATIENCE_SECONDS", {FAMILY: 3.0})
    found = Found()
    made = Supervisor(SETTINGS, found, [sys.executable, "-c", CHILD, as_text(SETTINGS), middle])
    try:
        made.run(TRIAL, seconds)
        made.run(Part(FAMILY, "next"), 60)
    finally:
        made.close()
    assert found.operations["next", "after", "float64", ""]["runs"] == 2
    return found


def outcomes(found: Found) -> dict[str, tuple[int, int]]:
    """(runs, failures) by operation, of the trial."""
    return {key[1]: (row["runs"], row["failed"]) for key, row in found.operations.items() if key[0] == "trial"}


@pytest.mark.parametrize(
    ("middle", "runs", "words"),
    [
        ("aborts", 0, "p: its process ended with status -6"),
        ("hangs", 0, "p: no answer after 3 s; its process was ended"),
        ("loses", 1, "p: RuntimeError: an illegal memory access"),
    ],
)
def test_a_check_that_ends_the_process_is_one_failure(
    middle: str, runs: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = supervised(middle, monkeypatch)
    assert outcomes(found) == {"first": (2, 0), middle: (runs, 1), "last": (2, 0)}
    assert found.operations["trial", middle, "float64", ""]["failures"] == [words]
    assert found.said(TRIAL) == f"1 of {4 + runs} FAILED"
    assert found.late == []


def test_several_breaks_in_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    found = supervised("aborts,loses,fine", monkeypatch)
    assert outcomes(found) == {
        "first": (2, 0), "aborts": (0, 1), "loses": (1, 1), "fine": (2, 0), "last": (2, 0)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("middle", "words"),
    [("leaves", "its process ended with status 7"), ("raises", "ValueError: not in a check")],
)
def test_what_breaks_between_checks_is_the_familys_failure(
    middle: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = supervised(middle, monkeypatch)
    assert outcomes(found) == {"first": (2, 0), "trial": (0, 1)}
    assert found.operations["trial", "trial", "", ""]["failures"] == [words]


def test_a_part_that_breaks_again_and_again_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_MOST_BREAKS", 1)
    found = supervised("aborts", monkeypatch)
    assert outcomes(found) == {"first": (2, 0), "aborts": (0, 1), "trial": (0, 1)}
    assert found.operations["trial", "trial", "", ""]["failures"] == [
        "broke off 1 times: the rest of it is not run"
    ]


def test_a_part_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    found = supervised("fine", monkeypatch, seconds=-1.0)
    assert (found.late, outcomes(found)) == ([TRIAL], {})


def test_a_run_that_breaks_off_has_its_parts_name() -> None:
    found = Found()
    found.breaks(Part(TRAINING, "lenet5"), "it ended")
    found.breaks(Part(CAPTURED, "lenet5, tf32"), "it ended")
    assert list(found.results.values()) == [
        {"network": "lenet5", "passed": False, "failures": ["it ended"]},
        {"recipe": "lenet5, tf32", "passed": False, "failures": ["it ended"]},
    ]
    assert [part.kind for part in runs(SETTINGS)] == [TRAINING] * 2 + [CAPTURED] * 2


def test_without_a_process_of_its_own_a_lost_gpu_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "works", lambda self: False)
    bench = Bench("host", 3, ("float64",), False, time.monotonic() + 60)
    with pytest.raises(ContextLostError):
        bench.check("trial", "p", "float64", lambda: numpy.ones(1), [numpy.zeros(1)], [0.5])
    bench.check("other", "p", "float64", lambda: numpy.zeros(1), [numpy.zeros(1)], [0.5])
    monkeypatch.setattr("scripts.gpu_validation.parts.families", lambda: {"trial": _fails})
    with pytest.raises(SystemExit, match="after trial no call of CUDA works any more"):
        run_here(SETTINGS, Found())(TRIAL, 60)


def _fails(bench: Bench) -> None:
    bench.check("fails", "p", "float64", lambda: numpy.ones(1), [numpy.zeros(1)], [0.5])


def test_the_report_is_written_after_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "report.json"
    written: list[tuple[int, list[str]]] = []
    plain = validate_gpu.keep

    def keep(found: dict[str, Any], place: Path | None) -> None:
        assert place == path
        written.append((len(found["operations"]), found["not_run"]))
        assert found["verdict"] == "not finished"
        plain(found, place)

    monkeypatch.setattr(validate_gpu, "keep", keep)
    arguments = ["--runtime", "host", "--families", "softmax,linear", "--no-training", "--dtypes", "float32"]
    found = validate_gpu.validate(validate_gpu.options([*arguments, "--output", str(path)]))
    assert found["verdict"] == "passed"
    assert [left for _, left in written] == [["linear: not reached when this was written"], []]
    assert 0 < written[0][0] < written[1][0] == len(found["operations"])
    assert path.exists()
    assert list(path.parent.iterdir()) == [path]
    here = validate_gpu.validate(validate_gpu.options([*arguments, "--one-process", "--output", str(path)]))
    assert [row["runs"] for row in here["operations"]] == [row["runs"] for row in found["operations"]]


def test_a_kernel_that_does_not_compile_is_a_failure_and_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpucnn_kernels import catalog

    def warm_up(dtypes: Any, processes: int) -> int:
        raise RuntimeError("no such register\nand more")

    monkeypatch.setattr(catalog, "warm_up", warm_up)
    found = Found()
    assert validate_gpu.compile_ahead(["float32"], found) == {}
    assert found.operations["compiling", "all kernels", "", ""]["failures"] == [
        "RuntimeError: no such register\nand more"
    ]
    monkeypatch.setattr(catalog, "warm_up", lambda dtypes, processes: len(dtypes))
    assert validate_gpu.compile_ahead(["float32"], found)["modules"] == 1


def test_packages_of_others_named_tests_and_scripts_do_not_stand_for_ours(tmp_path: Path) -> None:
    for name in ("tests", "scripts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('not this one')\n")
    script = Path(validate_gpu.__file__).resolve()
    arguments = ["--runtime", "host", "--families", "softmax", "--dtypes", "float32", "--no-training"]
    answer = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_a_fact_that_cannot_be_had_is_no_reason_not_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_handle() -> int:
        raise RuntimeError("CUBLAS_STATUS_NOT_INITIALIZED")

    cuda_runtime = SimpleNamespace(
        getDevice=lambda: 0,
        getDeviceProperties=lambda number: {"name": b"GPU X", "major": 9, "minor": 0},
        memGetInfo=lambda: (3 << 30, 4 << 30),
        getDeviceCount=lambda: 1,
        driverGetVersion=lambda: 13000,
        runtimeGetVersion=lambda: 12090,
    )
    cuda = SimpleNamespace(
        runtime=cuda_runtime,
        nvrtc=SimpleNamespace(getVersion=lambda: (12, 9)),
        cublas=SimpleNamespace(getVersion=lambda handle: 1),
        device=SimpleNamespace(get_cublas_handle=no_handle),
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda, __version__="14.2"))
    found = machine.facts("cuda")
    assert (found["gpu"], found["memory_gib"], found["free_gib"]) == ("GPU X", 4.0, 3.0)
    assert (found["compute_capability"], found["cuda_of_driver"], found["nvrtc"]) == ("9.0", "13.0", "12.9")
    assert found["cublas"] == "not known (RuntimeError: CUBLAS_STATUS_NOT_INITIALIZED)"
    assert found["multiprocessors"] == "not known (KeyError: 'multiProcessorCount')"
