"""scripts/benchmark.py --device cuda: every kind of row runs, on the host runtime; files, time and arithmetic."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.append(str(SCRIPTS))  # the benchmark's own parts are imported from there

from benchmarking import gpu_report, gpu_run  # noqa: E402
from benchmarking.gpu_clock import EventClock, WallClock  # noqa: E402
from benchmarking.gpu_others import CupyColumns  # noqa: E402
from benchmarking.gpu_ours import OursOnGpu  # noqa: E402
from benchmarking.gpu_process import TooLateError  # noqa: E402
from benchmarking.gpu_rows import (  # noqa: E402
    COMPILED,
    Measurement,
    convolution_work,
    in_turns,
    measurements,
    tiny,
)
from benchmarking.gpu_worker import LostError, Worker  # noqa: E402
from benchmarking.rows import convolution_rows  # noqa: E402

from gpucnn_kernels import tuning_memory  # noqa: E402

# ---------------------------------------------------------------- rows


def test_the_table_that_was_to_be_filled_is_all_there() -> None:
    keys = {measurement.key for measurement in measurements()}
    assert len(keys) == len(measurements())
    layers = (
        "seed c1 3->16 k3 s2 224 N64", "seed c2 16->32 k3 s2 55 N64", "seed c3 32->64 k3 s2 27 N64",
        "seed c4 64->128 k3 s2 13 N64", "lenet c1 1->6 k5 28 N512", "lenet c2 6->16 k5 14 N512",
        "alexnet c1 3->64 k11 s4 224 N256", "alexnet c2 64->192 k5 27 N256", "vgg 3->64 k3 224 N64",
        "vgg 64->64 k3 224 N64", "vgg 512->512 k3 14 N64", "resnet stem 3->64 k7 s2 224 N256",
        "resnet 64->64 k3 56 N256", "resnet 128->128 k3 28 N256", "resnet 256->256 k3 14 N256",
        "resnet 512->512 k3 7 N256", "resnet 64->128 k3 s2 56 N256", "1x1 64->256 56 N256",
        "1x1 1024->256 14 N256", "depthwise k3 64 56 N256", "depthwise k3 256 28 N256",
    )  # fmt: skip
    for precision in ("float32", "tf32", "bfloat16", "float16"):
        for layer in layers:
            for direction in ("forward", "input gradient", "filter gradient"):
                assert f"{layer} {direction}, {precision}, libraries" in keys
        for step in ("lenet5 28 N128", "animalnet 224 N4", "vgg-small 28 N128", "resnet18 224 N256"):
            assert f"{step} training step, {precision}, libraries" in keys
        assert f"resnet50 224 N128 training step, {precision}, libraries" in keys
    for row in (
        "max-pool k2 64x56 N256 forward", "average pool k2 64x56 N256 backward", "batch norm 64x56 N256 backward",
        "softmax cross-entropy 65536x1000 forward and backward", "sgd momentum 25,600,000 step",
        "adam 25,600,000 step", "col2im k3 64x56 N64 col2im",
        "seed c1 3->16 k3 s2 224 N64 conv + bias + relu + pool",
    ):  # fmt: skip
        assert f"{row}, float32, libraries" in keys
    assert "lenet5 28 N128 training step, float32, compiled" in keys


@pytest.mark.parametrize(
    ("key", "goal"),
    [
        ("seed c1 3->16 k3 s2 224 N64 forward, float32, libraries", "first layer"),
        ("seed c1 3->16 k3 s2 224 N64 input gradient, float32, libraries", "strided input gradient"),
        ("seed c1 3->16 k3 s2 224 N64 filter gradient, float32, libraries", "filter gradient"),
        ("vgg 64->64 k3 224 N64 input gradient, tf32, libraries", "dense tf32"),
        ("vgg 64->64 k3 224 N64 forward, float16, libraries", "dense 16-bit"),
        ("lenet c2 6->16 k5 14 N512 forward, float32, libraries", "dense float32"),
        ("1x1 64->256 56 N256 forward, bfloat16, libraries", "1x1"),
        ("depthwise k3 64 56 N256 filter gradient, float32, libraries", "depthwise"),
        ("gelu 64x56 N256 forward, bfloat16, libraries", "memory-bound"),
        ("lenet5 28 N128 training step, float32, libraries", "small step, eager"),
        ("animalnet 224 N4 training step, float32, compiled", "small step, compiled"),
        ("resnet50 224 N128 training step, bfloat16, compiled", "none"),
    ],
)
def test_rows_belong_to_the_classes_of_the_goals(key: str, goal: str) -> None:
    (found,) = [each for each in measurements() if each.key == key]
    assert found.goal.name == goal


def test_the_least_work_is_counted_alike_twice_and_by_hand() -> None:
    for row in convolution_rows("cuda"):
        assert convolution_work(row.sizes) == (row.flops, row.bytes)
    (found,) = [each for each in measurements() if each.key == "1x1 64->256 56 N256 forward, float16, libraries"]
    assert found.row.flops == 2 * 256 * 56 * 56 * 64 * 256
    assert found.row.bytes == 2 * (256 * 56 * 56 * (64 + 256) + 64 * 256)


# ---------------------------------------------------------------- every kind of row, on the host runtime


def _kinds() -> list[Measurement]:
    """The first row of each kind, direction, precision and model; the largest networks left out."""
    found: dict[Any, Measurement] = {}
    for each in measurements():
        row = each.row
        if row.sizes.get("model") in ("resnet18", "resnet50", "vgg-small") or each.against == COMPILED:
            continue
        groups = row.sizes.get("groups", 1) > 1
        size = row.sizes.get("kernel") if row.kind == "convolution" else None
        found.setdefault((row.kind, row.direction, each.precision, groups, size in (1, 5)), tiny(each))
    return list(found.values())


@pytest.fixture
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUCNN_KERNELS_RUNTIME", "host")


@pytest.mark.compiler
@pytest.mark.parametrize("measurement", _kinds(), ids=lambda measurement: measurement.key)
def test_a_row_of_each_kind_runs(
    measurement: Measurement, on_the_host: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tuning_memory, "cache_folder", lambda kind: tmp_path)
    tuning_memory.memory_of.cache_clear()
    worker = Worker(OursOnGpu(), rehearsing=True)
    answer = worker.prepare(measurement.row.as_json(), measurement.precision)
    assert answer["failed"] == {}
    image = measurement.row.kind not in ("step", "cross_entropy") and "count" not in measurement.row.sizes
    expected = ["", "channels-last"] if image else [""]
    convolution = measurement.row.kind == "convolution"
    dense = convolution and measurement.row.sizes["groups"] == 1
    expected += ["tensor"] * (dense and measurement.precision == "float32")
    narrow = measurement.precision in ("bfloat16", "float16")
    expected += ["wgmma"] * (convolution and narrow and measurement.row.direction != "filter gradient")
    step = measurement.row.kind == "step"
    assert answer["variants"] == expected + ["autotuned"] * convolution + ["captured"] * step
    for variant in ("", "autotuned") if convolution else ():
        assert answer["settings"][variant]["way"].split()[0] in (
            "implicit_gemm", "phases", "direct", "depthwise", "im2col", "col2im", "tensor",
        )  # fmt: skip
    for variant in answer["variants"]:
        (seconds,) = worker.measure(variant)["seconds"]
        assert 0 < seconds < 60


@pytest.mark.parametrize("direction", ["forward", "input gradient", "filter gradient"])
def test_what_a_cupy_user_writes_is_the_convolution(direction: str, on_the_host: None) -> None:
    """It is the peer without a library: were it wrong, it would be no peer."""
    import numpy

    from gpucnn.ops import cpu

    sizes = {"n": 2, "c": 3, "size": 9, "k": 4, "kernel": 3, "stride": 2, "padding": 1, "groups": 1}
    given: list[Any] = []
    peer = CupyColumns()
    pair = peer._pair

    def keep(s: dict[str, Any]) -> tuple[Any, Any]:
        given[:] = pair(s)
        return given[0], given[1]

    peer._pair = keep  # type: ignore[method-assign]
    row = {"kind": "convolution", "direction": direction, "sizes": sizes}
    work = peer.prepare_in(row, "float32", "")
    assert work is not None
    x, weight = (values.get() for values in given)
    options: dict[str, Any] = {"stride": 2, "padding": 1}
    y = cpu.conv2d_forward(x, weight, **options)
    if direction == "forward":
        expected = y
    elif direction == "input gradient":
        expected = cpu.conv2d_backward_data(y, weight, input_size=(9, 9), **options)
    else:
        expected = cpu.conv2d_backward_filter(y, x, kernel_size=3, **options)
    result = numpy.asarray(work()).reshape(expected.shape)
    assert float(numpy.abs(result - expected).max()) <= 1e-4 * float(numpy.abs(expected).max())


@pytest.mark.compiler
def test_the_proof_shows_what_precision_was_at_work(on_the_host: None) -> None:
    worker = Worker(OursOnGpu(), rehearsing=True)
    found = {precision: worker.proof(precision)["error_ratio"] for precision in gpu_run._PROOFS}
    assert found["float32"] <= gpu_run._PROOFS["float32"] < found["tf32"] <= gpu_run._PROOFS["tf32"]
    assert 1e-4 < found["bfloat16"] <= gpu_run._PROOFS["bfloat16"]
    assert 1e-5 < found["float16"] <= gpu_run._PROOFS["float16"]


# ---------------------------------------------------------------- clocks


class _Gpu:
    """A GPU that is a counter: flushing takes 100 units (us), a call of the work 7."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def event(self) -> Any:
        gpu = self

        class Event:
            at = -1.0

            def record(self) -> None:
                self.at = gpu.now
                gpu.log.append("event")

        return Event()

    def run(self, what: str, microseconds: float) -> None:
        self.log.append(what)
        self.now += microseconds


def test_events_time_the_call_alone_after_the_cache_was_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = _Gpu()
    clock = EventClock(
        gpu.event,
        lambda before, after: (after.at - before.at) / 1e3,
        lambda: gpu.run("flush", 100),
        lambda: gpu.log.append("wait"),
    )
    seconds = iter([0.0, 130e-6])  # Python takes 130 us to queue a call: the GPU needs 260 us of other work
    monkeypatch.setattr("benchmarking.gpu_clock.time.perf_counter", lambda: next(seconds))
    found = clock.samples(lambda: gpu.run("work", 7), 2)
    assert found == pytest.approx([7e-6, 7e-6])
    timed = ["flush"] * 3 + ["event", "work", "event"]
    assert gpu.log[-14:] == ["wait", *timed, *timed, "wait"]


# ---------------------------------------------------------------- calls that go on with a file


class _Fake:
    """A library in the place of a process: preparing takes ``cost`` seconds of a clock that only it moves."""

    now = 0.0
    asked: ClassVar[list[tuple[str, str]]] = []
    costs: ClassVar[dict[str, float]] = {}
    errors: ClassVar[dict[str, float]] = {}

    def __init__(self, name: str, runtime: str) -> None:
        self.name, self.hello, self.closed = name, {}, False  # type: ignore[var-annotated]

    def launch(self) -> None:
        self.launched = True

    def start(self, deadline: float) -> None:
        assert self.launched
        facts = {"gpu": "GPU X", "driver": "1"}
        self.hello = (
            {"error": "no module"} if self.name == "jax" else {"versions": {self.name: "1"}, "facts": facts}
        )

    @property
    def works(self) -> bool:
        return "error" not in self.hello

    def ask(self, deadline: float, do: str, **what: Any) -> dict[str, Any]:
        if do == "ceiling":
            return {"seconds": [1e-3]}
        if do == "proof":
            return {"error_ratio": self.errors.get(self.name, 1e-7)}
        if do == "prepare":
            row = what["row"]
            _Fake.asked.append((self.name, f"{row['name']} {row['direction']}, {what['precision']}"))
            cost = self.costs.get(self.name, 1.0)
            if _Fake.now + cost > deadline:
                _Fake.now = deadline
                raise TooLateError
            _Fake.now += cost
            return {"variants": [""], "failed": {"channels-last": "cannot"}, "settings": {"": {"on": True}}}
        return {"seconds": [2e-3 if self.name == "gpucnn" else 3e-3]}

    def close(self, at_once: bool = False) -> None:
        self.closed = True


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> type[_Fake]:
    _Fake.now, _Fake.asked, _Fake.costs, _Fake.errors = 0.0, [], {}, {}
    monkeypatch.setenv("GPUCNN_KERNELS_RUNTIME", "host")  # put back what main sets
    monkeypatch.setattr(gpu_run, "Library", _Fake)
    monkeypatch.setattr(gpu_run, "compile_ahead", lambda options: None)
    monkeypatch.setattr(gpu_run.time, "monotonic", lambda: _Fake.now)
    return _Fake


def _options(path: Path, **changes: Any) -> argparse.Namespace:
    given = {"runtime": "cuda", "minutes": 8.0, "precisions": None, "rows": "", "suite": "all", "rounds": 3}
    return argparse.Namespace(**{**given, "retry_blanks": False, "json": path, **changes})


def test_four_calls_of_eight_minutes_fill_the_table(fakes: type[_Fake], tmp_path: Path) -> None:
    """With a second to prepare a row for each of three libraries; what is there is not measured again."""
    path = tmp_path / "x.json"
    statuses = [gpu_run.main(_options(path), ["torch", "jax", "torch compile"])]
    first = json.loads(path.read_text())
    assert 200 < len(first["rows"]) < len(measurements())
    while statuses[-1] == 3:
        statuses.append(gpu_run.main(_options(path), ["torch", "jax", "torch compile"]))
    assert statuses == [3] * (len(statuses) - 1) + [0]
    assert len(statuses) <= 4
    done = json.loads(path.read_text())
    assert set(done["rows"]) == {measurement.key for measurement in measurements()}
    in_order = [measurement.key for measurement in in_turns(measurements())]
    assert list(first["rows"])[:200] == in_order[:200]  # the last of a call are those that it had the time for
    assert {call["driver"] for call in done["calls"]} == {"1"}
    assert done["rows"].items() >= first["rows"].items()
    ours = [key for name, key in fakes.asked if name == "gpucnn"]
    # A row that the end of a call cut short is begun again, and only such a row.
    assert len(measurements()) <= len(ours) <= len(measurements()) + len(statuses)
    for entry in done["rows"].values():
        peers = {"torch compile"} if entry["against"] == "compiled" else {"torch"}
        assert set(entry["seconds"]) == {"gpucnn"} | peers
        assert entry["seconds"]["gpucnn"] == [2e-3] * 3
        assert gpu_report.speed(entry) == pytest.approx(1.5)
    assert done["missing"] == {"jax": "no module"}
    page = path.with_suffix(".md").read_text()
    assert page == gpu_report.page(done)
    assert "- jax: no module" in page
    assert gpu_run.main(_options(path), ["torch", "jax", "torch compile"]) == 0  # nothing is left
    assert len(json.loads(path.read_text())["calls"]) == len(statuses)


def test_a_library_that_hangs_is_a_blank_and_not_the_end(
    fakes: type[_Fake], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    fakes.costs = {"torch": 1000.0}
    assert gpu_run.main(_options(path, rows="lenet c1"), ["torch"]) == 3
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 3  # of 150 seconds each; the fourth ran into the end of the call
    assert all(entry["blank"]["torch"] == "not ready after 150 s" for entry in rows.values())
    assert all(entry["seconds"] == {"gpucnn": [2e-3] * 3} for entry in rows.values())
    assert "15 of 18 rows are left, from 'lenet c1 1->6 k5 28 N512 input gradient, float32, libraries' on" in (
        capsys.readouterr().err
    )


def test_blanks_are_measured_again_where_that_is_asked_for(fakes: type[_Fake], tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    only = {"rows": "lenet c1", "precisions": "float32", "minutes": 60.0}
    fakes.costs = {"torch": 1000.0}
    assert gpu_run.main(_options(path, **only), ["torch"]) == 0

    def measured() -> set[bool]:
        rows = json.loads(path.read_text())["rows"].values()
        return {"torch" in entry["seconds"] for entry in rows if entry["against"] == "libraries"}

    assert measured() == {False}
    fakes.costs = {}
    for retry_blanks in (False, True):
        assert gpu_run.main(_options(path, retry_blanks=retry_blanks, **only), ["torch"]) == 0
        assert measured() == {retry_blanks}


def test_rows_that_take_long_are_not_begun_near_the_end(fakes: type[_Fake], tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    asked = {"rows": "lenet5", "precisions": "float32", "minutes": 1.0}
    assert gpu_run.main(_options(path, **asked), ["torch compile"]) == 3
    rows = json.loads(path.read_text())["rows"].values()
    assert {entry["against"] for entry in rows} == {"libraries"}  # what is compiled may take 150 seconds
    assert gpu_run.main(_options(path, **{**asked, "minutes": 8.0}), ["torch compile"]) == 0


def test_jax_is_no_peer_where_its_cache_is_warm() -> None:
    entry = {"seconds": {"gpucnn": [2.0], "torch": [3.0], "jax": [1.0]}, "bytes": 1e6}
    assert gpu_report.best(entry, ours=False) == ("torch", 3.0)
    assert gpu_report.best({**entry, "bytes": 1e9}, ours=False) == ("jax", 1.0)


def test_what_ends_a_process_is_one_blank(
    fakes: type[_Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variant after which CUDA fails, one that does not come to its end, one that kills the process."""
    path, asked = tmp_path / "x.json", list[list[str]]()
    ends = {"": "an illegal access", "tensor": "", "channels-last": "the process ended with status -11"}

    def ask(self: Any, deadline: float, do: str, **what: Any) -> dict[str, Any]:
        if do != "prepare" or self.name != "gpucnn":
            return plain(self, deadline, do, **what)
        asked.append(list(what["without"]))
        for self.at, why in ends.items():
            if self.at in what["without"]:
                continue
            if not why:
                raise TooLateError
            return {"error": why, "lost": self.at}
        return {"variants": ["autotuned"], "failed": {}, "settings": {}}

    plain = _Fake.ask
    monkeypatch.setattr(_Fake, "ask", ask)
    monkeypatch.setattr(_Fake, "at", None, raising=False)
    options = _options(path, rows="lenet c1 1->6 k5 28 N512 forward", precisions="tf32")
    assert gpu_run.main(options, ["torch"]) == 0
    (entry,) = json.loads(path.read_text())["rows"].values()
    assert asked == [[], [""], ["", "tensor"], ["", "tensor", "channels-last"]]
    assert set(entry["seconds"]) == {"gpucnn autotuned", "torch"}
    assert {column: why for column, why in entry["blank"].items() if "gpucnn" in column} == {
        "gpucnn": "an illegal access",
        "gpucnn tensor": "not ready after 150 s",
        "gpucnn channels-last": "the process ended with status -11",
    }


def test_a_worker_says_what_it_is_at_and_whether_cuda_goes_on() -> None:
    class Peer:
        variants = ("fine", "wrong", "fatal", "never")
        broken = False

        def forget(self) -> None: ...

        def synchronize(self) -> None:
            if self.broken:
                raise RuntimeError("so it is with every call")

        def prepare_in(self, row: Any, precision: str, variant: str) -> Any:
            if variant == "fine":
                return lambda: None
            Peer.broken = variant == "fatal"
            raise RuntimeError(f"{variant} it is")

    said: list[dict[str, Any]] = []
    worker = Worker(Peer(), WallClock(), rehearsing=True, tell=said.append)
    with pytest.raises(LostError, match="RuntimeError: fatal it is") as caught:
        worker.prepare({"kind": "step"}, "tf32")
    assert caught.value.variant == "fatal"
    Peer.broken = False
    answer = worker.prepare({"kind": "step"}, "tf32", without=["fatal", "never"])
    assert (answer["variants"], answer["failed"]) == (["fine"], {"wrong": "RuntimeError: wrong it is"})
    assert [what["at"] for what in said] == ["fine", "wrong", "fatal", "fine", "wrong"]
    assert len(worker.measure("fine")["seconds"]) == 1
    with pytest.raises(RuntimeError, match="its process was ended by another variant"):
        worker.measure("fatal")


def test_a_proof_that_never_comes_leaves_its_library_blank(
    fakes: type[_Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(self: Any, deadline: float, do: str, **what: Any) -> dict[str, Any]:
        if do == "proof" and self.name == "torch":
            _Fake.now = deadline
            raise TooLateError
        return plain(self, deadline, do, **what)

    plain = _Fake.ask
    monkeypatch.setattr(_Fake, "ask", ask)
    path = tmp_path / "x.json"
    assert gpu_run.main(_options(path, rows="lenet c2", precisions="tf32"), ["torch"]) == 0
    for entry in json.loads(path.read_text())["rows"].values():
        assert entry["blank"]["torch"] == "its proof was not ready after 150 s"
        assert set(entry["seconds"]) == {"gpucnn"}


def test_the_first_rows_have_something_of_everything() -> None:
    order = in_turns(measurements())
    assert sorted(each.key for each in order) == sorted(each.key for each in measurements())
    first = order[:30]
    classes = {(each.goal.name, each.precision) for each in measurements() if each.against == "libraries"}
    assert {(each.goal.name, each.precision) for each in first} >= {
        found for found in classes if found[1] != "float16"
    }
    assert "vgg 64->64 k3 224 N64 forward, float32, libraries" in {each.key for each in first}
    sooner = {
        each.key for each in order if (each.goal.name, each.precision) == ("small step, compiled", "float32")
    }
    assert {each.key for each in order[: len(order) // 2]} >= sooner
    rest = [each for each in order if each.key not in sooner]
    late = [each.against == COMPILED or each.precision == "float16" for each in rest]
    assert late == sorted(late)
    assert order[-1].against == COMPILED


def test_all_kernels_are_compiled_before_the_first_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from gpucnn_kernels import catalog

    asked: list[list[str]] = []

    def warm_up(dtypes: list[str], processes: int) -> int:
        asked.append(dtypes)
        if len(asked) == 2:
            raise RuntimeError("no register left")
        return 7

    monkeypatch.setattr(catalog, "warm_up", warm_up)
    for precisions in (None, "tf32,float16"):
        gpu_run.compile_ahead(_options(tmp_path, precisions=precisions))
    gpu_run.compile_ahead(_options(tmp_path, runtime="host"))
    assert asked == [["float32", "bfloat16", "float16"], ["float32", "float16"]]
    said = capsys.readouterr()
    assert said.out.startswith("7 modules compiled in ")
    assert said.err == "benchmark: not all kernels compile: no register left\n"


def test_a_library_whose_float32_is_none_does_not_count(fakes: type[_Fake], tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    fakes.errors = {"torch": 3e-4}  # as tf32 has it
    assert gpu_run.main(_options(path, rows="lenet c2", precisions="float32,tf32"), ["torch"]) == 0
    rows = json.loads(path.read_text())["rows"]
    for entry in rows.values():
        assert ("torch" in entry["seconds"]) == (entry["precision"] == "tf32")
        if entry["precision"] == "float32":
            assert "its float32 convolutions have a relative error of 3.0e-04" in entry["blank"]["torch"]


def test_results_of_another_machine_or_other_kernels_are_not_mixed(
    fakes: type[_Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    assert gpu_run.main(_options(path, rows="lenet c1", precisions="tf32"), []) == 0
    before = path.read_bytes()
    monkeypatch.setattr(gpu_run, "fingerprint", lambda: "other")
    assert gpu_run.main(_options(path), []) == 2
    assert "holds results of another kernels" in capsys.readouterr().err
    assert path.read_bytes() == before
    path.write_text("{}")
    assert gpu_run.main(_options(path), []) == 2
    assert "is no file of results" in capsys.readouterr().err


def test_a_call_without_a_library_goes_on_with_the_file(
    fakes: type[_Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that was not asked for, or hangs as it is imported; but not with another version of one."""
    path = tmp_path / "x.json"
    assert gpu_run.main(_options(path, rows="lenet c1", precisions="tf32"), []) == 0
    plain = _Fake.start

    def start(self: Any, deadline: float) -> None:
        if self.name == "torch" and hangs:
            _Fake.now = deadline
            raise TooLateError
        plain(self, deadline)

    monkeypatch.setattr(_Fake, "start", start)
    for hangs in (True, False):
        options = _options(path, rows="lenet c2" if hangs else "vgg 3", precisions="tf32")
        assert gpu_run.main(options, ["torch", "jax"]) == 0
        results = json.loads(path.read_text())
        assert set(results["versions"]) == {"gpucnn"} | (set() if hangs else {"torch"})
        assert results["missing"] == {"jax": "no module"} | ({"torch": "not there after 150 s"} if hangs else {})
    assert {tuple(entry["seconds"]) for entry in results["rows"].values()} == {("gpucnn",), ("gpucnn", "torch")}
    results["versions"]["torch"] = "0.9"
    path.write_text(json.dumps(results))
    assert gpu_run.main(_options(path), ["torch"]) == 2
    assert "holds results of another torch: 0.9, now 1" in capsys.readouterr().err


def test_a_process_is_asked_told_to_hurry_and_replaced(tmp_path: Path) -> None:
    """The real process, with a worker that answers, hangs and dies."""
    import time

    from benchmarking import gpu_process

    package = tmp_path / "benchmarking"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "gpu_worker.py").write_text(
        "import json, sys, time\n"
        "print(json.dumps({'versions': {}, 'facts': {}}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    request = json.loads(line)\n"
        "    if request['do'] == 'hang': time.sleep(100)\n"
        "    if request['do'] == 'die': sys.exit(7)\n"
        "    if request['do'] == 'die later':\n"
        "        print(json.dumps({'at': 'tensor'}), flush=True); sys.exit(8)\n"
        "    if request['do'] == 'lose': print(json.dumps({'error': 'bad', 'lost': 'x'}), flush=True); continue\n"
        "    print(json.dumps({'got': request}), flush=True)\n"
    )
    library = gpu_process.Library("x", "host")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_process, "SCRIPTS", tmp_path)
        try:
            soon = time.monotonic() + 60
            library.start(soon)
            assert library.ask(soon, "prepare", row=1) == {"got": {"do": "prepare", "row": 1}}
            assert library.ask(soon, "die") == {"error": "the process ended with status 7"}
            assert library.ask(soon, "again") == {"got": {"do": "again"}}
            ended = {"error": "the process ended with status 8", "lost": "tensor"}
            assert library.ask(soon, "die later") == ended
            assert library.ask(soon, "lose") == {"error": "bad", "lost": "x"}
            assert library._process is None, "CUDA would fail in every call: another process takes its place"
            with pytest.raises(TooLateError):
                library.ask(time.monotonic() + 0.2, "hang")
            assert library.ask(time.monotonic() + 60, "back") == {"got": {"do": "back"}}
        finally:
            library.close()


@pytest.mark.compiler
def test_the_command_rehearses_and_writes(tmp_path: Path) -> None:
    path = tmp_path / "rehearsal.json"
    command = [sys.executable, str(SCRIPTS / "benchmark.py"), "--device", "cuda", "--runtime", "host"]
    command += ["--rows", "seed c4 64->128 k3 s2 13 N64 forward", "--peers", "cupy im2col", "--rounds", "1"]
    answer = subprocess.run([*command, "--json", str(path)], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    results = json.loads(path.read_text())
    assert [entry["precision"] for entry in results["rows"].values()] == ["float32", "tf32", "bfloat16", "float16"]
    exact = results["rows"]["seed c4 64->128 k3 s2 13 N64 forward, float32, libraries"]
    ours = {"gpucnn", "gpucnn channels-last", "gpucnn tensor", "gpucnn autotuned"}
    assert set(exact["seconds"]) == ours | {"cupy im2col"}
    assert set(results["calls"][0]["ceilings"]) == {"copy", "float32", "tf32", "bfloat16", "float16"}
    page = path.with_suffix(".md").read_text()
    assert "A rehearsal without a GPU" in page
    assert "## Operations, float16" in page


# ---------------------------------------------------------------- arithmetic


def _entry(**seconds: list[float]) -> dict[str, Any]:
    columns = {
        name.replace("_", " ").replace("channels last", "channels-last"): value for name, value in seconds.items()
    }
    return {
        "name": "row", "kind": "convolution", "direction": "forward", "precision": "tf32", "against": "libraries",
        "goal": "dense tf32", "flops": 4e9, "bytes": 1e6, "call": 0, "seconds": columns, "blank": {},
    }  # fmt: skip


def test_speed_goals_and_the_share_of_the_limit() -> None:
    entry = _entry(gpucnn=[4.0, 2.0, 3.0], gpucnn_channels_last=[1.0, 1.0, 9.0], gpucnn_tensor=[0.1], torch=[0.9])
    results = {"calls": [{"ceilings": {"copy": 1e7, "tf32": 1e10}}]}
    assert gpu_report.best(entry, True) == ("gpucnn channels-last", 1.0)  # what was asked for by name is no choice
    assert gpu_report.speed(entry) == pytest.approx(0.9)
    assert gpu_report.goal_reached(entry) == "then"
    assert gpu_report.share(entry, results) == pytest.approx(0.4)  # 0.4 s of arithmetic, 0.1 s of memory
    assert gpu_report.limit_seconds(entry, {"copy": 1e6, "tf32": 1e10}) == pytest.approx(1.0)
    assert gpu_report.goal_reached(_entry(gpucnn=[1.0], torch=[0.49])) == "none yet"
    assert gpu_report.goal_reached(_entry(gpucnn=[1.0], torch=[1.05])) == "goal"
    assert gpu_report.goal_reached(_entry(gpucnn=[1.0])) == "-"
    assert gpu_report.speed(_entry(torch=[1.0])) is None


def test_predictions_stand_beside_what_is_measured_on_the_gpu_that_they_are_for() -> None:
    (found,) = [each for each in measurements() if each.key == "vgg 512->512 k3 14 N64 forward, tf32, libraries"]
    entry = {**gpu_run.describe(found), "call": 0, "seconds": {"gpucnn": [1e-3]}, "blank": {}, "settings": {}}
    results: dict[str, Any] = {"gpu": "NVIDIA H200", "calls": [{"ceilings": {}}]}
    expected = json.loads(gpu_report.PREDICTIONS.read_text())["rows"][found.key]["seconds"]
    assert gpu_report.predicted(entry, results) == expected
    table = gpu_report.table([entry], results)
    assert f"| 1 ms | {gpu_report.shown(expected)} |" in table
    assert "predicted" not in gpu_report.table([entry], {**results, "gpu": "NVIDIA L4"})
