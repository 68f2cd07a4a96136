"""Layers that stay themselves beside neighbours that train as one: derived, patched, called by hand, copied."""

from __future__ import annotations

import copy

import numpy
import pytest

from gpucnn import device, layers
from gpucnn.errors import ShapeError, StateError
from tests.fusion_networks import basic, gradient_for, images, made, norms, pooled, started
from tests.kernel_accuracy import on_the_host

__all__ = ["on_the_host", "started"]


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


def test_relu6_after_other_layers_stays_apart(started):
    for layer in (layers.Linear(12, 4), layers.Conv2d(3, 4, 1)):
        model = layers.Sequential(layer, layers.ReLU6()).to("cuda")
        started.clear()
        model.backward(gradient_for(model(images())))
        assert {"activation_forward", "activation_backward"} <= set(started)


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
