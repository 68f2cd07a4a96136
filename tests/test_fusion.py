"""Neighbouring layers that train as one on a GPU: the bits of the layers one by one, in fewer launches."""

from __future__ import annotations

import copy
import itertools

import numpy
import pytest

from gpucnn import device, layers, losses, models, optimizers
from gpucnn.errors import ShapeError, StateError
from gpucnn.gradient_check import check_gradients
from gpucnn.layers import fusion
from gpucnn.layers.fusion import backward_through
from gpucnn.layers.precision import set_precision
from gpucnn.models.mobilenet import InvertedResidual
from gpucnn.models.resnet import BasicBlock, Bottleneck
from gpucnn.ops.memory_format import to_channels_last
from gpucnn.parameters import refresh_narrow_copies
from gpucnn.random import manual_seed
from gpucnn.training.buffers import BufferCopy
from gpucnn.training.captured_step import make_step
from gpucnn.training.random_state import RandomState
from gpucnn.training.steps import StepParts
from gpucnn_kernels.launch import Call
from gpucnn_kernels.runtime import using
from gpucnn_kernels.runtime.host_graph import HostGraph
from tests.accuracy import channels_last


@pytest.fixture(autouse=True)
def host_runtime():
    with using("host"):
        yield


@pytest.fixture
def started(monkeypatch):
    """The kernels that were started, by name."""
    found = []
    launch = Call.launch

    def launched(self, source, kernel, *rest, **more):
        found.append(kernel)
        return launch(self, source, kernel, *rest, **more)

    monkeypatch.setattr(Call, "launch", launched)
    return found


def norms():
    return layers.Sequential(
        layers.Conv2d(3, 8, 3, padding=1, bias=False),
        layers.BatchNorm2d(8),
        layers.ReLU(inplace=True),
        layers.MaxPool2d(2),
        layers.Conv2d(8, 8, 3, padding=1, bias=False),
        layers.BatchNorm2d(8),
        layers.LeakyReLU(0.2),
        layers.Flatten(),
        layers.Linear(8 * 36, 6),
        layers.BatchNorm1d(6),
        layers.ReLU(),
    )


def residuals():
    body = layers.Sequential(layers.Conv2d(3, 8, 3, padding=1), layers.BatchNorm2d(8))
    shortcut = layers.Sequential(layers.Conv2d(3, 8, 1, bias=False), layers.BatchNorm2d(8))
    straight = layers.Sequential(layers.Conv2d(8, 8, 1), layers.BatchNorm2d(8))
    return layers.Sequential(
        layers.Residual(body, shortcut, layers.ReLU()),
        layers.Residual(straight, activation=layers.LeakyReLU(0.1)),
        layers.Residual(layers.BatchNorm2d(8)),
        layers.Residual(layers.Conv2d(8, 8, 1), activation=layers.ReLU()),
    )


def basic():
    down = layers.Sequential(layers.Conv2d(3, 8, 1, stride=2, bias=False), layers.BatchNorm2d(8))
    return layers.Sequential(BasicBlock(3, 8, 2, down), BasicBlock(8, 8, 1, None))


def bottleneck():
    down = layers.Sequential(layers.Conv2d(3, 16, 1, bias=False), layers.BatchNorm2d(16))
    return layers.Sequential(Bottleneck(3, 4, 1, down), Bottleneck(16, 4, 1, None))


def inverted():
    return layers.Sequential(InvertedResidual(3, 8, 2, 2), InvertedResidual(8, 8, 1, 2))


def activated():
    return layers.Sequential(
        layers.Conv2d(3, 8, 3, padding=1),
        layers.Tanh(),
        layers.Conv2d(8, 8, 3, stride=2, bias=False),
        layers.LeakyReLU(0.3),
        layers.Conv2d(8, 40, 1, algorithm={"forward": "implicit_gemm"}),  # by name: it does not pool
        layers.Sigmoid(),
        layers.MaxPool2d(2),
        layers.Conv2d(40, 4, 1),
        layers.ReLU(inplace=True),
        layers.Conv2d(4, 4, 1),
        layers.GELU(),
        layers.Flatten(),
        layers.Linear(16, 12),
        layers.ReLU(),
        layers.Linear(12, 12),
        layers.LeakyReLU(0.1),
        layers.Linear(12, 8),
        layers.Tanh(),
        layers.Linear(8, 7),
        layers.Sigmoid(),
        layers.SiLU(),
    )


def pooled(activation=layers.ReLU):
    return layers.Sequential(
        layers.Conv2d(3, 6, 3, padding=1),
        activation(),
        layers.MaxPool2d(2),
        layers.Conv2d(6, 8, 3),
        layers.MaxPool2d(2, ceil_mode=True),
        layers.Flatten(),
    )


def rows():
    return layers.Sequential(
        layers.Conv2d(3, 8, 3, padding=1),
        layers.Linear(12, 9),
        layers.ReLU(),
        layers.Linear(9, 8),
        layers.LeakyReLU(0.1),
        layers.Linear(8, 5),
        layers.Sigmoid(),
        layers.Flatten(2),
        layers.Linear(60, 6),
        layers.Tanh(),
        layers.Flatten(),
    )


def branches():
    """Branches that begin with a convolution, inside of containers, too, and such that do not."""
    deep = layers.Sequential(
        layers.Sequential(layers.Sequential(layers.Conv2d(3, 4, 3, padding=1)), layers.ReLU()),
        layers.Conv2d(4, 5, 1),
    )
    joined = layers.Concatenate(
        layers.Sequential(layers.BatchNorm2d(3), layers.ReLU()),
        deep,
        layers.Conv2d(3, 2, 3, padding=1, bias=False),
        layers.Identity(),
        layers.Residual(layers.Conv2d(3, 3, 1)),
    )
    depthwise = layers.Sequential(
        layers.Sequential(layers.Conv2d(16, 16, 3, padding=1, groups=16), layers.ReLU()), layers.BatchNorm2d(16)
    )
    strided = layers.Sequential(layers.Conv2d(16, 8, 1, stride=2), layers.BatchNorm2d(8))
    return layers.Sequential(
        joined,
        layers.Residual(depthwise),
        layers.Residual(strided, layers.Sequential(layers.Conv2d(16, 8, 3, stride=2, padding=1)), layers.ReLU()),
        layers.Residual(layers.Identity()),
    )


NETWORKS = [rows, norms, residuals, basic, bottleneck, inverted, activated, pooled, branches]


def made(network, fused=True, precision="float32", channels_last=None):
    manual_seed(3)
    model = network().to("cuda").fuse(fused)
    set_precision(model, precision, channels_last=channels_last)
    return model.train()


def images(precision="float32", seed=0, n=5):
    x = numpy.random.default_rng(seed).standard_normal((n, 3, 12, 12)).astype("float32")
    return device.to_device(x, "cuda").astype(precision if precision != "tf32" else "float32")


def gradient_for(y, seed=1):
    dy = numpy.random.default_rng(seed).standard_normal(y.shape).astype("float32")
    return device.to_device(dy, "cuda").astype(y.dtype)


def passes(model, precision="float32", steps=2):
    """All that ``steps`` batches leave behind: results, gradients for inputs and parameters, statistics."""
    found = []
    for step in range(steps):
        y = model(images(precision, seed=step))
        found.append(y)
        found.append(model.backward(gradient_for(y)))
    found += [parameter.gradient for parameter in model.parameters()]
    found += [buffer for _, buffer in model.named_buffers()]
    return [numpy.asarray(device.to_cpu(array)).astype("float64") for array in found]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_bits_of_the_layers_one_by_one(network, channels_last, started):
    results, counts = [], []
    for fused in (True, False):
        model = made(network, fused, channels_last=channels_last)
        started.clear()
        results.append(passes(model))  # the second batch adds to gradients that are there
        counts.append(len(started))
    for ours, theirs in zip(*results, strict=True):
        if network is pooled:  # whose convolutions may add up their products in another order
            numpy.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * numpy.abs(theirs).max())
        else:
            numpy.testing.assert_array_equal(ours, theirs)
    assert counts[0] < counts[1]


@pytest.mark.parametrize("activation", [layers.ReLU, layers.LeakyReLU, layers.Sigmoid, layers.Tanh])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_convolution_its_activation_and_its_pooling(activation, channels_last, started):
    def network():
        return pooled(activation)

    for precision in ("float32", "bfloat16"):
        results = []
        for fused in (True, False):
            model = made(network, fused, precision, channels_last)
            started.clear()
            results.append(passes(model, precision, steps=1))
            names = ["conv2d_max_pool" in name for name in started]
            assert sum(names) == 2 * fused
            assert ("activation_backward" in started) is not fused
        # In 16 bits other rounded sums make some other winners, which get the gradient.
        count, far = (len(results[0]), 1e-5) if precision == "float32" else (1, 2.0**-6)
        for ours, theirs in itertools.islice(zip(*results, strict=True), count):
            assert numpy.linalg.norm(ours - theirs) <= far * numpy.linalg.norm(theirs)


def test_layers_of_a_pooled_convolution_by_hand():
    """The activation's result is stored nowhere, and made where its own backward asks for it."""
    whole, apart = made(pooled), made(pooled)
    y = whole(images())
    apart(images())
    dy = gradient_for(y)
    expected, found = whole.backward(dy), dy
    for layer in reversed(list(copy.deepcopy(apart))):
        found = layer.backward(found)
    numpy.testing.assert_array_equal(device.to_cpu(found), device.to_cpu(expected))
    activation = apart[1]
    full = gradient_for(numpy.empty((5, 6, 12, 12), "float32"))
    before = made(pooled)[0](images())
    numpy.testing.assert_array_equal(
        device.to_cpu(activation.backward(full)), numpy.where(device.to_cpu(before) > 0, device.to_cpu(full), 0)
    )
    assert apart[0]._saved is not None, "the convolution's own backward is still to come"


def test_what_does_not_pay_or_is_chosen_by_name_is_not_pooled_at_once(started):
    deep = layers.Sequential(
        layers.Conv2d(3, 96, 1), layers.Conv2d(96, 64, 3), layers.ReLU(), layers.MaxPool2d(2)
    ).to("cuda")
    deep.backward(gradient_for(deep(images())))
    assert {"max_pool_forward_planes", "max_pool_backward_planes", "activation_backward"} <= set(started)
    assert "activation_forward" not in started
    started.clear()
    named = layers.Conv2d(3, 8, 1, algorithm={"forward": "direct"})
    model = layers.Sequential(named, layers.ReLU(), layers.MaxPool2d(2)).to("cuda")
    model(images())
    assert [name.startswith("conv2d_direct") for name in started] == [True, False]
    with pytest.raises(ShapeError, match="layer '1'"):
        layers.Sequential(layers.Conv2d(3, 8, 3), layers.MaxPool2d(20)).to("cuda")(images())


@pytest.mark.parametrize("shape", [(3, 4, 5, 5), (8, 8, 20, 20), (6, 4)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_batch_norm_and_relu6(shape, channels_last, started):
    """In the kernels of one launch and of several, with numbers on both sides of 0 and of 6."""
    random, results = numpy.random.default_rng(4), []
    x, dy = (device.to_device(random.standard_normal(shape, numpy.float32), "cuda") for _ in range(2))
    if channels_last and len(shape) == 4:
        x = to_channels_last(x)
    for fused in (True, False):
        norm = layers.BatchNorm2d(shape[1]) if len(shape) == 4 else layers.BatchNorm1d(shape[1])
        norm.weight.data[...], norm.bias.data[...] = 5, 3
        model = layers.Sequential(norm, layers.ReLU6()).to("cuda").fuse(fused)
        started.clear()
        y = model(x)
        dx = model.backward(dy)
        assert any(name.startswith("activation_") for name in started) is not fused
        results.append([device.to_cpu(array) for array in (y, dx, norm.weight.gradient, norm.bias.gradient)])
    for ours, theirs in zip(*results, strict=True):
        numpy.testing.assert_array_equal(ours, theirs)
    found = results[0][0]
    assert (found == 6).any()
    assert (found == 0).any()
    assert ((found > 0) & (found < 6)).any()


def test_relu6_after_other_layers_stays_apart(started):
    for layer in (layers.Linear(12, 4), layers.Conv2d(3, 4, 1)):
        model = layers.Sequential(layer, layers.ReLU6()).to("cuda")
        started.clear()
        model.backward(gradient_for(model(images())))
        assert {"activation_forward", "activation_backward"} <= set(started)


def test_16_bits_are_rounded_less_often():
    """A sum that is stored once, after the activation, is nearer to the truth than one that is stored thrice."""
    block = layers.Residual(layers.BatchNorm2d(3), activation=layers.LeakyReLU(0.3)).to("cuda")
    narrow = images("float16")
    exact = device.to_cpu(block.fuse(False)(narrow.astype("float32")))
    errors = []
    for fused in (True, False):
        y = device.to_cpu(block.fuse(fused)(narrow)).astype("float32")
        errors.append(float(numpy.sqrt(numpy.mean((y - exact) ** 2))))
        dx = block.backward(gradient_for(narrow).astype("float16"))
        assert dx.dtype == "float16"
    assert 0 < errors[0] < errors[1]


@pytest.mark.parametrize("network", [norms, residuals, basic, pooled, activated, branches])
def test_gradients(network):
    manual_seed(3)
    model = network().to("cuda", dtype="float64").train()
    x = numpy.random.default_rng(5).standard_normal((3, 3, 12, 12))
    check_gradients(model, device.to_device(x, "cuda"))


@pytest.mark.parametrize("network", [norms, residuals, bottleneck, inverted])
def test_batch_norms_in_evaluation_have_the_bits_of_layers_one_by_one(network):
    results = []
    for fused in (True, False):
        model = made(network, fused, channels_last=True)
        model(images())  # so that statistics are others than 0 and 1
        for _, layer in list(model.named_layers())[::2]:
            if isinstance(layer, (layers.BatchNorm1d, layers.BatchNorm2d)):
                layer.eval()
        results.append(passes(model))
    for ours, theirs in zip(*results, strict=True):
        numpy.testing.assert_array_equal(ours, theirs)


# ---------------------------------------------------------------- the gradients of two branches


@pytest.fixture
def added(monkeypatch):
    """How many residuals input gradients of convolutions got, and how many sums there were beside."""
    found = {"by a convolution": 0, "apart": 0}
    gradient, add = layers.Conv2d.backward_adding, fusion.add

    def counted(self, dy, residual):
        found["by a convolution"] += 1
        return gradient(self, dy, residual)

    def counted_sum(first, second):
        found["apart"] += 1
        return add(first, second)

    monkeypatch.setattr(layers.Conv2d, "backward_adding", counted)
    monkeypatch.setattr(fusion, "add", counted_sum)
    return found


@pytest.mark.parametrize(
    ("network", "by_convolutions", "apart"),
    [(basic, 2, 0), (bottleneck, 2, 0), (inverted, 1, 0), (residuals, 3, 1), (branches, 5, 3)],
)
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_a_branch_adds_the_gradient_of_the_other(network, by_convolutions, apart, precision, added):
    """Where it begins with a convolution, and is no other layer, such as a batch norm."""
    passes(made(network, precision=precision), precision, steps=1)
    assert added == {"by a convolution": by_convolutions, "apart": apart}
    added.update(dict.fromkeys(added, 0))
    passes(made(network, False, precision), precision, steps=1)
    assert added["by a convolution"] == 0


class OwnConvolution(layers.Conv2d):
    def backward(self, dy):
        return super().backward(dy) * 2


def test_a_convolution_of_ones_own_goes_back_by_itself(added):
    def network():
        body = layers.Sequential(OwnConvolution(3, 3, 1), layers.BatchNorm2d(3))
        patched = layers.Sequential(layers.Conv2d(3, 3, 1), layers.BatchNorm2d(3))
        backward = patched[0].backward
        object.__setattr__(patched[0], "backward", lambda dy: backward(dy) * 3)
        inside = layers.Sequential(layers.Sequential(layers.Conv2d(3, 3, 1)), layers.BatchNorm2d(3))
        within = inside[0].backward
        object.__setattr__(inside[0], "backward", lambda dy: within(dy) * 4)
        return layers.Sequential(*map(layers.Residual, (body, patched, inside)))

    ours, theirs = (passes(made(network, fused)) for fused in (True, False))
    for one, other in zip(ours, theirs, strict=True):
        numpy.testing.assert_array_equal(one, other)
    assert added["by a convolution"] == 0


def test_a_sum_of_gradients_in_16_bits_is_rounded_once():
    manual_seed(0)
    body = layers.Sequential(layers.Conv2d(3, 3, 1, bias=False), layers.Identity())
    block = layers.Residual(body).to("cuda")
    weight = block.body[0].weight
    weight.data[...] = weight.data.astype("float16")  # so that narrow copies are exact
    x = images("float16")
    dy = gradient_for(x)
    block(x.astype("float32"))
    exact = device.to_cpu(block.backward(dy.astype("float32")))
    set_precision(block, "float16")
    errors = []
    for fused in (True, False):
        block.fuse(fused)(x)
        dx = device.to_cpu(block.backward(dy)).astype("float32")
        errors.append(float(numpy.sqrt(numpy.mean((dx - exact) ** 2))))
    assert 0 < errors[0] < errors[1]


def test_a_gradient_of_another_dtype_is_added_apart(added):
    block = layers.Residual(layers.Sequential(layers.Conv2d(3, 3, 1), layers.Identity())).to("cuda")
    x = images()
    block(x)
    dx = block.backward(gradient_for(x))
    block(x)
    other = backward_through(block, block.body.steps(), gradient_for(x), gradient_for(x).astype("float64"))
    assert added["by a convolution"] == 1
    assert other.dtype == "float32"
    numpy.testing.assert_array_equal(device.to_cpu(other), device.to_cpu(dx))


def test_a_frozen_input_is_told_as_before():
    block = layers.Residual(layers.Sequential(layers.Conv2d(3, 3, 1), layers.Identity())).to("cuda")
    block.body[0].skip_input_gradient()
    block(images())
    with pytest.raises(TypeError):
        block.backward(gradient_for(images()))


def test_backward_by_hand():
    """Each layer has saved what its own backward needs, whoever calls it."""
    whole, apart = made(norms), made(norms)
    y = whole(images())
    apart(images())
    dy = gradient_for(y)
    expected, found = whole.backward(dy), dy
    for layer in reversed(list(apart)):
        found = layer.backward(found)
    numpy.testing.assert_array_equal(device.to_cpu(found), device.to_cpu(expected))
    with pytest.raises(StateError, match="backward needs a forward before it"):
        whole.backward(dy)


def test_backward_after_layers_called_by_hand():
    whole, apart = made(norms), made(norms)
    y = x = images()
    for layer in apart:
        x = layer(x)
    y = whole(y)
    numpy.testing.assert_array_equal(device.to_cpu(x), device.to_cpu(y))
    dy = gradient_for(y)
    numpy.testing.assert_array_equal(device.to_cpu(apart.backward(dy)), device.to_cpu(whole.backward(dy)))


def test_a_copy_between_forward_and_backward():
    model = made(norms)
    y = model(images())
    twin = copy.deepcopy(model)
    dy = gradient_for(y)
    numpy.testing.assert_array_equal(device.to_cpu(twin.backward(dy)), device.to_cpu(model.backward(dy)))


def wide_norms():
    """Batch norms of so many numbers a channel that their passes are apart, of whole pieces of 16 bytes."""
    return layers.Sequential(
        layers.BatchNorm2d(4),
        layers.ReLU(),
        layers.Residual(layers.BatchNorm2d(4), activation=layers.LeakyReLU(0.1)),
        layers.Residual(layers.BatchNorm2d(4)),
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_backward_reads_a_mask_and_not_the_results_of_activations(layout, monkeypatch):
    read = []
    launch = Call.launch

    def launched(self, source, kernel, *rest, **more):
        if "backward_sums" in kernel:
            read.append((more["y"] is not None, more["mask"] is not None))
        return launch(self, source, kernel, *rest, **more)

    monkeypatch.setattr(Call, "launch", launched)
    whole, apart = made(wide_norms), made(wide_norms, fused=False)
    x = numpy.random.default_rng(5).standard_normal((40, 4, 16, 16)).astype("float32")
    x = device.to_device(channels_last(x) if layout == "channels_last" else x, "cuda")
    y = whole(x)
    numpy.testing.assert_array_equal(device.to_cpu(y), device.to_cpu(apart(x)))
    dy = gradient_for(y)
    numpy.testing.assert_array_equal(device.to_cpu(whole.backward(dy)), device.to_cpu(apart.backward(dy)))
    for ours, theirs in zip(whole.parameters(), apart.parameters(), strict=True):
        numpy.testing.assert_array_equal(device.to_cpu(ours.gradient), device.to_cpu(theirs.gradient))
    # The last of them has no activation; those apart have theirs elsewhere.
    assert read == [(False, False), (False, True), (False, True), *[(False, False)] * 3]


class OwnReLU(layers.ReLU):
    pass


class OwnReLU6(layers.ReLU6):
    pass


class OwnNorm(layers.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


def recorded(layer, found):
    forward = layer.forward
    object.__setattr__(layer, "forward", lambda x: found.append(forward(x)) or found[-1])


@pytest.mark.parametrize(
    "activation",
    [OwnReLU(), layers.GELU(), layers.SiLU(), layers.LeakyReLU(0.0), layers.LeakyReLU(-0.5), OwnReLU6()],
    ids=lambda layer: repr(layer),
)
def test_other_activations_stay_apart(activation, started):
    model = layers.Sequential(layers.BatchNorm2d(3), copy.deepcopy(activation)).to("cuda")
    y = model(images())
    assert started.count("activation_forward") == 1
    model.backward(gradient_for(y))
    assert "batch_norm_backward_whole" in started


def test_other_norms_stay_apart(started):
    model = layers.Sequential(OwnNorm(3), layers.ReLU()).to("cuda")
    model(images())
    assert started == ["batch_norm_whole", "activation_forward"]


def test_a_forward_that_was_put_in_place_is_called():
    for index in (0, 1):
        model, found = layers.Sequential(layers.BatchNorm2d(3), layers.ReLU()).to("cuda"), []
        recorded(model[index], found)
        y = model(images())
        assert len(found) == 1
        model.backward(gradient_for(y))


def test_a_class_that_was_changed_is_called(monkeypatch):
    found, forward = [], layers.BatchNorm2d.forward
    monkeypatch.setattr(layers.BatchNorm2d, "forward", lambda self, x: found.append(x) or forward(self, x))
    layers.Sequential(layers.BatchNorm2d(3), layers.ReLU()).to("cuda")(images())
    assert len(found) == 1


def test_evaluation_and_frozen_statistics(started):
    model = made(norms).eval()
    y = model(images())
    assert started.count("activation_forward") == 3
    assert all(layer._saved is None for _, layer in model.named_layers())
    numpy.testing.assert_array_equal(device.to_cpu(y), device.to_cpu(made(norms, False).eval()(images())))
    results = []
    for fused in (True, False):
        model = made(norms, fused)
        model[1].eval()  # its statistics are those of training
        results.append(device.to_cpu(model(images())))
    numpy.testing.assert_array_equal(*results)


def test_frozen_parameters():
    results = []
    for fused in (True, False):
        model = made(norms, fused)
        model[1].weight.requires_grad = False
        model[5].requires_grad_(False)
        model.skip_input_gradient()
        y = model(images())
        assert model.backward(gradient_for(y)) is None
        results.append([device.to_cpu(parameter.gradient) for parameter in model.parameters()])
        assert not numpy.any(device.to_cpu(model[1].weight.gradient))
        assert numpy.any(device.to_cpu(model[1].bias.gradient))
    for ours, theirs in zip(*results, strict=True):
        numpy.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_frozen_parameter_of_a_layer_with_an_activation(name):
    results = []
    for fused in (True, False):
        model = made(activated, fused)
        for layer in model:
            if isinstance(layer, (layers.Conv2d, layers.Linear)) and getattr(layer, name) is not None:
                getattr(layer, name).requires_grad = False
        results.append(passes(model, steps=1))
    for ours, theirs in zip(*results, strict=True):
        numpy.testing.assert_array_equal(ours, theirs)


def test_parameters_of_a_flat_buffer_get_their_gradients_where_they_lie():
    """A first gradient is computed there, and no pass copies it."""
    model = made(norms)
    optimizer = optimizers.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    places = [parameter._gradient for parameter in model.parameters()]
    y = model(images())
    model.backward(gradient_for(y))
    assert all(p.gradient is place for p, place in zip(model.parameters(), places, strict=True))
    plain = made(norms, False)
    plain(images())
    plain.backward(gradient_for(y))
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        numpy.testing.assert_array_equal(device.to_cpu(ours.gradient), device.to_cpu(theirs.gradient))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_gradients_of_weights_in_16_bits_are_not_rounded(precision):
    """Sums are float32, as the gradients are, and nothing between them has 16 bits."""
    model = made(pooled, precision=precision)
    optimizers.SGD(model.parameters(), lr=0.1).zero_grad()
    refresh_narrow_copies(model.parameters(), precision)
    y = model(images(precision))
    model.backward(gradient_for(y))
    for parameter in model.parameters():
        gradient = device.to_cpu(parameter.gradient)
        assert gradient.dtype == "float32"
        rounded = device.to_cpu(parameter.gradient.astype(precision)).astype("float32")
        assert numpy.mean(rounded != gradient) > 0.5
    before = [device.to_cpu(parameter.gradient).copy() for parameter in model.parameters()]
    model(images(precision))
    model.backward(gradient_for(y))  # added to those that are there
    for parameter, once in zip(model.parameters(), before, strict=True):
        twice = device.to_cpu(parameter.gradient)
        assert numpy.abs(twice - 2 * once).max() <= 2.0**-7 * numpy.abs(once).max()


def test_errors_name_the_layer():
    model = layers.Sequential(layers.Identity(), layers.BatchNorm2d(4), layers.ReLU()).to("cuda")
    with pytest.raises(ShapeError, match=r"layer '1' .*expected 4 channels, got 3"):
        model(images())
    block = layers.Residual(layers.BatchNorm2d(3), layers.MaxPool2d(2)).to("cuda")
    with pytest.raises(ShapeError, match="the body gives shape"):
        block(images())
    model = made(norms)
    y = model(images())
    with pytest.raises(ShapeError, match="the gradient has shape"):
        model.backward(y[:2])


def test_the_cpu_goes_layer_by_layer(monkeypatch):
    def refuse(*given, **more):
        raise AssertionError("fused")

    monkeypatch.setattr(layers.BatchNorm2d, "forward_ending", refuse)
    model, twin = norms().train(), norms().train()
    twin.load_state_dict(model.state_dict())
    x = numpy.random.default_rng(3).standard_normal((2, 3, 12, 12)).astype("float32")
    y, expected = model(x), x
    for layer in twin:
        expected = layer(expected)
    assert numpy.array_equal(y, expected)
    dx, expected = model.backward(numpy.ones_like(y)), numpy.ones_like(y)
    for layer in reversed(list(twin)):
        expected = layer.backward(expected)
    assert numpy.array_equal(dx, expected)


def test_the_switch_reaches_every_container_and_is_part_of_a_copy():
    model = made(basic, fused=False)
    assert not any(layer.fuses_children for _, layer in copy.deepcopy(model).named_layers())
    assert model.fuse() is model
    assert all(layer.fuses_children for _, layer in model.named_layers())


# ---------------------------------------------------------------- the graph of a step


def nodes(name, channels, size, n, precision, monkeypatch, **options):
    """How many nodes the graph of a training step has."""
    found = []
    launch = HostGraph.launch
    monkeypatch.setattr(HostGraph, "launch", lambda graph: found.append(len(graph)) or launch(graph))
    model = models.create(name, num_classes=4, in_channels=channels, image_size=size, **options).to("cuda")
    model.compute_in(precision).train()
    model.skip_input_gradient()
    loss = losses.CrossEntropyLoss(ignore_index=None)
    loss.check_targets = False
    optimizer = optimizers.SGD(model.parameters(), lr=0.01, momentum=0.9)
    parts = StepParts(model, loss, optimizer, BufferCopy(model), RandomState(model), None, None, None)
    step = make_step(parts, "on", n, lambda line: None)
    x = numpy.random.default_rng(0).standard_normal((n, channels, size, size), numpy.float32)
    labels = device.to_device(numpy.arange(n) % 4, "cuda")
    for number in (1, 2):
        step.take(device.to_device(x, "cuda"), labels, number)
    return found[-1]


@pytest.mark.parametrize(
    ("name", "channels", "size", "n", "precision", "options", "most"),
    [
        ("lenet5", 1, 28, 8, "float32", {}, 20),
        ("animalnet", 3, 63, 4, "float32", {}, 34),
        ("vgg-small", 1, 16, 4, "float32", {"width": 16}, 55),
        ("resnet18", 3, 8, 2, "float32", {"width": 8, "stem": "small"}, 138),
    ],
)
def test_a_step_has_no_more_nodes_than(name, channels, size, n, precision, options, most, monkeypatch):
    """Each waits for the one before it: of a small network they are most of the time. Fewer are welcome."""
    assert nodes(name, channels, size, n, precision, monkeypatch, **options) <= most
