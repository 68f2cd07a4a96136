"""Neighbouring layers that train as one on a GPU: the bits of the layers one by one, in fewer launches."""

from __future__ import annotations

import itertools

import numpy
import pytest

from gpucnn import device, layers
from gpucnn.gradient_check import check_gradients
from gpucnn.ops.memory_format import to_channels_last
from gpucnn.random import manual_seed
from tests.fusion_networks import (
    NETWORKS,
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
    started,
)
from tests.kernel_accuracy import on_the_host

__all__ = ["on_the_host", "started"]


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
