"""The library on its own CUDA kernels, run by the host runtime: the same training as NumPy's, to rounding."""

from __future__ import annotations

import numpy
import pytest
from test_device_layers import batch, network
from test_device_training import digits, untimed  # noqa: F401  # a fixture
from test_resume import StopAt, assert_same_end, crash

import gpucnn
from gpucnn import device, layers, losses, models, optimizers
from gpucnn.gradient_check import check_gradients
from gpucnn.random import manual_seed
from gpucnn.training import RunFolder
from gpucnn_kernels.runtime.host_array import HostArray, host_arrays

OPTIMIZERS = [
    ("sgd", {"momentum": 0.9, "nesterov": True}),
    ("adam", {"eps": 1e-3}),
    ("adamw", {"eps": 1e-3}),
    ("rmsprop", {"momentum": 0.9, "centered": True, "eps": 1e-3}),
]
"""With a large eps: a gradient that is rounding alone (a bias before a batch norm) then makes a small step."""


@pytest.fixture(autouse=True)
def host_runtime(monkeypatch):
    monkeypatch.setenv("GPUCNN_KERNELS_RUNTIME", "host")


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
def test_steps_of_every_layer_and_optimizer(name, options):
    ends = []
    for place in ("cpu", "cuda"):
        model = network().to(place, dtype=numpy.float64)
        optimizer = optimizers.make_optimizer(name, optimizers.parameter_groups(model, 0.01), 0.01, **options)
        loss = losses.CrossEntropyLoss([1.0, 2.0, 3.0], label_smoothing=0.1)
        images, labels = (device.to_device(array, place) for array in batch())
        values = []
        for _ in range(3):
            optimizer.zero_grad()
            values.append(loss(model(images.astype(numpy.float64)), labels))
            dx = model.backward(loss.backward())
            values.append(optimizer.clip_gradient_norm(1.0))
            optimizer.step()
        model.eval()
        logits = model(images.astype(numpy.float64))
        state = {**model.state_dict(), **optimizer.state_dict()}
        ends.append({"values": numpy.array(values), "dx": dx, "logits": logits, **state})
    assert type(ends[1]["dx"]) is HostArray
    assert list(ends[0]) == list(ends[1])
    for key, expected in ends[0].items():
        error = numpy.abs(device.to_cpu(ends[1][key]) - expected).max()
        assert error <= 1e-10 * max(1.0, float(numpy.abs(expected).max())), key


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lenet5", {"image_size": 12}),
        ("vgg-small", {"image_size": 16, "width": 2}),
        ("animalnet", {"image_size": 64, "dropout": 0.2}),
        ("resnet18", {"image_size": 16, "width": 2}),
        ("resnet50", {"image_size": 32, "width": 2, "stem": "imagenet"}),
        ("mobilenet_v2", {"image_size": 16, "width": 0.1}),
    ],
)
def test_a_step_of_each_model(name, options):
    ends = []
    for place in ("cpu", "cuda"):
        manual_seed(2)
        model = models.create(name, num_classes=3, in_channels=2, **options).to(place, dtype=numpy.float64)
        random = numpy.random.default_rng(4)
        images = device.to_device(random.standard_normal((3, *model.input_shape)), place)
        loss = losses.CrossEntropyLoss()
        value = loss(model(images), device.to_device(numpy.array([0, 2, 1]), place))
        model.backward(loss.backward())
        gradients = [device.to_cpu(parameter.gradient) for parameter in model.parameters()]
        ends.append((value, gradients, model.state_dict()))
    (value, gradients, state), (found, found_gradients, found_state) = ends
    assert abs(found - value) <= 1e-9 * abs(value)
    for expected, gradient in zip(gradients, found_gradients, strict=True):
        assert numpy.abs(gradient - expected).max() <= 1e-8 * max(1.0, float(numpy.abs(expected).max()))
    for key, expected in state.items():  # the running statistics moved alike
        assert numpy.abs(found_state[key] - expected).max() <= 1e-9 * max(1.0, float(numpy.abs(expected).max()))


def test_gradients_agree_with_differences():
    layer = gpucnn.layers.Sequential(
        gpucnn.layers.Conv2d(2, 3, 3, stride=2, padding=1),
        gpucnn.layers.BatchNorm2d(3),
        gpucnn.layers.GELU(),
        gpucnn.layers.Flatten(),
        gpucnn.layers.Linear(48, 2),
    ).cuda()
    check_gradients(layer, host_arrays.asarray(batch()[0]))


def test_lenet5_on_digits(digits, tmp_path):  # noqa: F811
    images, labels = digits
    train, validation = (images[:40], labels[:40]), (images[40:60], labels[40:60])
    recipe = {
        "epochs": 2,
        "batch_size": 20,
        "lr": 3e-3,
        "augmentation": "shift=1",
        "ema_decay": 0.9,
        "clip_norm": 1.0,
    }
    ends, predictions, trained = [], [], []
    for place in ("cpu", "cuda"):
        manual_seed(0)
        model = models.create("lenet5")
        history = model.fit(train, validation, device=place, output=tmp_path / place, verbose=False, **recipe)
        ends.append(untimed(history))
        predictions.append(model.predict(images[:30]))
        trained.append(model)
    for expected, found in zip(*ends, strict=True):
        assert expected.keys() == found.keys()
        assert all(abs(found[key] - value) <= 1e-4 * max(1.0, abs(value)) for key, value in expected.items())
    assert type(predictions[1]) is numpy.ndarray
    assert numpy.abs(predictions[1] - predictions[0]).max() <= 1e-4
    on_cpu = models.load(tmp_path / "cuda")
    on_cuda = models.load(tmp_path / "cuda", "cuda")
    assert numpy.abs(on_cpu.predict(images[:10]) - on_cuda.predict(images[:10])).max() <= 1e-5
    assert abs(trained[1].evaluate(validation).loss - trained[0].evaluate(validation).loss) <= 1e-4


def test_a_crashed_run_resumes_bit_for_bit(tmp_path):
    from test_device_training import make_trainer

    small = {"epochs": 1, "batch_size": 27}
    undisturbed, crashed = RunFolder(tmp_path / "undisturbed"), RunFolder(tmp_path / "crashed")
    make_trainer(undisturbed, **small).fit()
    with pytest.raises(MemoryError):
        make_trainer(crashed, (StopAt(4, crash),), **small).fit()
    make_trainer(crashed, **small).fit(resume=True)
    assert_same_end(undisturbed, crashed)


def test_grad_cam():
    pytest.importorskip("matplotlib")
    from gpucnn.visualize import grad_cam

    manual_seed(0)
    here = models.create("vgg-small", num_classes=3, image_size=16, width=2, in_channels=1).eval()
    image = numpy.random.default_rng(0).standard_normal((1, 16, 16)).astype(numpy.float32)
    expected = grad_cam(here, image, 1)
    assert numpy.abs(grad_cam(here.cuda(), image, 1) - expected).max() <= 1e-4


@pytest.mark.parametrize(("precision", "most"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_grad_cam_of_a_model_that_computes_in_16_bits(precision, most):
    pytest.importorskip("matplotlib")
    from gpucnn.visualize import grad_cam

    manual_seed(0)
    model = models.create("vgg-small", num_classes=3, image_size=16, width=2, in_channels=1).eval().cuda()
    image = numpy.random.default_rng(0).standard_normal((1, 16, 16)).astype(numpy.float32)
    expected = grad_cam(model, image, 1)
    found = grad_cam(model.compute_in(precision), image, 1)
    assert found.dtype == numpy.float32
    assert 0 < numpy.abs(found - expected).max() <= most, "near, and not computed in float32"


def test_the_summary_of_a_model_that_computes_in_16_bits():
    model = models.create("vgg-small", num_classes=3, image_size=16, width=2, in_channels=1).cuda()
    expected = str(models.summary(model))
    assert str(models.summary(model.compute_in("float16"))) == expected


def test_relu6_in_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    layer, x = layers.ReLU6(), numpy.array([[-1, 0.5, 6, 9, numpy.nan]], ml_dtypes.bfloat16)
    with numpy.errstate(invalid="ignore"):  # ml_dtypes warns of a NaN
        y = layer(host_arrays.asarray(x))
    assert numpy.array_equal(y.get().astype(float), [[0, 0.5, 6, 6, numpy.nan]], equal_nan=True)
    with numpy.errstate(invalid="ignore"):
        dx = layer.backward(host_arrays.asarray(numpy.full((1, 5), 2, ml_dtypes.bfloat16)))
    assert dx.dtype == ml_dtypes.bfloat16
    assert dx.get()[:, :4].astype(float).tolist() == [[0, 2, 0, 0]]
