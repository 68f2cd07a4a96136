"""What tuning goes by is the GPU's time: on a GPU that is played, with a clock that only it and Python move."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gpucnn_kernels import tuning, tuning_clock
from gpucnn_kernels.tuning_clock import EventClock
from gpucnn_kernels.tuning_memory import Choice

PYTHON = 60e-6  # to start a call


class PlayedGpu:
    """Does what is queued one after the other, from the time at which Python has queued it."""

    def __init__(self, memory: bool = True) -> None:
        self.now = self.free = 0.0
        self.memory, self.overwritten = memory, 0
        gpu = self

        class Event:
            time = 0.0

            def record(self) -> None:
                self.time = gpu.free = max(gpu.free, gpu.now)

            def synchronize(self) -> None:
                gpu.now = max(gpu.now, self.time)

        self.cuda = SimpleNamespace(
            Event=Event, get_elapsed_time=lambda before, after: 1e3 * (after.time - before.time)
        )

    def run(self, seconds: float, python: float = PYTHON) -> None:
        self.now += python
        self.free = max(self.free, self.now) + seconds

    def empty(self, size: int, dtype: str) -> Any:
        if not self.memory:
            raise MemoryError
        return SimpleNamespace(data=SimpleNamespace(memset_async=self._memset))

    def _memset(self, value: int, size: int) -> None:
        self.overwritten += 1
        self.run(20e-6, 2e-6)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> PlayedGpu:
    made = PlayedGpu()
    monkeypatch.setattr(tuning_clock.time, "perf_counter", lambda: made.now)
    return made


@pytest.mark.parametrize("seconds", [3e-6, 30e-6, 2e-3])
def test_a_kernel_shorter_than_its_start_is_timed_by_itself(seconds: float, gpu: PlayedGpu) -> None:
    clock = EventClock(gpu)
    clock.seconds(lambda: gpu.run(seconds, 1.5), 1)  # compiles
    clock.seconds(lambda: gpu.run(seconds), 1)
    before = gpu.overwritten
    for repeats in (1, 20):
        assert clock.seconds(lambda: gpu.run(seconds), repeats) == pytest.approx(seconds)
    assert gpu.overwritten - before == 6 + 120, "twice as long as Python takes"
    clock.seconds(lambda: gpu.run(seconds, 1.5), 1)
    before = gpu.overwritten
    clock.seconds(lambda: gpu.run(seconds), 1)
    assert gpu.overwritten - before == 1000, "20 ms at the most"


def test_without_memory_for_it_python_counts(gpu: PlayedGpu) -> None:
    gpu.memory = False
    clock = EventClock(gpu)
    for _ in range(2):
        assert clock.seconds(lambda: gpu.run(3e-6), 20) == pytest.approx(PYTHON, rel=0.1)


def test_the_fastest_is_the_gpus_and_not_pythons(gpu: PlayedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch of 20 us, or two of 2 us, which take Python twice as long."""

    def run(path: str) -> None:
        if path == "refused":
            raise RuntimeError("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES")
        for _ in range(2 if path == "two" else 1):
            gpu.run(2e-6 if path == "two" else 20e-6)

    choices = [Choice("refused"), Choice("one"), Choice("two")]
    monkeypatch.setattr(tuning, "current_name", lambda: "cuda")
    failures: list[Exception] = []
    found = tuning.measure(choices, run, EventClock(gpu), failures)
    assert min(found, key=found.__getitem__) == Choice("two")
    assert found == pytest.approx({Choice("one"): 20e-6, Choice("two"): 4e-6})
    assert [str(error) for error in failures] == ["CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"]
    monkeypatch.setattr(tuning, "current_name", lambda: "host")
    with pytest.raises(RuntimeError, match="OUT_OF_RESOURCES"):  # there it is a kernel's fault
        tuning.measure(choices, run, EventClock(gpu))
