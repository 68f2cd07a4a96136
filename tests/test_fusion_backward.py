"""Back through neighbouring layers at once: sums of branches, masks, frozen parameters, where gradients lie."""

from __future__ import annotations

import numpy
import pytest

from gpucnn import device, layers, optimizers
from gpucnn.layers import fusion
from gpucnn.layers.fusion import backward_through
from gpucnn.layers.precision import set_precision
from gpucnn.parameters import refresh_narrow_copies
from gpucnn.random import manual_seed
from gpucnn_kernels.launch import Call
from tests.accuracy import channels_last
from tests.fusion_networks import (
    activated,
    basic,
    bottleneck,
    branches,
    gradient_for,
    images,
    inverted,
    made,
    norms,
    passes,
    pooled,
    residuals,
)
from tests.kernel_accuracy import on_the_host

__all__ = ["on_the_host"]


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
