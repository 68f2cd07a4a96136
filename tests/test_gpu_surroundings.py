"""The checks of what lies around the kernels, as far as they run without a GPU: they pass, and they can fail."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest

from gpucnn.data import device_preprocessing
from gpucnn.data.transfer import HostMemory
from gpucnn_kernels import Conv2dProblem, runtime, tuning_memory
from gpucnn_kernels import tuning as kernels_tuning
from gpucnn_kernels.runtime.host_array import HostArray, host_arrays
from scripts.gpu_validation import surroundings, tuning
from scripts.gpu_validation.bench import Bench


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv(runtime.VARIABLE, "host")
    return Bench("host", seed=5, dtypes=("float32", "bfloat16"), whole=False, deadline=math.inf)


def failures(bench: Bench) -> list[str]:
    assert bench.outcomes
    return [failure for outcome in bench.outcomes.values() for failure in outcome.failures]


def test_they_pass_on_the_host_runtime(bench: Bench) -> None:
    surroundings.check_threads(bench)
    surroundings.check_batches(bench, HostMemory())
    surroundings.check_loader(bench)
    surroundings.check_bfloat16(bench, host_arrays)
    assert failures(bench) == []
    assert sum(outcome.runs for outcome in bench.outcomes.values()) == 8


@pytest.mark.compiler
def test_tuning_passes_on_the_host_runtime_and_is_seen_to_fail(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tuning, "PROBLEMS", {"3x3": Conv2dProblem.from_shapes((1, 8, 7, 7), (12, 8, 3, 3), padding=1)}
    )
    used = kernels_tuning.used()
    tuning.check_tuning(bench)
    assert failures(bench) == []
    assert sum(outcome.runs for outcome in bench.outcomes.values()) == 7
    assert kernels_tuning.used() == used  # what this process had chosen before
    monkeypatch.setattr(tuning_memory.Memory, "get", lambda self, key: None)
    tuning.check_tuning(bench)
    assert any("what the file remembers" in failure for failure in failures(bench))


def test_without_a_gpu_there_is_nothing_to_check(bench: Bench) -> None:
    surroundings.check_surroundings(bench)
    assert bench.outcomes == {}


def test_a_batch_that_comes_too_late_is_seen(bench: Bench) -> None:
    class Late(HostMemory):
        before: list[Any] | None = None

        def start(self, *sent: Any) -> tuple[list[Any], Any, Any]:
            arrays, copied, end = super().start(*sent)
            late, self.before = self.before or arrays, arrays
            return late, copied, end

    surroundings.check_batches(bench, Late())
    assert any("numbers are over the bound" in failure for failure in failures(bench))


def test_batches_that_are_not_the_cpus_are_seen(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    right = device_preprocessing.to_send

    def wrong(images: Any, preprocessing: Any, changes: Any, dtype: str) -> Any:
        return right(images, preprocessing, {name: changes[name] for name in changes if name != "flip"}, dtype)

    monkeypatch.setattr("gpucnn.data.loader.to_send", wrong)
    surroundings.check_loader(bench)
    assert failures(bench)[0].startswith("moved: ")
    assert not any(failure.startswith("no changes") for failure in failures(bench))


def test_a_thread_that_cannot_launch_is_seen(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(x: Any) -> Any:
        raise RuntimeError("CUDA_ERROR_INVALID_CONTEXT: invalid device context")

    monkeypatch.setattr(surroundings.kernels, "relu_forward", fail)
    surroundings.check_threads(bench)
    assert any("INVALID_CONTEXT" in failure for failure in failures(bench))


def test_wrong_bfloat16_is_seen(bench: Bench) -> None:
    class Truncating:
        asarray = staticmethod(host_arrays.asarray)
        isfinite = staticmethod(host_arrays.isfinite)
        concatenate = staticmethod(host_arrays.concatenate)

        @staticmethod
        def minimum(y: Any, most: Any) -> Any:
            return numpy.minimum(y.view(numpy.ndarray), most + 1).view(HostArray)

    surroundings.check_bfloat16(bench, Truncating())
    assert any("numbers are over the bound" in failure for failure in failures(bench))
