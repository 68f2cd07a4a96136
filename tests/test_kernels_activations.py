"""The activation kernels on the host runtime: ordinary and extreme inputs, in place, in any dense layout."""

import math

import numpy
import pytest

import gpucnn_kernels as kernels
from gpucnn_kernels import ArgumentError, DtypeError, LayoutError, launch
from gpucnn_kernels.runtime.host import order_independent
from tests.accuracy import awkward, channels_last
from tests.kernel_accuracy import DTYPES, EVERY_DTYPE, epsilon, normal, on_the_host, placed, wide
from tests.oracles import activations as oracle

__all__ = ["on_the_host"]

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


def operations(name):
    keywords = FUNCTIONS[name][3]
    base = "gelu" if name == "gelu_tanh" else name
    forward, backward = getattr(kernels, f"{base}_forward"), getattr(kernels, f"{base}_backward")

    def run(x, **options):
        return forward(x, **keywords, **options)

    def run_back(dy, saved, **options):
        return backward(dy, saved, **keywords, **options)

    return run, run_back


def inputs(dtype, shape=(2, 3, 4, 25), seed=0):
    random = numpy.random.default_rng(seed)
    x = 4 * random.standard_normal(shape)
    x.flat[:15] = 0, -0.0, 1, -1, 30, -30, 1000, -1000, 1e-4, -1e-4, 0.46875, -5, -7, -9, -11
    return x.astype(dtype), random.standard_normal(shape).astype(dtype)


def smallest(dtype):
    """Below it numbers are subnormal, which float16 keeps and a GPU makes 0 in float32."""
    return {numpy.dtype(numpy.float16): 2.0**-24, numpy.dtype(numpy.float64): 1e-300}.get(dtype, 2.0**-126)


def forward_bound(name, x, expected):
    """The rounding of the storage; four of the arithmetic, and four of the input seen through the derivative."""
    derivative = oracle.elementwise(FUNCTIONS[name][1], x)
    arithmetic = 4 * epsilon(wide(x.dtype)) * (abs(expected) + abs(x.astype(float) * derivative))
    # What multiplies x last is made 0 where it is subnormal.
    return (
        epsilon(x.dtype) * abs(expected) + arithmetic + smallest(x.dtype) * numpy.maximum(1, abs(x.astype(float)))
    )


@NAMES
@EVERY_DTYPE
def test_forward(name, dtype):
    x, _ = inputs(dtype)
    expected = oracle.elementwise(FUNCTIONS[name][0], x)
    bound = forward_bound(name, x, expected)
    forward, _ = operations(name)
    for arrange in (numpy.ascontiguousarray, channels_last):
        y = forward(arrange(x))
        assert y.dtype == dtype
        assert y.strides == arrange(x).strides
        error = abs(y.astype(float) - expected)
        worst = numpy.unravel_index((error - bound).argmax(), error.shape)
        assert (error <= bound).all(), f"at {x[worst]}: {y[worst]} instead of {expected[worst]}"


@NAMES
@EVERY_DTYPE
def test_backward(name, dtype):
    x, dy = inputs(dtype, seed=1)
    forward, backward = operations(name)
    takes_output = FUNCTIONS[name][2]
    derivative = oracle.elementwise(FUNCTIONS[name][1], x)
    saved = x
    arithmetic = 8 * epsilon(wide(dtype))
    if takes_output:
        # The derivative is a function of the rounded output: sigmoid's and tanh's slope in y is at most 2.
        saved, arithmetic = forward(x), arithmetic + (2 * epsilon(dtype) if dtype.itemsize == 2 else 0)
    bound = arithmetic * abs(dy.astype(float)) + epsilon(dtype) * abs(dy * derivative) + smallest(dtype)
    for arrange in (numpy.ascontiguousarray, channels_last):
        dx = backward(arrange(dy), arrange(saved))
        assert dx.dtype == dtype
        assert dx.strides == arrange(x).strides
        error = abs(dx.astype(float) - dy.astype(float) * derivative)
        worst = numpy.unravel_index((error - bound).argmax(), error.shape)
        assert (error <= bound).all(), f"at {x[worst]}: {dx[worst]}"


@NAMES
@EVERY_DTYPE
def test_the_input_may_be_overwritten(name, dtype):
    x, dy = inputs(dtype, seed=2)
    forward, backward = operations(name)
    y = forward(x)
    for arrange in (numpy.array, channels_last):
        same = arrange(x)
        assert forward(same, out=same) is same
        assert same.tobytes() == y.tobytes()
    saved = y if FUNCTIONS[name][2] else x
    dx = backward(dy, saved)
    for arrange in (numpy.array, channels_last):
        gradient, kept = arrange(dy), arrange(saved)
        assert backward(gradient, kept, out=gradient) is gradient
        assert gradient.tobytes() == dx.tobytes()
        gradient = arrange(dy)
        assert backward(gradient, kept, out=kept) is kept
        assert kept.tobytes() == dx.tobytes()


@NAMES
@EVERY_DTYPE
def test_extreme_inputs(name, dtype):
    import ml_dtypes

    largest = float(ml_dtypes.finfo(dtype).max)
    x = numpy.array([-numpy.inf, -largest, -1000, 1000, largest, numpy.inf, numpy.nan], dtype)
    forward, backward = operations(name)
    low, high = FUNCTIONS[name][4]
    y = forward(x).astype(float)
    assert y[0] == low
    assert y[5] == high
    assert numpy.isnan(y[6])
    assert not numpy.isnan(y[:6]).any()
    slope = {"leaky_relu": 0.01}.get(name, 0.0)
    top = {"sigmoid": 0.0, "tanh": 0.0, "relu6": 0.0}.get(name, 1.0)
    saved = forward(x) if FUNCTIONS[name][2] else x
    dx = backward(numpy.ones(x.shape, dtype), saved).astype(float)
    assert (abs(dx[:3] - slope) <= 1e-4).all()
    assert (abs(dx[3:6] - top) <= 1e-4).all()
    if name not in ("relu", "relu6", "leaky_relu"):  # where a NaN is not above 0 and takes the lower slope
        assert numpy.isnan(dx[6])


def test_slopes_of_a_leaky_relu():
    x = numpy.array([-2.0, 3.0, -numpy.inf, 0.0], numpy.float32)
    for slope in (0.0, 0.25, 1.5):
        y = kernels.leaky_relu_forward(x, negative_slope=slope)
        with numpy.errstate(invalid="ignore"):
            numpy.testing.assert_array_equal(y, numpy.where(x > 0, x, numpy.float32(slope) * x))
        dx = kernels.leaky_relu_backward(numpy.full(4, 2, numpy.float32), x, negative_slope=slope)
        assert dx.tolist() == [2 * slope, 2, 2 * slope, 2 * slope]


def test_an_infinite_gradient_does_not_pass_a_closed_relu():
    y = numpy.array([0.0, 1.0, 0.0], numpy.float32)
    dy = numpy.array([numpy.inf, -numpy.inf, numpy.nan], numpy.float32)
    assert kernels.relu_backward(dy, y).tolist() == [0, -numpy.inf, 0]
    assert kernels.relu6_backward(dy, y).tolist() == [0, -numpy.inf, 0]
    assert kernels.relu6_backward(dy, numpy.float32(6) + y - y).tolist() == [0, 0, 0]


@EVERY_DTYPE
def test_shapes_and_long_arrays(dtype, monkeypatch):
    monkeypatch.setattr(launch, "_MAX_BLOCKS", 2)  # threads take several elements each
    for shape in ((), (0,), (1,), (3, 0, 2), (1301,), (2, 3, 4, 5, 6)):
        x = numpy.asarray(normal(shape, 3, numpy.float64)).astype(dtype)
        y = kernels.relu_forward(x)
        assert y.shape == x.shape
        numpy.testing.assert_array_equal(y, numpy.maximum(x, 0).astype(dtype))
        dx = kernels.relu_backward(x, y)
        numpy.testing.assert_array_equal(dx.astype(float), numpy.where(x > 0, x, 0).astype(float))


@NAMES
@EVERY_DTYPE
def test_packs_and_elements_give_the_same_bits(name, dtype, monkeypatch):
    # Some tiles of two packs a thread and a part of one; where an array begins off a multiple of 16 bytes, or the
    # tile is not whole, elements are moved one by one, as they all are of the short arrays of the tests above.
    count = 5 * (256 * 2 * 16 // dtype.itemsize) // 2 + 3
    x, dy = inputs(dtype, seed=5)
    forward, backward = operations(name)
    saved = forward(x) if FUNCTIONS[name][2] else x
    y, dx = forward(x), backward(dy, saved)
    long = {key: numpy.resize(value, count) for key, value in {"x": x, "dy": dy, "saved": saved}.items()}
    for blocks in (1 << 16, 2):
        monkeypatch.setattr(launch, "_MAX_BLOCKS", blocks)
        for places in ((0, 0, 0), (1, 0, 0), (0, 3, 0), (0, 0, 1)):
            given = {key: placed(value, place) for (key, value), place in zip(long.items(), places, strict=True)}
            result = placed(numpy.zeros(count, dtype), places[2])
            forward(given["x"], out=result)
            assert result.tobytes() == numpy.resize(y, count).tobytes()
            backward(given["dy"], given["saved"], out=result)
            assert result.tobytes() == numpy.resize(dx, count).tobytes()


def test_any_dense_order_of_axes_and_no_order_of_threads():
    x, dy = inputs(DTYPES["float32"], seed=4)
    forward, backward = operations("silu")
    y, dx = forward(x), backward(dy, x)
    view, gradient = x.transpose(2, 0, 3, 1), dy.transpose(2, 0, 3, 1)
    numpy.testing.assert_array_equal(forward(view), y.transpose(2, 0, 3, 1))
    numpy.testing.assert_array_equal(backward(gradient, view), dx.transpose(2, 0, 3, 1))
    assert order_independent(lambda: [forward(x), backward(dy, x)])


def test_errors():
    x = numpy.zeros((2, 3, 4, 5), numpy.float32)
    with pytest.raises(LayoutError, match="gaps or overlaps"):
        kernels.relu_forward(x[:, :, :, ::2])
    with pytest.raises(LayoutError):
        kernels.relu_forward(awkward(x))
    with pytest.raises(LayoutError, match="bring both to the same memory format"):
        kernels.relu_backward(x, channels_last(x))
    with pytest.raises(ArgumentError, match=r"y has shape \(2, 3, 4\), but dy has shape \(2, 3, 4, 5\)"):
        kernels.relu_backward(x, x[..., 0].copy())
    with pytest.raises(DtypeError, match="x must be one of float32"):
        kernels.tanh_forward(x.astype(int))
    with pytest.raises(DtypeError, match="y is float64, but dy is float32"):
        kernels.tanh_backward(x, x.astype(float))
    with pytest.raises(ArgumentError, match="approximate must be 'none' or 'tanh', got 'erf'"):
        kernels.gelu_forward(x, approximate="erf")
    with pytest.raises(ArgumentError, match="approximate must be 'none' or 'tanh'"):
        kernels.gelu_backward(x, x, approximate="")
