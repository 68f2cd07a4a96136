"""Layers against loops over single numbers: that each hands arguments, parameters and gradients on rightly."""

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucnn import layers
from gpucnn.errors import ShapeError
from gpucnn.random import Generator, words
from tests import problems
from tests.accuracy import awkward, channels_last, max_error
from tests.backends import BACKENDS, Placed
from tests.oracles import activations, convolution, linear, normalization, pooling
from tests.pool_problems import POOL_PROBLEMS

LAYOUTS = {"contiguous": numpy.ascontiguousarray, "channels-last": channels_last, "awkward": awkward}
TOLERANCE = 1e-12


def random_array(*shape, seed=0):
    return numpy.random.default_rng(seed).standard_normal(shape)


@BACKENDS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("problem", problems.parameters(problems.SMALL))
def test_conv2d(backend, problem, layout):
    x, weight, bias, dy = problems.arrays(problem)
    layer = layers.Conv2d(problem.C, problem.K, (problem.R, problem.S), **problems.options(problem))
    layer.to(dtype=numpy.float64)
    layer.weight.data[...], layer.bias.data[...] = weight, bias
    placed = Placed(backend, layer)
    where = problems.geometry(problem)
    assert max_error(placed(LAYOUTS[layout](x)), convolution.forward_loops(x, weight, where, bias)) <= TOLERANCE
    dx = placed.backward(LAYOUTS[layout](dy))
    assert max_error(dx, convolution.backward_data_loops(dy, weight, x.shape, where)) <= TOLERANCE
    dweight = convolution.backward_filter_loops(dy, x, weight.shape, where)
    assert max_error(placed.gradient("weight"), dweight) <= 1e-11
    assert max_error(placed.gradient("bias"), [sum(dy[:, k].ravel().tolist()) for k in range(problem.K)]) <= 1e-11


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3),
    st.integers(1, 3), st.tuples(*[st.integers(0, 2)] * 4), st.integers(1, 2),
    st.integers(4, 7), st.integers(4, 7),
)  # fmt: skip
def test_any_conv2d(n, c, k, kernel_h, kernel_w, stride, padding, groups, h, w):
    c, k = c * groups, k * groups
    layer = layers.Conv2d(c, k, (kernel_h, kernel_w), stride=stride, padding=padding, groups=groups)
    layer.to(dtype=numpy.float64)
    x = random_array(n, c, h, w)
    where = convolution.Geometry((stride, stride), padding, (1, 1), groups)
    expected = convolution.forward_loops(x, layer.weight.data, where, layer.bias.data)
    y = layer(x)
    assert max_error(y, expected) <= TOLERANCE
    dy = random_array(*y.shape, seed=1)
    dx = layer.backward(dy)
    assert max_error(dx, convolution.backward_data_loops(dy, layer.weight.data, x.shape, where)) <= TOLERANCE


@BACKENDS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_conv_transpose2d_is_the_input_gradient_of_a_convolution(backend, layout, stride, groups):
    x = random_array(2, 4, 5, 4)
    layer = layers.ConvTranspose2d(4, 6, (3, 2), stride=stride, padding=1, groups=groups)
    layer.to(dtype=numpy.float64)
    placed = Placed(backend, layer)
    y = placed(LAYOUTS[layout](x))
    where = convolution.Geometry((stride, stride), (1, 1, 1, 1), (1, 1), groups)
    expected = convolution.backward_data_loops(x, placed.value("weight"), y.shape, where)
    assert max_error(y, expected + placed.value("bias")[:, None, None]) <= TOLERANCE
    dy = random_array(*y.shape, seed=1)
    dx = placed.backward(LAYOUTS[layout](dy))
    no_bias = numpy.zeros(4)
    assert max_error(dx, convolution.forward_loops(dy, placed.value("weight"), where, no_bias)) <= TOLERANCE
    dweight = convolution.backward_filter_loops(x, dy, layer.weight.shape, where)
    assert max_error(placed.gradient("weight"), dweight) <= 1e-11


@BACKENDS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", POOL_PROBLEMS, ids=lambda case: case.name)
def test_pooling(backend, case, layout):
    x = random_array(*case.shape)
    arguments = (case.kernel, case.stride, case.padding, case.dilation, case.ceil_mode)
    placed = Placed(backend, layers.MaxPool2d(*arguments))
    y, argmax = pooling.max_pool(x, *arguments)
    assert numpy.array_equal(placed(LAYOUTS[layout](x)), y)  # minus infinity where a window steps over the image
    dy = random_array(*y.shape, seed=1)
    dx = pooling.max_pool_backward(dy, argmax, x.shape, *arguments)
    assert max_error(placed.backward(LAYOUTS[layout](dy)), dx) <= TOLERANCE
    if case.dilation != (1, 1):
        return
    for count_padding in (True, False):
        arguments = (case.kernel, case.stride, case.padding, case.ceil_mode, count_padding)
        placed = Placed(backend, layers.AvgPool2d(*arguments))
        assert max_error(placed(LAYOUTS[layout](x)), pooling.avg_pool(x, *arguments)) <= TOLERANCE
        dx = pooling.avg_pool_backward(dy, x.shape, *arguments)
        assert max_error(placed.backward(LAYOUTS[layout](dy)), dx) <= TOLERANCE


@BACKENDS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (4, 7)])
def test_adaptive_pooling(backend, size, layout):
    x = random_array(2, 3, 8, 7)
    placed = Placed(backend, layers.AdaptiveAvgPool2d(size))
    assert max_error(placed(LAYOUTS[layout](x)), pooling.adaptive_avg_pool(x, size)) <= TOLERANCE
    dy = random_array(2, 3, *size, seed=1)
    assert max_error(placed.backward(dy), pooling.adaptive_avg_pool_backward(dy, (8, 7))) <= TOLERANCE


@BACKENDS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_norm2d(backend, layout):
    x, dy = random_array(3, 4, 5, 2) * 3 + 7, random_array(3, 4, 5, 2, seed=1)
    layer = layers.BatchNorm2d(4, eps=1e-3, momentum=0.3).to(dtype=numpy.float64)
    layer.weight.data[...], layer.bias.data[...] = random_array(4, seed=2), random_array(4, seed=3)
    placed = Placed(backend, layer)
    expected, mean, _ = normalization.batch_norm(x, placed.value("weight"), placed.value("bias"), 1e-3)
    assert max_error(placed(LAYOUTS[layout](x)), expected) <= 1e-11
    dx, dweight, dbias = normalization.batch_norm_backward(dy, x, placed.value("weight"), 1e-3)
    assert max_error(placed.backward(LAYOUTS[layout](dy)), dx) <= 1e-11
    assert max_error(placed.gradient("weight"), dweight) <= 1e-11
    assert max_error(placed.gradient("bias"), dbias) <= 1e-11
    assert max_error(placed.value("running_mean"), 0.3 * numpy.asarray(mean)) <= TOLERANCE
    running = placed.value("running_mean").copy(), placed.value("running_var").copy()
    expected = normalization.batch_norm_inference(x, placed.value("weight"), placed.value("bias"), *running, 1e-3)
    assert max_error(placed.eval()(LAYOUTS[layout](x)), expected) <= 1e-11


def relu6(x):
    return min(max(x, 0.0), 6.0)


def tanh(x):
    return 2 * activations.sigmoid(2 * x) - 1


ELEMENTWISE = {
    "relu": (layers.ReLU, activations.relu, activations.relu_derivative),
    "relu6": (layers.ReLU6, relu6, lambda x: float(0 < x < 6)),
    "leaky relu": (
        lambda: layers.LeakyReLU(0.3),
        lambda x: activations.leaky_relu(x, 0.3),
        lambda x: activations.leaky_relu_derivative(x, 0.3),
    ),
    "sigmoid": (layers.Sigmoid, activations.sigmoid, activations.sigmoid_derivative),
    "tanh": (layers.Tanh, tanh, activations.tanh_derivative),
    "gelu": (layers.GELU, activations.gelu, activations.gelu_derivative),
    "gelu tanh": (lambda: layers.GELU("tanh"), activations.gelu_tanh, activations.gelu_tanh_derivative),
    "silu": (layers.SiLU, activations.silu, activations.silu_derivative),
    "identity": (layers.Identity, lambda x: x, lambda x: 1.0),
}


@BACKENDS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_activations(backend, name, layout):
    make, function, derivative = ELEMENTWISE[name]
    x, dy = random_array(2, 3, 4, 5) * 4, random_array(2, 3, 4, 5, seed=1)
    placed = Placed(backend, make())
    assert max_error(placed(LAYOUTS[layout](x)), activations.elementwise(function, x)) <= TOLERANCE
    expected = dy * activations.elementwise(derivative, x)
    assert max_error(placed.backward(LAYOUTS[layout](dy)), expected) <= TOLERANCE


@BACKENDS
@pytest.mark.parametrize("make", [layers.ReLU, layers.ReLU6])
def test_infinite_gradients_vanish_where_the_value_was_clipped(backend, make):
    placed = Placed(backend, make())
    placed(numpy.array([[-1.0, 0.0, 3.0, 5.0]], numpy.float32))
    dx = placed.backward(numpy.array([[numpy.inf, numpy.nan, -numpy.inf, 2.0]], numpy.float32))
    assert dx.dtype == numpy.float32
    assert dx.tolist() == [[0.0, 0.0, -numpy.inf, 2.0]]


@BACKENDS
def test_infinite_gradients_vanish_above_six(backend):
    placed = Placed(backend, layers.ReLU6())
    placed(numpy.array([[6.0, 9.0, numpy.inf, 5.5]]))
    assert placed.backward(numpy.array([[numpy.inf, -numpy.inf, numpy.nan, 1.0]])).tolist() == [
        [0.0, 0.0, 0.0, 1.0]
    ]


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_activations_of_any_numbers(values):
    x = numpy.array(values)[None]
    for make, function, _ in ELEMENTWISE.values():
        assert max_error(make()(x.copy()), activations.elementwise(function, x)) <= 1e-12 * max(1.0, abs(x).max())


@BACKENDS
@pytest.mark.parametrize("axis", [1, -1])
def test_softmax(backend, axis):
    x, dy = random_array(3, 4, 5), random_array(3, 4, 5, seed=1)
    placed = Placed(backend, layers.Softmax(axis))
    assert max_error(placed(x), activations.softmax(x, axis)) <= TOLERANCE
    assert max_error(placed.backward(dy), activations.softmax_backward(dy, x, axis)) <= TOLERANCE


@BACKENDS
@pytest.mark.parametrize("transposed", [False, True])
def test_linear(backend, transposed):
    x, dy = random_array(5, 7), random_array(5, 3, seed=1)
    placed = Placed(backend, layers.Linear(7, 3).to(dtype=numpy.float64))
    given_x = numpy.asfortranarray(x) if transposed else x
    assert max_error(placed(given_x), linear.forward(x, placed.value("weight"), placed.value("bias"))) <= TOLERANCE
    dx, dweight, dbias = linear.backward(dy, x, placed.value("weight"))
    assert max_error(placed.backward(dy), dx) <= TOLERANCE
    assert max_error(placed.gradient("weight"), dweight) <= TOLERANCE
    assert max_error(placed.gradient("bias"), dbias) <= TOLERANCE


@BACKENDS
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "sliced"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 3, 4), (2, 1, 3, 2), (2, 0)])
def test_linear_works_on_the_last_axis(backend, lead, frozen, layout):
    x, dy = random_array(*lead, 7), random_array(*lead, 3, seed=1)
    rows, dy_rows = x.reshape(-1, 7), dy.reshape(-1, 3)
    layer = layers.Linear(7, 3).to(dtype=numpy.float64)
    layer.weight.requires_grad = not frozen
    placed = Placed(backend, layer)
    given = x
    if layout == "channels-last" and len(lead) == 3:
        given = numpy.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    elif layout == "sliced":
        given = numpy.repeat(x, 2, axis=-1)[..., ::2]
    y = placed(given)
    assert y.shape == (*lead, 3)
    expected = linear.forward(rows, placed.value("weight"), placed.value("bias"))
    assert max_error(y.reshape(-1, 3), expected) <= TOLERANCE
    dx, dweight, dbias = linear.backward(dy_rows, rows, placed.value("weight"))
    found = placed.backward(dy)
    assert found.shape == x.shape
    assert max_error(found.reshape(-1, 7), dx) <= TOLERANCE
    assert max_error(placed.gradient("weight"), numpy.zeros_like(dweight) if frozen else dweight) <= TOLERANCE
    assert max_error(placed.gradient("bias"), dbias) <= TOLERANCE


@pytest.mark.parametrize("shape", [(4, 6), (2, 5, 6), (2, 7, 3, 6)])
def test_linear_says_what_does_not_fit_its_last_axis(shape):
    layer = layers.Linear(7, 3)
    missing = "a Flatten that is missing" if len(shape) == 4 else "another size than the network was made for"
    with pytest.raises(ShapeError, match=f"expected 7 input features, got 6 .*{missing}"):
        layer(numpy.zeros(shape, numpy.float32))
    with pytest.raises(ShapeError, match="a single number"):
        layer(numpy.zeros((), numpy.float32))
    y = layer(numpy.zeros((*shape[:-1], 7), numpy.float32))
    with pytest.raises(ShapeError, match="the gradient has shape"):
        layer.backward(y.reshape(-1))


def test_dropout_keeps_what_the_stream_says():
    x, generator = random_array(4, 6), Generator(9)
    generator.reserve(8)
    layer = layers.Dropout(0.3, generator=generator)
    y = layer(x)

    kept = [word >= 0.3 * 2**32 for word in words(9, 8, 24).tolist()]
    expected = [value / 0.7 if keep else 0.0 for value, keep in zip(x.ravel().tolist(), kept, strict=True)]
    assert max_error(y.ravel(), numpy.array(expected)) <= TOLERANCE
    dx = layer.backward(numpy.ones_like(x))
    assert max_error(dx.ravel(), numpy.array([1 / 0.7 if keep else 0.0 for keep in kept])) <= TOLERANCE
