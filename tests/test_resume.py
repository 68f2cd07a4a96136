"""A run that is killed and resumed, however often and at whatever moment, ends where the undisturbed run ends."""

from __future__ import annotations

import dataclasses
import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
from resume_worker import make_data, make_model, make_trainer

from gpucnn import layers
from gpucnn.data import Preprocessing
from gpucnn.errors import ArgumentError, CheckpointError
from gpucnn.training import (
    Callback,
    Checkpoint,
    LineProgress,
    RunFolder,
    Trainer,
    TrainingInterrupted,
    read_checkpoint,
    write_checkpoint,
)

REPOSITORY = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("resume_worker.py")
TIMING = ("seconds", "images_per_second", "train_seconds")
KILLS = 20


def start_worker(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels")]
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(WORKER), str(folder), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint that does not depend on the clock, tensors as their exact bytes."""
    checkpoint = read_checkpoint(path)
    found: dict[str, Any] = {}
    for part in ("model", "ema", "optimizer"):
        for name, value in getattr(checkpoint, part).items():
            is_array = hasattr(value, "dtype")
            found[f"{part}.{name}"] = (str(value.dtype), value.shape, value.tobytes()) if is_array else value
    found |= {f"position.{k}": v for k, v in dataclasses.asdict(checkpoint.position).items() if k not in TIMING}
    found |= {"history": untimed(checkpoint), "generators": checkpoint.generators, "options": checkpoint.options}
    return found


def untimed(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    rows = [dataclasses.asdict(record) for record in checkpoint.history]
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


def assert_same_end(left: RunFolder, right: RunFolder) -> None:
    for one, other in ((left.last_path, right.last_path), (left.best_path, right.best_path)):
        expected, found = contents(one), contents(other)
        assert expected.keys() == found.keys()
        assert [name for name in expected if expected[name] != found[name]] == []
    for one in (left, right):
        assert [dataclasses.asdict(r) for r in one.read_history()] == [
            dataclasses.asdict(r) for r in one.read_last().history
        ]
        assert sorted(path.name for path in one.path.iterdir()) == [
            "best.safetensors",
            "config.json",
            "history.jsonl",
            "last.safetensors",
        ]


@pytest.mark.slow
def test_twenty_kills_at_random_moments_and_four_within_a_write_change_nothing(tmp_path: Path) -> None:
    undisturbed = start_worker(tmp_path / "undisturbed")
    moments = random.Random(time.time_ns())
    # Each place of a checkpoint write at which dying could hurt, then twenty moments by the clock.
    for number, place in enumerate(("half-written", "unsynced", "unnamed", "unnoticed"), start=3):
        worker = start_worker(tmp_path / "killed", place, KILL_AT=str(number))
        _, errors = worker.communicate(timeout=60)
        assert worker.returncode == -signal.SIGKILL, errors
    kills = 0
    while kills < KILLS:
        worker = start_worker(tmp_path / "killed")
        assert worker.stdout is not None
        worker.stdout.readline()
        time.sleep(moments.uniform(0, 0.08))
        assert worker.poll() is None, f"the run ended after {kills} kills; make it longer"
        worker.kill()
        worker.communicate(timeout=60)
        kills += 1
    final = start_worker(tmp_path / "killed")
    for worker in (final, undisturbed):
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    assert_same_end(RunFolder(tmp_path / "undisturbed"), RunFolder(tmp_path / "killed"))


class StopAt(Callback):
    """Ends the run after a step, in a way of one's choice."""

    def __init__(self, step: int, how: Any) -> None:
        self.step, self.how, self.taken = step, how, 0

    def on_step_end(self, trainer: Any, loss: float) -> None:
        self.taken += 1
        if self.taken == self.step:
            self.how()


def crash() -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (9, {"optimizer": "sgd", "nesterov": True, "schedule": "step", "step_size": 1, "ema_decay": None}),
        (27, {"optimizer": "rmsprop", "schedule": "constant", "workers": 0, "clip_norm": None}),
        (31, {"optimizer": "adam", "schedule": "cosine", "class_weights": None, "checkpoint_steps": 1}),
        (54, {"weight_decay": 0.1, "monitor": "loss", "checkpoint_steps": None}),
    ],
)
def test_a_crash_with_any_optimizer_and_schedule_changes_nothing(
    tmp_path: Path, step: int, options: dict[str, Any]
) -> None:
    undisturbed, crashed = RunFolder(tmp_path / "undisturbed"), RunFolder(tmp_path / "crashed")
    options = {"epochs": 2, **options}
    make_trainer(undisturbed, **options).fit()
    with pytest.raises(MemoryError):
        make_trainer(crashed, (StopAt(step, crash),), **options).fit()
    make_trainer(crashed, **options).fit(resume=True)
    assert_same_end(undisturbed, crashed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_where(tmp_path: Path, number: signal.Signals) -> None:
    undisturbed, stopped = RunFolder(tmp_path / "undisturbed"), RunFolder(tmp_path / "stopped")
    before = signal.getsignal(number)
    make_trainer(undisturbed, epochs=1).fit()
    with pytest.raises(TrainingInterrupted, match=r"step 7; saved in .*last\.safetensors") as caught:
        make_trainer(stopped, (StopAt(7, lambda: os.kill(os.getpid(), number)),), epochs=1).fit()
    assert caught.value.signal_number == number
    assert signal.getsignal(number) is before
    assert stopped.read_last().position.step == 7
    make_trainer(stopped, epochs=1).fit(resume=True)
    assert_same_end(undisturbed, stopped)


def test_a_signal_during_validation_saves_the_trained_weights_not_their_average(tmp_path: Path) -> None:
    undisturbed, stopped = RunFolder(tmp_path / "undisturbed"), RunFolder(tmp_path / "stopped")
    make_trainer(undisturbed, epochs=1).fit()
    trainer = make_trainer(stopped, epochs=1)
    trainer.progress.validate = lambda images: os.kill(os.getpid(), signal.SIGINT)  # type: ignore[method-assign]
    with pytest.raises(TrainingInterrupted, match="step 27"):
        trainer.fit()
    assert stopped.read_last().position.batch == 27
    make_trainer(stopped, epochs=1).fit(resume=True)
    assert_same_end(undisturbed, stopped)


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), RuntimeError("reentrant call"), ValueError("closed file")]
)
def test_a_signal_that_cannot_be_announced_still_saves(tmp_path: Path, error: Exception) -> None:
    class Gone(io.StringIO):
        """Ends with the signal, as a reader in the same pipeline does; a pipe stays broken, the rest passes."""

        broken, refused = False, 0

        def write(self, text: str) -> int:
            if self.broken:
                self.refused += 1
                self.broken = isinstance(error, OSError)
                raise error
            return super().write(text)

    stream, run = Gone(), RunFolder(tmp_path)

    def interrupt() -> None:
        stream.broken = True
        os.kill(os.getpid(), signal.SIGINT)

    trainer = make_trainer(run, (StopAt(7, interrupt),), epochs=1)
    trainer.progress = LineProgress(stream, interval=0.0)
    with pytest.raises(TrainingInterrupted, match=r"step 7; saved in"):
        trainer.fit()
    assert run.read_last().position.step == 7
    assert stream.refused >= 1


def test_a_second_signal_stops_at_once() -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        make_trainer(None, (StopAt(2, twice),)).fit()
    assert not isinstance(caught.value, TrainingInterrupted)


def test_a_signal_without_a_run_folder_says_that_nothing_is_saved() -> None:
    with pytest.raises(TrainingInterrupted, match="nothing is saved"):
        make_trainer(None, (StopAt(2, lambda: os.kill(os.getpid(), signal.SIGINT)),)).fit()


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    make_trainer(run, epochs=1).fit()
    before = run.last_path.read_bytes()
    history = make_trainer(run, epochs=1).fit(resume=True)
    assert run.last_path.read_bytes() == before
    assert [record.epoch for record in history] == [1]


def test_an_early_stop_is_the_same_early_stop_after_a_crash(tmp_path: Path) -> None:
    undisturbed, crashed = RunFolder(tmp_path / "undisturbed"), RunFolder(tmp_path / "crashed")
    options = {"epochs": 30, "early_stopping": 1, "lr": 0.02, "ema_decay": None, "schedule": "constant"}
    history = make_trainer(undisturbed, **options).fit()
    assert history.stopped_early
    assert len(history) < 30
    with pytest.raises(MemoryError):
        make_trainer(crashed, (StopAt(27 * (len(history) - 1) + 5, crash),), **options).fit()
    resumed = make_trainer(crashed, **options).fit(resume=True)
    assert resumed.stopped_early
    assert_same_end(undisturbed, crashed)
    assert make_trainer(crashed, **options).fit(resume=True).stopped_early


def test_more_epochs_go_on_where_the_learning_rate_allows_it(tmp_path: Path) -> None:
    long, extended = RunFolder(tmp_path / "long"), RunFolder(tmp_path / "extended")
    options = {"schedule": "constant", "warmup_epochs": 0.0, "early_stopping": None}
    make_trainer(long, epochs=3, **options).fit()
    make_trainer(extended, epochs=1, **options).fit()
    make_trainer(extended, epochs=3, **options).fit(resume=True)
    expected, found = contents(long.last_path), contents(extended.last_path)
    assert [name for name in expected if expected[name] != found[name]] == []


def test_a_run_started_otherwise_is_not_resumed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    make_trainer(run, epochs=1).fit()
    with pytest.raises(CheckpointError, match=r"epochs \(was 1, now 2\); lr \(was None, now 0\.5\)"):
        make_trainer(run, epochs=2, lr=0.5).fit(resume=True)
    with pytest.raises(ArgumentError, match="already holds a run"):
        make_trainer(run, epochs=1).fit()
    with pytest.raises(ArgumentError, match="needs a run folder"):
        make_trainer(None, epochs=1).fit(resume=True)


def test_the_size_of_the_images_is_kept_and_need_not_be_known(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    make_trainer(run, epochs=1).fit()
    checkpoint = read_checkpoint(run.last_path)
    assert checkpoint.data["source_size"] == [6, 6]
    del checkpoint.data["source_size"]  # as an earlier version wrote it
    write_checkpoint(run.last_path, checkpoint)
    make_trainer(run, epochs=1).fit(resume=True)
    checkpoint.data["source_size"] = [9, 9]
    write_checkpoint(run.last_path, checkpoint)
    with pytest.raises(CheckpointError, match=r"source_size \(was \[9, 9\], now \[6, 6\]\)"):
        make_trainer(run, epochs=1).fit(resume=True)


class InDoublePrecision(Preprocessing):
    def apply(self, *arguments: Any, **options: Any) -> Any:
        return super().apply(*arguments, **options).astype("float64")


def test_a_checkpoint_of_another_model_or_of_other_data_is_not_resumed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    make_trainer(run, epochs=1).fit()
    checkpoint = read_checkpoint(run.last_path)
    assert checkpoint.architecture is None  # a bare Sequential has no name

    class Named(layers.Sequential):
        architecture: ClassVar = {"name": "lenet5", "num_classes": 3, "image_size": None, "kernel": (3, 3)}

    trainer = make_trainer(run, epochs=1)
    trainer.model = Named(*make_model())
    with pytest.raises(
        CheckpointError,
        match=r"last\.safetensors is a checkpoint of a model without a name, but the model is 'lenet5' "
        r"\(num_classes=3, kernel=\(3, 3\)\); resume with the model of the run",
    ):
        trainer.fit(resume=True)
    trainer.model.architecture["name"] = "vgg"  # type: ignore[attr-defined]
    write_checkpoint(run.last_path, dataclasses.replace(checkpoint, architecture=trainer.model.architecture))  # type: ignore[attr-defined]
    trainer.fit(resume=True)  # a tuple is a list in JSON, and still the same

    write_checkpoint(run.last_path, checkpoint)
    trainer = make_trainer(run, epochs=1)
    trainer.model = layers.Sequential(*make_model(), layers.Linear(3, 3))
    with pytest.raises(CheckpointError, match=r"missing: 7\.weight"):
        trainer.fit(resume=True)

    trainer = make_trainer(run, epochs=1)
    trainer = Trainer(
        make_model().to(dtype="float64"),
        *make_data(),
        options=trainer.options,
        preprocessing=InDoublePrecision.for_dataset(trainer.train),
        augmentation=trainer.augmentation,
        run=run,
    )
    with pytest.raises(CheckpointError, match=r"dtype \(was 'float32', now 'float64'\); resume it"):
        trainer.fit(resume=True)

    train, validation = make_data()
    train.labels[0] = (train.labels[0] + 1) % 3
    trainer = Trainer(make_model(), train, validation, options=make_trainer(None, epochs=1).options, run=run)
    with pytest.raises(
        CheckpointError, match=r"label_checksum \(was \d+, now \d+\); augmentation \(was 'flip,shift=1'"
    ):
        trainer.fit(resume=True)
