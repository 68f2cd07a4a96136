"""Autotuning: what is tried, what is chosen by a clock that is told, and what a file keeps, whoever writes it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

import gpucnn_kernels
from gpucnn_kernels import (
    ArgumentError,
    DeviceError,
    conv2d_backward_data,
    conv2d_backward_filter,
    conv2d_forward,
    conv2d_tiles,
    tuning,
    tuning_memory,
)
from gpucnn_kernels.gpu import H200
from gpucnn_kernels.launch import Call
from gpucnn_kernels.recording import recording
from gpucnn_kernels.runtime import using
from gpucnn_kernels.tuning_memory import Choice, Memory

ROOT = Path(__file__).resolve().parent.parent
X = numpy.linspace(-1, 1, 2 * 8 * 6 * 6, dtype=numpy.float32).reshape(2, 8, 6, 6)
WEIGHT = numpy.linspace(-1, 1, 16 * 8 * 9, dtype=numpy.float32).reshape(16, 8, 3, 3)
DY = numpy.linspace(-1, 1, 2 * 16 * 6 * 6, dtype=numpy.float32).reshape(2, 16, 6, 6)


class ToldClock:
    """Runs the work, and answers with what it was told that the way and tile of the day take."""

    def __init__(self, seconds: dict[str, float], fails: tuple[str, ...] = ()) -> None:
        self.told, self.fails, self.asked = seconds, fails, []  # type: ignore[var-annotated]
        self.now = ""

    def seconds(self, work: Callable[[], None], repeats: int) -> float:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Call, "launch", self._watched(Call.launch))
            self.now = ""
            work()
        self.asked.append((self.now, repeats))
        if self.now in self.fails:
            raise DeviceError("not here")
        return self.told.get(self.now, 1.0)

    def _watched(self, launch: Any) -> Any:
        def watched(call: Any, source: Any, kernel: str, *rest: Any, **more: Any) -> None:
            self.now = self.now or kernel  # the first launch of a way tells which it is
            launch(call, source, kernel, *rest, **more)

        return watched


PLAIN: dict[str, Any] = {"padding": 1, "precision": "float32"}  # ways of which each makes every product in float32


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache of its own, nothing remembered in this process, the host runtime."""
    monkeypatch.setattr(tuning_memory, "cache_folder", lambda kind: tmp_path)
    monkeypatch.setattr(tuning, "_used", {})
    tuning_memory.memory_of.cache_clear()
    with using("host"), tuning.autotune():
        yield tmp_path
    tuning_memory.memory_of.cache_clear()


def clock(monkeypatch: pytest.MonkeyPatch, *fails: str, **seconds: float) -> ToldClock:
    told = ToldClock(seconds, fails)
    monkeypatch.setattr(tuning, "make_clock", lambda: told)
    return told


def launched(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> list[str]:
    names: list[str] = []
    launch = Call.launch
    with monkeypatch.context() as patch:
        patch.setattr(
            Call,
            "launch",
            lambda self, source, kernel, *rest, **more: (
                names.append(kernel),
                launch(self, source, kernel, *rest, **more),
            )[1],
        )
        run()
    return names


@pytest.mark.compiler
def test_the_fastest_is_taken_and_not_measured_again(monkeypatch: pytest.MonkeyPatch, tuned: Path) -> None:
    told = clock(
        monkeypatch, conv2d_implicit_gemm_large=3e-6, conv2d_implicit_gemm_medium=6e-6,
        conv2d_implicit_gemm_small=5e-6, im2col_planes=4e-6, conv2d_direct_wide=7e-6,
    )  # fmt: skip
    with tuning.autotune(False):
        expected = conv2d_forward(X, WEIGHT, **PLAIN)
    result = conv2d_forward(X, WEIGHT, **PLAIN)
    assert numpy.abs(result - expected).max() <= 1e-5
    assert {name for name, _ in told.asked} == {
        "conv2d_implicit_gemm_large", "conv2d_implicit_gemm_medium", "conv2d_implicit_gemm_small", "im2col_planes",
        "conv2d_direct_wide",
    }  # fmt: skip
    # Two to warm up, then five rounds of as many as fill a millisecond, at most twenty.
    assert [repeats for name, repeats in told.asked if name == "im2col_planes"] == [1, 1, 20, 20, 20, 20, 20]
    told.asked.clear()
    assert launched(monkeypatch, lambda: conv2d_forward(X, WEIGHT, **PLAIN)) == ["conv2d_implicit_gemm_large"]
    assert told.asked == []
    # Another process, for whom other things would be fast, believes the file.
    monkeypatch.setattr(tuning, "_used", {})
    tuning_memory.memory_of.cache_clear()
    clock(monkeypatch, im2col_planes=1e-9)
    assert launched(monkeypatch, lambda: conv2d_forward(X, WEIGHT, **PLAIN)) == ["conv2d_implicit_gemm_large"]


@pytest.mark.compiler
def test_each_direction_layout_and_size_is_a_problem_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tuned: Path
) -> None:
    clock(monkeypatch, im2col_planes=1e-6, conv2d_implicit_gemm_small=2e-6, filter_gradient_narrow=1e-6)
    assert launched(monkeypatch, lambda: conv2d_forward(X, WEIGHT, padding=1))[-1] == "im2col_planes"
    conv2d_backward_data(DY, WEIGHT, input_size=(6, 6), padding=1)
    conv2d_backward_filter(DY, X, kernel_size=3, padding=1)
    conv2d_forward(X[:1].copy(), WEIGHT, padding=1)
    last = numpy.ascontiguousarray(X.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    conv2d_forward(last, WEIGHT, padding=1)
    (file,) = tuned.glob("*.json")
    content = json.loads(file.read_text())
    assert {key.rpartition(" ")[0].split(" n")[0] for key in content["choices"]} == {
        "forward float32 None contiguous",
        "backward_data float32 None contiguous",
        "backward_filter float32 None contiguous",
        "forward float32 None channels-last",
    }
    assert len(content["choices"]) == 5
    assert content["identity"]["gpu"] == "none: the host runtime"
    entry = next(entry for key, entry in content["choices"].items() if key.startswith("backward_filter"))
    assert (entry["path"], entry["tile"]) == ("implicit_gemm", "filter_gradient_narrow")
    assert entry["seconds"]["implicit_gemm filter_gradient_narrow"] == 1e-6


@pytest.mark.compiler
def test_what_cannot_run_here_is_passed_over(monkeypatch: pytest.MonkeyPatch, tuned: Path) -> None:
    clock(
        monkeypatch, "im2col_planes", "conv2d_implicit_gemm_large", im2col_planes=1e-9,
        conv2d_implicit_gemm_medium=2e-6, conv2d_implicit_gemm_small=1e-6,
    )  # fmt: skip
    assert launched(monkeypatch, lambda: conv2d_forward(X, WEIGHT, **PLAIN))[-1] == "conv2d_implicit_gemm_small"
    tiles = [f"conv2d_implicit_gemm_{size}" for size in ("large", "medium", "small")]
    clock(monkeypatch, "im2col_planes", "conv2d_direct_wide", *tiles)
    every = "none of implicit_gemm, implicit_gemm, implicit_gemm, im2col, direct runs"
    with pytest.raises(gpucnn_kernels.KernelError, match=every):
        conv2d_forward(X[:1].copy(), WEIGHT, **PLAIN)


@pytest.mark.compiler
def test_nothing_is_measured_where_launches_are_recorded(monkeypatch: pytest.MonkeyPatch, tuned: Path) -> None:
    told = clock(monkeypatch, im2col_planes=1e-9)
    with recording():
        first = launched(monkeypatch, lambda: conv2d_forward(X, WEIGHT, padding=1))
    assert told.asked == []
    assert first[0].startswith("conv2d_implicit_gemm")
    # What was used once stays, so that a graph and what came before it are the same.
    assert launched(monkeypatch, lambda: conv2d_forward(X, WEIGHT, padding=1)) == first
    assert told.asked == []


def test_only_what_gives_the_same_bits_every_time_is_tried(tuned: Path) -> None:
    with Call(None, x=X) as call:
        problem = gpucnn_kernels.Conv2dProblem.from_shapes(X.shape, WEIGHT.shape, padding=1)
        plain = [
            ("phases", "conv2d_implicit_gemm_large"), ("phases", "conv2d_implicit_gemm_medium"),
            ("phases", "conv2d_implicit_gemm_small"), ("col2im", ""), ("direct", ""),
        ]  # fmt: skip
        assert tuning.candidates(call, "backward_data", problem, "float32", "float32") == plain
        three = [("tensor", f"conv2d_tensor_{tile}") for tile in ("wide", "large", "medium", "small")]
        assert tuning.candidates(call, "backward_data", problem, "float32", None) == plain + three
        found = tuning.candidates(call, "forward", problem, "float32", "tf32")
        assert found[0] == ("tensor", "conv2d_tensor_wide")  # what is usual is tried first
        assert ("im2col", "") in found


def test_a_hopeless_way_is_not_measured_further() -> None:
    asked = []

    class Clock:
        def seconds(self, work: Callable[[], None], repeats: int) -> float:
            work()
            return {"quick": 1e-4, "slow": 5e-4}[asked[-1]]

    found = tuning.measure([Choice("quick"), Choice("slow")], asked.append, Clock())
    assert found == {("quick", ""): 1e-4, ("slow", ""): 5e-4}
    assert asked == ["quick"] * 7 + ["slow"] * 2


def test_a_forced_tile_is_taken_where_there_is_such_a_one() -> None:
    with conv2d_tiles.forced("conv2d_implicit_gemm_small"):
        assert (
            conv2d_tiles.implicit_tile(H200, "float32", 512, 1 << 20, 1, 576.0).name
            == "conv2d_implicit_gemm_small"
        )
        assert conv2d_tiles.tensor_tile(H200, "float16", None, 512, 1 << 20, 1, 576.0).name == "conv2d_tensor_wide"
    assert conv2d_tiles.implicit_tile(H200, "float32", 512, 1 << 20, 1, 576.0).name == "conv2d_implicit_gemm_large"


# ---------------------------------------------------------------- the switch


def test_the_environment_and_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPUCNN_KERNELS_AUTOTUNE", raising=False)
    assert not tuning.enabled()
    monkeypatch.setenv("GPUCNN_KERNELS_AUTOTUNE", "1")
    assert tuning.enabled()
    with gpucnn_kernels.autotune(False):
        assert not tuning.enabled()
        with gpucnn_kernels.autotune():
            assert tuning.enabled()
    assert tuning.enabled()
    monkeypatch.setenv("GPUCNN_KERNELS_AUTOTUNE", "yes")
    with pytest.raises(ArgumentError, match="GPUCNN_KERNELS_AUTOTUNE must be 0 or 1, got 'yes'"):
        tuning.enabled()


# ---------------------------------------------------------------- the file


IDENTITY = {"gpu": "X", "driver": "1", "kernels": "k"}


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "null", '{"format": 1}', '{"format": 1, "identity": {"gpu": "Y"}, "choices": {}}',
        json.dumps({"format": 2, "identity": IDENTITY, "choices": {}}),
        json.dumps({"format": 1, "identity": IDENTITY, "choices": {"a": {"path": 1, "tile": ""}}}),
        json.dumps({"format": 1, "identity": IDENTITY, "choices": {"a": None}}),
        json.dumps({"format": 1, "identity": IDENTITY, "choices": []}),
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_file_is_said_and_written_anew(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    memory = Memory(path, IDENTITY)
    (said,) = capsys.readouterr().err.splitlines()
    assert "x.json is not used and will be written anew" in said
    assert memory.get("a") is None
    assert memory.put("b", Choice("im2col"), {Choice("im2col"): 1.23456e-5}) == ("im2col", "")
    assert Memory(path, IDENTITY).get("b") == ("im2col", "")
    assert json.loads(path.read_text())["choices"]["b"]["seconds"] == {"im2col": 1.235e-5}
    assert [each.suffix for each in tmp_path.iterdir() if each != path] == [".lock"]  # nothing half-written


def test_a_remembered_way_that_is_none_is_measured_anew(monkeypatch: pytest.MonkeyPatch, tuned: Path) -> None:
    clock(monkeypatch, conv2d_implicit_gemm_small=1e-6)
    conv2d_forward(X, WEIGHT, padding=1)
    (file,) = tuned.glob("*.json")
    file.write_text(file.read_text().replace('"implicit_gemm"', '"scatter"'))
    monkeypatch.setattr(tuning, "_used", {})
    tuning_memory.memory_of.cache_clear()
    told = clock(monkeypatch, conv2d_implicit_gemm_small=1e-6)
    assert launched(monkeypatch, lambda: conv2d_forward(X, WEIGHT, padding=1))[-1] == "conv2d_implicit_gemm_small"
    assert told.asked


def test_two_processes_lose_nothing_of_each_other(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from gpucnn_kernels.tuning_memory import Choice, Memory\n"
        "memory = Memory(Path(sys.argv[1]), {'gpu': 'X', 'driver': '1', 'kernels': 'k'})\n"
        "for i in range(60): memory.put(f'{sys.argv[2]} {i}', Choice(sys.argv[2]), {})\n"
        "memory.put('both', Choice(sys.argv[2]), {})\n"
    )
    path = tmp_path / "x.json"
    command = [sys.executable, "-c", code, str(path)]
    environment = {"PYTHONPATH": str(ROOT / "kernels"), "PATH": "/usr/bin:/bin"}
    running = [
        subprocess.Popen([*command, name], env=environment, stderr=subprocess.PIPE, text=True) for name in "ab"
    ]
    for process in running:
        _, said = process.communicate(timeout=120)
        assert (process.returncode, said) == (0, "")
    choices = json.loads(path.read_text())["choices"]
    assert len(choices) == 121
    assert Memory(path, IDENTITY).get("both") in (("a", ""), ("b", ""))


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory = Memory(tmp_path / "not there" / "x.json", IDENTITY)
    assert memory.put("a", Choice("im2col"), {}) == ("im2col", "")
    assert "cannot remember what was measured" in capsys.readouterr().err
    assert memory.get("a") == ("im2col", "")


def test_other_kernels_are_another_file(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tuning_memory.memory_of("host", 0).path
    monkeypatch.setattr(tuning_memory, "fingerprint", lambda: "other")
    tuning_memory.memory_of.cache_clear()
    assert tuning_memory.memory_of("host", 0).path != first


def test_captures_and_arenas_say_that_they_record() -> None:
    from gpucnn_kernels import runtime
    from gpucnn_kernels.arena import Arena
    from gpucnn_kernels.recording import is_recording

    seen = []
    with using("host"):
        arena = Arena()
        with arena.recorded():
            seen.append(is_recording())
        with arena.in_use():
            seen.append(is_recording())
        runtime.current().capture(lambda: seen.append(is_recording()), [], 0)
    assert seen == [True, True, True]
    assert not is_recording()
