"""Models compiled for inference against their originals, on NumPy and by the kernels on the host runtime."""

from __future__ import annotations

import numpy
import pytest
from resume_worker import make_data

import gpucnn
from gpucnn import layers
from gpucnn.errors import ArgumentError, StateError
from gpucnn.layers import BatchNorm1d, BatchNorm2d, Dropout, Identity
from gpucnn.models import available, create
from gpucnn.models.inference import FoldedConv2d, FoldedMaxPool2d, FoldedResidual
from gpucnn.models.model import Sequential
from gpucnn_kernels.launch import Call

SMALL = {
    "lenet5": {"image_size": 12},
    "animalnet": {"image_size": 63, "dropout": 0.3},
    "vgg-small": {"image_size": 8, "width": 4, "dropout": 0.3},
    "resnet18": {"image_size": 9, "width": 4, "stem": "small"},
    "resnet50": {"image_size": 8, "width": 4, "stem": "small"},
    "mobilenet_v2": {"image_size": 10, "width": 0.25, "stem": "small"},
}
BLOCKS = {"resnet18": 8, "resnet50": 16, "mobilenet_v2": 12}
POOLS = {"lenet5": 2, "animalnet": 1, "vgg-small": 3}
BATCH_NORMS = {"lenet5": 0, "animalnet": 4, "vgg-small": 6, "resnet18": 20, "resnet50": 53, "mobilenet_v2": 52}


@pytest.fixture(autouse=True)
def host_runtime(monkeypatch):
    monkeypatch.setenv("GPUCNN_KERNELS_RUNTIME", "host")


def lived_in(model, seed=0):
    """With statistics, scales and shifts as after a training, so that each of them counts."""
    generator = numpy.random.default_rng(seed)
    for _, layer in model.named_layers():
        if isinstance(layer, (BatchNorm1d, BatchNorm2d)):
            count = layer.num_features
            if layer.track_running_stats:
                layer.running_mean[...] = generator.normal(0, 0.3, count)
                layer.running_var[...] = generator.uniform(0.5, 2, count)
            if layer.weight is not None:
                layer.weight.data[...] = generator.uniform(0.5, 1.5, count)
                layer.bias.data[...] = generator.normal(0, 0.3, count)
    return model.eval()


def state_of(model):
    return {name: array.tobytes() for name, array in model.state_dict().items()}


def kinds(model):
    return [type(layer) for _, layer in model.named_layers()]


def logits_of(model, x, device="cpu"):
    y = model(gpucnn.device.to_device(x, device))
    return gpucnn.device.to_cpu(y).astype("f8")


def test_every_registered_model_is_tested():
    assert set(SMALL) == set(available())


@pytest.mark.parametrize("name", SMALL)
def test_a_compiled_model_gives_the_originals_outputs(name):
    gpucnn.manual_seed(0)
    model = lived_in(create(name, num_classes=4, in_channels=3, **SMALL[name]))
    assert sum(kind is BatchNorm2d for kind in kinds(model)) == BATCH_NORMS[name]
    size = model.input_shape[1]
    x = numpy.random.default_rng(1).standard_normal((3, 3, size, size)).astype("float32")
    expected = logits_of(model, x)
    before, probabilities = state_of(model), model.predict(x)

    model.to(dtype="float64")
    exact = logits_of(model, x.astype("f8"))
    folded = logits_of(model.compile_for_inference(), x.astype("f8"))
    assert numpy.abs(folded - exact).max() <= 1e-11 * numpy.abs(exact).max(), "the algebra"
    model.to(dtype="float32")
    # The folded weights are rounded once more, and there are fewer roundings after them.
    bound = 4 * numpy.abs(expected - exact).max() + 1e-6 * numpy.abs(exact).max()

    for device in ("cpu", "cuda"):
        compiled = model.to(device).compile_for_inference()
        assert numpy.abs(logits_of(compiled, x, device) - exact).max() <= bound, device
        assert numpy.abs(compiled.predict(x) - probabilities).max() <= 1e-5
        assert compiled.device == model.device
        assert not {BatchNorm2d, Dropout} & set(kinds(compiled))
        convolutions = [layer for _, layer in compiled.named_layers() if isinstance(layer, layers.Conv2d)]
        # Each ends with its activation, but those of shortcuts and mobile blocks, which have none.
        fused = sum(isinstance(layer, FoldedConv2d) and layer.activation is not None for layer in convolutions)
        assert fused == {"resnet18": 17, "resnet50": 49, "mobilenet_v2": 35}.get(name, len(convolutions))
        assert kinds(compiled).count(FoldedResidual) == BLOCKS.get(name, 0)
        assert kinds(compiled).count(FoldedMaxPool2d) == POOLS.get(name, 0)
        assert numpy.abs(compiled.cpu().predict(x) - probabilities).max() <= 1e-5, "moved"
    model.cpu()
    assert state_of(model) == before
    assert type(model).__name__ != "InferenceModel"


def test_every_activation_is_folded_on_both_devices():
    generator = numpy.random.default_rng(2)
    x = generator.standard_normal((2, 2, 7, 8)).astype("float32")
    for activation in (
        layers.ReLU(),
        layers.LeakyReLU(0.2),
        layers.ReLU6(),
        layers.Sigmoid(),
        layers.Tanh(),
        layers.GELU(),
        layers.GELU("tanh"),
        layers.SiLU(),
    ):
        model = Sequential(
            layers.Conv2d(2, 4, 3, padding=(0, 1, 2, 1), stride=2, groups=2, bias=False),
            layers.BatchNorm2d(4, affine=False),
            activation,
        )
        lived_in(model)
        expected = logits_of(model, x)
        for device in ("cpu", "cuda"):
            compiled = model.to(device).compile_for_inference()
            assert kinds(compiled.network)[1:4] == [FoldedConv2d, type(activation), Identity]
            error = numpy.abs(logits_of(compiled, x, device) - expected).max()
            assert error <= 1e-5, f"{activation} on {device}"
        model.cpu()


def test_what_does_not_follow_directly_is_left_as_it_is():
    gpucnn.manual_seed(1)
    model = Sequential(
        layers.BatchNorm2d(2),
        layers.Conv2d(2, 3, 3),
        layers.MaxPool2d(2),
        layers.BatchNorm2d(3),
        layers.Conv2d(3, 3, 1),
        layers.BatchNorm2d(3, track_running_stats=False),
        layers.Residual(layers.Conv2d(3, 3, 1), activation=layers.ReLU()),
        layers.Conv2d(3, 3, 1),
        layers.Dropout2d(0.5),
        layers.BatchNorm2d(3),
        layers.ReLU(),
        layers.ReLU(),
        layers.ConvTranspose2d(3, 3, 1),
        layers.BatchNorm2d(3),
        layers.Flatten(),
        layers.Linear(27, 8, bias=False),
        layers.BatchNorm1d(8),
        layers.ReLU(),
        layers.Linear(8, 3),
    )
    lived_in(model)
    compiled = model.compile_for_inference()
    changed = [
        index
        for index, (one, other) in enumerate(zip(model, compiled.network, strict=True))
        if type(one) is not type(other)
    ]
    assert changed == [1, 2, 6, 7, 8, 9, 10, 16]
    assert isinstance(compiled.network[1], FoldedMaxPool2d)
    assert isinstance(compiled.network[6], FoldedResidual)
    assert isinstance(compiled.network[7], FoldedConv2d)
    x = numpy.random.default_rng(3).standard_normal((4, 2, 8, 8)).astype("float32")
    assert numpy.abs(logits_of(compiled, x) - logits_of(model, x)).max() <= 1e-5


def launches(model, x, monkeypatch):
    """The sources of the kernels that a forward starts, in their order."""
    started = []
    launch = Call.launch
    with monkeypatch.context() as patch:
        patch.setattr(
            Call,
            "launch",
            lambda self, source, *rest, **more: (started.append(source), launch(self, source, *rest, **more)),
        )
        model(gpucnn.device.to_device(x, "cuda"))
    return started


def test_a_residual_network_launches_its_convolutions_and_little_else(monkeypatch):
    gpucnn.manual_seed(4)
    x = numpy.zeros((2, 3, 9, 9), "float32")
    for name, convolutions in (("resnet18", 20), ("resnet50", 53)):
        model = create(name, num_classes=4, in_channels=3, **SMALL[name]).eval().to("cuda")
        plain, started = launches(model, x, monkeypatch), launches(model.compile_for_inference(), x, monkeypatch)
        *body, mean, linear = (source for source in started if source != "im2col")  # the columns are no end
        assert len(body) == convolutions
        assert all(source.startswith("conv2d_") for source in body)
        assert (mean, linear) == ("average_pooling", "linear")
        assert len(plain) > 2 * convolutions


def test_a_small_network_pools_in_its_convolutions(monkeypatch):
    x = numpy.zeros((2, 1, 28, 28), "float32")
    model = create("lenet5").eval().to("cuda")
    started = launches(model.compile_for_inference(), x, monkeypatch)
    assert started[:2] == ["conv2d_max_pool"] * 2
    assert "max_pooling" not in started


def test_sums_that_do_not_end_in_a_convolution_stay():
    gpucnn.manual_seed(5)
    x = numpy.random.default_rng(6).standard_normal((2, 4, 6, 6)).astype("float32")

    def convolution(**more):
        return layers.Conv2d(4, 4, 3, padding=1, **more)

    blocks = {
        # block: whether it is folded
        layers.Residual(convolution()): True,
        layers.Residual(
            layers.Sequential(layers.ReLU(), convolution()), layers.Conv2d(4, 4, 1), layers.SiLU()
        ): True,
        layers.Residual(
            layers.Sequential(convolution(), Dropout(0.5), BatchNorm2d(4)), activation=layers.ReLU6()
        ): True,
        layers.Residual(layers.Sequential(convolution(), layers.Sequential(convolution(), Identity()))): True,
        layers.Residual(layers.Sequential(convolution(), layers.ReLU())): False,
        layers.Residual(layers.MaxPool2d(3, 1, 1)): False,
        layers.Residual(layers.Sequential(convolution(), layers.MaxPool2d(3, 1, 1))): False,
        layers.Residual(Identity()): False,
    }
    for block, folded in blocks.items():
        model = lived_in(Sequential(block))
        expected = logits_of(model, x)
        for device in ("cpu", "cuda"):
            compiled = model.to(device).compile_for_inference()
            assert (FoldedResidual in kinds(compiled)) == folded, block
            assert numpy.abs(logits_of(compiled, x, device) - expected).max() <= 1e-5, f"{block} on {device}"
            with pytest.raises(StateError, match="only predicts"):
                compiled.network[0].backward(x) if folded else compiled.backward(x)


def test_a_convolution_whose_algorithm_was_chosen_keeps_it(monkeypatch):
    """So it does not end with a pooling, which no algorithm of a convolution does."""
    model = Sequential(layers.Conv2d(1, 2, 3, algorithm={"forward": "im2col"}), layers.ReLU(), layers.MaxPool2d(2))
    compiled = model.eval().to("cuda").compile_for_inference()
    started = launches(compiled, numpy.zeros((1, 1, 8, 8), "float32"), monkeypatch)
    assert started == ["im2col", "conv2d_epilogue", "max_pooling"]


def test_a_body_and_a_shortcut_of_other_shapes():
    model = Sequential(layers.Residual(layers.Conv2d(2, 2, 3))).eval()
    for device in ("cpu", "cuda"):
        compiled = model.to(device).compile_for_inference()
        x = gpucnn.device.to_device(numpy.zeros((1, 2, 5, 5), "float32"), device)
        with pytest.raises(gpucnn.errors.ShapeError, match=r"residual must have shape \(1, 2, 3, 3\), got"):
            compiled(x)


def test_a_trained_model_is_compiled_with_its_preprocessing_in_any_precision():
    train, validation = make_data()
    gpucnn.manual_seed(2)
    model = Sequential(
        layers.Conv2d(1, 4, 3, bias=False),
        layers.BatchNorm2d(4),
        layers.ReLU(),
        layers.Flatten(),
        layers.Linear(64, 3),
    )
    model.fit(train, validation, epochs=2, verbose=False, workers=0)
    images = validation.images(numpy.arange(20))
    before = gpucnn.random.default_generator.state
    compiled = model.compile_for_inference()
    assert gpucnn.random.default_generator.state == before, "compiling draws no random numbers"
    expected = model.predict(images)
    assert numpy.abs(compiled.predict(images) - expected).max() <= 1e-5
    assert compiled.evaluate(validation).accuracy == model.evaluate(validation).accuracy
    for precision, epsilon in (("bfloat16", 2.0**-8), ("float16", 2.0**-11)):
        narrow = model.to("cuda").compute_in(precision).compile_for_inference()
        assert narrow.narrow_dtype == precision
        assert 0 < numpy.abs(narrow.predict(images) - expected).max() <= 8 * epsilon


def test_a_compiled_model_only_predicts(tmp_path):
    compiled = create("lenet5").compile_for_inference()
    assert compiled.compile_for_inference() is compiled
    with pytest.raises(StateError, match="only predicts; use the model that it was compiled from"):
        compiled.fit(make_data()[0])
    with pytest.raises(StateError, match="only predicts"):
        compiled.backward(numpy.zeros((1, 10), "float32"))
    with pytest.raises(ArgumentError, match="to save, load that and compile it again"):
        compiled.save(tmp_path / "model.safetensors")
    with pytest.raises(ArgumentError, match="and compile it again"):
        compiled.load(tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(gpucnn.errors.ShapeError, match=r"expected 1 input channels, got 2"):
        compiled(numpy.zeros((1, 2, 28, 28), "float32"))
