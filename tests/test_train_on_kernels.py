"""An epoch of LeNet-5 on the digits by the CUDA kernels, on the host runtime, ends where the CPU backend's does.

What is compared, and why so: both runs take the same steps on the same numbers, so their losses differ by rounding
alone. A step's rounding changes the weights, the changed weights all later losses; how much depends on the network
and the learning rate, and no number can be given beforehand. So a third run takes the same steps on the CPU in
float64, whose rounding is nothing beside float32's. How far the CPU's float32 losses stray from it, up to a step,
is what float32 costs at that step. The kernels' losses may stray twice as far (their sums are as long, in another
order) and by four units in the last place of the loss, which is itself a float32 and may be exact by luck.
"""

from __future__ import annotations

from typing import Any

import numpy
import pytest

import gpucnn
from gpucnn.data import load
from gpucnn.device import to_cpu
from gpucnn.models import Model
from gpucnn.ops import backend_of, cuda
from gpucnn.training import Callback, EpochRecord, Trainer
from gpucnn_kernels.runtime import using

RECIPE: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 32,
    "lr": 2e-3,
    "augmentation": "light,rotate=10",
    "label_smoothing": 0.1,
    "clip_norm": 1.0,
}
"""That of ``gpucnn train`` for the digits, and clipping by the gradients' norm."""

FLOAT32_EPSILON = float(numpy.finfo(numpy.float32).eps)


class StepLosses(Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        self.values.append(float(loss))


def train(device: str, dtype: str) -> tuple[numpy.ndarray, EpochRecord, Model]:
    """(the loss of each step, the epoch's record, the model) of the recipe's run, always from the same seed."""
    gpucnn.manual_seed(0)
    model = gpucnn.models.create("lenet5").to(dtype=dtype)
    losses = StepLosses()
    history = model.fit(load("digits"), device=device, callbacks=[losses], verbose=False, **RECIPE)
    return numpy.array(losses.values), history[-1], model


def strays(actual: Any, exact: Any) -> numpy.ndarray:
    return numpy.abs(numpy.asarray(actual, numpy.float64) - exact)


@pytest.fixture(scope="module")
def runs() -> dict[str, tuple[numpy.ndarray, EpochRecord, Model]]:
    with using("host"):
        return {
            "exact": train("cpu", "float64"),
            "cpu": train("cpu", "float32"),
            "cuda": train("cuda", "float32"),
        }


def test_the_run_was_on_the_kernels_and_learned(runs: Any) -> None:
    losses, record, model = runs["cuda"]
    assert all(backend_of(parameter.data) is cuda for parameter in model.parameters())
    assert all(parameter.data.dtype == numpy.float32 for parameter in model.parameters())
    assert losses[-5:].mean() <= 0.6 * losses[:5].mean()
    assert record.validation_accuracy >= 0.7


def test_every_steps_loss(runs: Any) -> None:
    exact = runs["exact"][0]
    assert len(exact) == 36
    allowed = 2 * numpy.maximum.accumulate(strays(runs["cpu"][0], exact)) + 4 * FLOAT32_EPSILON * exact
    strayed = strays(runs["cuda"][0], exact)
    assert numpy.all(strayed <= allowed), f"steps {numpy.flatnonzero(~(strayed <= allowed)).tolist()}"


@pytest.mark.parametrize("name", ["train_loss", "validation_loss"])
def test_the_epochs_losses(runs: Any, name: str) -> None:
    # A mean over many images hides rounding that a single step shows; the largest so far is what float32 costs.
    exact = getattr(runs["exact"][1], name)
    largest = max(
        float(strays(runs["cpu"][0], runs["exact"][0]).max()), abs(getattr(runs["cpu"][1], name) - exact)
    )
    assert abs(getattr(runs["cuda"][1], name) - exact) <= 2 * largest + 4 * FLOAT32_EPSILON * exact


def test_the_weights(runs: Any) -> None:
    exact, cpu, kernels = (
        [to_cpu(parameter.data) for parameter in runs[name][2].parameters()] for name in ("exact", "cpu", "cuda")
    )
    largest = max(float(strays(ours, truth).max()) for ours, truth in zip(cpu, exact, strict=True))
    for ours, truth in zip(kernels, exact, strict=True):
        assert strays(ours, truth).max() <= 2 * largest + 4 * FLOAT32_EPSILON * numpy.abs(truth).max()
