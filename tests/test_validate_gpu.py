"""scripts/validate_gpu.py, rehearsed on the host runtime: it covers every kernel, and sees what it is to see."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import pytest

import gpucnn_kernels
from gpucnn_kernels import runtime
from gpucnn_kernels.arrays import numpy_dtype
from gpucnn_kernels.problem import Conv2dProblem
from scripts.gpu_validation import (
    augmentation,
    captured,
    convolution,
    convolution_ends,
    layers,
    machine,
    memory_format,
    planned,
    report,
    steps,
    surroundings,
    training,
)
from scripts.gpu_validation import bench as benches
from scripts.gpu_validation.bench import Bench, Numbers, OutOfTimeError

pytestmark = pytest.mark.compiler

WITHOUT_ARRAYS = ("autotune", "conv2d_algorithms", "conv2d_choose", "conv2d_max_pool2d_pays", "warm_up")
CONVOLUTIONS = {**convolution.CHECKS, **convolution_ends.CHECKS}
ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "validate_gpu.py"


def start(*arguments: str, python: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess[str]:
    away = ("PYTHONPATH", "GPUCNN")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(away)}
    if "GPUCNN_KERNELS_CACHE" in os.environ:
        environment["GPUCNN_KERNELS_CACHE"] = os.environ["GPUCNN_KERNELS_CACHE"]
    return subprocess.run(
        [sys.executable, *python, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env={**environment, **variables},
        cwd="/",
    )


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """(what a rehearsal says, its report)."""
    path = tmp_path_factory.mktemp("validation") / "new" / "host.json"
    answer = start("--runtime", "host", "--output", str(path), "--seed", "1")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout, json.loads(path.read_text())


def test_a_rehearsal_passes_and_says_so(rehearsal: tuple[str, dict[str, Any]]) -> None:
    said, found = rehearsal
    assert found["verdict"] == "passed"
    assert (found["runtime"], found["seed"], found["not_run"], found["whole"]) == ("host", 1, [], False)
    assert said.splitlines()[-2] == report.summary(found)
    assert report.table(found) in said
    assert [run["network"] for run in found["training"]] == ["lenet5", "animalnet"]
    for run in found["training"]:
        assert run["passed"]
        assert 0 < run["error_over_bound"] <= 1
        assert len(run["losses"]) == len(run["cpu_losses"]) == run["steps"]
    assert len(found["captured"]) == 2
    for run in found["captured"]:
        assert (run["passed"], run["failures"]) == (True, [])
        assert f"-- captured {run['recipe']}: passed, " in said
    for row in found["operations"]:
        assert row["failed"] == 0
        assert row["runs"] > 0
        assert 0 <= row["error_over_bound"] <= 1
        assert row["same_bits_twice"] == (0 if row["algorithm"] == "scatter" else row["runs"])


def test_every_function_of_the_package_is_checked_in_every_dtype(rehearsal: tuple[str, dict[str, Any]]) -> None:
    functions = {name for name in gpucnn_kernels.__all__ if name.islower() and name not in WITHOUT_ARRAYS}
    checked: dict[str, set[str]] = {}
    for row in rehearsal[1]["operations"]:
        if row["family"] not in {**planned.CHECKS, **memory_format.CHECKS}:  # which are of gpucnn's models
            checked.setdefault(row["operation"].partition(",")[0], set()).add(row["dtype"])
    assert set(checked) == functions
    assert all(dtypes == set(benches.DTYPES) for dtypes in checked.values())


def test_every_algorithm_is_checked(rehearsal: tuple[str, dict[str, Any]]) -> None:
    for direction in ("forward", "backward_data", "backward_filter"):
        by = {row["algorithm"] for row in rehearsal[1]["operations"] if row["operation"] == f"conv2d_{direction}"}
        assert by == {"auto", *gpucnn_kernels.conv2d_algorithms(direction)}


def test_every_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all problems, but of the convolutions' few and small ones that take kernels of their own."""
    from gpucnn_kernels import catalog, launch

    started: set[tuple[str, str]] = set()
    plain = launch.Call.launch

    def noted(self: Any, source: Any, kernel: str, *arguments: Any, **options: Any) -> None:
        started.add((source, kernel))
        plain(self, source, kernel, *arguments, **options)

    monkeypatch.setattr(launch.Call, "launch", noted)
    few = {  # tiles are chosen by channels here: these take what the wide problems take, in a tenth of the time
        "many-outputs": Conv2dProblem.from_shapes((2, 5, 13, 12), (136, 5, 3, 3), padding=1),
        "many-inputs": Conv2dProblem.from_shapes((2, 72, 13, 12), (5, 72, 3, 3), padding=1),
    }
    monkeypatch.setattr(convolution, "WIDE", convolution.WIDE | few)
    monkeypatch.setattr(
        convolution,
        "REDUCED",
        (
            "k3-d2-s2",
            "depthwise",
            "depthwise-s2",
            "depthwise-k5",
            "depthwise-k5-s2",
            "depthwise-packs",
            "depthwise-packs-s2",
            "depthwise-packs-k5",
            "depthwise-packs-k5-s2",
            "depthwise-d2",
            "bottleneck",
            "resnet-block",
            "many-outputs",
            "sixty-four-outputs",
            "some-outputs",
            "many-inputs",
            "three-inputs",
            "four-inputs",
        ),
    )
    assert set(convolution.REDUCED) <= set(convolution.problems(bench(whole=True)))
    whole_families = ((module.CHECKS, True) for module in (layers, steps, augmentation, captured))
    for checks, whole in (*whole_families, (CONVOLUTIONS, False)):
        made = bench(dtypes=("float32", "bfloat16"), whole=whole)
        for name, check in checks.items():
            made.family = name
            check(made)
        assert [row.failures for row in made.outcomes.values() if row.failed] == []
    assert started == {(source.name, kernel) for source in catalog.variants() for kernel in source.kernels}


# ------------------------------------------------------------ what it must see


def bench(**changes: Any) -> Bench:
    given = {"seed": 3, "dtypes": benches.DTYPES, "whole": False, "deadline": math.inf, **changes}
    return Bench("host", **given)


@pytest.fixture(autouse=True)
def host() -> Any:
    with runtime.using("host") as made:
        yield made


def outcome(made: Bench) -> benches.Outcome:
    (only,) = made.outcomes.values()
    return only


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ([1.0, 2.0 + 2e-6], "at (1,) 2.00000"),
        ([1.0, math.nan], "at (1,) nan, expected 2.0; 1 of 2 numbers are over the bound"),
        ([1.0, math.inf], "at (1,) inf, expected 2.0"),
        ([[1.0, 2.0]], "shape (1, 2), not (2,)"),
        (None, "ZeroDivisionError: division by zero"),
    ],
)
def test_wrong_results_are_failures(result: Any, words: str) -> None:
    made = bench()

    def run() -> Any:
        return numpy.array(result, numpy.float64) if result is not None else 1 / 0

    made.check("trial", "a problem", "float64", run, [numpy.array([1.0, 2.0])], [1e-6])
    found = outcome(made)
    assert (found.failed, found.runs) == (1, 1)
    assert words in found.failures[0]
    assert found.failures[0].startswith("a problem")


def test_right_results_pass_and_what_is_in_the_bound_is_told() -> None:
    made = bench()
    expected = numpy.array([1.0, math.inf, math.nan, 4.0])
    actual = numpy.array([1.0, math.inf, math.nan, 4.0 + 5e-7])
    made.check("trial", "p", "float64", lambda: actual.copy(), [expected], [numpy.full(4, 1e-6)])
    found = outcome(made)
    assert (found.failed, found.repeated) == (0, 1)
    assert found.worst == pytest.approx(0.5)
    assert found.error == pytest.approx(5e-7)


def test_results_that_change_from_run_to_run_are_failures() -> None:
    made, results = bench(), iter([numpy.zeros(2), numpy.array([0.0, -0.0])])
    made.check("trial", "p", "float64", lambda: next(results), [numpy.zeros(2)], [0.0])
    assert outcome(made).failures == ["p: run twice, it gave different bits"]
    atomic, results = bench(), iter([numpy.zeros(2), numpy.array([0.0, -0.0])])
    atomic.check("trial", "p", "float64", lambda: next(results), [numpy.zeros(2)], [0.0], repeatable=False)
    assert outcome(atomic).failed == 0


def test_what_a_gpu_is_too_old_for_is_told_apart() -> None:
    made = bench()

    def run() -> Any:
        raise gpucnn_kernels.DeviceError("products of bfloat16 need a GPU of compute capability 8.0 or newer")

    made.check("trial", "p", "bfloat16", run, [numpy.zeros(2)], [0.0])
    assert (outcome(made).failed, outcome(made).refused) == (0, 1)


def test_only_a_few_failures_are_kept() -> None:
    made = bench()
    for number in range(20):
        made.check("trial", f"p{number}", "float64", lambda: numpy.ones(1), [numpy.zeros(1)], [0.5])
    assert outcome(made).failed == 20
    assert len(outcome(made).failures) == 5


FAULTS = {
    "conv2d_forward": (convolution.check_convolution, lambda y: y * numpy.float32(1 + 1e-4)),  # as TF32 would
    "conv2d_backward_filter": (convolution.check_convolution, lambda y: numpy.roll(y, 1, axis=-1)),
    "max_pool2d_forward": (layers.check_pooling, lambda y: y[::-1]),
    "batch_norm_forward": (layers.check_batch_norm, lambda y: (*y[:2], y[2] * (1 + 1e-4), *y[3:])),
    "softmax_cross_entropy_backward": (steps.check_cross_entropy, lambda y: y * (1 + 1e-3)),
    "images_to_float": (steps.check_images, lambda y: y[..., ::-1]),
    "augment_images": (augmentation.check_augmentation, lambda y: y * numpy.float32(1 + 1e-5)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_kernel_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, spoil = FAULTS[name]
    right = getattr(gpucnn_kernels, name)

    def wrong(*arguments: Any, **options: Any) -> Any:
        return spoil(right(*arguments, **options))

    monkeypatch.setattr(gpucnn_kernels, name, wrong)
    made = bench(dtypes=("float32",))
    check(made)
    failing = {key[1].partition(",")[0] for key, row in made.outcomes.items() if row.failed}
    assert failing == {name}


def test_outputs_and_workspaces_are_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain:
        def empty(self, shape: Any, dtype: str, like: Any) -> Any:
            return numpy.zeros(shape, numpy_dtype(dtype))

    plain = Plain()
    benches.poison_all(plain)
    for dtype in ("float32", "bfloat16", "uint8", "int32"):
        for shape in ((3, 4), (), (0, 2)):
            made = plain.empty(shape, dtype, None)
            assert made.shape == shape
            assert made.tobytes() == b"\xff" * made.nbytes


def test_the_time_ends_the_checks() -> None:
    made = bench(deadline=time.monotonic() - 1)
    with pytest.raises(OutOfTimeError):
        made.check("trial", "p", "float64", lambda: numpy.zeros(1), [numpy.zeros(1)], [0.0])
    answer = start(
        "--runtime", "host", "--minutes", "0.0001", "--no-training", "--families", "convolution,pooling"
    )
    assert answer.returncode == 3, answer.stdout + answer.stderr
    assert "-- not run: convolution: the time was over" in answer.stdout
    assert answer.stdout.splitlines()[-1].startswith("not finished: ")


@pytest.mark.parametrize("half", [False, True])
def test_the_numbers_are_exact_in_their_dtypes(half: bool) -> None:
    dtypes = ("float16", "bfloat16") if half else ("float32", "float64")
    numbers = Numbers(dtypes, numpy.random.default_rng(0), half)
    values = numbers.rounded(
        numpy.concatenate([numbers.random.standard_normal(10000) * 10.0**p for p in (-6, 0, 3)])
    )
    for dtype in dtypes:
        assert numpy.array_equal(values.astype(numpy_dtype(dtype)).astype(numpy.float64), values)
    assert len(numpy.unique(values)) > 1000
    assert len(set(numbers.normal(50).tolist()) & set(numbers.normal(50).tolist())) < 10  # never the same again


def test_a_training_run_that_strays_is_seen() -> None:
    exact = numpy.linspace(2.3, 0.5, 100)
    cpu = exact + 1e-7
    allowed = training.allowed(cpu, exact)
    assert allowed[0] == pytest.approx(1e-6 + 2.3e-5)
    assert allowed[10] == pytest.approx(1e-6 + 2.3e-4)
    assert allowed[-1] == pytest.approx(1e-6 + 2.3 * 0.03)
    assert (numpy.diff(allowed) >= 0).all()


def test_a_wrong_gradient_strays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUCNN_KERNELS_RUNTIME", "host")
    from gpucnn.ops import cuda

    right = cuda.conv2d_backward_filter

    def wrong(*arguments: Any, **options: Any) -> Any:
        gradient = right(*arguments, **options)
        gradient *= 1.01
        return gradient

    monkeypatch.setattr(cuda, "conv2d_backward_filter", wrong)
    found = training.compare(training.REHEARSED[1], seed=2)
    assert not found["passed"]
    assert found["failures"][0].startswith("step ")


# ------------------------------------------------------------ without a GPU, and the report


def test_a_captured_run_of_other_bits_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpucnn.training.scheduled_step import ScheduledTrainingStep

    prepare = ScheduledTrainingStep.prepare
    recipe = captured.Recipe("lenet5", {"optimizer": "sgd"})
    monkeypatch.setattr(
        ScheduledTrainingStep, "prepare", lambda step, number: prepare(step, number) if number == 1 else None
    )
    found = captured.compare(recipe, 1, False)
    assert not found["passed"]
    assert "other bits than kernel by kernel in" in found["failures"][0]
    monkeypatch.setattr(ScheduledTrainingStep, "prepare", prepare)
    monkeypatch.setattr(ScheduledTrainingStep, "arrays", lambda step: [])
    found = captured.compare(recipe, 1, False)
    assert "nothing was captured: the steps are not captured as a CUDA graph" in found["failures"][-1]


def test_without_a_gpu_it_says_so_with_status_2(tmp_path: Path) -> None:
    (tmp_path / "cupy.py").write_text("raise ImportError('no CUDA here')\n")
    answer = subprocess.run(
        [sys.executable, str(SCRIPT)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert "validate_gpu.py: no GPU can be used: CuPy does not import: no CUDA here" in answer.stderr
    assert "python3 scripts/run.py setup" in answer.stderr


def test_without_numpy_it_says_so_with_status_2() -> None:
    answer = start("--runtime", "host", python=("-S",))  # no site-packages
    assert answer.returncode == 2
    assert f"NumPy is not installed for {sys.executable}" in answer.stderr


def test_families_and_dtypes_that_there_are_not() -> None:
    for arguments, words in (
        (("--families", "convulsion"), "unknown family convulsion; there are activations, pooling"),
        (("--dtypes", "int8"), "unknown dtype int8; there are float32, float16, bfloat16, float64"),
    ):
        answer = start("--runtime", "host", *arguments)
        assert answer.returncode == 1
        assert words in answer.stderr
    listed = start("--runtime", "host", "--families", "?").stdout.split("\n")
    checks = (
        layers, steps, augmentation, captured, convolution, convolution_ends, memory_format, planned, surroundings
    )  # fmt: skip
    known = {name: check for module in checks for name, check in module.CHECKS.items()}
    assert listed[:-1] == list(known)


def test_the_sanitizer_is_run_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(machine.SANITIZED) <= set({**layers.CHECKS, **steps.CHECKS, **augmentation.CHECKS, **CONVOLUTIONS})
    home = tmp_path / "bin"
    home.mkdir()
    tool = home / "compute-sanitizer"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    found = machine.find_sanitizer()
    assert found is None or not found.startswith(str(tmp_path))
    tool.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "assert sys.argv[1] == '--tool' and '--no-sanitizer' in sys.argv\n"
        "print('========= ERROR SUMMARY:', sys.argv[2])\n"
        "sys.exit(86 if sys.argv[2] == 'racecheck' else 0)\n"
    )
    tool.chmod(0o755)
    assert machine.find_sanitizer() == str(tool)
    memory, races = machine.sanitize(1, 100)
    assert (memory["tool"], memory["finished"], memory["passed"]) == ("memcheck", True, True)
    assert (races["tool"], races["finished"], races["passed"]) == ("racecheck", True, False)
    assert "ERROR SUMMARY: racecheck" in races["output"]
    assert [check["finished"] for check in machine.sanitize(1, 1)] == [False, False]


def test_the_page_is_that_of_the_reports() -> None:
    folder = ROOT / "docs" / "gpu"
    assert (folder / "README.md").read_text(encoding="utf-8") == report.page(folder)


def test_a_page_of_a_report(rehearsal: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    found = json.loads(json.dumps(rehearsal[1]))
    report.write(found, tmp_path / "rehearsal.json")
    assert "Not yet run on a GPU." in report.page(tmp_path)  # a rehearsal is no run
    found["runtime"] = "cuda"
    facts = {"gpu": "NVIDIA Trial", "compute_capability": "9.0", "driver": "1", "cupy": "14.2", "nvrtc": "12.9"}
    found["machine"] |= facts
    found["operations"][0] |= {"failed": 2, "error_over_bound": math.inf, "failures": ["it broke"]}
    found["sanitizer"] = [{"tool": "memcheck", "finished": True, "passed": False, "output": "bad\nworse"}]
    found["not_run"] = ["columns: the time was over"]
    report.write(found, tmp_path / "trial.json")
    page = report.page(tmp_path)
    assert "Not yet run" not in page
    assert f"### NVIDIA Trial, {found['when']}" in page
    assert "compute-sanitizer memcheck: failed." in page
    assert page.count("Captured as a CUDA graph, lenet5, optimizer ") == 2
    operations = {row["operation"] for row in found["operations"]}
    assert all(f"| `{operation}` |" in page for operation in operations)
    assert page.count("| failed: ") == 1
    table = report.table(json.loads((tmp_path / "trial.json").read_text()))
    assert "FAILED" in table
    assert "      it broke" in table
    assert "      worse" in table
    assert "-- not run: columns: the time was over" in table
