"""``fit(autotune=True)`` and ``gpucnn train --autotune``: on for the run and no longer, and nothing on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
from cli_cases import call

import gpucnn
from gpucnn.errors import ArgumentError
from gpucnn.layers import Flatten, Linear
from gpucnn.training import Callback, Progress, Trainer, TrainingOptions
from gpucnn_kernels import tuning
from gpucnn_kernels.runtime import using

SMALL = ("--data", "digits", "--epochs", "1", "--device", "cpu", "--batch-size", "512")


class Seen(Callback):
    """Whether convolutions would be measured, at every step and every epoch's end."""

    def __init__(self) -> None:
        self.steps: list[bool] = []

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        self.steps.append(tuning.enabled())

    def on_epoch_end(self, trainer: Trainer, record: Any) -> None:
        self.steps.append(tuning.enabled())


class Lines(Progress):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


def fit(device: str, autotune: bool) -> tuple[list[bool], list[str]]:
    """(whether each step would have measured, what was said)."""
    gpucnn.manual_seed(0)
    model = gpucnn.Sequential(Flatten(), Linear(64, 10))
    data = gpucnn.data.load("digits").train
    seen, said = Seen(), Lines()
    options = TrainingOptions(epochs=1, batch_size=512, autotune=autotune, capture="off")
    Trainer(model, data, options=options, callbacks=[seen], progress=said, device=device).fit()
    return seen.steps, said.lines


def test_on_a_gpu_it_is_on_for_the_run_alone() -> None:
    with using("host"):
        steps, said = fit("cuda", True)
        assert set(steps) == {True}
        assert not tuning.enabled()
        assert [line for line in said if line.startswith("autotune: the first step measures")] == said
        steps, said = fit("cuda", False)
        assert set(steps) == {False}
        assert said == []


def test_what_the_environment_asks_for_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.VARIABLE, "1")
    with using("host"):
        assert set(fit("cuda", False)[0]) == {True}


def test_on_the_cpu_there_is_nothing_to_measure() -> None:
    steps, said = fit("cpu", True)
    assert set(steps) == {False}
    assert said == ["autotune: there is nothing to measure on the CPU, and it has no effect"]


def test_a_run_keeps_to_what_it_was_started_with() -> None:
    assert TrainingOptions(autotune=numpy.bool_(True)).autotune is True  # type: ignore[arg-type]
    assert TrainingOptions().differences(TrainingOptions(autotune=True)) == ["autotune"]
    assert TrainingOptions.from_dict({"epochs": 3}).autotune is False, "checkpoints of earlier versions"
    with pytest.raises(ArgumentError, match="did you mean 'autotune'"):
        TrainingOptions.from_dict({"autotun": True})


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    answer = call(capsys, "train", *SMALL, "--autotune", "--output", str(run))
    assert answer.status == 0, answer.errors
    assert answer.errors.count("autotune: there is nothing to measure on the CPU") == 1
    answer = call(capsys, "train", "--resume", str(run), "--no-autotune")
    assert answer.status == 2
    assert "autotune" in answer.errors
    answer = call(capsys, "train", "--resume", str(run))
    assert answer.status == 0, answer.errors
