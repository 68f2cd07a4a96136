"""The catalog holds every source in every form, and warming up compiles all of it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

import gpucnn_kernels
from gpucnn_kernels import catalog, source
from gpucnn_kernels.errors import ArgumentError, CompileError
from gpucnn_kernels.launch import Call
from gpucnn_kernels.runtime import ahead, using
from gpucnn_kernels.source import Source
from tests.kernel_stand_ins import (
    RecordedArray,
    RecordingRuntime,
    StandInArray,
    StandInCupy,
    recording,
    stand_in_cupy,
)

__all__ = ["recording", "stand_in_cupy"]

_plain_variant = source.variant  # as it is before the session's check stands in front of it
PACKAGE = Path(gpucnn_kernels.__file__).parent


def test_every_cuda_file_is_in_the_catalog() -> None:
    assert sorted(catalog.sources()) == sorted(path.stem for path in (PACKAGE / "cuda").glob("*.cu"))


def test_every_form_is_there_once_and_has_kernels() -> None:
    found = catalog.variants()
    assert len({made.fingerprint for made in found}) == len(found)
    for name, sets in catalog.sources().items():
        forms = [made for made in found if made.name == name]
        assert len(forms) == sum(1 if "SCALAR" in definitions else 4 for definitions in sets)
        assert all(made.kernels for made in forms)
    assert {dict(made.definitions).get("SCALAR") for made in found} >= {
        "float32",
        "float16",
        "bfloat16",
        "float64",
    }


def test_a_source_without_an_element_type_and_one_with_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("gpucnn_kernels.activations")
    sets = ({"SCALAR": None}, {"WIDE": "1", "ALSO": "2"}, {})
    monkeypatch.setattr(module, "SOURCES", {"activations": sets})
    titles = [made.title for made in catalog.variants(["float32"]) if made.name == "activations"]
    assert titles == [
        "activations",
        "activations (SCALAR float32) (ALSO 2) (WIDE 1)",
        "activations (SCALAR float32)",
    ]


def test_a_launch_of_a_form_that_the_catalog_lacks_is_noticed(recording: RecordingRuntime) -> None:
    with (
        Call(None, x=RecordedArray((3,))) as call,
        pytest.raises(AssertionError, match=r"\(ODD 1\) is not in gpucnn"),
    ):
        call.launch("activations", "activation_forward", 1, scalar="float32", definitions={"ODD": 1}, x=call["x"])
    assert recording.launches == []


def test_the_order_of_definitions_makes_no_other_form(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(source, "load", lambda name, definitions: asked.append((name, definitions)))
    monkeypatch.setattr(source, "variant", _plain_variant)
    source.variant("activations", "float32", {"B": False, "A": 1})
    source.variant("activations", "float32", {"A": "1", "B": 0})
    assert asked == [("activations", (("SCALAR", "float32"), ("A", "1"), ("B", "0")))] * 2


def test_warming_up_compiles_every_form_for_the_current_device(
    recording: RecordingRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "current", lambda: recording)
    seen: list[tuple[str, int, int]] = []
    count = gpucnn_kernels.warm_up(progress=lambda *said: seen.append(said))
    titles = [made.title for made in catalog.variants(["float32"])]
    assert count == len(titles) == len(recording.compiled)
    assert recording.compiled == [(title, 0) for title in titles]
    assert seen == [(title, number, count) for number, title in enumerate(titles, 1)]
    recording.compiled.clear()
    assert gpucnn_kernels.warm_up("float16") == len(recording.compiled)
    assert gpucnn_kernels.warm_up(["float16", "float64"]) < 2 * count + 1
    with pytest.raises(
        ArgumentError, match="kernels take arrays of float32, float16, bfloat16, float64, got int8"
    ):
        gpucnn_kernels.warm_up(["float32", "int8"])


def test_warming_up_on_a_gpu_leaves_nothing_to_compile(stand_in_cupy: StandInCupy) -> None:
    count = gpucnn_kernels.warm_up(["float32", "float64"])
    assert len(stand_in_cupy.compiled) == count
    assert set(stand_in_cupy.devices) == {1}  # CuPy's current one
    for dtype in (numpy.float32, numpy.float64):
        gpucnn_kernels.relu_forward(StandInArray(numpy.ones(3, dtype), 1))
    assert len(stand_in_cupy.compiled) == count


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Source]:
    """Three small forms in place of all, on the host runtime, with a cache that is empty."""
    made = [source.load(name, (("SCALAR", "float32"),)) for name in ("linear", "softmax", "activations")]
    monkeypatch.setattr(catalog, "capabilities", lambda dtypes: dict.fromkeys(made, (0, 0)))
    monkeypatch.setenv("GPUCNN_KERNELS_CACHE", str(tmp_path))
    return made


def kept(folder: Path) -> int:
    return len(list(folder.rglob("*.so")))


@pytest.mark.compiler
def test_several_processes_compile_into_the_cache_of_all(
    few: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[str, int, int]] = []
    compiled: list[str] = []
    with using("host") as runtime:
        monkeypatch.setattr(runtime, "module", lambda made, device: compiled.append(made.title))
        assert gpucnn_kernels.warm_up(progress=lambda *line: said.append(line), processes=2) == 3
    assert said == [(made.title, number, 3) for number, made in enumerate(few, 1)]
    assert compiled == [], "nothing is left for this process"
    assert kept(tmp_path) >= 3


@pytest.mark.compiler
def test_what_a_process_cannot_compile_is_told_by_this_one(few: list[Source], tmp_path: Path) -> None:
    few[1] = Source("no_such_file", (), 'extern "C" __global__ void wrong() { this is no C++; }\n')
    with using("host"), pytest.raises(CompileError, match=r"no_such_file: wrong\.cu does not compile"):
        gpucnn_kernels.warm_up(processes=2)
    assert kept(tmp_path) >= 2, "the others are compiled"


@pytest.mark.parametrize(
    "code",
    ["import sys; sys.exit(1)", "import sys; sys.stdin.readline()", "import time; time.sleep(1000)"],
    ids=["end at once", "end when asked", "hang"],
)
def test_processes_that_end_or_hang_leave_their_work_to_this_one(
    code: str, recording: RecordingRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(runtime: str, device: int) -> subprocess.Popen[str]:
        assert (runtime, device) == ("recording", 0)
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True)

    monkeypatch.setattr(catalog, "current", lambda: recording)
    monkeypatch.setattr(ahead, "_start", start)
    monkeypatch.setattr(ahead, "PATIENCE_SECONDS", 1.0)
    said: list[int] = []
    count = gpucnn_kernels.warm_up(progress=lambda title, number, total: said.append(number), processes=2)
    assert sorted(recording.compiled) == sorted((made.title, 0) for made in catalog.variants(["float32"]))
    assert said == list(range(1, count + 1))
    with pytest.raises(ArgumentError, match="processes must be at least 1, got 0"):
        gpucnn_kernels.warm_up(processes=0)


def test_importing_the_catalog_loads_no_gpu() -> None:
    code = (
        "import sys; from gpucnn_kernels import catalog; catalog.variants()\n"
        "print(sorted({'cupy', 'gpucnn_kernels.runtime.host'} & {*sys.modules}))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"
