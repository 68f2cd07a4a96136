"""Options, evaluation, progress and signals: the parts around the training loop."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy
import pytest

from gpucnn import layers
from gpucnn.data import ArrayDataset, TensorDataset
from gpucnn.errors import ArgumentError, DataError, ShapeError
from gpucnn.optimizers import SGD, RMSprop
from gpucnn.training import (
    BarProgress,
    EpochRecord,
    LineProgress,
    Progress,
    Trainer,
    TrainingOptions,
    evaluate,
    make_progress,
)
from gpucnn.training.interruption import InterruptWatch

# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optimizer", "adamv", r"unknown optimizer 'adamv'; did you mean 'adam"),
        ("schedule", "onecycle", r"unknown schedule 'onecycle'; did you mean 'one-cycle'"),
        ("monitor", "acuracy", r"did you mean 'accuracy'"),
        ("class_weights", "balance", r"did you mean 'balanced'"),
        ("class_weights", [1.0, -1.0], r"each of class_weights must be a number 0 or more and finite, got -1.0"),
        ("class_weights", [0, 0], r"must not all be zero"),
        ("epochs", 0, r"epochs must be an integer of at least 1, got 0"),
        ("epochs", 2.5, r"epochs must be an integer"),
        ("epochs", True, r"epochs must be an integer"),
        ("epochs", numpy.bool_(True), r"epochs must be an integer"),
        ("epochs", numpy.float32(2), r"epochs must be an integer"),
        ("lr", numpy.float32(math.nan), r"lr must be a number above 0 and finite"),
        ("lr", True, r"lr must be a number above 0 and finite, got True"),
        ("batch_size", "8", r"batch_size must be an integer of at least 1, got '8'"),
        ("seed", -1, r"seed must be an integer of at least 0"),
        ("seed", 2**64, r"seed must be below 2\*\*64"),
        ("early_stopping", 0, r"early_stopping must be an integer of at least 1"),
        ("checkpoint_steps", 0, r"checkpoint_steps must be"),
        ("workers", -1, r"workers must be an integer of at least 0"),
        ("lr", 0.0, r"lr must be a number above 0 and finite, got 0.0"),
        ("lr", math.nan, r"lr must be a number above 0 and finite, got nan"),
        ("lr", math.inf, r"lr must be a number above 0 and finite, got inf"),
        ("lr", "0.1", r"lr must be a number above 0 and finite, got '0.1'"),
        ("clip_norm", -1, r"clip_norm must be a number above 0"),
        ("weight_decay", -1e-3, r"weight_decay must be a number 0 or more and finite"),
        ("momentum", 1.0, r"momentum must be a number 0 or more and below 1, got 1.0"),
        ("label_smoothing", 1.0, r"label_smoothing must be a number 0 or more and below 1"),
        ("ema_decay", 1.5, r"ema_decay must be a number 0 or more and below 1"),
        ("warmup_epochs", 10, r"warmup_epochs must be less than epochs \(10\), got 10; warm up for less"),
    ],
)
def test_options_out_of_range(name: str, value: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        TrainingOptions(**{name: value})


def test_options_come_back_from_their_dictionary() -> None:
    options = TrainingOptions(optimizer="sgd", class_weights=(1, 2), lr=0.5, early_stopping=3)
    assert options.class_weights == [1.0, 2.0]
    assert TrainingOptions.from_dict(options.to_dict()) == options
    with pytest.raises(ArgumentError, match="unknown training option 'epoch'; did you mean 'epochs'"):
        TrainingOptions.from_dict({"epoch": 3})


def test_numpy_numbers_become_pythons() -> None:
    options = TrainingOptions(
        epochs=numpy.int64(3),
        batch_size=numpy.uint8(8),
        lr=numpy.float32(0.125),
        momentum=numpy.float64(0.5),
        nesterov=numpy.bool_(True),
        warmup_epochs=numpy.int32(1),
        ema_decay=numpy.float16(0.5),
        early_stopping=numpy.int16(2),
        seed=numpy.uint64(2**63),
        class_weights=numpy.array([1, 2], numpy.float32),
    )
    values = options.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["lr"] == 0.125
    assert values["seed"] == 2**63
    assert values["class_weights"] == [1.0, 2.0]
    assert type(values["epochs"]) is type(values["batch_size"]) is type(values["early_stopping"]) is int
    assert type(values["lr"]) is type(values["warmup_epochs"]) is type(values["momentum"]) is float
    assert values["nesterov"] is True


def test_each_optimizer_has_its_defaults() -> None:
    model = layers.Sequential(layers.Conv2d(1, 2, 3), layers.Flatten(), layers.Linear(8, 2))
    sgd = TrainingOptions(optimizer="sgd", nesterov=True).make_optimizer(model)
    assert isinstance(sgd, SGD)
    assert sgd.lr == 0.05
    assert sgd.groups[0].options == {"momentum": 0.9, "dampening": 0.0, "weight_decay": 5e-4, "nesterov": True}
    assert sgd.groups[1].options["weight_decay"] == 0.0
    without = TrainingOptions(optimizer="sgd", nesterov=True, momentum=0.0).make_optimizer(model)
    assert without.groups[0].options["nesterov"] is False
    rmsprop = TrainingOptions(optimizer="rmsprop", momentum=0.5, lr=0.25, weight_decay=0.125).make_optimizer(model)
    assert isinstance(rmsprop, RMSprop)
    assert rmsprop.lr == 0.25
    assert rmsprop.groups[0].options["momentum"] == 0.5
    assert rmsprop.groups[0].options["weight_decay"] == 0.125
    assert TrainingOptions(optimizer="adam").make_optimizer(model).groups[0].options["weight_decay"] == 0.0


def test_schedules_count_in_epochs() -> None:
    step = TrainingOptions(schedule="step", step_size=2, gamma=0.5, lr=1.0).make_schedule(10)
    assert [step(0), step(19), step(20), step(40)] == [1.0, 1.0, 0.5, 0.25]
    warm = TrainingOptions(schedule="constant", lr=1.0, warmup_epochs=0.5).make_schedule(10)
    assert warm(0) < warm(4) < 1.0
    assert warm(5) == 1.0
    short = TrainingOptions(epochs=1, schedule="constant", lr=1.0, warmup_epochs=0.9).make_schedule(1)
    assert short(0) == 1.0


def test_what_may_change_when_a_run_is_resumed() -> None:
    constant = TrainingOptions(schedule="constant")
    assert (
        constant.differences(TrainingOptions(schedule="constant", epochs=20, workers=0, checkpoint_steps=3)) == []
    )
    falling = TrainingOptions(schedule="step", epochs=20)
    assert falling.differences(TrainingOptions(schedule="step", epochs=30)) == ["epochs"]
    every_five = TrainingOptions(schedule="step", step_size=5)
    assert every_five.differences(TrainingOptions(schedule="step", step_size=5, epochs=30)) == []
    assert TrainingOptions().differences(TrainingOptions(epochs=20, lr=0.1, seed=1)) == ["epochs", "lr", "seed"]


def test_the_batch_size_of_the_evaluation() -> None:
    assert TrainingOptions(batch_size=8).resolved_evaluation_batch_size == 64
    assert TrainingOptions(batch_size=128).resolved_evaluation_batch_size == 128
    assert TrainingOptions(evaluation_batch_size=5).resolved_evaluation_batch_size == 5


# ---------------------------------------------------------------- evaluation


def evaluation_case(batch_norm: bool = False) -> tuple[layers.Sequential, TensorDataset]:
    generator = numpy.random.default_rng(6)
    x = generator.standard_normal((11, 2, 2, 2)).astype(numpy.float32)
    y = [0, 1, 1, 2, 0, 1, 2, 2, 1, 0, 1]
    norm = [layers.BatchNorm2d(2)] if batch_norm else []
    model = layers.Sequential(*norm, layers.Flatten(), layers.Dropout(0.5), layers.Linear(8, 4))
    return model, TensorDataset(x, y, classes=["a", "b", "c", "never"])


def test_an_evaluation_is_what_its_definitions_say() -> None:
    model, dataset = evaluation_case()
    linear = model[-1]
    assert isinstance(linear, layers.Linear)
    result = evaluate(model, dataset, batch_size=4)
    loss, confusion, shares = 0.0, [[0] * 4 for _ in range(4)], []
    for image, label in zip(dataset.images(range(11)), dataset.labels.tolist(), strict=True):
        flat = image.reshape(8).astype(float)
        scores = [
            float(row.astype(float) @ flat + b)
            for row, b in zip(linear.weight.data, linear.bias.data, strict=True)
        ]
        total = sum(math.exp(score) for score in scores)
        loss -= math.log(math.exp(scores[label]) / total) / 11
        confusion[label][scores.index(max(scores))] += 1
        shares.append([math.exp(score) / total for score in scores])
    assert abs(result.loss - loss) <= 1e-6
    assert result.confusion.tolist() == confusion
    assert result.accuracy == sum(confusion[k][k] for k in range(4)) / 11
    assert abs(result.probabilities - numpy.array(shares)).max() <= 1e-6
    assert result.labels.tolist() == dataset.labels.tolist()
    assert confusion[dataset.labels[0]][result.predictions[0]] > 0
    assert result.per_class_accuracy[1] == confusion[1][1] / 5
    assert numpy.isnan(result.per_class_accuracy[3])


def test_an_evaluation_as_json() -> None:
    model, dataset = evaluation_case()
    found = evaluate(model, dataset).to_dict()
    assert found["images"] == 11
    assert [row["class"] for row in found["per_class"]] == ["a", "b", "c", "never"]
    assert [row["images"] for row in found["per_class"]] == [3, 5, 3, 0]
    assert found["per_class"][3]["accuracy"] is None
    assert sum(map(sum, found["confusion"])) == 11


def test_an_evaluation_leaves_the_model_as_it_was() -> None:
    model, dataset = evaluation_case(batch_norm=True)
    model.train()
    model[0].training = False
    state = {name: array.copy() for name, array in model.state_dict().items()}
    done: list[int] = []
    evaluate(model, dataset, batch_size=4, after_batch=done.append)
    assert done == [4, 8, 11]
    assert [layer.training for layer in model] == [False, True, True, True]
    assert model.training
    for name, array in model.state_dict().items():
        assert numpy.array_equal(array, state[name])


def test_what_cannot_be_evaluated() -> None:
    model, dataset = evaluation_case()
    images = ArrayDataset(numpy.zeros((3, 2, 2, 2), numpy.uint8), [0, 1, 3])
    with pytest.raises(ArgumentError, match="the images of 'arrays' need preprocessing"):
        evaluate(model, images)
    with pytest.raises(ShapeError, match="'tensors' has 3 classes"):
        evaluate(model, TensorDataset(dataset.images(range(3)), [0, 1, 2]))
    dataset.labels = dataset.labels + 2
    with pytest.raises(DataError, match="label 4 of image 3"):
        evaluate(model, dataset)


# ---------------------------------------------------------------- progress


def a_record(validated: bool = True) -> EpochRecord:
    return EpochRecord(
        3, 30, 1e-3, 0.41, 0.875, 0.5 if validated else None, 0.75 if validated else None, 1.26, 99.6
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_in_a_pipe() -> None:
    stream = io.StringIO()
    progress = make_progress(stream)
    assert isinstance(progress, LineProgress)
    progress.begin_epoch(3, 12, 100, 0)
    progress.step(10, 0.5, 0.5)
    progress.validate(20)
    progress.end_epoch(a_record(), True)
    progress.end_epoch(a_record(), False)
    progress.end_epoch(a_record(validated=False), False)
    progress.message("done")
    progress.close()
    start = "epoch  3/12  loss 0.4100  accuracy 0.8750"
    assert stream.getvalue().splitlines() == [
        f"{start}  validation loss 0.5000  accuracy 0.7500 *  1.3 s  100 images/s",
        f"{start}  validation loss 0.5000  accuracy 0.7500    1.3 s  100 images/s",
        f"{start}  1.3 s  100 images/s",
        "done",
    ]


def test_a_line_now_and_then_within_an_epoch() -> None:
    stream = io.StringIO()
    progress = LineProgress(stream, interval=0.0)
    progress.begin_epoch(1, 2, 100, 50)
    progress.step(10, 0.5, 0.25)
    assert re.fullmatch(r"epoch 1/2   60 %  loss 0\.5000  accuracy 0\.2500  \d+ images/s\n", stream.getvalue())


def test_a_bar_on_a_terminal() -> None:
    stream = Terminal()
    progress = make_progress(stream)
    assert isinstance(progress, BarProgress)
    progress.begin_epoch(1, 2, 100, 50)
    progress.message("a line for the user")
    progress.step(50, 0.5, 0.25)
    progress.validate(20)
    progress.end_epoch(a_record(), True)
    progress.close()
    shown = stream.getvalue()
    assert "epoch 1/2:  50%" in shown
    assert "50/100" in shown
    assert "validating" in shown
    assert "a line for the user\n" in shown
    assert "epoch 3/2  loss 0.4100" in shown


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_goes_on_when_nobody_reads_its_progress(terminal: bool) -> None:
    class Gone(io.StringIO):
        def isatty(self) -> bool:
            return terminal

        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

        def flush(self) -> None:
            raise BrokenPipeError(32, "Broken pipe")

    model, dataset = evaluation_case()
    progress = make_progress(Gone())
    assert isinstance(progress, BarProgress if terminal else LineProgress)
    if isinstance(progress, LineProgress):
        progress.interval = 0.0
    options = TrainingOptions(epochs=2, batch_size=4, workers=0)
    assert len(Trainer(model, dataset, dataset, options=options, progress=progress).fit()) == 2


def test_quiet_is_quiet() -> None:
    stream = Terminal()
    progress = make_progress(stream, quiet=True)
    assert type(progress) is Progress
    progress.begin_epoch(1, 1, 1, 0)
    progress.step(1, 0.0, 0.0)
    progress.validate(1)
    progress.end_epoch(a_record(), True)
    progress.message("nothing")
    progress.close()
    assert stream.getvalue() == ""
    assert isinstance(LineProgress().stream, type(sys.stderr))


def test_a_run_shows_its_progress() -> None:
    stream = Terminal()
    model, dataset = evaluation_case()
    options = TrainingOptions(epochs=2, batch_size=4, workers=0)
    Trainer(model, dataset, dataset, options=options, progress=make_progress(stream)).fit()
    lines = [line for line in re.split(r"[\r\n]", stream.getvalue()) if "validation loss" in line]
    assert len(lines) == 2
    assert lines[1].startswith("epoch 2/2  loss ")


# ---------------------------------------------------------------- signals, imports


def test_other_threads_watch_no_signals() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[Any] = []

    def watch() -> None:
        with InterruptWatch(seen.append):
            seen.append(signal.getsignal(signal.SIGINT) is before)

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert seen == [True]


def test_training_loads_no_more_than_it_needs() -> None:
    program = (
        "import sys, gpucnn.training\n"
        "heavy = ('tqdm', 'matplotlib', 'PIL', 'safetensors', 'urllib.request')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=_environment()
    )
    assert done.stdout == "[]\n"


def _environment() -> dict[str, str]:
    root = Path(__file__).parents[1]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
