"""Networks that run channels-last on a GPU: what a step transposes, packs and copies, and that no result shows it.

On the host runtime, with the real kernels. A GPU's speed is not looked at: launches are counted.
"""

from __future__ import annotations

import collections

import numpy
import pytest
from layout_counts import watched_counts

import gpucnn
from gpucnn import layers, models
from gpucnn.device import to_device
from gpucnn.layers.precision import backward_pass, forward_pass
from gpucnn.losses import CrossEntropyLoss
from gpucnn.models.model import Sequential
from gpucnn.ops.memory_format import is_channels_last
from gpucnn.optimizers import SGD
from gpucnn_kernels.runtime.host_array import host_arrays

EPSILON = {"float32": 2.0**-20, "tf32": 2.0**-11, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@pytest.fixture(autouse=True)
def host_runtime(monkeypatch):
    monkeypatch.setenv("GPUCNN_KERNELS_RUNTIME", "host")


@pytest.fixture
def counts(monkeypatch):
    return watched_counts(monkeypatch)


MODELS = {
    "lenet5": ((1, 28), {}),
    "animalnet": ((3, 63), {}),
    "vgg-small": ((3, 28), {}),
    "resnet18": ((3, 32), {"width": 8}),
    "mobilenet_v2": ((3, 32), {}),
}


def make(name, precision, **more):
    (channels, size), options = MODELS[name]
    gpucnn.manual_seed(0)
    model = models.create(name, num_classes=4, in_channels=channels, image_size=size, **options).to("cuda")
    return model.compute_in(precision, **more)


def batch_for(name, count=2):
    channels, size = MODELS[name][0]
    x = numpy.random.default_rng(1).standard_normal((count, channels, size, size)).astype("float32")
    return to_device(x, "cuda"), to_device(numpy.arange(count) % 4, "cuda")


def step(model, name):
    """(logits, every gradient) of a training step."""
    x, labels = batch_for(name)
    gpucnn.manual_seed(5)  # dropout's
    model.train().skip_input_gradient()
    model.zero_grad()
    loss = CrossEntropyLoss()
    logits = forward_pass(model, x)
    loss(logits, labels)
    backward_pass(model, loss.backward())
    found = {name: parameter.gradient.get().astype("f8") for name, parameter in model.named_parameters()}
    return logits.get().astype("f8"), found


def lies_otherwise(array):
    """Whether it is a contiguous image that could be told from a channels-last one."""
    return array.ndim == 4 and array.shape[1] > 1 and array.shape[2:] != (1, 1) and not is_channels_last(array)


def watch_layouts(model, monkeypatch):
    """A list that comes to hold the layers that give or take a contiguous image, behind the first convolution."""
    wrong, seen = [], []
    for path, layer in model.named_layers():
        if any(True for _ in layer.children()):
            continue
        forward, backward = layer.forward, layer.backward

        def watched_forward(x, path=path, forward=forward):
            y = forward(x)
            if (seen and lies_otherwise(x)) or lies_otherwise(y):
                wrong.append(f"{path} forward")
            seen.append(path)
            return y

        def watched_backward(dy, path=path, backward=backward):
            dx = backward(dy)
            if lies_otherwise(dy) or (dx is not None and lies_otherwise(dx)):
                wrong.append(f"{path} backward")
            return dx

        monkeypatch.setitem(vars(layer), "forward", watched_forward)
        monkeypatch.setitem(vars(layer), "backward", watched_backward)
    return wrong


@pytest.mark.parametrize("precision", ["bfloat16", "tf32"])
@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_moves_no_more_than_it_must(name, precision, counts, monkeypatch):
    model = make(name, precision)
    piece = 4 if precision == "tf32" else 8
    SGD(model.parameters(), lr=0.1)
    wrong = watch_layouts(model, monkeypatch)
    step(model, name)
    assert wrong == []
    assert counts.copies == []
    # Features of more than a pixel an image are brought into their order for the linear layer, and their gradient
    # back: 16 x 4 x 4 of lenet5 and 128 of 1 x 1 of animalnet at 63 x 63.
    assert counts.transposes == (2 if name == "lenet5" else 0)
    convolutions = [layer for _, layer in model.named_layers() if isinstance(layer, layers.Conv2d)]
    of_tensor_cores = [layer for layer in convolutions if layer.groups == 1]
    # Images whose channels fill no pieces of 16 bytes: packed for the forward pass and for the filter's gradient,
    # but for the first layer's, which are read where they lie, in tf32 by the forward pass alone.
    expected = collections.Counter()
    for layer in of_tensor_cores:
        first = layer is convolutions[0]
        if layer.in_channels % piece:
            expected[layer.in_channels] += (precision == "tf32") if first else 2
        if layer.out_channels % piece:
            expected[layer.out_channels] += (precision == "tf32") if first else 2
    expected = +expected  # without those that are 0
    assert collections.Counter(counts.images) == expected
    forward = [channels for channels, transposed in counts.filters if not transposed]
    assert all(channels % piece for channels in forward), "a weight that lies as tensor cores read it was packed"
    backward = [channels for channels, transposed in counts.filters if transposed]
    assert sorted(backward) == sorted(layer.in_channels for layer in of_tensor_cores[1:])


def test_contiguous_networks_pay_for_every_convolution(counts):
    """That the counts count: without the layout each convolution packs what it reads."""
    step(make("vgg-small", "bfloat16", channels_last=False), "vgg-small")
    # Five convolutions on tensor cores read x and dy twice each; the first one's images are read as they lie.
    assert len(counts.images) == 5 * 4
    assert len([1 for _, transposed in counts.filters if not transposed]) == 5
    weights = sum(o * i * 9 for o, i in ((32, 32), (64, 32), (64, 64), (128, 64), (128, 128)))
    inputs = 32 * 28**2 + (32 + 64) * 14**2 + (64 + 128) * 7**2
    outputs = 32 * 28**2 + (64 + 64) * 14**2 + (128 + 128) * 7**2
    # All is read and written: 2 bytes a number, 2 images; weights forward and backward.
    images = 2 * 2 * (inputs + outputs)
    assert counts.bytes == 2 * (2 * images + 2 * 2 * weights)
    counts.bytes = 0
    counts.images.clear()
    counts.filters.clear()
    step(make("vgg-small", "bfloat16"), "vgg-small")
    assert counts.images == []
    assert counts.bytes == 2 * 2 * weights  # for the inputs' gradients


def smooth_model(precision, channels_last):
    """Smooth all the way: a ReLU or a max-pool that decides otherwise is no matter of a rounding's size."""
    gpucnn.manual_seed(0)
    model = Sequential(
        layers.Conv2d(3, 8, 3, padding=1),
        layers.BatchNorm2d(8),
        layers.SiLU(),
        layers.Residual(Sequential(layers.Conv2d(8, 8, 3, padding=1), layers.BatchNorm2d(8)), None, layers.Tanh()),
        layers.AvgPool2d(2),
        layers.Concatenate(layers.Conv2d(8, 8, 3), layers.Conv2d(8, 16, 3)),
        layers.Dropout(0.3),
        layers.Flatten(),
        layers.Linear(24 * 4, 4),
    )
    return model.to("cuda").compute_in(precision, channels_last=channels_last)


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "tf32", "float32"])
def test_results_do_not_show_the_layout(precision, monkeypatch):
    monkeypatch.setitem(MODELS, "smooth", ((3, 8), {}))
    plain, last = smooth_model(precision, False), smooth_model(precision, True)
    states = [plain.state_dict(), last.state_dict()]
    assert list(states[0]) == list(states[1])
    for key, value in states[0].items():
        assert numpy.array_equal(states[1][key], value), key
        assert states[1][key].flags.c_contiguous, key
    assert is_channels_last(last[3].body[0].weight.data)
    wrong = watch_layouts(last, monkeypatch)
    (logits, expected), (found_logits, found) = step(plain, "smooth"), step(last, "smooth")
    assert wrong == []
    bound = 8 * EPSILON[precision]
    assert numpy.linalg.norm(found_logits - logits) <= bound * numpy.linalg.norm(logits)
    largest = max(numpy.linalg.norm(gradient) for gradient in expected.values())
    for key, gradient in expected.items():
        # The gradient of a bias before batch norm is zero but for rounding: the largest is the measure there.
        error = numpy.linalg.norm(found[key] - gradient)
        assert error <= bound * max(numpy.linalg.norm(gradient), 0.1 * largest), key


def test_float32_stays_as_it_is(monkeypatch):
    model = make("vgg-small", "float32")
    made = []
    forward = layers.BatchNorm2d.forward
    monkeypatch.setattr(layers.BatchNorm2d, "forward", lambda self, x: made.append(x) or forward(self, x))
    step(model, "vgg-small")
    assert made
    assert all(x.flags.c_contiguous for x in made)
    assert all(parameter.data.flags.c_contiguous for parameter in model.parameters())
    back = make("vgg-small", "bfloat16").compute_in("float32")
    assert all(parameter.data.flags.c_contiguous for parameter in back.parameters())


# ---------------------------------------------------------------- layers


def channels_last_image(shape, seed=0):
    values = numpy.random.default_rng(seed).standard_normal(shape).astype("float32")
    rows = host_arrays.asarray(numpy.ascontiguousarray(values.transpose(0, 2, 3, 1)))
    return rows.transpose(0, 3, 1, 2), to_device(values, "cuda")


@pytest.mark.parametrize(
    "layer",
    [
        layers.AdaptiveAvgPool2d(1),
        layers.MaxPool2d(4),
        layers.AvgPool2d(4),
        layers.Conv2d(5, 6, 4),
        layers.Flatten(),
        layers.ReLU6(),
        layers.Residual(layers.Tanh()),
        layers.Residual(layers.Tanh(), activation=layers.SiLU()),
        layers.Concatenate(layers.Tanh(), layers.Conv2d(5, 1, 1), layers.SiLU()),
        layers.ConvTranspose2d(5, 3, 2),
    ],
    ids=str,
)
def test_gradients_lie_as_inputs_do_and_have_their_numbers(layer):
    layer.to("cuda")
    given, contiguous = channels_last_image((2, 5, 4, 4))
    results = []
    for x in (given, contiguous):
        y = layer(x)
        dy = numpy.random.default_rng(3).standard_normal(y.shape).astype("float32")
        dx = layer.backward(to_device(dy, "cuda"))
        assert is_channels_last(dx) == is_channels_last(x)
        results.append((y.get(), dx.get()))
    for ours, theirs in zip(*results, strict=True):
        assert float(numpy.abs(ours - theirs).max()) <= 1e-5 * max(1.0, float(numpy.abs(theirs).max()))


def test_flattened_features_come_in_their_order():
    given, contiguous = channels_last_image((2, 5, 4, 3))
    flatten = layers.Flatten()
    assert flatten(given).get().tolist() == contiguous.get().reshape(2, 60).tolist()


def test_a_single_channel_or_pixel_does_not_end_it():
    """Images of one channel, and of one pixel, lie both ways: nothing is learned from them."""
    gpucnn.manual_seed(0)
    model = Sequential(
        layers.Conv2d(1, 8, 3),
        layers.ReLU(),
        layers.Conv2d(8, 1, 3),
        layers.ReLU(),
        layers.Conv2d(1, 8, 3),
        layers.AdaptiveAvgPool2d(1),
        layers.ConvTranspose2d(8, 8, 3),
        layers.Flatten(),
        layers.Linear(72, 4),
    )
    model.to("cuda").compute_in("bfloat16")
    x = to_device(numpy.ones((2, 1, 9, 9), "float32"), "cuda")
    logits = forward_pass(model, x)
    seen = {}
    for path, layer in model.named_layers():
        if path:
            backward = layer.backward
            vars(layer)["backward"] = lambda d, p=path, b=backward: seen.setdefault(p, b(d))
    backward_pass(model, logits)
    assert not any(lies_otherwise(dx) for path, dx in seen.items() if path not in ("0", "8"))


# ---------------------------------------------------------------- compiled models


@pytest.mark.parametrize("name", MODELS)
def test_compiled_models_and_plans(name, counts):
    model = make(name, "bfloat16").eval()
    x, _ = batch_for(name)
    compiled = model.compile_for_inference()
    expected = forward_pass(model, x).get()
    counts.images.clear()
    counts.filters.clear()
    counts.transposes = 0
    found = forward_pass(compiled, x).get()
    assert counts.images == counts.copies == []
    assert all(channels % 8 for channels, _ in counts.filters)
    assert counts.transposes == (1 if name == "lenet5" else 0)
    assert numpy.linalg.norm(found - expected) <= 32 * EPSILON["bfloat16"] * numpy.linalg.norm(expected)
    plan = compiled.plan(x.shape)
    assert numpy.array_equal(plan(x.astype("bfloat16")).get(), found)


def test_a_compiled_model_changes_its_precision_and_keeps_one_buffer():
    model = make("vgg-small", "float32").eval()
    x, _ = batch_for("vgg-small")
    compiled = model.compile_for_inference().compute_in("bfloat16")
    weights = [layer.weight for _, layer in compiled.named_layers() if isinstance(layer, layers.Conv2d)]
    assert [is_channels_last(weight.data) for weight in weights] == [False] + [True] * 5
    assert len({id(parameter.working.base) for parameter in compiled.parameters()}) == 1
    expected = forward_pass(model.compute_in("bfloat16").compile_for_inference(), x).get()
    assert numpy.array_equal(forward_pass(compiled, x).get(), expected)
    assert len({id(parameter.working.base) for parameter in compiled.parameters()}) == 1
