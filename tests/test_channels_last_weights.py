"""Weights that lie channels-last: what is saved of them, of an optimizer and of an average does not show it."""

from __future__ import annotations

import copy

import numpy
import pytest
from layout_counts import watched_counts

import gpucnn
from gpucnn import layers
from gpucnn.data.dataset import Subset
from gpucnn.device import to_cpu, to_device
from gpucnn.models.model import Sequential
from gpucnn.ops.memory_format import is_channels_last
from gpucnn.optimizers import SGD
from gpucnn.training import Callback, RunFolder, Trainer, TrainingOptions
from gpucnn.training.averaging import WeightAverage


@pytest.fixture(autouse=True)
def host_runtime(monkeypatch):
    monkeypatch.setenv("GPUCNN_KERNELS_RUNTIME", "host")


@pytest.fixture
def counts(monkeypatch):
    return watched_counts(monkeypatch)


# ---------------------------------------------------------------- weights, optimizers, averages


def steps_by_hand(channels_last, steps=2, load=None):
    """(model, optimizer, average) after steps along gradients that depend on the place alone."""
    gpucnn.manual_seed(0)
    model = Sequential(layers.Conv2d(8, 16, 3), layers.Conv2d(16, 8, (2, 3), bias=False), layers.Conv2d(3, 4, 3))
    model.to("cuda").compute_in("bfloat16", channels_last=channels_last)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    average = WeightAverage(model, 0.5)
    if load is not None:
        optimizer.load_state_dict(load)
    for number in range(steps):
        for parameter in model.parameters():
            values = numpy.sin(numpy.arange(parameter.size) + number).reshape(parameter.shape)
            parameter.gradient[...] = to_device(values.astype("float32"), "cuda")
        optimizer.step()
        average.update(number + 1)
    return model, optimizer, average


def everything(model, optimizer, average):
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    state |= {f"optimizer.{key}": value for key, value in optimizer.state_dict().items()}
    return state | {f"average.{key}": to_cpu(value) for key, value in average.average.items()}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [key for key in theirs if not numpy.array_equal(ours[key], theirs[key])] == []


def test_what_is_saved_of_a_run_is_the_same():
    last, plain = steps_by_hand(True), steps_by_hand(False)
    weights = [layer.weight for _, layer in last[0].named_layers() if isinstance(layer, layers.Conv2d)]
    assert [is_channels_last(weight.data) for weight in weights] == [True, True, False]
    assert [is_channels_last(weight.gradient) for weight in weights] == [True, True, False]
    assert [is_channels_last(weight.working) for weight in weights] == [True, True, False]
    assert_equal(everything(*last), everything(*plain))
    assert_equal(
        everything(*steps_by_hand(True, load=plain[1].state_dict())),
        everything(*steps_by_hand(False, load=last[1].state_dict())),
    )


def test_an_optimizer_follows_weights_into_another_layout():
    model, optimizer, _ = steps_by_hand(False)
    before = optimizer.state_dict()
    model.compute_in("bfloat16")
    optimizer.follow()
    assert is_channels_last(model[0].weight.data)
    assert model[0].weight.data.base is model[0].weight.buffer.data
    assert_equal(optimizer.state_dict(), before)


def test_copies_and_moves_of_weights():
    model, _, _ = steps_by_hand(True)
    twin = copy.deepcopy(model)
    assert is_channels_last(twin[0].weight.data)
    assert_equal(twin.state_dict(), model.state_dict())
    expected = model.state_dict()
    model.compute_in("tf32").cpu()
    assert all(parameter.data.flags.c_contiguous for parameter in model.parameters())
    assert_equal(model.state_dict(), expected)
    back = {key: value * 2 for key, value in expected.items()}
    twin.load_state_dict(back)
    assert is_channels_last(twin[0].weight.data)
    assert_equal(twin.state_dict(), back)


# ---------------------------------------------------------------- runs


class Crash(Callback):
    """The end of a run, after its sixth step."""

    def __init__(self):
        self.steps = 0

    def on_step_end(self, trainer, loss):
        self.steps += 1
        if self.steps == 6:
            raise MemoryError


def run_of(precision, folder=None, callbacks=(), resume=False, **options):
    """A trainer, at the end of its run."""
    gpucnn.manual_seed(0)
    made = Trainer(
        small_network(),
        Subset(gpucnn.data.load("digits").train, range(72)),
        options=TrainingOptions(epochs=2, batch_size=16, workers=0, optimizer="adam", ema_decay=0.9, **options),
        device="cuda",
        precision=precision,
        run=None if folder is None else RunFolder(folder),
        callbacks=callbacks,
    )
    made.fit(resume=resume)
    return made


def small_network():
    """Convolutions of 8 channels and more behind the first, for digits."""
    return Sequential(
        layers.Conv2d(1, 8, 3, padding=1),
        layers.BatchNorm2d(8),
        layers.ReLU(),
        layers.ConvTranspose2d(8, 16, 2, stride=2),
        layers.MaxPool2d(2),
        layers.Conv2d(16, 8, 3),
        layers.ReLU(),
        layers.Dropout(0.2),
        layers.Flatten(),
        layers.Linear(8 * 36, 10),
    )


def left_behind(made):
    state = everything(made.model, made.optimizer, made._average)
    return state | {"losses": numpy.array([record.train_loss for record in made.history])}


@pytest.mark.parametrize("precision", ["bfloat16", "tf32"])
def test_captured_steps_have_the_bits_of_plain_ones(precision, counts):
    plain = run_of(precision, capture="off")
    packed = set(counts.images)
    captured = run_of(precision, capture="on")
    assert_equal(left_behind(captured), left_behind(plain))
    assert is_channels_last(plain.model[5].weight.data)
    assert is_channels_last(plain.model[3].weight.data)
    # In tf32 the filter's gradient of the first layer packs its image; in 16 bits it is read as it lies.
    assert packed == ({1} if precision == "tf32" else set()), "an image in pieces was packed"


def test_a_run_goes_on_from_its_checkpoint_with_the_same_bits(tmp_path):
    whole = run_of("bfloat16", tmp_path / "whole", checkpoint_steps=4)
    with pytest.raises(MemoryError):
        run_of("bfloat16", tmp_path / "run", [Crash()], checkpoint_steps=4)
    resumed = run_of("bfloat16", tmp_path / "run", resume=True, checkpoint_steps=4)
    assert_equal(left_behind(resumed), left_behind(whole))
