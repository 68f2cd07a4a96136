"""Networks that run channels-last on a GPU: what a step transposes, packs and copies, and that no result shows it.

On the host runtime, with the real kernels. A GPU's speed is not looked at: launches are counted.
"""

from __future__ import annotations

import collections
import copy
import dataclasses

import numpy
import pytest

import gpucnn
from gpucnn import layers, models
from gpucnn.data.dataset import Subset
from gpucnn.device import to_cpu, to_device
from gpucnn.layers.precision import backward_pass, forward_pass
from gpucnn.losses import CrossEntropyLoss
from gpucnn.models.model import Sequential
from gpucnn.ops.memory_format import is_channels_last
from gpucnn.optimizers import SGD
from gpucnn.training import Callback, RunFolder, Trainer, TrainingOptions
from gpucnn.training.averaging import WeightAverage
from gpucnn_kernels import conv2d_choice, conv2d_tensor
from gpucnn_kernels.launch import Call
from gpucnn_kernels.runtime import ITEM_SIZES
from gpucnn_kernels.runtime.host_array import HostArrays, host_arrays

EPSILON = {"float32": 2.0**-20, "tf32": 2.0**-11, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@pytest.fixture(autouse=True)
def host_runtime(monkeypatch):
    monkeypatch.setenv("GPUCNN_KERNELS_RUNTIME", "host")


@dataclasses.dataclass
class Counts:
    """What brings arrays from one order in memory to another, launched since it was cleared."""

    transposes: int = 0
    images: list = dataclasses.field(default_factory=list)  # channels of those packed for tensor cores
    filters: list = dataclasses.field(default_factory=list)  # (channels, for the gradient of the input)
    copies: list = dataclasses.field(default_factory=list)  # shapes of images that an operation copied
    bytes: int = 0  # read and written to pack


@pytest.fixture
def counts(monkeypatch):
    """Of tensor cores' convolutions, whatever so small problems are reckoned to take."""
    monkeypatch.setattr(conv2d_choice, "_chosen", lambda *given: conv2d_choice.usual(*given[:4], given[5]))
    found = Counts()
    launch, image, weight = Call.launch, conv2d_tensor._packed_image, conv2d_tensor._packed_filter
    copied = HostArrays.ascontiguousarray

    def launched(self, source, *rest, **more):
        found.transposes += source == "layout"
        return launch(self, source, *rest, **more)

    def packed_image(call, given, groups):
        packed = image(call, given, groups)
        if packed is not given:
            found.images.append(given.shape[1])
            found.bytes += (given.size + packed.size) * ITEM_SIZES[given.dtype]
        return packed

    def packed_filter(call, problem, given, transposed):
        packed = weight(call, problem, given, transposed)
        if packed[0] is not given:
            found.filters.append((given.shape[1], transposed))
            found.bytes += (given.size + packed[0].size) * ITEM_SIZES[given.dtype]
        return packed

    def contiguous(self, values, dtype=None):
        result = copied(self, values, dtype)
        if result is not values and result.ndim == 4:
            found.copies.append(result.shape)
        return result

    monkeypatch.setattr(Call, "launch", launched)
    monkeypatch.setattr(conv2d_tensor, "_packed_image", packed_image)
    monkeypatch.setattr(conv2d_tensor, "_packed_filter", packed_filter)
    monkeypatch.setattr(HostArrays, "ascontiguousarray", contiguous)
    return found


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
    # but for few channels in 16 bits, whose forward pass reads them where they lie.
    expected = collections.Counter()
    for layer in of_tensor_cores:
        if layer.in_channels % piece:
            expected[layer.in_channels] += 1 if layer.in_channels <= 4 and precision != "tf32" else 2
        if layer.out_channels % piece:
            expected[layer.out_channels] += 1 if layer is convolutions[0] else 2
    assert collections.Counter(counts.images) == expected
    forward = [channels for channels, transposed in counts.filters if not transposed]
    assert all(channels % piece for channels in forward), "a weight that lies as tensor cores read it was packed"
    backward = [channels for channels, transposed in counts.filters if transposed]
    assert sorted(backward) == sorted(layer.in_channels for layer in of_tensor_cores[1:])


def test_contiguous_networks_pay_for_every_convolution(counts):
    """That the counts count: without the layout each convolution packs what it reads."""
    step(make("vgg-small", "bfloat16", channels_last=False), "vgg-small")
    # Five convolutions on tensor cores read x and dy twice each, the first one both once, for its filter.
    assert len(counts.images) == 5 * 4 + 2
    assert len([1 for _, transposed in counts.filters if not transposed]) == 5
    weights = sum(o * i * 9 for o, i in ((32, 32), (64, 32), (64, 64), (128, 64), (128, 128)))
    inputs = 32 * 28**2 + (32 + 64) * 14**2 + (64 + 128) * 7**2
    outputs = 32 * 28**2 + (64 + 64) * 14**2 + (128 + 128) * 7**2
    # All is read and written: 2 bytes a number, 2 images; weights forward and backward.
    images = 2 * 2 * (inputs + outputs) + 2 * 32 * 28**2 + (3 + 8) * 28**2
    assert counts.bytes == 2 * (2 * images + 2 * 2 * weights)
    counts.bytes = 0
    counts.images.clear()
    counts.filters.clear()
    step(make("vgg-small", "bfloat16"), "vgg-small")
    assert counts.images == [3]
    # The batch of 3 channels, filled up to 8, and the weights for the inputs' gradients.
    assert counts.bytes == 2 * (2 * (3 + 8) * 28**2 + 2 * weights)


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
    assert packed == {1}, "an image in pieces was packed"


def test_a_run_goes_on_from_its_checkpoint_with_the_same_bits(tmp_path):
    whole = run_of("bfloat16", tmp_path / "whole", checkpoint_steps=4)
    with pytest.raises(MemoryError):
        run_of("bfloat16", tmp_path / "run", [Crash()], checkpoint_steps=4)
    resumed = run_of("bfloat16", tmp_path / "run", resume=True, checkpoint_steps=4)
    assert_equal(left_behind(resumed), left_behind(whole))


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
