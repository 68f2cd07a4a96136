"""Models as a user holds them: fit, evaluate, predict, save, load."""

import copy
import json

import numpy
import pytest

import gpucnn
from gpucnn import layers
from gpucnn.errors import ArgumentError, CheckpointError, DtypeError, ShapeError


def stripes(count, seed=0):
    """Images that a small network tells apart at once: horizontal or vertical stripes, with noise."""
    random = numpy.random.default_rng(seed)
    labels = random.integers(0, 2, count)
    rows = (numpy.arange(8)[:, None] % 4 < 2) * 120 + 40
    patterns = numpy.stack([numpy.broadcast_to(rows, (8, 8)), numpy.broadcast_to(rows.T, (8, 8))])
    noisy = patterns[labels] + random.integers(-30, 31, (count, 8, 8))
    return noisy.clip(0, 255).astype(numpy.uint8), labels


def network():
    gpucnn.manual_seed(0)
    return gpucnn.Sequential(
        layers.Conv2d(1, 4, 3),
        layers.BatchNorm2d(4),
        layers.ReLU(),
        layers.AdaptiveAvgPool2d(3),
        layers.Flatten(),
        layers.Dropout(0.1),
        layers.Linear(36, 2),
    )


@pytest.fixture(scope="module")
def trained():
    model = network()
    model.fit(stripes(200), stripes(50, 1), epochs=4, batch_size=20, lr=0.02, verbose=False)
    return model


def test_fit_learns_and_reports(capsys):
    model = network()
    history = model.fit(
        stripes(200), stripes(50, 1), epochs=3, batch_size=20, lr=0.02, augmentation="shift=1", label_smoothing=0.1
    )
    assert len(history) == 3
    assert history.best.validation_accuracy >= 0.98
    assert "epoch 3/3" in capsys.readouterr().err
    assert model.preprocessing.image_size == (8, 8)
    assert model.classes == ["0", "1"]


def test_evaluate_and_predict_agree(trained):
    images, labels = stripes(40, 2)
    result = trained.evaluate((images, labels))
    assert result.accuracy >= 0.98
    probabilities = trained.predict(images, batch_size=7)
    assert probabilities.shape == (40, 2)
    assert numpy.abs(probabilities.sum(axis=1) - 1).max() < 1e-5
    assert float((probabilities.argmax(1) == labels).mean()) == result.accuracy
    assert numpy.abs(trained.predict(images[..., None]) - probabilities).max() < 1e-6, "(N, H, W, C)"
    assert numpy.abs(trained.predict(images[0][..., None]) - probabilities[:1]).max() < 1e-6, "(H, W, C)"
    inputs = trained.preprocessing.apply(images[..., None])
    assert numpy.abs(trained.predict(inputs) - probabilities).max() < 1e-6, "ready inputs"


def test_ready_inputs_can_be_fitted():
    images, labels = stripes(100)
    inputs = (images[:, None] / 128.0 - 1).astype(numpy.float32)
    model = network()
    model.fit((inputs, labels), epochs=3, batch_size=20, lr=0.02, verbose=False)
    assert model.preprocessing is None
    assert model.evaluate((inputs, labels)).accuracy >= 0.95


def test_splits_can_be_fitted_and_evaluated():
    splits = gpucnn.data.load("digits")
    gpucnn.manual_seed(0)
    model = gpucnn.Sequential(layers.Flatten(), layers.Linear(64, 10))
    history = model.fit(splits, epochs=3, batch_size=50, lr=0.02, verbose=False)
    assert history[-1].validation_accuracy is not None
    result = model.evaluate(splits)
    assert len(result.labels) == len(splits.test)
    assert result.accuracy >= 0.85


def test_save_and_load_round_trip(trained, tmp_path):
    path = tmp_path / "model.safetensors"
    trained.save(path)
    other = network()
    other.load(path)
    images, _ = stripes(10, 3)
    assert numpy.array_equal(other.predict(images), trained.predict(images))
    assert other.classes == ["0", "1"]
    plain = network()
    plain.save(path)
    other = network()
    other.load(path)
    assert other.preprocessing is None


def test_registry_models_are_rebuilt_from_their_file(tmp_path):
    model = gpucnn.models.create("lenet5", num_classes=3)
    model.classes = ["a", "b", "c"]
    model.save(tmp_path / "model.safetensors")
    again = gpucnn.models.load(tmp_path / "model.safetensors")
    assert again.architecture == model.architecture
    assert again.classes == ["a", "b", "c"]
    x = numpy.random.default_rng(0).standard_normal((2, 1, 28, 28)).astype(numpy.float32)
    assert numpy.array_equal(again.predict(x), model.predict(x))


def test_a_run_folder_resumes_and_loads(tmp_path):
    data, folder = stripes(100), tmp_path / "run"
    whole = network()
    whole.fit(data, data, epochs=3, batch_size=20, verbose=False, output=folder)
    with pytest.raises(ArgumentError, match="already holds a run"):
        network().fit(data, data, epochs=3, batch_size=20, verbose=False, output=folder)
    resumed = network()
    history = resumed.fit(data, data, epochs=3, batch_size=20, verbose=False, output=folder, resume=True)
    assert len(history) == 3
    for key, value in whole.state_dict().items():
        assert numpy.array_equal(value, resumed.state_dict()[key])
    config = json.loads((folder / "config.json").read_text())
    assert config["options"]["epochs"] == 3
    loaded = network()
    loaded.load(folder)
    assert loaded.predict(data[0]).shape == (100, 2)
    (folder / "best.safetensors").unlink()
    loaded.load(folder)
    with pytest.raises(ArgumentError, match=r"resume=True needs output="):
        network().fit(data, resume=True)


def test_loading_what_does_not_fit_is_explained(trained, tmp_path):
    path = tmp_path / "model.safetensors"
    trained.save(path)
    with pytest.raises(CheckpointError, match=r"is a checkpoint of Sequential, this model is lenet5: .*missing"):
        gpucnn.models.create("lenet5").load(path)
    with pytest.raises(CheckpointError, match="a folder without a checkpoint"):
        trained.load(tmp_path)
    with pytest.raises(CheckpointError, match=r"is of a model that gpucnn has not: unknown model 'Sequential'"):
        gpucnn.models.load(path)


def test_bad_input_is_named(trained):
    images, labels = stripes(4)
    with pytest.raises(DtypeError, match="data set or a pair"):
        trained.evaluate(images)
    with pytest.raises(ArgumentError, match="does not know how its images are normalized"):
        network().predict(images)
    with pytest.raises(DtypeError, match="got dtype int64"):
        trained.predict(labels)
    with pytest.raises(ShapeError, match=r"got shape \(3,\)"):
        trained.predict(numpy.zeros(3))
    with pytest.raises(ShapeError, match="no images"):
        trained.predict(images[:0])
    with pytest.raises(ArgumentError, match="fliq"):
        network().fit((images, labels), augmentation="fliq")


@pytest.mark.parametrize("wrong", [0, -3, 2.5, True])
def test_a_batch_size_that_is_none_is_named(trained, wrong):
    images, labels = stripes(4)
    for call in (trained.predict, lambda images, **given: trained.evaluate((images, labels), **given)):
        with pytest.raises(ArgumentError, match=f"batch_size must be a whole number, 1 or more, got {wrong}"):
            call(images, batch_size=wrong)


def test_fine_tuning_keeps_the_statistics_of_batch_norms_in_evaluation(trained):
    model = copy.deepcopy(trained)
    model[1].eval().requires_grad_(False)
    before = {key: value for key, value in model.state_dict().items() if key.startswith("1.")}
    weight = model[0].weight.data.copy()
    model.fit(stripes(60, 5), stripes(20, 6), epochs=1, batch_size=20, lr=0.01, verbose=False)
    after = model.state_dict()
    for key, value in before.items():
        numpy.testing.assert_array_equal(after[key], value, err_msg=key)
    assert (model[0].weight.data != weight).all()
    assert [layer.training for layer in model] == [True, False] + [True] * 5
    model.eval().fit(stripes(60, 5), epochs=1, batch_size=20, lr=0.01, verbose=False)
    assert all(layer.training for layer in model), "a model in evaluation is trained as a whole"
    assert (model[1].running_mean != before["1.running_mean"]).any()


def test_numpy_numbers_are_numbers(tmp_path):
    images, labels = stripes(40)
    model = gpucnn.models.create("vgg-small", num_classes=labels.max() + 1, image_size=numpy.int64(8), width=2)
    assert json.dumps(model.architecture)
    options = {"epochs": numpy.int64(1), "lr": numpy.float32(0.01), "output": tmp_path / "run"}
    model.fit((images, labels), verbose=False, **options)
    model.save(tmp_path / "model.safetensors")
    assert gpucnn.models.load(tmp_path / "model.safetensors").architecture == model.architecture


@pytest.mark.parametrize("ready", [False, True])
def test_float64_models_are_fitted(ready):
    images, labels = stripes(60)
    inputs = images[:, None] / 128.0 - 1 if ready else images
    model = network().to(dtype=numpy.float64)
    model.fit((inputs, labels), epochs=1, batch_size=20, verbose=False)
    assert model.predict(inputs).dtype == numpy.float64
    assert model.state_dict()["0.weight"].dtype == numpy.float64


def test_a_class_may_have_no_image():
    images, _ = stripes(30)
    model = gpucnn.models.create("vgg-small", num_classes=5, image_size=8, width=2)
    model.fit((images, numpy.arange(30) % 3), epochs=1, verbose=False)
    result = model.evaluate((images, numpy.arange(30) % 3))
    assert result.confusion.shape == (5, 5)


def test_misspelt_options_are_named():
    with pytest.raises(ArgumentError, match="did you mean 'batch_size'"):
        network().fit(stripes(20), batchsize=3)


def test_a_callback_can_predict():
    seen = []

    class Look(gpucnn.training.Callback):
        def on_epoch_end(self, trainer, record):
            seen.append(trainer.model.predict(stripes(3)[0]).shape)

    network().fit(stripes(40), epochs=1, verbose=False, callbacks=[Look()])
    assert seen == [(3, 2)]
