"""Batch norm against exactly rounded sums, a large mean over a small variance included."""

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucnn.errors import ArgumentError, DtypeError, ShapeError
from gpucnn.ops import cpu
from tests.accuracy import awkward, channels_last, error_bound, max_error
from tests.backends import BACKENDS, CPU
from tests.oracles import normalization as oracle

EPSILON = 1e-5
SHAPES = [(2, 1), (5, 3), (300, 7), (2, 3, 1, 1), (1, 2, 1, 2), (4, 3, 5, 7), (3, 2, 16, 16), (17, 5, 9, 8)]


def inputs(shape, dtype, seed=0, mean=0.3, spread=2.0):
    random = numpy.random.default_rng(seed)
    channels = shape[1]
    x = (mean + spread * random.standard_normal(shape)).astype(dtype)
    weight = (1 + 0.5 * random.standard_normal(channels)).astype(dtype)
    bias = random.standard_normal(channels).astype(dtype)
    return x, weight, bias, random.standard_normal(shape).astype(dtype)


def per_channel(values, x):
    return values.reshape((1, -1) + (1,) * (x.ndim - 2))


def plain_batch_norm(x, weight, bias):
    """The textbook two-pass computation in the dtype of x."""
    axes = (0, *range(2, x.ndim))
    mean, variance = x.mean(axes), x.var(axes)
    inverse_std = 1 / numpy.sqrt(variance + x.dtype.type(EPSILON))
    y = (x - per_channel(mean, x)) * per_channel(inverse_std, x) * per_channel(weight, x) + per_channel(bias, x)
    return y, mean, inverse_std


def plain_backward(dy, x, weight):
    axes = (0, *range(2, x.ndim))
    _, mean, inverse_std = plain_batch_norm(x, weight, weight)
    normal = (x - per_channel(mean, x)) * per_channel(inverse_std, x)
    count = x.size // x.shape[1]
    dbias, dweight = dy.sum(axes), (dy * normal).sum(axes)
    rest = (
        dy - per_channel(dbias / x.dtype.type(count), x) - normal * per_channel(dweight / x.dtype.type(count), x)
    )
    return rest * per_channel(weight * inverse_std, x), dweight, dbias


@BACKENDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_forward(backend, shape, dtype):
    x, weight, bias, _ = inputs(shape, dtype)
    expected = oracle.batch_norm(x, weight, bias, EPSILON)
    plain = plain_batch_norm(x, weight, bias)
    for layout in (numpy.ascontiguousarray, awkward, channels_last if x.ndim == 4 else numpy.asfortranarray):
        results = backend.batch_norm_forward(layout(x), weight, bias)
        for result, wanted, simple in zip(results, expected, plain, strict=True):
            assert result.dtype == x.dtype
            assert max_error(result, wanted) <= error_bound(simple, wanted, scale=4)
    unscaled = backend.batch_norm_forward(x)[0]
    wanted = oracle.batch_norm(x, numpy.ones(shape[1]), numpy.zeros(shape[1]), EPSILON)[0]
    assert max_error(unscaled, wanted) <= error_bound(plain_batch_norm(x, weight * 0 + 1, bias * 0)[0], wanted, 4)


@BACKENDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_backward(backend, shape, dtype):
    x, weight, bias, dy = inputs(shape, dtype, 1)
    _, mean, inverse_std = backend.batch_norm_forward(x, weight, bias)
    expected = oracle.batch_norm_backward(dy, x, weight, EPSILON)
    plain = plain_backward(dy, x, weight)
    # dx is a difference of terms of the size of dy * weight / std.
    scale = float(abs(dy).max() * abs(weight).max() * inverse_std.max()) + float(abs(dy).sum())
    for layout in (numpy.ascontiguousarray, awkward, channels_last if x.ndim == 4 else numpy.asfortranarray):
        results = backend.batch_norm_backward(layout(dy), layout(x), weight, mean, inverse_std)
        for result, wanted, simple in zip(results, expected, plain, strict=True):
            assert result.dtype == x.dtype
            assert max_error(result, wanted) <= error_bound(simple, wanted, scale=scale)
    dx, dweight, dbias = backend.batch_norm_backward(dy, x, None, mean, inverse_std)
    wanted = oracle.batch_norm_backward(dy, x, numpy.ones(shape[1]), EPSILON)
    assert max_error(dx, wanted[0]) <= error_bound(plain_backward(dy, x, weight * 0 + 1)[0], wanted[0], scale)
    assert max_error(dweight, wanted[1]) <= error_bound(plain[1], wanted[1], scale)
    assert max_error(dbias, wanted[2]) <= error_bound(plain[2], wanted[2], scale)


@BACKENDS
@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 1000),
)
def test_backward_is_the_derivative_of_forward(backend, shape, seed):
    if shape[0] * shape[2] * shape[3] < 2:
        shape = (2, *shape[1:])
    x, weight, bias, dy = inputs(shape, "float64", seed)
    random = numpy.random.default_rng(seed + 1)
    direction, dw, db = (
        random.standard_normal(shape),
        random.standard_normal(shape[1]),
        random.standard_normal(shape[1]),
    )
    step, epsilon = 1e-6, 0.1  # a large epsilon keeps the third derivative, the difference's error, small

    def value(t):
        y = backend.batch_norm_forward(x + t * direction, weight + t * dw, bias + t * db, epsilon=epsilon)[0]
        return float((y * dy).sum())

    _, mean, inverse_std = backend.batch_norm_forward(x, weight, bias, epsilon=epsilon)
    dx, dweight, dbias = backend.batch_norm_backward(dy, x, weight, mean, inverse_std)
    slope = float((dx * direction).sum() + (dweight * dw).sum() + (dbias * db).sum())
    numeric = (value(step) - value(-step)) / (2 * step)
    assert abs(slope - numeric) <= 1e-6 * (1 + abs(slope) + float(abs(dy).sum()))


@BACKENDS
@pytest.mark.parametrize(("mean", "spread"), [(1e4, 1.0), (-3e5, 1.0), (1e3, 1e-3), (0.0, 1e-20), (1e15, 1e16)])
def test_large_means_and_extreme_spreads(backend, mean, spread):
    x, weight, bias, dy = inputs((8, 2, 9, 9), "float32", 2, mean, spread)
    expected = oracle.batch_norm(x, weight, bias, EPSILON)
    y, found_mean, inverse_std = backend.batch_norm_forward(x, weight, bias)
    assert max_error(y, expected[0]) <= 2e-6
    assert numpy.all(abs(found_mean - expected[1]) <= 1e-7 * (abs(expected[1]) + spread))
    assert numpy.all(abs(inverse_std - expected[2]) <= 1e-6 * expected[2])
    wanted = oracle.batch_norm_backward(dy, x, weight, EPSILON)
    results = backend.batch_norm_backward(dy, x, weight, found_mean, inverse_std)
    for result, reference in zip(results, wanted, strict=True):
        assert max_error(result, reference) <= 1e-5 * (float(abs(reference).max()) + 1e-30)


@BACKENDS
@pytest.mark.parametrize("outlier", [1e2, 1e6])
def test_images_that_mislead_the_first_estimate_of_the_mean(backend, outlier):
    # Every eighth image, those that the estimate looks at, is far from the others.
    x, weight, bias, _ = inputs((64, 2, 3, 3), "float32", 8)
    x[::8] += numpy.float32(outlier)
    expected = oracle.batch_norm(x, weight, bias, EPSILON)
    plain = plain_batch_norm(x, weight, bias)
    results = backend.batch_norm_forward(x, weight, bias)
    for result, wanted, simple in zip(results, expected, plain, strict=True):
        assert max_error(result, wanted) <= error_bound(simple, wanted)


@BACKENDS
def test_constant_channels(backend):
    x = numpy.full((4, 2, 3, 3), 123456.78, numpy.float32)
    y, mean, inverse_std = backend.batch_norm_forward(x)
    assert numpy.all(y == 0)
    assert numpy.all(mean == x[0, 0, 0, 0])
    assert numpy.all(abs(inverse_std - 1 / numpy.sqrt(EPSILON)) <= 1e-4)
    dx, _, _ = backend.batch_norm_backward(numpy.ones_like(x), x, None, mean, inverse_std)
    assert numpy.all(dx == 0)


@BACKENDS
def test_a_nan_stays_in_its_channel(backend):
    x = inputs((3, 3, 4, 4), "float32")[0]
    clean = backend.batch_norm_forward(x)[0]
    x[1, 1, 2, 2] = numpy.nan
    y = backend.batch_norm_forward(x)[0]
    assert numpy.isnan(y[:, 1]).all()
    numpy.testing.assert_array_equal(y[:, ::2], clean[:, ::2])


@pytest.mark.parametrize("shape", [(3, 3, 4, 4), (2, 3, 12, 16)])
def test_a_large_mean_changes_no_bit_of_other_channels(shape):
    x, weight, bias, dy = inputs(shape, "float32", 9)
    y, mean, inverse_std = CPU.batch_norm_forward(x, weight, bias)
    gradients = CPU.batch_norm_backward(dy, x, weight, mean, inverse_std)
    x[:, 1] += numpy.float32(1e4)
    results = CPU.batch_norm_forward(x, weight, bias)
    numpy.testing.assert_array_equal(results[0][:, ::2], y[:, ::2])
    changed = CPU.batch_norm_backward(dy, x, weight, *results[1:])
    numpy.testing.assert_array_equal(changed[0][:, ::2], gradients[0][:, ::2])
    numpy.testing.assert_array_equal(changed[1][::2], gradients[1][::2])


@pytest.mark.parametrize("shape", [(8, 2, 3, 3), (8, 2, 12, 12)])
def test_means_whose_squares_overflow(shape):
    x, weight, bias, _ = inputs(shape, "float32", 10, 1e20, 1e16)
    expected = oracle.batch_norm(x, weight, bias, EPSILON)
    results = CPU.batch_norm_forward(x, weight, bias)
    assert max_error(results[0], expected[0]) <= 2e-5
    assert numpy.all(abs(results[2] - expected[2]) <= 1e-5 * expected[2])


@BACKENDS
@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_running_statistics(backend, momentum):
    x, weight, bias, _ = inputs((6, 4, 3, 5), "float32", 3)
    running_mean, running_var = numpy.full(4, 0.5, numpy.float32), numpy.full(4, 2.0, numpy.float32)
    backend.batch_norm_forward(x, weight, bias, running_mean, running_var, momentum=momentum)
    mean, variance = oracle.statistics(x)
    count = x.size // 4
    assert max_error(running_mean, (1 - momentum) * 0.5 + momentum * mean) <= 1e-6
    assert max_error(running_var, (1 - momentum) * 2 + momentum * variance * count / (count - 1)) <= 2e-6
    only_mean = numpy.zeros(4, numpy.float32)
    backend.batch_norm_forward(x, running_mean=only_mean, momentum=1.0)
    assert max_error(only_mean, mean) <= 1e-6


@BACKENDS
@pytest.mark.parametrize("shape", [(1, 3), (6, 3), (1, 3, 1, 1), (4, 3, 5, 7)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_inference(backend, shape, dtype):
    x, weight, bias, _ = inputs(shape, dtype, 4)
    running_mean = numpy.array([0.1, -4, 100], dtype)
    running_var = numpy.array([1, 1e-3, 50], dtype)
    expected = oracle.batch_norm_inference(x, weight, bias, running_mean, running_var, EPSILON)
    root = numpy.sqrt(running_var + x.dtype.type(EPSILON))
    plain = (x - per_channel(running_mean, x)) / per_channel(root, x) * per_channel(weight, x) + per_channel(
        bias, x
    )
    for layout in (numpy.ascontiguousarray, awkward):
        y = backend.batch_norm_inference(layout(x), weight, bias, running_mean, running_var)
        assert y.dtype == x.dtype
        assert max_error(y, expected) <= error_bound(plain, expected)
    ones, zeros = numpy.ones(3), numpy.zeros(3)
    bare = backend.batch_norm_inference(x, None, None, running_mean, running_var)
    wanted = oracle.batch_norm_inference(x, ones, zeros, running_mean, running_var, EPSILON)
    assert max_error(bare, wanted) <= error_bound(plain, expected, scale=abs(wanted).max())
    out = x.copy()
    assert backend.batch_norm_inference(out, weight, bias, running_mean, running_var, out=out) is out
    assert max_error(out, expected) <= error_bound(plain, expected)


@BACKENDS
@pytest.mark.parametrize(
    "shape", [(1, 3), (6, 3), (1, 3, 1, 1), (4, 3, 5, 7), (2, 3, 20, 20), (0, 3, 2, 2)], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradient_of_inference(backend, shape, dtype):
    x, weight, _, dy = inputs(shape, dtype, 6)
    running_mean, running_var = numpy.array([0.1, -4, 2], dtype), numpy.array([1, 1e-3, 50], dtype)
    statistics = running_mean, running_var
    expected = oracle.batch_norm_inference_backward(dy, x, weight, *statistics, EPSILON)
    eps = float(numpy.finfo(dtype).eps)
    terms = [abs(dy) * (abs(x) + 5), abs(dy)]
    axes = (0, *range(2, x.ndim))
    bounds = [4 * eps * abs(expected[0]), 4 * eps * terms[0].sum(axes) * 32, 4 * eps * terms[1].sum(axes)]
    for layout in (numpy.ascontiguousarray, awkward):
        results = backend.batch_norm_inference_backward(layout(dy), layout(x), weight, *statistics)
        for result, wanted, bound in zip(results, expected, bounds, strict=True):
            assert result.dtype == x.dtype
            assert numpy.all(abs(result - wanted) <= bound)
    dx, dweight, dbias = backend.batch_norm_inference_backward(dy, None, weight, *statistics)
    assert dweight is dbias is None
    numpy.testing.assert_array_equal(dx, backend.batch_norm_inference_backward(dy, x, weight, *statistics)[0])
    bare = backend.batch_norm_inference_backward(dy, x, None, *statistics)[0]
    assert max_error(bare * per_channel(weight, x), expected[0]) <= 8 * eps * abs(expected[0]).max(initial=0)
    for index in (0, 1):
        arrays = [dy.copy(), x.copy()]
        places = numpy.full(3, 7, dtype), numpy.full(3, 7, dtype)
        again = backend.batch_norm_inference_backward(
            *arrays, weight, *statistics, out=arrays[index], out_weight=places[0], out_bias=places[1]
        )
        assert again[0] is arrays[index]
        for one, other in zip((arrays[index], *places), results, strict=True):
            assert max_error(one, other) <= 4 * eps * abs(other).max(initial=0)


@BACKENDS
def test_the_gradient_of_inference_checks_its_arrays(backend):
    dy, row = numpy.zeros((2, 3, 4, 4), numpy.float32), numpy.ones(3, numpy.float32)
    backward = backend.batch_norm_inference_backward
    with pytest.raises(ShapeError, match="the input must have shape"):
        backward(dy, dy[:1], row, row, row)
    with pytest.raises(ShapeError, match="running_var must have shape"):
        backward(dy, dy, row, row, row[:2])
    with pytest.raises(ShapeError):
        backward(dy, dy, row, row, row, out=dy[0])
    with pytest.raises(DtypeError):
        backward(dy.astype(int), dy, row, row, row)


@BACKENDS
def test_out_and_aliasing(backend):
    x, weight, bias, dy = inputs((3, 4, 5, 5), "float32", 5)
    y, mean, inverse_std = backend.batch_norm_forward(x, weight, bias)
    dx = backend.batch_norm_backward(dy, x, weight, mean, inverse_std)[0]
    out = awkward(numpy.zeros_like(x))
    assert backend.batch_norm_forward(x, weight, bias, out=out)[0] is out
    numpy.testing.assert_array_equal(out, y)
    gradient = dy.copy()
    assert backend.batch_norm_backward(gradient, x, weight, mean, inverse_std, out=gradient)[0] is gradient
    numpy.testing.assert_array_equal(gradient, dx)
    same = x.copy()
    backend.batch_norm_forward(same, weight, bias, out=same)
    numpy.testing.assert_array_equal(same, y)


@BACKENDS
@pytest.mark.parametrize("name", ["identity", "relu", "leaky_relu", "relu6"])
def test_a_residual_and_an_activation(backend, name):
    """As the operations one after another, the bits too: in float32 they round at the same places."""
    slope = {"negative_slope": 0.2} if name == "leaky_relu" else {}
    x, weight, bias, dy = inputs((4, 3, 5, 7), "float32")
    residual = 3 * inputs(x.shape, "float32", seed=1)[0]
    plain, mean, inverse_std = backend.batch_norm_forward(x, weight, bias)
    y, before = plain + residual, dy
    if name != "identity":
        y = getattr(backend, f"{name}_forward")(y, **slope)
        before = getattr(backend, f"{name}_backward")(dy, y, **slope)
    wanted = backend.batch_norm_backward(before, x, weight, mean, inverse_std)
    more = {"activation": name, **slope}
    for layout in (numpy.ascontiguousarray, channels_last, awkward):
        found, *_ = backend.batch_norm_forward(layout(x), weight, bias, residual=layout(residual), **more)
        if layout is not channels_last:  # whose sums are taken in another order
            numpy.testing.assert_array_equal(found, y)
        assert max_error(found, y) <= 1e-5
    out = residual.copy()
    assert backend.batch_norm_forward(x, weight, bias, residual=out, out=out, **more)[0] is out
    numpy.testing.assert_array_equal(out, y)
    for layout in (numpy.ascontiguousarray, awkward):
        out = {"out": layout(numpy.full_like(x, numpy.nan)), "out_residual": layout(numpy.full_like(x, numpy.nan))}
        out |= {"out_weight": numpy.empty_like(weight), "out_bias": numpy.empty_like(bias)}
        given = (layout(dy), x, weight, mean, inverse_std)
        results = backend.batch_norm_backward(*given, y=layout(y), **more, **out)
        for result, target, expected in zip(results, ("out", "out_weight", "out_bias"), wanted, strict=True):
            numpy.testing.assert_array_equal(result, expected)
            numpy.testing.assert_array_equal(out[target], expected)
        numpy.testing.assert_array_equal(out["out_residual"], before)


@BACKENDS
def test_endings_that_cannot_be(backend):
    x, weight, bias, dy = inputs((4, 3, 5, 7), "float32")
    y, mean, inverse_std = backend.batch_norm_forward(x, weight, bias)
    with pytest.raises(
        ArgumentError, match="activation must be one of 'identity', 'relu', 'leaky_relu', 'relu6', got 'gelu'"
    ):
        backend.batch_norm_forward(x, weight, bias, activation="gelu")
    with pytest.raises(ShapeError, match="residual must have shape"):
        backend.batch_norm_forward(x, weight, bias, residual=x[:2])
    given = (dy, x, weight, mean, inverse_std)
    with pytest.raises(ArgumentError, match="give it as y"):
        backend.batch_norm_backward(*given, activation="relu")
    with pytest.raises(ShapeError, match="the result y must have shape"):
        backend.batch_norm_backward(*given, y=y[:2], activation="relu")
    with pytest.raises(ArgumentError, match="where negative_slope is above 0, got -1"):
        backend.batch_norm_backward(*given, y=y, activation="leaky_relu", negative_slope=-1)


@BACKENDS
def test_half_precision_is_calculated_in_single(backend):
    x, weight, bias, dy = inputs((8, 3, 6, 6), "float16", 6)
    y, mean, inverse_std = backend.batch_norm_forward(x, weight, bias)
    expected = oracle.batch_norm(x, weight, bias, EPSILON)
    assert y.dtype == numpy.float16
    assert max_error(y, expected[0]) <= 2 * numpy.finfo(numpy.float16).eps * abs(expected[0]).max()
    dx, _, _ = backend.batch_norm_backward(dy, x, weight, mean, inverse_std)
    wanted = oracle.batch_norm_backward(dy, x, weight, EPSILON)[0]
    assert dx.dtype == numpy.float16
    assert max_error(dx, wanted) <= 2e-3 * abs(wanted).max()
    z = backend.batch_norm_inference(x, weight, bias, mean, 1 / inverse_std**2 - numpy.float32(EPSILON))
    assert z.dtype == numpy.float16
    assert max_error(z, expected[0]) <= 4 * numpy.finfo(numpy.float16).eps * abs(expected[0]).max()


def test_the_number_of_threads_changes_nothing(monkeypatch):
    x, weight, bias, dy = inputs((32, 24, 20, 20), "float32", 7)
    results = []
    for threads in ("1", "3"):
        monkeypatch.setenv("GPUCNN_NUM_THREADS", threads)
        y, mean, inverse_std = cpu.batch_norm_forward(x, weight, bias)
        z = cpu.batch_norm_inference(x, weight, bias, mean, abs(weight))
        results.append((y, mean, inverse_std, z, *cpu.batch_norm_backward(dy, x, weight, mean, inverse_std)))
    for one, other in zip(*results, strict=True):
        numpy.testing.assert_array_equal(one, other)


@BACKENDS
def test_errors(backend):
    x = numpy.zeros((1, 3, 1, 1), numpy.float32)
    with pytest.raises(ShapeError, match="batch of one"):
        backend.batch_norm_forward(x)
    with pytest.raises(ShapeError, match="at least two values a channel, got 0"):
        backend.batch_norm_forward(numpy.zeros((0, 3)))
    with pytest.raises(ShapeError, match=r"\(N, C\) or \(N, C, H, W\)"):
        backend.batch_norm_forward(numpy.zeros((2, 3, 4)))
    with pytest.raises(ShapeError, match=r"weight must have shape \(3,\), got \(2,\)"):
        backend.batch_norm_forward(numpy.zeros((2, 3)), numpy.ones(2))
    with pytest.raises(DtypeError, match="floating-point"):
        backend.batch_norm_forward(numpy.zeros((2, 3), int))
    with pytest.raises(ShapeError, match="output gradient"):
        backend.batch_norm_backward(x[..., :0], x, None, numpy.zeros(3), numpy.zeros(3))
    with pytest.raises(ShapeError, match="mean"):
        backend.batch_norm_backward(x, x, None, numpy.zeros(2), numpy.zeros(3))
    with pytest.raises(ShapeError, match="out must have"):
        backend.batch_norm_inference(x, None, None, numpy.zeros(3), numpy.ones(3), out=x[0])
