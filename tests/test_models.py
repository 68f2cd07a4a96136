"""The models: structure, names and counts as published; shapes, gradients and initial weights."""

from __future__ import annotations

import json
import math

import numpy
import pytest

import gpucnn
from gpucnn.errors import ArgumentError, ShapeError
from gpucnn.gradient_check import directional_errors
from gpucnn.layers import BatchNorm2d, Conv2d
from gpucnn.models import AnimalNet, LeNet5, MobileNetV2, available, create, describe, resnet18, resnet50, summary
from gpucnn.models.vgg import VGGSmall

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def norm_keys(prefix):
    return [f"{prefix}.{name}" for name in NORM]


def resnet_keys(convolutions, blocks, first_stage_has_downsample):
    """Torchvision's resnet keys in order, from its published module structure."""
    keys = ["conv1.weight", *norm_keys("bn1")]
    for stage, count in enumerate(blocks, start=1):
        for block in range(count):
            prefix = f"layer{stage}.{block}"
            for number in range(1, convolutions + 1):
                keys += [f"{prefix}.conv{number}.weight", *norm_keys(f"{prefix}.bn{number}")]
            if block == 0 and (stage > 1 or first_stage_has_downsample):
                keys += [f"{prefix}.downsample.0.weight", *norm_keys(f"{prefix}.downsample.1")]
    return [*keys, "fc.weight", "fc.bias"]


def mobilenet_keys():
    keys = ["features.0.0.weight", *norm_keys("features.0.1")]
    for block in range(1, 18):
        prefix, place = f"features.{block}.conv", 0
        for _ in range(1 if block == 1 else 2):  # the first block has no expansion
            keys += [f"{prefix}.{place}.0.weight", *norm_keys(f"{prefix}.{place}.1")]
            place += 1
        keys += [f"{prefix}.{place}.weight", *norm_keys(f"{prefix}.{place + 1}")]
    keys += ["features.18.0.weight", *norm_keys("features.18.1")]
    return [*keys, "classifier.1.weight", "classifier.1.bias"]


def images(count, channels, size, seed=0, dtype=numpy.float32):
    return numpy.random.default_rng(seed).standard_normal((count, channels, size, size)).astype(dtype)


@pytest.fixture(scope="module")
def imagenet_models():
    # 40 million Philox numbers take seconds; NumPy's have the same distribution, which is what is tested here.
    random = numpy.random.default_rng(7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "gpucnn.random.Generator.uniform",
            lambda self, shape, low=0.0, high=1.0, dtype=numpy.float32: (
                low + (high - low) * random.random(shape, dtype)
            ),
        )
        patch.setattr(
            "gpucnn.random.Generator.normal",
            lambda self, shape, mean=0.0, std=1.0, dtype=numpy.float32: (
                mean + std * random.standard_normal(shape, dtype)
            ),
        )
        return {"resnet18": resnet18(), "resnet50": resnet50(), "mobilenet_v2": MobileNetV2()}


@pytest.mark.parametrize(
    ("name", "count", "keys"),
    [
        ("resnet18", 11_689_512, resnet_keys(2, (2, 2, 2, 2), False)),
        ("resnet50", 25_557_032, resnet_keys(3, (3, 4, 6, 3), True)),
        ("mobilenet_v2", 3_504_872, mobilenet_keys()),
    ],
)
def test_torchvision_counts_and_keys(imagenet_models, name, count, keys):
    model = imagenet_models[name]
    assert model.parameter_count == count
    assert list(model.state_dict()) == keys
    features = model.state_dict()["fc.weight" if name.startswith("resnet") else "classifier.1.weight"].shape[1]
    assert describe(name).parameter_count == count - 990 * (features + 1)


@pytest.mark.parametrize(
    ("name", "key", "shape"),
    [
        ("resnet18", "conv1.weight", (64, 3, 7, 7)),
        ("resnet18", "layer2.0.downsample.0.weight", (128, 64, 1, 1)),
        ("resnet50", "layer1.0.downsample.0.weight", (256, 64, 1, 1)),
        ("resnet50", "layer4.0.conv2.weight", (512, 512, 3, 3)),
        ("resnet50", "layer4.2.conv3.weight", (2048, 512, 1, 1)),
        ("resnet50", "fc.weight", (1000, 2048)),
        ("mobilenet_v2", "features.1.conv.0.0.weight", (32, 1, 3, 3)),
        ("mobilenet_v2", "features.17.conv.2.weight", (320, 960, 1, 1)),
        ("mobilenet_v2", "features.18.0.weight", (1280, 320, 1, 1)),
    ],
)
def test_torchvision_shapes(imagenet_models, name, key, shape):
    assert imagenet_models[name].state_dict()[key].shape == shape


def test_resnet50_has_its_strides_on_the_3x3_convolutions(imagenet_models):
    strides = {
        path: layer.stride
        for path, layer in imagenet_models["resnet50"].named_layers()
        if isinstance(layer, Conv2d) and layer.stride != (1, 1)
    }
    expected = {"conv1": (2, 2)}
    for stage in (2, 3, 4):
        expected |= {f"layer{stage}.0.conv2": (2, 2), f"layer{stage}.0.downsample.0": (2, 2)}
    assert strides == expected


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_imagenet_models_go_forward_and_backward(imagenet_models, name):
    model = imagenet_models[name]
    x = images(2, 3, 64)
    before = x.copy()
    y = model(x)
    assert y.shape == (2, 1000)
    assert numpy.isfinite(y).all()
    model.zero_grad()
    dx = model.backward(numpy.ones_like(y))
    assert dx.shape == x.shape
    assert numpy.array_equal(x, before)
    assert all(numpy.isfinite(parameter.gradient).all() for parameter in model.parameters())
    assert all(parameter.gradient.any() for parameter in model.parameters() if len(parameter.shape) > 1)


@pytest.mark.parametrize(("name", "billions"), [("resnet18", 1.81), ("resnet50", 4.09), ("mobilenet_v2", 0.30)])
def test_published_multiply_adds(imagenet_models, name, billions):
    assert abs(summary(imagenet_models[name]).flops / 2e9 - billions) <= 0.006


def relative_std(values, expected):
    return abs(float(values.std()) / expected - 1)


def test_initial_weights_are_torchvisions(imagenet_models):
    for name, model in imagenet_models.items():
        for _, layer in model.named_layers():
            if isinstance(layer, Conv2d):
                weight = layer.weight.data
                fan_out = weight.shape[0] * weight.shape[2] * weight.shape[3]
                # Five standard errors of a standard deviation, 1 / sqrt(2 n).
                assert relative_std(weight, math.sqrt(2 / fan_out)) <= 5 / math.sqrt(2 * weight.size), name
                assert layer.bias is None


def test_initial_norms_and_classifiers_are_torchvisions():
    model = create("resnet18", width=8)
    for _, layer in model.named_layers():
        if isinstance(layer, BatchNorm2d):
            assert (layer.weight.data == 1).all()
            assert not layer.bias.data.any()
    assert numpy.max(numpy.abs(model.fc.weight.data)) <= 1 / math.sqrt(64)
    linear = create("mobilenet_v2", image_size=32, num_classes=50).classifier[1]
    assert relative_std(linear.weight.data, 0.01) <= 0.05
    assert not linear.bias.data.any()


@pytest.mark.parametrize("make", [resnet18, resnet50])
def test_zero_init_residual_starts_blocks_as_their_shortcuts(make):
    model = make(10, image_size=32, width=4, stem="small", zero_init_residual=True)
    last = "bn2" if make is resnet18 else "bn3"
    for path, layer in model.named_layers():
        if isinstance(layer, BatchNorm2d):
            assert bool(layer.weight.data.any()) == (not path.endswith(last))


@pytest.mark.parametrize(
    ("name", "channels", "size", "options"),
    [
        ("lenet5", 1, 28, {}),
        ("lenet5", 3, 32, {}),
        ("lenet5", 1, 12, {}),
        ("animalnet", 3, 224, {}),
        ("animalnet", 1, 63, {"batch_norm": False, "dropout": 0.5}),
        ("vgg-small", 1, 28, {}),
        ("vgg-small", 3, 32, {"width": 8, "dropout": 0.3}),
        ("vgg-small", 3, 48, {"width": 4, "stages": 4}),
        ("vgg-small", 3, 48, {"width": 4, "stages": 2, "stem": "strided"}),
        ("resnet18", 1, 28, {"width": 8}),
        ("resnet18", 3, 96, {"width": 8}),
        ("resnet50", 3, 32, {"width": 4, "stem": "imagenet"}),
        ("mobilenet_v2", 3, 32, {"width": 0.25}),
        ("mobilenet_v2", 1, 8, {"width": 0.1}),
        ("mobilenet_v2", 3, 65, {"width": 0.25, "dropout": 0.0}),
    ],
)
def test_models_are_made_run_and_made_again(name, channels, size, options):
    model = create(name, num_classes=5, in_channels=channels, image_size=size, **options)
    assert (model.name, model.input_shape, model.num_classes) == (name, (channels, size, size), 5)
    x = images(3, channels, size)
    y = model(x)
    assert y.shape == (3, 5)
    assert model.backward(numpy.ones_like(y)).shape == x.shape

    again = create(**json.loads(json.dumps(model.architecture)))
    assert again.architecture == model.architecture
    again.load_state_dict(model.state_dict())
    evaluated = model.eval()(x)
    assert numpy.array_equal(again.eval()(x), evaluated)
    assert all(layer._saved is None for _, layer in model.named_layers())


def with_generic_norms(model):
    """Batch norms with unlike scales and shifts, so that a gradient that ignores one of them shows."""
    random = numpy.random.default_rng(5)
    for _, layer in model.named_layers():
        if isinstance(layer, BatchNorm2d):
            layer.weight.data[...] = random.uniform(0.5, 1.5, layer.weight.shape)
            layer.bias.data[...] = random.uniform(-0.5, 0.5, layer.bias.shape)
    return model


@pytest.mark.parametrize(
    ("make", "channels", "size"),
    [
        (lambda: LeNet5(4, 2, 14), 2, 14),
        (lambda: AnimalNet(3, 2, 63), 2, 63),
        (lambda: AnimalNet(3, 1, 63, batch_norm=False), 1, 63),
        (lambda: VGGSmall(3, 2, 9, width=3, stages=2), 2, 9),
        (lambda: create("resnet18", num_classes=3, in_channels=2, image_size=16, width=3), 2, 16),
        (lambda: create("resnet18", num_classes=3, in_channels=1, image_size=64, width=2, stem="imagenet"), 1, 64),
        (lambda: create("resnet50", num_classes=3, in_channels=2, image_size=16, width=2), 2, 16),
        (lambda: MobileNetV2(3, 2, 16, stem="small", width=0.1, dropout=0.0), 2, 16),
    ],
)
def test_gradients_by_central_differences(make, channels, size):
    gpucnn.manual_seed(3)
    model = with_generic_norms(make())
    # A deep network has a ReLU's corner within a larger step, more often than not.
    errors = directional_errors(model, images(4, channels, size, dtype=numpy.float64), directions=2, step=1e-9)
    assert all(error <= 1e-5 for error in errors)


@pytest.mark.parametrize("name", ["lenet5", "animalnet", "vgg-small", "resnet18", "mobilenet_v2"])
def test_skipping_the_input_gradient_leaves_the_others_alone(name):
    options = {"resnet18": {"width": 4}, "mobilenet_v2": {"width": 0.1, "dropout": 0.0}, "vgg-small": {"width": 4}}
    size = 63 if name == "animalnet" else 16
    model = create(name, image_size=size, in_channels=3, **options.get(name, {}))
    x = images(2, 3, size)
    gradients = []
    for skip in (False, True):
        model.skip_input_gradient(skip)
        model.zero_grad()
        y = model(x)
        dx = model.backward(numpy.ones_like(y))
        assert (dx is None) == skip
        gradients.append([parameter.gradient.copy() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert numpy.array_equal(one, other)


def test_seed_decides_the_weights():
    states = []
    for seed in (1, 1, 2):
        gpucnn.manual_seed(seed)
        states.append(create("lenet5").state_dict())
    assert all(numpy.array_equal(states[0][key], states[1][key]) for key in states[0])
    assert not numpy.array_equal(states[0]["features.0.weight"], states[2]["features.0.weight"])


def test_lenet5_has_the_papers_sizes():
    shapes = {key: value.shape for key, value in LeNet5().state_dict().items() if key.endswith("weight")}
    assert list(shapes.values()) == [(6, 1, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)]
    assert LeNet5(image_size=32).classifier[0].in_features == 400


def test_animalnet_has_the_articles_sizes():
    model = AnimalNet(batch_norm=False)
    shapes = [value.shape for key, value in model.state_dict().items() if key.endswith("weight")]
    assert shapes == [(16, 3, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3), (128, 64, 3, 3), (3, 4608)]
    assert model.parameter_count == sum(math.prod(shape) + shape[0] for shape in shapes)


def test_registry_lists_what_it_makes():
    assert available() == ("lenet5", "animalnet", "vgg-small", "resnet18", "resnet50", "mobilenet_v2")
    for name in available():
        info = describe(name)
        assert info.name == name
        assert info.description
        if name in ("lenet5", "animalnet", "vgg-small"):
            model = create(name)
            assert (model.input_shape, model.parameter_count) == (info.input_shape, info.parameter_count)
            assert model.options == info.options


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet-18", {}, "unknown model 'resnet-18'; did you mean 'resnet18'"),
        ("mobilenet-v2", {}, "did you mean 'mobilenet_v2'"),
        ("VGG-small", {}, "did you mean 'vgg-small'"),
        ("lenet5", {"dropout": 0.1}, r"unknown option of the model lenet5 'dropout' \(there is none\)"),
        ("vgg-small", {"widht": 3}, "did you mean 'width'"),
        ("vgg-small", {"width": 1.5}, "width must be an integer, got 1.5"),
        ("vgg-small", {"stages": 0}, "1 to 6 stages"),
        ("vgg-small", {"stem": "stride"}, "did you mean 'strided'"),
        ("vgg-small", {"stem": "strided", "image_size": 31}, "at least 32x32"),
        ("vgg-small", {"dropout": "much"}, "dropout must be a number, got 'much'"),
        ("vgg-small", {"dropout": 2.0}, "dropout probability"),
        ("animalnet", {"batch_norm": 1}, "batch_norm must be true or false, got 1"),
        ("resnet18", {"stem": 3}, "stem must be a word, got 3"),
        ("resnet18", {"stem": "smal"}, "unknown stem 'smal'; did you mean 'small'"),
        ("mobilenet_v2", {"width": 0}, "factor above 0"),
        ("lenet5", {"num_classes": 0}, "at least 1"),
        ("lenet5", {"num_classes": 2.5}, "num_classes must be an integer"),
        ("lenet5", {"in_channels": True}, "in_channels must be an integer"),
        ("lenet5", {"image_size": 8}, "images of 8x8 are too small for lenet5, which needs at least 12x12"),
        ("lenet5", {"image_size": "big"}, "image_size must be an integer"),
        ("animalnet", {"image_size": 62}, "at least 63x63"),
        ("vgg-small", {"image_size": 7}, "at least 8x8"),
        ("resnet18", {"image_size": 7}, "resnet18 with the small stem, which needs at least 8x8"),
        ("resnet50", {"image_size": 31, "stem": "imagenet"}, "at least 32x32"),
        ("mobilenet_v2", {"image_size": 31, "stem": "imagenet"}, "at least 32x32"),
    ],
)
def test_bad_arguments_are_named(name, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        create(name, **arguments)


def test_describe_names_the_nearest():
    with pytest.raises(ArgumentError, match="did you mean 'resnet50'"):
        describe("resnet51")


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (lambda: LeNet5(), (1, 1, 32, 32), "images of 32x32 do not fit this model, which was made for 28x28"),
        (lambda: AnimalNet(), (1, 3, 63, 64), "made for 224x224"),
        (lambda: VGGSmall(width=2), (1, 1, 7, 30), "images of 7x30 are too small for this model"),
        (lambda: create("resnet18", width=2), (1, 3, 16, 16), "at least 32x32"),
        (lambda: create("mobilenet_v2", width=0.1), (1, 3, 31, 31), "at least 32x32"),
        (lambda: LeNet5(), (1, 28, 28), "expected 4 dimensions"),
        (lambda: LeNet5(), (1, 3, 28, 28), "expected 1 input channels, got 3"),
    ],
)
def test_images_that_do_not_fit_are_refused(model, shape, message):
    with pytest.raises(ShapeError, match=message):
        model()(numpy.zeros(shape, numpy.float32))


def test_any_size_models_take_other_sizes_than_they_were_made_for():
    model = create("vgg-small", width=2).eval()
    assert model(images(2, 1, 41)).shape == (2, 10)
