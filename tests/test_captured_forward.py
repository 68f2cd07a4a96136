"""Evaluation and prediction by graphs: the results of passes kernel by kernel."""

from __future__ import annotations

import warnings
from typing import Any

import numpy
import pytest
from resume_worker import make_data, make_model
from test_captured_step import OwnLayer, host_runtime, launches, trainer, with_own

from gpucnn.errors import ArgumentError
from gpucnn.layers import BatchNorm2d, Flatten, Linear, ReLU
from gpucnn.layers.precision import set_precision
from gpucnn.models.model import Sequential
from gpucnn.training import evaluate
from gpucnn.training.forward_passes import LEAST_BATCHES
from gpucnn.training.preparation import default_preprocessing

__all__ = ["host_runtime", "launches"]


def placed(model: Any = None, precision: str = "float32") -> Any:
    model = (make_model() if model is None else model).to("cuda")
    set_precision(model, precision)
    return model


def measured(model: Any, capture: str, batch_size: int = 20) -> Any:
    train, _ = make_data()
    return evaluate(model, train, default_preprocessing(model, train), batch_size, workers=1, capture=capture)


@pytest.mark.parametrize("precision", ["float32", "float64", "float16"])
def test_evaluation(precision: str, launches: list[int]) -> None:
    captured, plain = (measured(placed(precision=precision), capture) for capture in ("on", "off"))
    assert captured.loss == plain.loss
    assert captured.predictions.tobytes() == plain.predictions.tobytes()
    assert captured.probabilities.tobytes() == plain.probabilities.tobytes()
    assert len(launches) == 7, "eight full batches, the first kernel by kernel, and a last one of three images"


def test_a_few_batches_are_not_worth_a_graph(launches: list[int]) -> None:
    measured(placed(), "on", batch_size=163 // (LEAST_BATCHES - 1))
    assert launches == []


def test_validation_after_each_epoch_captures_once(launches: list[int]) -> None:
    options = {"validation": True, "epochs": 4, "evaluation_batch_size": 10, "ema_decay": 0.9}
    captured, plain = trainer("on", **options), trainer("off", **options)
    lengths = []
    for made in (captured, plain):
        launches.clear()
        made.fit()
        lengths.append(list(launches))
    for ours, theirs in zip(captured.history, plain.history, strict=True):
        assert (ours.validation_loss, ours.validation_accuracy) == (
            theirs.validation_loss,
            theirs.validation_accuracy,
        )
    assert lengths[1] == []
    forward = min(lengths[0])
    assert lengths[0].count(forward) == 4 * 4 - 1, "four full batches after each of four epochs, but the first"


def predictor() -> Any:
    from gpucnn.random import manual_seed

    manual_seed(0)
    return Sequential(Flatten(), Linear(36, 8), ReLU(), Linear(8, 3)).to("cuda")


def test_prediction(launches: list[int]) -> None:
    model = predictor()
    images = numpy.random.default_rng(0).random((47, 1, 6, 6), "float32")
    captured = model.predict(images, batch_size=10, capture="on")
    assert captured.tobytes() == model.predict(images, batch_size=10, capture="off").tobytes()
    assert len(launches) == 3
    assert model.predict(images[:39], batch_size=10, capture="on").tobytes() == captured[:39].tobytes()
    assert len(launches) == 3


def test_weights_that_move_are_read_anew(launches: list[int]) -> None:
    """A graph reads the weights where they are; other arrays in their place are another graph."""
    from gpucnn.training.evaluation import evaluation_mode, make_measurement

    train, _ = make_data()
    model = placed()
    measurement = make_measurement(model, train, "on")
    preprocessing = default_preprocessing(model, train)

    def loss(measurement: Any = measurement, capture: str = "on") -> float:
        return evaluate(model, train, preprocessing, 20, workers=1, measurement=measurement, capture=capture).loss

    first = loss()
    model.parameters()[0].data[...] *= 2
    assert loss() == loss(None, "off") != first
    norm = next(layer for _, layer in model.named_layers() if isinstance(layer, BatchNorm2d))
    norm.running_mean = norm.running_mean + 1
    assert loss() == loss(None, "off")
    norm.eps = 0.5
    assert loss() == loss(None, "off")
    with evaluation_mode(model):
        assert not model.training


def test_what_cannot_be_captured_is_said(launches: list[int]) -> None:
    model = placed(with_own(lambda x: float(x.sum())))
    with pytest.warns(RuntimeWarning, match="go on kernel by kernel: cannot look at an array's values"):
        captured = measured(model, "on")
    assert captured.loss == measured(model, "off").loss
    assert launches == []
    with pytest.raises(ArgumentError, match="capture='on': graphs are a GPU's"):
        measured(make_model(), "on")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured(model, "auto")
    assert any(isinstance(layer, OwnLayer) for _, layer in model.named_layers())


def test_a_model_compiled_for_inference(launches: list[int]) -> None:
    from gpucnn.layers import Conv2d, MaxPool2d

    layers = Conv2d(1, 4, 3), BatchNorm2d(4), ReLU(), MaxPool2d(2), Flatten(), Linear(16, 3)
    model = Sequential(*layers).to("cuda").compile_for_inference()
    images = numpy.random.default_rng(0).random((40, 1, 6, 6), "float32")
    captured = model.predict(images, batch_size=10, capture="on")
    assert captured.tobytes() == model.predict(images, batch_size=10, capture="off").tobytes()
    assert len(launches) == 3


def test_fit_and_predict_pass_the_option_on(launches: list[int]) -> None:
    images = numpy.random.default_rng(0).random((47, 1, 6, 6), "float32")
    labels, ends = numpy.arange(47) % 3, []
    for capture in ("on", "off"):
        model = predictor()
        model.fit((images, labels), epochs=1, batch_size=10, capture=capture, verbose=False)
        ends.append({key: value.tobytes() for key, value in model.state_dict().items()})
        result = model.evaluate((images, labels), batch_size=10, capture=capture)
        ends[-1]["loss"] = repr(result.loss).encode()
    assert ends[0] == ends[1]
    assert len(launches) == 3 + 3, "of four full batches each, the first kernel by kernel"
