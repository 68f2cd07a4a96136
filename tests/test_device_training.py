"""A whole training on device "cuda": fit, evaluate, predict, save, load on the CPU, resume; results as NumPy."""

from __future__ import annotations

import dataclasses
import os
import signal

import host_backend
import numpy
import pytest
from resume_worker import make_data, make_model
from test_resume import StopAt, assert_same_end, crash

import gpucnn
from gpucnn import device, layers
from gpucnn.data import ArrayDataset, Augmentation, Loader, load
from gpucnn.errors import DeviceError, NonFiniteError
from gpucnn.optimizers import Adam
from gpucnn.training import (
    Callback,
    RunFolder,
    Trainer,
    TrainingInterrupted,
    TrainingOptions,
    evaluate,
    read_checkpoint,
)
from gpucnn_kernels.runtime.host_array import HostArray, host_arrays


@pytest.fixture(autouse=True)
def host_runtime(monkeypatch):
    host_backend.use(monkeypatch)


@pytest.fixture(scope="module")
def digits():
    """A few digits, as 28x28 images for LeNet-5."""
    train = load("digits").train
    images = numpy.repeat(numpy.repeat(train.images(numpy.arange(150))[..., 0], 4, axis=1), 4, axis=2)
    images = images[:, 2:30, 2:30]
    return images, train.labels[:150]


def lenet():
    gpucnn.manual_seed(0)
    return gpucnn.models.create("lenet5")


def untimed(history):
    rows = [dataclasses.asdict(record) for record in history]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def test_lenet5_on_digits_from_fit_to_load(digits, tmp_path):
    images, labels = digits
    data = {"epochs": 2, "batch_size": 25, "lr": 3e-3, "augmentation": "shift=1", "verbose": False}
    here, there = lenet(), lenet()
    ends = []
    for model, place in ((here, "cpu"), (there, "cuda")):
        history = model.fit(
            (images[:100], labels[:100]),
            (images[100:], labels[100:]),
            device=place,
            output=tmp_path / place,
            ema_decay=0.9,
            class_weights="balanced",
            clip_norm=1.0,
            **data,
        )
        ends.append(untimed(history))
    assert there.device == "cuda:0"
    assert all(type(parameter.data) is HostArray for parameter in there.parameters())
    assert ends[0] == ends[1], "the same operations on the same numbers"
    assert ends[1][-1]["train_accuracy"] > 0.3

    result = there.evaluate((images, labels))
    expected = here.evaluate((images, labels))
    for name in ("confusion", "per_class_accuracy", "labels", "predictions", "probabilities"):
        assert type(getattr(result, name)) is numpy.ndarray
        assert numpy.array_equal(getattr(result, name), getattr(expected, name), equal_nan=True)
    assert type(result.loss) is float
    assert result.loss == expected.loss

    probabilities = there.predict(images, batch_size=64)
    assert type(probabilities) is numpy.ndarray
    assert numpy.array_equal(probabilities, here.predict(images, batch_size=64))
    inputs = there.preprocessing.apply(images[:3, ..., None])
    assert numpy.array_equal(there.predict(host_arrays.asarray(inputs)), there.predict(inputs))

    there.save(tmp_path / "model.safetensors")
    for place in ("cpu", "cuda"):
        loaded = gpucnn.models.load(tmp_path / "model.safetensors", place)
        assert loaded.device == ("cuda:0" if place == "cuda" else "cpu")
        assert numpy.array_equal(loaded.predict(images), probabilities)
    best = gpucnn.models.load(tmp_path / "cuda")
    there.load(tmp_path / "cpu")
    assert there.device == "cuda:0"
    assert numpy.array_equal(best.predict(images), there.predict(images))


def test_the_files_do_not_depend_on_the_device(tmp_path):
    for place in ("cpu", "cuda"):
        make_trainer(RunFolder(tmp_path / place), device=place, epochs=1).fit()
    assert_same_end(RunFolder(tmp_path / "cpu"), RunFolder(tmp_path / "cuda"))


def make_trainer(run, callbacks=(), device="cuda", model=None, **changes):
    train, validation = make_data()
    options = {
        "epochs": 2,
        "batch_size": 9,
        "checkpoint_steps": 3,
        "ema_decay": 0.98,
        "clip_norm": 1.0,
        "class_weights": "balanced",
        "workers": 1,
        **changes,
    }
    return Trainer(
        model or make_model(),
        train,
        validation,
        options=TrainingOptions(**options),
        augmentation=Augmentation(horizontal_flip=True, shift=1),
        run=run,
        callbacks=callbacks,
        device=device,
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_a_crashed_run_resumes_bit_for_bit_and_on_the_other_device_too(tmp_path, optimizer):
    undisturbed = RunFolder(tmp_path / "undisturbed")
    make_trainer(undisturbed, optimizer=optimizer).fit()
    for number, (first, second) in enumerate([("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")]):
        crashed = RunFolder(tmp_path / f"crashed-{number}")
        with pytest.raises(MemoryError):
            make_trainer(crashed, (StopAt(13, crash),), device=first, optimizer=optimizer).fit()
        make_trainer(crashed, device=second, optimizer=optimizer).fit(resume=True)
        # The stand-in's operations are the CPU's; on a GPU the last digits of the mixed runs may differ.
        assert_same_end(undisturbed, crashed)


def test_an_interrupted_run_saves_arrays_that_any_machine_reads(tmp_path):
    run = RunFolder(tmp_path)
    with pytest.raises(TrainingInterrupted, match="step 5; saved in"):
        make_trainer(run, (StopAt(5, lambda: os.kill(os.getpid(), signal.SIGINT)),)).fit()
    checkpoint = read_checkpoint(run.last_path)
    for part in (checkpoint.model, checkpoint.ema):
        assert all(type(array) is numpy.ndarray for array in part.values())
    assert checkpoint.position.step == 5


def test_without_a_run_folder_the_best_state_is_numpys():
    trainer = make_trainer(None)
    trainer.fit()
    assert all(type(array) is numpy.ndarray for array in trainer.best_state.values())
    assert trainer.model.device == "cuda:0"
    on_cpu = make_model()
    on_cpu.load_state_dict(trainer.best_state)


def test_callbacks_see_a_model_that_can_be_used():
    seen = []

    class Look(Callback):
        def on_step_end(self, trainer, loss):
            assert type(loss) is float

        def on_epoch_end(self, trainer, record):
            assert all(type(value) in (int, float) for value in dataclasses.asdict(record).values())
            seen.append(evaluate(trainer.model, trainer.validation, trainer.preprocessing).accuracy)

    make_trainer(None, (Look(),), epochs=1).fit()
    assert len(seen) == 1


def test_a_model_that_is_on_the_device_trains_there_unasked():
    model = make_model().cuda()
    make_trainer(None, device=None, model=model, epochs=1).fit()
    assert model.device == "cuda:0"
    make_trainer(None, device="auto", model=model, epochs=1).fit()
    assert model.device == "cpu", "auto never takes the host runtime"


def test_trouble_is_named_on_a_device_too(tmp_path):
    class Poison(layers.Layer):
        def forward(self, x):
            self._save(x)
            return x / host_arrays.zeros(1, x.dtype) if self.training else x

        def backward(self, dy):
            return dy

    model = layers.Sequential(layers.Flatten(), layers.Linear(36, 3), Poison())
    with pytest.raises(
        NonFiniteError, match=r"layer '2' .*first output that is not finite .*lower the learning rate"
    ):
        make_trainer(None, model=model).fit()
    train, _ = make_data()
    inputs = numpy.ones((20, 1, 6, 6), numpy.float32)
    inputs[3, 0, 2, 2] = numpy.inf
    model = gpucnn.Sequential(layers.Flatten(), layers.Linear(36, 3))
    with pytest.raises(NonFiniteError, match=r"images of the batch are not finite .*image 3 of"):
        model.fit((inputs, train.labels[:20]), device="cuda", verbose=False, augmentation=None)


def test_a_device_that_cannot_be_used_is_told_before_anything_is_trained(monkeypatch):
    with pytest.raises(DeviceError, match="cuda:1"):
        make_trainer(None, device="cuda:1")
    monkeypatch.setenv("GPUCNN_KERNELS_RUNTIME", "cuda")
    monkeypatch.setattr(device, "cuda_status", lambda index=0: (False, "there is no driver"))
    with pytest.raises(DeviceError, match="'cuda' cannot be used: there is no driver"):
        lenet().fit(make_data()[0], device="cuda")
    with pytest.raises(DeviceError, match="there is no driver"):
        next(iter(Loader(make_data()[0], 4, device="cuda")))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loaders_batches_are_on_its_device(workers):
    images, labels = numpy.arange(40, dtype=numpy.uint8).reshape(10, 2, 2), numpy.arange(10) % 3
    data = ArrayDataset(images, labels)
    plain = list(Loader(data, 4, shuffle=True, workers=workers))
    moved = list(Loader(data, 4, shuffle=True, workers=workers, device="cuda"))
    assert len(moved) == 3
    for here, there in zip(plain, moved, strict=True):
        assert type(there.images) is type(there.labels) is HostArray
        assert type(there.indices) is numpy.ndarray
        assert numpy.array_equal(here.images, there.images.get())
        assert numpy.array_equal(here.labels, there.labels.get())
        assert (here.images.dtype, here.labels.dtype) == (there.images.dtype, there.labels.dtype)


def test_pictures_of_a_model_on_a_device(tmp_path):
    pytest.importorskip("matplotlib")
    from gpucnn.visualize import draw_filters, grad_cam

    here, there = make_model().eval(), make_model().cuda().eval()
    image = numpy.random.default_rng(0).standard_normal((1, 6, 6)).astype(numpy.float32)
    heat = grad_cam(there, image)
    assert type(heat) is numpy.ndarray
    assert numpy.array_equal(heat, grad_cam(here, image))
    assert numpy.array_equal(heat, grad_cam(there, host_arrays.asarray(image)))
    draw_filters(there, tmp_path / "filters.png")
    assert (tmp_path / "filters.png").stat().st_size > 1000


def test_a_summary_of_a_model_on_a_device():
    assert gpucnn.models.summary(lenet().cuda()).flops == gpucnn.models.summary(lenet()).flops


def test_a_step_reads_nothing_before_its_gradient_is_known(monkeypatch):
    """Each reading waits for the GPU: the norm is the first; loss and accuracy are there with it."""
    events = []
    monkeypatch.setattr(HostArray, "__float__", lambda array: events.append("read") or array.item())
    monkeypatch.setattr(HostArray, "__int__", lambda array: events.append("read") or int(array.item()))
    monkeypatch.setattr(HostArray, "__bool__", lambda array: events.append("read") or bool(array.item()))
    trainer = make_trainer(None, epochs=1, checkpoint_steps=None)
    backward, norm, step = trainer.model.backward, Adam.clip_gradient_norm, Adam.step

    def watch(name, function):
        def watched(*arguments):
            events.append(f"{name} begins")
            result = function(*arguments)
            events.append(f"{name} ends")
            return result

        return watched

    object.__setattr__(trainer.model, "backward", watch("backward", backward))
    monkeypatch.setattr(Adam, "clip_gradient_norm", watch("norm", norm))
    monkeypatch.setattr(Adam, "step", watch("step", step))
    forward = trainer.model.forward
    object.__setattr__(trainer.model, "forward", watch("forward", forward))
    trainer.fit()
    steps = " ".join(events).split("forward begins ")[1:19]
    assert len(steps) == 18
    for events_of_a_step in steps:
        before = events_of_a_step.split("norm begins")[0]
        assert "read" not in before, events_of_a_step
        assert "backward ends" in before
    assert all(
        events_of_a_step.split("norm ends ")[1].startswith("read step begins") for events_of_a_step in steps
    )
