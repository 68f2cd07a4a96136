"""The trainer: what it computes, what it refuses, what it says."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy
import pytest

from gpucnn import layers
from gpucnn.data import ArrayDataset, Preprocessing, Subset, TensorDataset
from gpucnn.errors import (
    ArgumentError,
    CheckpointError,
    DataError,
    NonFiniteError,
    ShapeError,
    StorageError,
)
from gpucnn.models.model import Sequential
from gpucnn.optimizers import AdamW
from gpucnn.random import Generator, manual_seed
from gpucnn.training import (
    Callback,
    EpochRecord,
    RunFolder,
    Trainer,
    TrainingOptions,
    evaluate,
    read_checkpoint,
)
from gpucnn.training.averaging import WeightAverage
from gpucnn.training.buffers import BufferCopy
from gpucnn.training.diagnosis import find_first_non_finite
from gpucnn.training.preparation import class_weights, default_preprocessing


def patterns(count: int = 60, classes: int = 3, seed: int = 0) -> ArrayDataset:
    """Noisy 6x6 patterns, one a class, easy to learn."""
    generator = numpy.random.default_rng(seed)
    base = numpy.random.default_rng(99).integers(0, 200, (classes, 6, 6))
    labels = numpy.arange(count) % classes
    images = base[labels] + generator.integers(0, 56, (count, 6, 6))
    return ArrayDataset(
        images.astype(numpy.uint8), labels, classes=[f"class {i}" for i in range(classes)], name="patterns"
    )


def small_model(classes: int = 3, batch_norm: bool = False) -> Sequential:
    manual_seed(1)
    norm: list[layers.Layer] = [layers.BatchNorm2d(4)] if batch_norm else []
    return Sequential(layers.Conv2d(1, 4, 3), *norm, layers.ReLU(), layers.Flatten(), layers.Linear(64, classes))


def quick(**changes: Any) -> TrainingOptions:
    return TrainingOptions(**{"epochs": 2, "batch_size": 10, "workers": 0, **changes})


# ---------------------------------------------------------------- training


def test_a_small_network_learns(tmp_path: Path) -> None:
    train, validation = patterns(), patterns(30, seed=1)
    run = RunFolder(tmp_path)
    trainer = Trainer(small_model(), train, validation, options=quick(epochs=6, lr=0.01), run=run)
    history = trainer.fit()
    assert history.best is not None
    assert history.best.validation_accuracy == 1.0
    assert [record.epoch for record in history] == [1, 2, 3, 4, 5, 6]
    assert [record.step for record in history] == [6, 12, 18, 24, 30, 36]
    assert history[5].train_loss < 0.5 * history[0].train_loss
    assert run.read_history().records == history.records
    best = small_model()
    best.load_state_dict(read_checkpoint(run.best_path).evaluation_state)
    result = evaluate(best, validation, trainer.preprocessing)
    assert result.accuracy == history.best.validation_accuracy
    assert result.loss == history.best.validation_loss
    assert run.read_config()["options"]["lr"] == 0.01


def test_one_epoch_is_the_same_as_its_steps_written_out() -> None:
    """Plain SGD on logistic regression, against float64 loops."""
    generator = numpy.random.default_rng(4)
    x = generator.standard_normal((10, 1, 2, 2)).astype(numpy.float32)
    y = generator.integers(0, 3, 10)
    manual_seed(2)
    model = Sequential(layers.Flatten(), layers.Linear(4, 3))
    linear = model[1]
    weight, bias = linear.weight.data.astype(float), linear.bias.data.astype(float)  # type: ignore[union-attr]
    options = quick(
        epochs=2, batch_size=4, optimizer="sgd", momentum=0.0, weight_decay=0.1, lr=0.3, schedule="constant"
    )
    trainer = Trainer(model, TensorDataset(x, y, classes=["a", "b", "c"]), options=options)
    history = trainer.fit()
    losses = []
    for epoch in range(2):
        order = trainer.loader.order(epoch)
        total, right = 0.0, 0
        for start in (0, 4, 8):
            chosen = order[start : start + 4]
            weight_gradient, bias_gradient = numpy.zeros((3, 4)), numpy.zeros(3)
            for i in chosen:
                flat = x[i].reshape(4).astype(float)
                scores = [sum(weight[k, j] * flat[j] for j in range(4)) + bias[k] for k in range(3)]
                shares = [math.exp(score) / sum(math.exp(s) for s in scores) for score in scores]
                total -= math.log(shares[y[i]])
                right += scores.index(max(scores)) == y[i]
                for k in range(3):
                    error = (shares[k] - (k == y[i])) / len(chosen)
                    bias_gradient[k] += error
                    weight_gradient[k] += error * flat
            weight = weight - 0.3 * (weight_gradient + 0.1 * weight)
            bias = bias - 0.3 * bias_gradient
        losses.append((total / 10, right / 10))
    assert abs(linear.weight.data - weight).max() <= 1e-5  # type: ignore[union-attr]
    assert abs(linear.bias.data - bias).max() <= 1e-5  # type: ignore[union-attr]
    for record, (loss, accuracy) in zip(history, losses, strict=True):
        assert abs(record.train_loss - loss) <= 1e-5
        assert record.train_accuracy == accuracy
        assert record.validation_loss is None


def test_the_learning_rate_follows_the_schedule_and_groups_spare_biases() -> None:
    seen = []

    class Watch(Callback):
        def on_step_end(self, trainer: Trainer, loss: float) -> None:
            seen.append(trainer.optimizer.lr)

    trainer = Trainer(
        small_model(), patterns(), options=quick(schedule="step", step_size=1, lr=0.1), callbacks=[Watch()]
    )
    trainer.fit()
    assert seen == [0.1] * 6 + [0.1 * 0.1] * 6
    assert [group.options["weight_decay"] for group in trainer.optimizer.groups] == [1e-2, 0.0]
    assert all(len(parameter.shape) == 1 for parameter in trainer.optimizer.groups[1].parameters)


def test_the_same_seed_gives_the_same_run_and_another_does_not() -> None:
    def train(seed: int, workers: int) -> Any:
        model = small_model()
        Trainer(model, patterns(), options=quick(seed=seed, workers=workers)).fit()
        return model[0].weight.data  # type: ignore[union-attr]

    assert numpy.array_equal(train(0, 0), train(0, 3))
    assert not numpy.array_equal(train(0, 0), train(1, 0))


def test_layers_may_have_generators_of_their_own(tmp_path: Path) -> None:
    def model() -> Sequential:
        manual_seed(1)
        own = Generator(5)
        return Sequential(
            layers.Flatten(),
            layers.Dropout(0.5, generator=own),
            layers.Dropout(generator=own),
            layers.Linear(36, 3),
        )

    run = RunFolder(tmp_path)
    Trainer(model(), patterns(), options=quick(), run=run).fit()
    generators = run.read_last().generators
    assert generators.keys() == {"default", "1"}
    assert generators["1"] == {"seed": 5, "offset": 2 * 2 * 60 * 36}
    plain = Sequential(layers.Flatten(), layers.Dropout(), layers.Dropout(), layers.Linear(36, 3))
    with pytest.raises(CheckpointError, match="knows the random generators default, 1, the model has default"):
        Trainer(plain, patterns(), options=quick(), run=run).fit(resume=True)


def test_callbacks_come_in_order() -> None:
    events: list[str] = []

    class Watch(Callback):
        def on_fit_start(self, trainer: Trainer) -> None:
            events.append("start")

        def on_step_end(self, trainer: Trainer, loss: float) -> None:
            assert loss > 0
            events.append("step")

        def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
            assert trainer.history.records[-1] is record
            events.append(f"epoch {record.epoch}")

        def on_fit_end(self, trainer: Trainer) -> None:
            events.append("end")

    Trainer(small_model(), patterns(20), options=quick(), callbacks=[Callback(), Watch()]).fit()
    assert events == ["start", "step", "step", "epoch 1", "step", "step", "epoch 2", "end"]


def test_the_best_state_is_kept_without_a_run_folder() -> None:
    train = patterns()
    trainer = Trainer(small_model(), train, patterns(30, seed=1), options=quick(lr=0.01))
    history = trainer.fit()
    assert trainer.best_state is not None
    assert history.best is not None
    best = small_model()
    best.load_state_dict(trainer.best_state)
    result = evaluate(best, patterns(30, seed=1), trainer.preprocessing)
    assert result.loss == history.best.validation_loss


def test_checkpoints_are_saved_by_the_clock(tmp_path: Path) -> None:
    saved = []

    class Watch(Callback):
        def on_step_end(self, trainer: Trainer, loss: float) -> None:
            saved.append(read_checkpoint(run.last_path).position.step)

    run = RunFolder(tmp_path)
    Trainer(
        small_model(), patterns(30), options=quick(epochs=1, checkpoint_seconds=1e-9), run=run, callbacks=[Watch()]
    ).fit()
    assert saved == [0, 1, 2]


def test_early_stopping_leaves_the_best_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    options = quick(epochs=20, early_stopping=2, lr=0.02, schedule="constant", monitor="loss")
    train = patterns()
    scrambled = ArrayDataset(train.images(range(60)), (train.labels + 1) % 3, classes=train.classes)
    history = Trainer(small_model(), train, scrambled, options=options, run=run).fit()
    assert history.stopped_early
    assert history.best is not None
    assert len(history) == history.best.epoch + 2
    assert read_checkpoint(run.best_path).history[-1] == history.best
    assert read_checkpoint(run.last_path).stopped_early


# ---------------------------------------------------------------- averages, class weights, preprocessing


def test_the_moving_average_is_its_formula() -> None:
    model = small_model(batch_norm=True)
    average = WeightAverage(model, 0.5)
    weight = model[0].weight  # type: ignore[union-attr]
    counter = model[1].num_batches_tracked  # type: ignore[union-attr]
    expected, bounds = weight.data.astype(float), (2 / 11, 3 / 12, 4 / 13)
    for step, decay in enumerate(bounds, start=1):
        weight.data += 0.25
        counter += 2
        average.update(step)
        expected = decay * expected + (1 - decay) * weight.data
    assert abs(average.average["0.weight"] - expected).max() <= 1e-6
    assert average.average["1.num_batches_tracked"] == 6
    for step in range(100, 140):
        average.update(step)
    assert abs(average.average["0.weight"] - weight.data).max() <= 1e-6
    weight.data += 1
    before = weight.data.copy()
    with average.in_use():
        assert numpy.array_equal(weight.data, average.average["0.weight"])
    assert numpy.array_equal(weight.data, before)


def test_what_lies_in_flat_arrays_is_averaged_and_copied_as_a_whole() -> None:
    apart, flat = small_model(batch_norm=True), small_model(batch_norm=True)
    flat.load_state_dict(apart.state_dict())
    AdamW(flat.parameters())
    buffers = BufferCopy(flat)
    assert [len(views) for _, views in buffers.flat] == [2, 1], "float32 statistics, and the counter"
    averages = WeightAverage(apart, 0.5), WeightAverage(flat, 0.5, buffers)
    assert len(averages[1]._pairs) == 3
    for step in range(1, 4):
        for model, average in zip((apart, flat), averages, strict=True):
            for number, parameter in enumerate(model.parameters()):
                parameter.data += 0.1 * number
            model[1].running_mean += step  # type: ignore[union-attr]
            model[1].num_batches_tracked += 1  # type: ignore[union-attr]
            average.update(step)
    assert averages[0].average.keys() == averages[1].average.keys() == flat.state_dict().keys()
    for name, array in averages[0].average.items():
        assert numpy.array_equal(array, averages[1].average[name]), name
        assert array.shape == averages[1].average[name].shape
    own = {name: array.tobytes() for name, array in flat.state_dict().items()}
    with averages[1].in_use():
        assert numpy.array_equal(flat[0].weight.data, averages[0].average["0.weight"])  # type: ignore[union-attr]
        assert numpy.array_equal(flat[1].running_mean, averages[0].average["1.running_mean"])  # type: ignore[union-attr]
    buffers.take()
    for _, array in flat.named_buffers():
        array[...] = 7
    buffers.put_back()
    assert {name: array.tobytes() for name, array in flat.state_dict().items()} == own


def test_validation_and_the_best_checkpoint_take_the_average(tmp_path: Path) -> None:
    run, validation = RunFolder(tmp_path), patterns(30, seed=1)
    model = small_model(batch_norm=True)
    trainer = Trainer(model, patterns(), validation, options=quick(ema_decay=0.9), run=run)
    history = trainer.fit()
    last = read_checkpoint(run.last_path)
    assert not numpy.array_equal(last.model["0.weight"], last.ema["0.weight"])
    assert numpy.array_equal(model[0].weight.data, last.ema["0.weight"])  # type: ignore[union-attr]
    assert evaluate(model, validation, trainer.preprocessing).loss == history[1].validation_loss
    assert numpy.array_equal(read_checkpoint(run.best_path).model["0.weight"], last.ema["0.weight"])


def test_balanced_class_weights() -> None:
    images = numpy.zeros((8, 2, 2), numpy.uint8)
    dataset = ArrayDataset(images, [0, 0, 0, 0, 0, 0, 1, 1], classes=["many", "few", "none"])
    weights = class_weights("balanced", dataset)
    assert weights == [8 / (3 * 6), 8 / (3 * 2), 0.0]
    assert class_weights([1, 2, 3], dataset) == [1.0, 2.0, 3.0]
    assert class_weights(None, dataset) is None
    with pytest.raises(ArgumentError, match="class_weights has 2 numbers, but 'arrays' has 3 classes"):
        class_weights([1, 2], dataset)
    assert class_weights([1, 2, 0], dataset) == [1.0, 2.0, 0.0]
    for zero in (0, 1e-60):
        with pytest.raises(
            ArgumentError, match=r"gives class 'few' weight (0|1e-60), but 'arrays' has 2 images of it; give"
        ):
            class_weights([1, zero, 1], dataset)
    trainer = Trainer(small_model(), patterns(), options=quick(class_weights=[1, 2, 3]))
    assert numpy.array_equal(trainer.loss.weight, [1, 2, 3])


def test_the_default_preprocessing_fits_the_model() -> None:
    model = Sequential(layers.Flatten(), layers.Linear(16, 3))
    model.input_shape = (1, 4, 4)
    made = default_preprocessing(model, patterns())
    assert made is not None
    assert made.image_size == (4, 4)
    assert default_preprocessing(small_model(), patterns()) == Preprocessing.for_dataset(patterns())
    Trainer(model, patterns(), options=quick(epochs=1)).fit()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["uint8", "float32", "float64"])
def test_every_batch_comes_in_the_dtype_of_the_model(tmp_path: Path, kind: str, dtype: str) -> None:
    seen = set()

    class Watch(layers.Layer):
        def forward(self, x: Any) -> Any:
            seen.add(str(x.dtype))
            return x

        def backward(self, dy: Any) -> Any:
            seen.add(str(dy.dtype))
            return dy

    images = patterns()
    tensors = images.images(range(60)).transpose(0, 3, 1, 2) / 255
    train = images if kind == "uint8" else TensorDataset(tensors.astype(kind), images.labels, images.classes)
    model = Sequential(Watch(), *small_model(batch_norm=True)).to(dtype=dtype)
    options = quick(class_weights=[1, 2, 3], ema_decay=0.9, clip_norm=1.0)
    run = RunFolder(tmp_path)
    history = Trainer(model, train, train, options=options, run=run).fit()
    assert seen == {dtype}
    assert history[1].train_loss < history[0].train_loss
    assert {str(run.read_last().model[key].dtype) for key in ("1.weight", "5.bias")} == {dtype}


# ---------------------------------------------------------------- what does not fit


def test_a_model_with_the_wrong_number_of_classes() -> None:
    with pytest.raises(ShapeError, match=r"shape \(1, 4\), but 'patterns' has 3 classes .*num_classes=3"):
        Trainer(small_model(classes=4), patterns())
    with pytest.raises(ShapeError, match=r"shape \(1, 4, 4, 4\)"):
        Trainer(layers.Sequential(layers.Conv2d(1, 4, 3)), patterns())
    with pytest.raises(ShapeError, match=r"has 7 classes \(class 0, class 1, class 2, class 3, class 4, \.\.\.\)"):
        Trainer(small_model(), patterns(classes=7))


def test_images_that_do_not_fit_the_model() -> None:
    colour = ArrayDataset(numpy.zeros((4, 6, 6, 3), numpy.uint8), [0, 1, 2, 0])
    model = small_model()
    model.input_shape = (1, 6, 6)
    with pytest.raises(
        ShapeError, match=r"takes images of 1 channels, but those of 'arrays' have 3; .*in_channels=3"
    ):
        Trainer(model, colour)
    with pytest.raises(ShapeError, match="layer '3'"):  # found by the trial run, named by the layer
        Trainer(small_model(), ArrayDataset(numpy.zeros((4, 9, 9), numpy.uint8), [0, 1, 2, 0]))


def test_labels_that_are_no_classes() -> None:
    train = patterns()
    train.labels = train.labels + 1
    with pytest.raises(
        DataError, match="label 3 of image 2 of 'patterns' is out of range: the data set has 3 classes"
    ):
        Trainer(small_model(), train)
    validation = patterns()
    validation.labels = validation.labels - 1
    with pytest.raises(DataError, match="label -1 of image 0"):
        Trainer(small_model(), patterns(), validation)
    floats = TensorDataset(numpy.zeros((3, 1, 6, 6), numpy.float32), numpy.zeros((3, 2)))
    with pytest.raises(DataError, match=r"float32 of shape \(3, 2\).*one integer an image"):
        Trainer(small_model(), floats)
    empty = patterns()
    empty.labels = empty.labels[:0]
    with pytest.raises(DataError, match="has no images"):
        Trainer(small_model(), empty)


def test_validation_data_of_another_kind() -> None:
    with pytest.raises(DataError, match=r"has classes \[class 0, class 1\] \(2\), the training set .*\(3\)"):
        Trainer(small_model(), patterns(), patterns(classes=2))
    ready = TensorDataset(numpy.zeros((3, 1, 6, 6), numpy.float32), [0, 1, 2], classes=patterns().classes)
    with pytest.raises(DataError, match="both be preprocessed, or neither"):
        Trainer(small_model(), patterns(), ready)


def test_a_last_batch_of_one_image_is_left_out_for_batch_norm_only() -> None:
    messages: list[str] = []

    def trainer(model: layers.Layer, count: int, **options: Any) -> Trainer:
        made = Trainer(model, Subset(patterns(), range(count)), options=quick(**options))
        made.progress.message = messages.append  # type: ignore[method-assign]
        return made

    normalized = trainer(small_model(batch_norm=True), 41)
    assert len(normalized.loader) == 4
    assert [record.step for record in normalized.fit()] == [4, 8]
    assert len(messages) == 1
    assert "would be a single image (41 images, batch size 10)" in messages[0]
    assert len(trainer(small_model(), 41).loader) == 5
    assert len(trainer(small_model(batch_norm=True), 42).loader) == 5
    assert len(trainer(small_model(batch_norm=True), 41, batch_size=1).loader) == 41


def test_batches_of_one_value_a_channel_are_refused_by_the_layer() -> None:
    model = Sequential(layers.Flatten(), layers.BatchNorm1d(36), layers.Linear(36, 3))
    with pytest.raises(ShapeError, match="layer '1'"):
        Trainer(model, patterns(), options=quick(batch_size=1)).fit()


# ---------------------------------------------------------------- a full disk


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no device that is always full")
def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    class FillDisk(Callback):
        def on_step_end(self, trainer: Trainer, loss: float) -> None:
            if trainer.optimizer.lr > 0 and not (tmp_path / ".last.safetensors.part").is_symlink():
                steps.append(read_checkpoint(run.last_path).position.step)
                if len(steps) == 3:
                    (tmp_path / ".last.safetensors.part").symlink_to("/dev/full")

    steps: list[int] = []
    run = RunFolder(tmp_path)
    model, options = small_model(), quick(checkpoint_steps=1)
    with pytest.raises(StorageError, match=r"cannot write .*last\.safetensors: No space left on device"):
        Trainer(model, patterns(), options=options, run=run, callbacks=[FillDisk()]).fit()
    assert steps == [0, 1, 2]
    assert run.read_last().position.step == 2
    assert sorted(os.listdir(tmp_path)) == ["config.json", "history.jsonl", "last.safetensors"]
    assert model[0].input_needs_gradient  # type: ignore[union-attr]
    history = Trainer(small_model(), patterns(), options=options, run=run).fit(resume=True)
    assert [record.step for record in history] == [6, 12]


# ---------------------------------------------------------------- numbers that are not finite


class Spoils(layers.Layer):
    """Passes everything on, but puts a NaN or an infinity somewhere."""

    def __init__(self, forward: float | None = None, backward: float | None = None, after: int = 0) -> None:
        self.values, self.after, self.passes = (forward, backward), after, 0

    def forward(self, x: Any) -> Any:
        self.passes += self.training
        return self._spoilt(x, self.values[0])

    def backward(self, dy: Any) -> Any:
        return self._spoilt(dy, self.values[1])

    def _spoilt(self, array: Any, value: float | None) -> Any:
        if value is None or self.passes <= self.after:
            return array
        spoilt = array.copy()
        spoilt.reshape(-1)[0] = value
        return spoilt


@pytest.mark.parametrize(
    ("spoils", "message"),
    [
        (
            {"forward": math.nan},
            r"the loss became nan .*: layer '1' \(Spoils\(\)\) gave the first output .*\(1 of 1440",
        ),
        ({"forward": math.inf}, r"the loss became nan .*: layer '1' .* gave the first output"),
        (
            {"backward": math.nan},
            r"the gradient's norm became nan .*: layer '1' .* its input \(1 of 1440 values\)",
        ),
    ],
)
def test_the_layer_where_it_began_is_named(tmp_path: Path, spoils: dict[str, Any], message: str) -> None:
    manual_seed(1)
    model = Sequential(
        layers.Conv2d(1, 4, 3, padding=1),
        Spoils(**spoils, after=7),
        layers.BatchNorm2d(4),
        layers.Flatten(),
        layers.Linear(144, 3),
    )
    run = RunFolder(tmp_path)
    with pytest.raises(NonFiniteError, match=message) as caught:
        Trainer(model, patterns(), options=quick(epochs=3, checkpoint_steps=5), run=run).fit()
    text = str(caught.value)
    assert "at step 8 (epoch 2, batch 2)" in text
    assert f"the checkpoint of step 6 is kept in {run.last_path}" in text
    assert run.read_last().position.step == 6
    assert all(numpy.isfinite(array).all() for array in run.read_last().model.values())
    assert "forward" not in vars(model[0])


@pytest.mark.parametrize("spoils", [{"forward": math.nan}, {"backward": math.nan}])
def test_running_statistics_are_those_of_the_step_before(spoils: dict[str, Any]) -> None:
    states = []

    class Watch(Callback):
        def on_step_end(self, trainer: Trainer, loss: float) -> None:
            states.append({name: array.copy() for name, array in trainer.model.state_dict().items()})

    manual_seed(1)
    model = Sequential(
        layers.Conv2d(1, 4, 3),
        Spoils(**spoils, after=3),
        layers.BatchNorm2d(4),
        layers.Flatten(),
        layers.Linear(64, 3),
    )
    with pytest.raises(NonFiniteError, match=r"step 4 .* the weights are those of the step before; lower the"):
        Trainer(model, patterns(), options=quick(), callbacks=[Watch()]).fit()
    assert len(states) == 3
    assert states[-1]["2.num_batches_tracked"] == 3
    for name, array in model.state_dict().items():
        assert numpy.array_equal(array, states[-1][name]), name


def test_images_that_are_not_finite_are_named() -> None:
    x = numpy.random.default_rng(0).standard_normal((20, 1, 6, 6))
    x[13, 0, 2, 2], x[7, 0, 0, 0] = math.nan, math.inf
    model = small_model(batch_norm=True)
    before = {name: array.copy() for name, array in model.state_dict().items()}
    train = TensorDataset(x, numpy.arange(20) % 3, name="spoilt")
    with pytest.raises(NonFiniteError) as caught:
        Trainer(model, train, options=quick(batch_size=20)).fit()
    message = str(caught.value)
    assert "the images of the batch are not finite already (2 of 720 values)" in message
    assert message.endswith(("repair or leave out images 13, 7 of 'spoilt'", "images 7, 13 of 'spoilt'"))
    assert "learning rate" not in message
    for name, array in model.state_dict().items():
        assert numpy.array_equal(array, before[name]), name


def test_a_learning_rate_too_high_is_caught_before_the_weights_are_touched() -> None:
    model = small_model()
    with pytest.raises(
        NonFiniteError, match=r"layer '\d'.*the weights are those of the step before; lower the learning"
    ):
        Trainer(
            model,
            patterns(),
            options=quick(epochs=9, optimizer="sgd", lr=1e30, schedule="constant", clip_norm=1e9),
        ).fit()
    assert all(numpy.isfinite(parameter.data).all() for parameter in model.parameters())


def test_weights_that_a_step_made_infinite_are_not_saved(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    options = quick(optimizer="sgd", lr=1e300, schedule="constant", checkpoint_steps=1)
    with pytest.raises(
        NonFiniteError, match=r"after step 1, '0\.weight' is not finite .* step 0 is kept .*lower the"
    ):
        Trainer(small_model(), patterns(), options=options, run=run).fit()
    assert run.read_last().position.step == 0


def test_a_validation_loss_that_is_not_finite(tmp_path: Path) -> None:
    class OnlyInEvaluation(Spoils):
        def forward(self, x: Any) -> Any:
            return x if self.training else self._spoilt(x, self.values[0])

    model = Sequential(layers.Flatten(), OnlyInEvaluation(math.nan), layers.Linear(36, 3))
    trainer = Trainer(model, patterns(), patterns(), options=quick())
    model[1].after = -1  # type: ignore[union-attr]
    with pytest.raises(NonFiniteError, match="the validation loss is nan after epoch 1"):
        trainer.fit()


def diagnose(model: layers.Layer, images: Any, loss: Any = None) -> str:
    labels = numpy.zeros(len(images), numpy.int64)
    with numpy.errstate(all="ignore"):
        return find_first_non_finite(model, loss or _Loss(), images, labels)


class _Loss:
    """A loss with a value and a gradient of one's choice."""

    def __init__(self, value: float = 1.0, gradient: float = 1.0) -> None:
        self.value, self.gradient = value, gradient

    def __call__(self, logits: Any, labels: Any) -> float:
        self.shape = logits.shape
        return self.value

    def backward(self) -> Any:
        return numpy.full(self.shape, self.gradient, numpy.float32)


def test_other_places_where_it_can_begin() -> None:
    images = numpy.ones((2, 1, 6, 6), numpy.float32)
    model = small_model(batch_norm=True)
    state = model.state_dict()
    assert (
        diagnose(model, images * numpy.nan) == "the images of the batch are not finite already (72 of 72 values)"
    )
    assert diagnose(model, images) == "run again, every output and gradient of this batch was finite"
    assert diagnose(model, images, _Loss(math.inf)) == "every layer's output is finite, but their loss is inf"
    assert "the loss's gradient is the first that is not finite (6 of 6" in diagnose(
        model, images, _Loss(1.0, math.nan)
    )
    found = diagnose(model, images, _Loss(1.0, 3e38))  # twice that is too much for float32
    assert "layer '4' (Linear(in_features=64, out_features=3" in found
    assert "the first gradient that is not finite: that of its bias (3 of 3 values)" in found
    model[0].weight.data[...] = 1e38  # type: ignore[union-attr]
    assert "layer '0'" in diagnose(model, images * 100)
    assert "from inputs of at most 100 and weight of at most 1e+38" in diagnose(model, images * 100)
    for name, array in model.named_buffers():
        assert numpy.array_equal(array, state[name])
    assert "the model Spoils gave the first output" in diagnose(Spoils(math.nan, after=-1), images)
