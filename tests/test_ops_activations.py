"""Activations against Python's math, at ordinary, extreme and non-finite inputs, in place and in any layout."""

import math

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucnn.errors import ArgumentError, DtypeError, ShapeError
from gpucnn.ops.cpu.error_function import erfc
from tests.accuracy import awkward, channels_last, error_bound, max_error
from tests.backends import BACKENDS, CPU
from tests.oracles import activations as oracle

# name: (oracle, derivative, does the backward pass take y (True) or x, keywords, limits at -inf and inf)
FUNCTIONS = {
    "relu": (oracle.relu, oracle.relu_derivative, True, {}, (0, math.inf)),
    "relu6": (oracle.relu6, oracle.relu6_derivative, True, {}, (0, 6)),
    "leaky_relu": (oracle.leaky_relu, oracle.leaky_relu_derivative, False, {}, (-math.inf, math.inf)),
    "sigmoid": (oracle.sigmoid, oracle.sigmoid_derivative, True, {}, (0, 1)),
    "tanh": (math.tanh, oracle.tanh_derivative, True, {}, (-1, 1)),
    "silu": (oracle.silu, oracle.silu_derivative, False, {}, (0, math.inf)),
    "gelu": (oracle.gelu, oracle.gelu_derivative, False, {}, (0, math.inf)),
    "gelu_tanh": (oracle.gelu_tanh, oracle.gelu_tanh_derivative, False, {"approximate": "tanh"}, (0, math.inf)),
}
NAMES = pytest.mark.parametrize("name", FUNCTIONS)
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])


def operations(backend, name):
    keywords = FUNCTIONS[name][3]
    base = name.removesuffix("_tanh") if name != "tanh" else name
    forward, backward = getattr(backend, f"{base}_forward"), getattr(backend, f"{base}_backward")

    def run(x, **options):
        return forward(x, **keywords, **options)

    def run_back(dy, saved, **options):
        return backward(dy, saved, **keywords, **options)

    return run, run_back


def inputs(dtype, shape=(2, 3, 4, 25), seed=0):
    random = numpy.random.default_rng(seed)
    x = 4 * random.standard_normal(shape)
    x.flat[:9] = 0, -0.0, 1, -1, 30, -30, 1e-8, -1e-8, 0.46875
    return x.astype(dtype), random.standard_normal(shape).astype(dtype)


def rounding_bound(name, x, expected):
    """Four roundings of the value and four of the input, the latter seen through the derivative."""
    derivative = oracle.elementwise(FUNCTIONS[name][1], x)
    eps = float(numpy.finfo(x.dtype).eps)
    return 4 * eps * (abs(expected) + abs(x.astype("f8") * derivative)) + eps * eps


@BACKENDS
@NAMES
@DTYPES
def test_forward(backend, name, dtype):
    x, _ = inputs(dtype)
    expected = oracle.elementwise(FUNCTIONS[name][0], x)
    forward, _ = operations(backend, name)
    for layout in (numpy.ascontiguousarray, awkward, channels_last):
        y = forward(layout(x))
        assert y.dtype == x.dtype
        assert numpy.all(abs(y - expected) <= rounding_bound(name, x, expected))


@BACKENDS
@NAMES
@DTYPES
def test_backward(backend, name, dtype):
    x, dy = inputs(dtype, seed=1)
    derivative = oracle.elementwise(FUNCTIONS[name][1], x)
    forward, backward = operations(backend, name)
    y = forward(x)
    for layout in (numpy.ascontiguousarray, awkward, channels_last):
        dx = backward(layout(dy), layout(y if FUNCTIONS[name][2] else x))
        assert dx.dtype == x.dtype
        assert numpy.all(abs(dx - dy * derivative) <= 8 * numpy.finfo(dtype).eps * numpy.maximum(abs(dy), 1e-30))


@BACKENDS
@NAMES
@DTYPES
def test_the_input_may_be_overwritten(backend, name, dtype):
    x, dy = inputs(dtype, seed=2)
    forward, backward = operations(backend, name)
    y = forward(x)
    for layout in (numpy.array, awkward):
        same = layout(x)
        assert forward(same, out=same) is same
        numpy.testing.assert_array_equal(same, y)
    saved = y if FUNCTIONS[name][2] else x
    dx = backward(dy, saved)
    for layout in (numpy.array, awkward):
        gradient, kept = layout(dy), layout(saved)
        assert backward(gradient, kept, out=gradient) is gradient
        numpy.testing.assert_array_equal(gradient, dx)
        assert backward(dy, kept, out=kept) is kept
        numpy.testing.assert_array_equal(kept, dx)


@BACKENDS
@NAMES
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_extreme_inputs(backend, name, dtype):
    largest = float(numpy.finfo(dtype).max)
    x = numpy.array([-numpy.inf, -largest, -1e4, 1e4, largest, numpy.inf, numpy.nan], dtype)
    forward, backward = operations(backend, name)
    low, high = FUNCTIONS[name][4]
    y = forward(x)
    assert y[0] == low
    assert y[5] == high
    assert numpy.isnan(y[6])
    assert not numpy.isnan(y[:6]).any()
    slope = {"leaky_relu": 0.01}.get(name, 0.0)
    top = {"sigmoid": 0.0, "tanh": 0.0, "relu6": 0.0}.get(name, 1.0)
    dx = backward(numpy.ones_like(x), y if FUNCTIONS[name][2] else x)
    assert numpy.all(abs(dx[:3] - slope) <= 1e-5)
    assert numpy.all(abs(dx[3:6] - top) <= 1e-5)


@BACKENDS
@NAMES
def test_half_precision(backend, name):
    x, dy = inputs("float16", seed=3)
    forward, backward = operations(backend, name)
    y = forward(x)
    expected = oracle.elementwise(FUNCTIONS[name][0], x)
    assert y.dtype == numpy.float16
    assert numpy.all(abs(y - expected) <= 1e-3 * abs(expected) + 1e-7)
    dx = backward(dy, y if FUNCTIONS[name][2] else x)
    assert dx.dtype == numpy.float16


@BACKENDS
@NAMES
def test_empty_arrays(backend, name):
    forward, backward = operations(backend, name)
    empty = numpy.zeros((0, 3, 2, 2), numpy.float32)
    assert forward(empty).shape == empty.shape
    assert backward(empty, empty).shape == empty.shape


@NAMES
def test_many_blocks_and_threads(monkeypatch, name):
    x, dy = inputs("float32", (3, 5, 100, 101), 4)
    forward, backward = operations(CPU, name)
    monkeypatch.setenv("GPUCNN_NUM_THREADS", "3")
    y = forward(x)
    dx = backward(dy, y if FUNCTIONS[name][2] else x)
    for n in range(3):
        row = forward(x[n].copy())
        numpy.testing.assert_array_equal(y[n], row)
        numpy.testing.assert_array_equal(dx[n], backward(dy[n].copy(), row if FUNCTIONS[name][2] else x[n].copy()))


@BACKENDS
@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0, 2.5, -0.5])
@DTYPES
def test_leaky_relu_slopes(backend, slope, dtype):
    x, dy = inputs(dtype, seed=5)
    y = backend.leaky_relu_forward(x, negative_slope=slope)
    dx = backend.leaky_relu_backward(dy, x, negative_slope=slope)
    eps = numpy.finfo(dtype).eps
    expected = oracle.elementwise(lambda value: oracle.leaky_relu(value, slope), x)
    derivative = oracle.elementwise(lambda value: oracle.leaky_relu_derivative(value, slope), x)
    assert numpy.all(abs(y - expected) <= 2 * eps * abs(expected))
    assert numpy.all(abs(dx - dy * derivative) <= 2 * eps * abs(dy * derivative))
    limits = backend.leaky_relu_forward(numpy.array([-numpy.inf, numpy.inf, numpy.nan]), negative_slope=slope)
    assert limits[1] == numpy.inf
    assert numpy.isnan(limits[2])


@BACKENDS
def test_relu_backward_drops_infinities_where_the_output_is_zero(backend):
    dy = numpy.array([numpy.inf, -numpy.inf, numpy.nan, numpy.inf, 2], numpy.float32)
    y = numpy.array([0, 0, 0, 1, 3], numpy.float32)
    numpy.testing.assert_array_equal(backend.relu_backward(dy, y), [0, 0, 0, numpy.inf, 2])


@settings(max_examples=200, deadline=None)
@given(st.floats(-40, 40))
def test_erfc_to_a_few_units_in_the_last_place(value):
    expected = math.erfc(value)
    assert abs(float(erfc(numpy.array([value]))[0]) - expected) <= 8 * math.ulp(expected)


def test_erfc_over_its_three_ranges():
    x = numpy.concatenate([numpy.linspace(-6, 27, 20001), [-numpy.inf, numpy.inf, numpy.nan, 0.46875, 4, -4]])
    expected = oracle.elementwise(math.erfc, x)
    ulp = numpy.spacing(abs(expected))
    finite = ~numpy.isnan(expected)
    assert numpy.all(abs(erfc(x) - expected)[finite] <= 8 * ulp[finite])
    assert numpy.isnan(erfc(x)[~finite]).all()


@BACKENDS
@pytest.mark.parametrize("approximate", ["erf", "None"])
def test_unknown_gelu(backend, approximate):
    with pytest.raises(ArgumentError, match="approximate must be one of 'none', 'tanh'"):
        backend.gelu_forward(numpy.zeros(3), approximate=approximate)
    with pytest.raises(ArgumentError, match="approximate must be one of 'none', 'tanh'"):
        backend.gelu_backward(numpy.zeros(3), numpy.zeros(3), approximate=approximate)


# ---------------------------------------------------------------- softmax


@BACKENDS
@pytest.mark.parametrize("axis", [-1, 0, 1])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_softmax(backend, axis, dtype):
    random = numpy.random.default_rng(6)
    x = (3 * random.standard_normal((4, 7, 5))).astype(dtype)
    dy = random.standard_normal(x.shape).astype(dtype)
    expected = oracle.softmax(x, axis)
    wide = "float32" if dtype == "float16" else dtype
    power = numpy.exp(x.astype(wide) - x.astype(wide).max(axis, keepdims=True))
    plain = (power / power.sum(axis, keepdims=True)).astype(dtype)
    for layout in (numpy.ascontiguousarray, awkward):
        y = backend.softmax_forward(layout(x), axis=axis)
        assert y.dtype == x.dtype
        assert max_error(y, expected) <= error_bound(plain, expected)
        dx = backend.softmax_backward(layout(dy), layout(y), axis=axis)
        wanted = oracle.softmax_backward(dy.astype("f8"), x, axis)
        simple = y * (dy - (dy * y).sum(axis, keepdims=True))
        assert dx.dtype == x.dtype
        assert max_error(dx, wanted) <= error_bound(simple, wanted, scale=abs(dy).max())
    same, gradient = x.copy(), dy.copy()
    assert backend.softmax_forward(same, axis=axis, out=same) is same
    numpy.testing.assert_array_equal(same, backend.softmax_forward(x, axis=axis))
    numpy.testing.assert_array_equal(
        backend.softmax_backward(gradient, same, axis=axis, out=gradient),
        backend.softmax_backward(dy, same, axis=axis),
    )


@BACKENDS
def test_softmax_of_extreme_rows(backend):
    x = numpy.array([[1e30, -1e30, 1e30], [-numpy.inf, 0, 0], [-numpy.inf] * 3, [numpy.nan, 0, 0]], numpy.float32)
    y = backend.softmax_forward(x)
    numpy.testing.assert_array_equal(y[:2], [[0.5, 0, 0.5], [0, 0.5, 0.5]])
    assert numpy.isnan(y[2:]).all()
    assert backend.softmax_forward(numpy.zeros((0, 4))).shape == (0, 4)


# ---------------------------------------------------------------- errors


@BACKENDS
def test_errors(backend):
    with pytest.raises(DtypeError, match=r"floating-point numbers, got dtype int64.*astype"):
        backend.relu_forward(numpy.arange(3))
    with pytest.raises(DtypeError, match=r"must be a numpy\.ndarray .*got list"):
        backend.sigmoid_forward([1.0])
    with pytest.raises(DtypeError, match="floating-point"):
        backend.tanh_backward(numpy.zeros(3), numpy.zeros(3, int))
    with pytest.raises(ShapeError, match=r"output gradient must have shape \(4,\), got \(3,\)"):
        backend.relu_backward(numpy.zeros(3), numpy.zeros(4))
    with pytest.raises(ShapeError, match="out must have the result's shape"):
        backend.relu_forward(numpy.zeros(3), out=numpy.zeros(4))
    with pytest.raises(DtypeError, match="out must have the result's dtype"):
        backend.silu_forward(numpy.zeros(3), out=numpy.zeros(3, numpy.float32))
    with pytest.raises(ArgumentError, match="softmax over axis 2 of an array with 2 axes"):
        backend.softmax_forward(numpy.zeros((3, 4)), axis=2)
    with pytest.raises(ShapeError, match="output gradient"):
        backend.softmax_backward(numpy.zeros((3, 4)), numpy.zeros((3, 5)))
