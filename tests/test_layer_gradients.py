"""Every layer's backward against central differences in float64, contiguous and not; and the check itself."""

import numpy
import pytest

from gpucnn import layers
from gpucnn.gradient_check import check_gradients, directional_errors
from gpucnn.random import Generator
from tests.backends import BACKENDS, CPU, CUDA


def dropout(kind):
    generator = Generator(3)
    layer = kind(0.4, generator=generator)
    return layer, (lambda: generator.manual_seed(3))


IMAGE_LAYERS = {
    "conv": lambda: layers.Conv2d(4, 6, 3),
    "conv strided padded": lambda: layers.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0)),
    "conv same even": lambda: layers.Conv2d(4, 3, (4, 2), padding="same"),
    "conv asymmetric": lambda: layers.Conv2d(4, 3, 3, stride=2, padding=(0, 2, 1, 0)),
    "conv dilated": lambda: layers.Conv2d(4, 3, 3, dilation=(2, 1)),
    "conv grouped": lambda: layers.Conv2d(4, 6, 3, groups=2, bias=False),
    "conv depthwise": lambda: layers.Conv2d(4, 8, 3, padding=1, groups=4),
    "conv 1x1": lambda: layers.Conv2d(4, 5, 1),
    "transposed": lambda: layers.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
    "transposed dilated": lambda: layers.ConvTranspose2d(4, 3, (2, 3), dilation=2, bias=False),
    "max pool": lambda: layers.MaxPool2d(2),
    "max pool overlapping": lambda: layers.MaxPool2d(3, stride=2, padding=1),
    "max pool dilated ceil": lambda: layers.MaxPool2d(2, stride=2, dilation=2, ceil_mode=True),
    "average pool": lambda: layers.AvgPool2d(3, stride=2, padding=1, ceil_mode=True),
    "average pool without padding in the count": lambda: layers.AvgPool2d(
        2, stride=1, padding=1, count_include_pad=False
    ),
    "adaptive pool": lambda: layers.AdaptiveAvgPool2d((3, 2)),
    "global pool": lambda: layers.AdaptiveAvgPool2d(1),
    "batch norm": lambda: layers.BatchNorm2d(4),
    "batch norm plain": lambda: layers.BatchNorm2d(4, affine=False, track_running_stats=False),
    "relu": layers.ReLU,
    "relu in place": lambda: layers.ReLU(inplace=True),
    "relu6": layers.ReLU6,
    "leaky relu": lambda: layers.LeakyReLU(0.2),
    "sigmoid": layers.Sigmoid,
    "tanh": layers.Tanh,
    "gelu": layers.GELU,
    "gelu tanh": lambda: layers.GELU("tanh"),
    "silu": layers.SiLU,
    "softmax": lambda: layers.Softmax(1),
    "flatten": layers.Flatten,
    "identity": layers.Identity,
    "sequential": lambda: layers.Sequential(layers.Conv2d(4, 3, 3), layers.Tanh(), layers.Conv2d(3, 2, 2)),
    "residual": lambda: layers.Residual(layers.Conv2d(4, 4, 3, padding=1)),
    "residual with shortcut and activation": lambda: layers.Residual(
        layers.Conv2d(4, 6, 3, stride=2, padding=1), layers.Conv2d(4, 6, 1, stride=2), layers.Sigmoid()
    ),
    "branches": lambda: layers.Concatenate(layers.Conv2d(4, 3, 1), layers.Identity(), layers.Tanh()),
}

OTHER_ALGORITHMS = [
    (CPU, {"backward_data": "dilated", "backward_filter": "tensordot"}),
    (CPU, {"backward_data": "scatter"}),
    (CUDA, {"backward_data": "dilated", "backward_filter": "im2col"}),
    (CUDA, {"forward": "im2col", "backward_data": "scatter"}),
    (CUDA, {"forward": "implicit_gemm", "backward_data": "col2im"}),
]


def image_input(layout):
    random = numpy.random.default_rng(7)
    x = random.standard_normal((3, 4, 8, 7)) * 2.5
    if layout == "channels-last":
        return numpy.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    if layout == "sliced":
        wide = numpy.zeros((3, 8, 8, 14))
        wide[:, ::2, :, ::2] = x
        return wide[:, ::2, :, ::2]
    return x


def check_on(backend, layer, x, **options):
    with backend.running():
        check_gradients(layer.to(backend.device), backend.asarray(x), tolerance=2e-7, **options)


@BACKENDS
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "sliced"])
@pytest.mark.parametrize("name", IMAGE_LAYERS)
def test_image_layers(backend, name, layout):
    check_on(backend, IMAGE_LAYERS[name](), image_input(layout))


@pytest.mark.parametrize(("backend", "names"), OTHER_ALGORITHMS)
def test_convolution_by_other_algorithms(backend, names):
    check_on(backend, layers.Conv2d(4, 3, 3, stride=2, algorithm=names), image_input("contiguous"))


@BACKENDS
@pytest.mark.parametrize("make", [lambda: layers.Linear(6, 4), lambda: layers.Linear(6, 4, bias=False),
                                  lambda: layers.BatchNorm1d(6), layers.Softmax])  # fmt: skip
@pytest.mark.parametrize("transposed", [False, True])
def test_feature_layers(backend, make, transposed):
    x = numpy.random.default_rng(1).standard_normal((6, 5) if transposed else (5, 6))
    check_on(backend, make(), x.T if transposed else x)


@BACKENDS
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "sliced"])
def test_a_linear_layer_on_the_last_of_four_axes(backend, layout):
    check_on(
        backend, layers.Sequential(layers.Linear(7, 5), layers.Tanh(), layers.Linear(5, 2)), image_input(layout)
    )


@BACKENDS
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "sliced"])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norms_whose_statistics_stay(backend, layout, affine):
    model = layers.Sequential(
        layers.BatchNorm2d(4, affine=affine),
        layers.Tanh(),
        layers.Flatten(),
        layers.BatchNorm1d(224),
        layers.Tanh(),
    )
    random = numpy.random.default_rng(3)
    for norm in (model[0], model[3]):
        norm.running_mean[...] = random.standard_normal(norm.num_features)
        norm.running_var[...] = random.uniform(0.3, 3, norm.num_features)
        norm.eval()
    check_on(backend, model, image_input(layout))


@BACKENDS
@pytest.mark.parametrize("kind", [layers.Dropout, layers.Dropout2d])
def test_dropout(backend, kind):
    layer, rewind = dropout(kind)
    check_on(backend, layer, image_input("contiguous"), before_forward=rewind)


def test_gradients_add_up_over_batches():
    layer = layers.Conv2d(4, 3, 3)
    x = image_input("contiguous").astype(numpy.float32)
    y = layer(x)
    layer.backward(numpy.ones_like(y))
    once = layer.weight.gradient.copy()
    layer(x)
    layer.backward(numpy.ones_like(y))
    assert numpy.abs(layer.weight.gradient - 2 * once).max() <= 1e-5 * numpy.abs(once).max()


class WrongScale(layers.Tanh):
    def backward(self, dy):
        return super().backward(dy) * 1.001


class WrongWeight(layers.Linear):
    def backward(self, dy):
        dx = super().backward(dy)
        self.weight.gradient[0, 0] += 1
        return dx


@pytest.mark.parametrize("layer", [WrongScale(), layers.Sequential(layers.Tanh(), WrongWeight(6, 2))])
def test_the_check_catches_a_wrong_backward(layer):
    x = numpy.random.default_rng(2).standard_normal((4, 6))
    assert max(directional_errors(layer, x)) > 1e-4
    with pytest.raises(AssertionError, match="disagrees with central differences"):
        check_gradients(layer, x)


def test_the_check_fails_on_nan():
    class Broken(layers.Identity):
        def backward(self, dy):
            return dy * numpy.nan

    with pytest.raises(AssertionError, match="disagrees"):
        check_gradients(Broken(), numpy.ones((2, 2)))


def test_the_check_leaves_the_parameters_as_they_were():
    layer = layers.Linear(6, 4)
    before = layer.weight.data.astype(numpy.float64)
    check_gradients(layer, numpy.ones((2, 6)))
    assert numpy.array_equal(layer.weight.data, before)
