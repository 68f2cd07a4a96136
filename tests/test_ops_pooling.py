"""Pooling against loops over every window, on the shared problems and on random ones."""

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucnn.errors import ArgumentError, DtypeError, ShapeError
from gpucnn.ops import cpu
from gpucnn.ops.cpu import blocks
from gpucnn_kernels import ProblemError
from tests.accuracy import awkward, channels_last, error_bound, max_error
from tests.backends import BACKENDS, CPU
from tests.oracles import pooling as oracle
from tests.pool_problems import POOL_PROBLEMS

CASES = pytest.mark.parametrize("case", POOL_PROBLEMS, ids=lambda case: case.name)
UNDILATED = [case for case in POOL_PROBLEMS if case.dilation == (1, 1)]
UNDILATED_CASES = pytest.mark.parametrize("case", UNDILATED, ids=lambda case: case.name)


def numbers(shape, seed=0, dtype=numpy.float64):
    return numpy.random.default_rng(seed).standard_normal(shape).astype(dtype)


def poisoned(shape, dtype=numpy.float64):
    """An array for a result, full of a number that no result here holds: what is not written shows."""
    return numpy.full(shape, 77777, dtype)


def oracle_max_pool(x, case):
    return oracle.max_pool(x, case.kernel, case.stride, case.padding, case.dilation, case.ceil_mode)


def max_pool(backend, x, case, **options):
    return backend.max_pool2d_forward(x, **case.options, dilation=case.dilation, **options)


# ---------------------------------------------------------------- max


@BACKENDS
@CASES
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_max_pool(backend, case, dtype):
    # Few different values, so that ties are everywhere.
    x = numpy.random.default_rng(1).integers(-3, 4, case.shape).astype(dtype)
    expected, expected_argmax = oracle_max_pool(x, case)
    y, argmax = max_pool(backend, x, case)
    assert y.dtype == x.dtype
    assert argmax.dtype == (numpy.uint8 if case.kernel[0] * case.kernel[1] <= 256 else numpy.int32)
    numpy.testing.assert_array_equal(y, expected)
    numpy.testing.assert_array_equal(argmax, expected_argmax)


@BACKENDS
@CASES
@pytest.mark.parametrize("layout", [awkward, channels_last])
def test_max_pool_of_other_layouts(backend, case, layout):
    x = numbers(case.shape, 2, numpy.float32)
    expected, expected_argmax = oracle_max_pool(x, case)
    y, argmax = max_pool(backend, layout(x), case)
    numpy.testing.assert_array_equal(y, expected)
    numpy.testing.assert_array_equal(argmax, expected_argmax)
    dy = numbers(y.shape, 3)
    dx = backend.max_pool2d_backward(
        layout(dy), layout(argmax), input_size=case.shape[2:], dilation=case.dilation, **case.options
    )
    expected = oracle.max_pool_backward(
        dy, expected_argmax, case.shape, case.kernel, case.stride, case.padding, case.dilation, case.ceil_mode
    )
    assert max_error(dx, expected) <= 1e-14 * (1 + abs(dy).max(initial=0))


@BACKENDS
@CASES
def test_max_pool_with_nan_and_infinities(backend, case):
    random = numpy.random.default_rng(4)
    x = random.choice(
        [-numpy.inf, numpy.inf, numpy.nan, -1.0, 0.0, 2.0], case.shape, p=[0.3, 0.1, 0.1, 0.2, 0.2, 0.1]
    )
    expected, expected_argmax = oracle_max_pool(x, case)
    y, argmax = max_pool(backend, x, case)
    numpy.testing.assert_array_equal(y, expected)
    numpy.testing.assert_array_equal(argmax, expected_argmax)


@BACKENDS
def test_a_window_of_minus_infinity_points_into_the_image(backend):
    y, argmax = backend.max_pool2d_forward(
        numpy.full((1, 1, 2, 2), -numpy.inf, numpy.float32), kernel_size=3, stride=2, padding=1
    )
    assert y.item() == -numpy.inf
    assert argmax.item() == 4, "the first place of the window that is no padding"


@BACKENDS
@CASES
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_max_pool_backward(backend, case, dtype):
    x = numpy.random.default_rng(5).integers(-3, 4, case.shape).astype(dtype)
    _, argmax = oracle_max_pool(x, case)
    # Small integers: sums are exact in every dtype, so the answer is too.
    dy = numpy.random.default_rng(6).integers(-8, 9, argmax.shape).astype(dtype)
    small = argmax.astype(numpy.uint8 if case.kernel[0] * case.kernel[1] <= 256 else numpy.int32)
    out = numpy.full(case.shape, 77, dtype)
    dx = backend.max_pool2d_backward(
        dy, small, input_size=case.shape[2:], dilation=case.dilation, **case.options, out=out
    )
    expected = oracle.max_pool_backward(
        dy, argmax, case.shape, case.kernel, case.stride, case.padding, case.dilation, case.ceil_mode
    )
    assert dx is out
    numpy.testing.assert_array_equal(dx, expected)


@BACKENDS
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_max_pool_backward_keeps_infinities_where_they_belong(backend, stride):
    x = numbers((1, 2, 7, 7), 7, numpy.float32)
    y, argmax = backend.max_pool2d_forward(x, kernel_size=2, stride=stride)
    dy = numpy.full(y.shape, numpy.inf, numpy.float32)
    dx = backend.max_pool2d_backward(dy, argmax, input_size=(7, 7), kernel_size=2, stride=stride)
    assert not numpy.isnan(dx).any()
    expected = oracle.max_pool_backward(dy, argmax, x.shape, (2, 2), (stride, stride))
    numpy.testing.assert_array_equal(dx, expected)


@BACKENDS
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_max_pool_of_random_problems(backend, data):
    shape, options = data.draw(problems(dilated=True))
    x = numpy.random.default_rng(data.draw(st.integers(0, 99))).integers(-2, 3, shape).astype(numpy.float32)
    kernel, stride, padding, dilation, ceil_mode = options
    expected, expected_argmax = oracle.max_pool(x, *options)
    keywords = {
        "kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation, "ceil_mode": ceil_mode
    }  # fmt: skip
    layout = data.draw(st.sampled_from([numpy.ascontiguousarray, channels_last]))
    y, argmax = backend.max_pool2d_forward(layout(x), **keywords, out=layout(poisoned(expected.shape, x.dtype)))
    numpy.testing.assert_array_equal(y, expected)
    numpy.testing.assert_array_equal(argmax, expected_argmax)
    dy = numpy.arange(y.size, dtype=numpy.float32).reshape(y.shape) + 1
    dx = backend.max_pool2d_backward(
        layout(dy), argmax, input_size=shape[2:], **keywords, out=layout(poisoned(shape, x.dtype))
    )
    numpy.testing.assert_array_equal(dx, oracle.max_pool_backward(dy, expected_argmax, shape, *options))


@st.composite
def problems(draw, dilated):
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    stride = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 3))) if dilated else (1, 1)
    padding = draw(st.integers(0, kernel[0] // 2)), draw(st.integers(0, kernel[1] // 2))
    smallest = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    height = draw(st.integers(smallest[0], smallest[0] + 6))
    width = draw(st.integers(smallest[1], smallest[1] + 6))
    shape = draw(st.integers(1, 2)), draw(st.integers(1, 2)), height, width
    return shape, (kernel, stride, padding, dilation, draw(st.booleans()))


# ---------------------------------------------------------------- average


def plain_avg_pool(x, case, count_include_pad):
    """The mean in the dtype of x: windows of a zero-padded copy, added one place after the other."""
    # The mean of an image of ones is the share of places inside, which tells the divisor.
    share = oracle.avg_pool(x * 0 + 1, case.kernel, case.stride, case.padding, case.ceil_mode, count_include_pad)
    (top, left), (height, width) = case.padding, case.shape[2:]
    padded = numpy.zeros((2, *case.shape[:2], height + 3 * top + 40, width + 3 * left + 40), x.dtype)
    padded[:, :, :, top : top + height, left : left + width] = x, x * 0 + 1
    total, inside = numpy.zeros((2, *share.shape), x.dtype)
    for r in range(case.kernel[0]):
        for s in range(case.kernel[1]):
            rows = slice(r, r + case.stride[0] * share.shape[2], case.stride[0])
            columns = slice(s, s + case.stride[1] * share.shape[3], case.stride[1])
            total += padded[0][:, :, rows, columns]
            inside += padded[1][:, :, rows, columns]
    return total / (inside / share).astype(x.dtype)


@BACKENDS
@UNDILATED_CASES
@pytest.mark.parametrize("count_include_pad", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_avg_pool(backend, case, count_include_pad, dtype):
    x = numbers(case.shape, 8, dtype)
    expected = oracle.avg_pool(x, case.kernel, case.stride, case.padding, case.ceil_mode, count_include_pad)
    plain = plain_avg_pool(x, case, count_include_pad)
    for layout in (numpy.ascontiguousarray, awkward, channels_last):
        y = backend.avg_pool2d_forward(layout(x), **case.options, count_include_pad=count_include_pad)
        assert y.dtype == x.dtype
        assert max_error(y, expected) <= error_bound(plain, expected, scale=abs(x).max(initial=0))


@BACKENDS
@UNDILATED_CASES
@pytest.mark.parametrize("count_include_pad", [True, False])
def test_avg_pool_backward(backend, case, count_include_pad):
    options = (case.kernel, case.stride, case.padding, case.ceil_mode, count_include_pad)
    dy = numbers(oracle.avg_pool(numpy.zeros(case.shape), *options).shape, 9)
    expected = oracle.avg_pool_backward(dy, case.shape, *options)
    for layout in (numpy.ascontiguousarray, awkward, channels_last):
        dx = backend.avg_pool2d_backward(
            layout(dy), input_size=case.shape[2:], count_include_pad=count_include_pad, **case.options
        )
        assert max_error(dx, expected) <= 1e-14
        single = backend.avg_pool2d_backward(
            layout(dy.astype("f4")), input_size=case.shape[2:], count_include_pad=count_include_pad, **case.options
        )
        assert single.dtype == numpy.float32
        assert max_error(single, expected) <= 1e-5


@BACKENDS
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_avg_pool_of_random_problems(backend, data):
    shape, (kernel, stride, padding, _, ceil_mode) = data.draw(problems(dilated=False))
    include = data.draw(st.booleans())
    x = numbers(shape, 10)
    expected = oracle.avg_pool(x, kernel, stride, padding, ceil_mode, include)
    keywords = {
        "kernel_size": kernel, "stride": stride, "padding": padding, "ceil_mode": ceil_mode,
        "count_include_pad": include,
    }  # fmt: skip
    y = backend.avg_pool2d_forward(x, **keywords, out=poisoned(expected.shape))
    assert max_error(y, expected) <= 1e-14
    dy = numbers(y.shape, 11)
    dx = backend.avg_pool2d_backward(dy, input_size=shape[2:], **keywords, out=poisoned(shape))
    # The operation is linear, so the backward pass is its adjoint: <dy, A x> = <A' dy, x>.
    assert abs(float((dy * y).sum() - (dx * x).sum())) <= 1e-12 * (1 + dy.size)
    assert max_error(dx, oracle.avg_pool_backward(dy, shape, kernel, stride, padding, ceil_mode, include)) <= 1e-13


@BACKENDS
@pytest.mark.parametrize(
    ("size", "output_size"),
    [((7, 7), (1, 1)), ((8, 6), (4, 3)), ((7, 5), (3, 2)), ((5, 7), (5, 7)), ((2, 3), (4, 5)), ((1, 1), (2, 2))],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_adaptive_avg_pool(backend, size, output_size, dtype):
    x = numbers((2, 3, *size), 12, dtype)
    expected = oracle.adaptive_avg_pool(x, output_size)
    dy = numbers(expected.shape, 13, dtype)
    expected_dx = oracle.adaptive_avg_pool_backward(dy, size)
    tolerance = 1e-6 if dtype == "float32" else 1e-15
    for layout in (numpy.ascontiguousarray, awkward, channels_last):
        y = backend.adaptive_avg_pool2d_forward(layout(x), output_size=output_size)
        assert y.dtype == x.dtype
        assert max_error(y, expected) <= 2 * tolerance
        dx = backend.adaptive_avg_pool2d_backward(layout(dy), input_size=size)
        assert dx.dtype == x.dtype
        assert max_error(dx, expected_dx) <= 4 * tolerance


@BACKENDS
def test_adaptive_pooling_of_no_images(backend):
    assert backend.adaptive_avg_pool2d_forward(numpy.zeros((0, 2, 4, 4)), output_size=2).shape == (0, 2, 2, 2)
    assert backend.adaptive_avg_pool2d_backward(numpy.zeros((0, 2, 2, 2)), input_size=(4, 4)).shape == (0, 2, 4, 4)


@BACKENDS
@pytest.mark.parametrize("name", ["relu", "leaky_relu", "sigmoid", "tanh"])
def test_back_through_the_activation_before(backend, name):
    """As the two operations one after another: an activation's slope at a winner is that of the pooled result."""
    slope = {"negative_slope": 0.25} if name == "leaky_relu" else {}
    case = next(case for case in POOL_PROBLEMS if case.name == "halves of an odd image")
    x = getattr(backend, f"{name}_forward")(numbers(case.shape, dtype=numpy.float32), **slope)
    y, argmax = max_pool(backend, x, case)
    dy = numbers(y.shape, 1, numpy.float32)
    options = {"input_size": case.shape[2:], **case.options}
    plain = backend.max_pool2d_backward(dy, argmax, **options)
    wanted = getattr(backend, f"{name}_backward")(plain, x, **slope)
    for layout in (numpy.ascontiguousarray, channels_last, awkward):
        more = {"y": layout(y), "activation": name, **slope}
        dx = backend.max_pool2d_backward(layout(dy), argmax, **options, **more)
        numpy.testing.assert_array_equal(dx, wanted)
        out = layout(poisoned(case.shape, numpy.float32))
        assert backend.max_pool2d_backward(dy, argmax, **options, **more, out=out) is out
        numpy.testing.assert_array_equal(out, wanted)
    with pytest.raises(ArgumentError, match="give it as y"):
        backend.max_pool2d_backward(dy, argmax, **options, activation=name, **slope)
    with pytest.raises(ArgumentError, match="activation must be one of"):
        backend.max_pool2d_backward(dy, argmax, **options, y=y, activation="gelu")
    with pytest.raises(ShapeError, match="the result y must have shape"):
        backend.max_pool2d_backward(dy, argmax, **options, y=y[:1], activation=name, **slope)


@BACKENDS
def test_half_precision_is_summed_in_single(backend):
    x = numpy.full((1, 1, 64, 64), 1.001, numpy.float16)
    value = float(x[0, 0, 0, 0])
    y = backend.avg_pool2d_forward(x, kernel_size=64)
    assert y.dtype == numpy.float16
    assert float(y.item()) == value
    assert float(backend.adaptive_avg_pool2d_forward(x, output_size=1).item()) == value
    dx = backend.avg_pool2d_backward(numpy.ones((1, 1, 64, 64), numpy.float16), input_size=(64, 64), kernel_size=1)
    assert dx.dtype == numpy.float16
    dx = backend.adaptive_avg_pool2d_backward(numpy.ones((1, 1, 2, 2), numpy.float16), input_size=(4, 4))
    assert dx.dtype == numpy.float16
    assert float(dx.sum()) == 4


# ---------------------------------------------------------------- results, threads and errors


@BACKENDS
@pytest.mark.parametrize("kernel", [2, 3])
def test_out_receives_the_result(backend, kernel):
    x = numbers((2, 2, 6, 6), 14, numpy.float32)
    for operation in (backend.max_pool2d_forward, backend.avg_pool2d_forward):
        expected = operation(x, kernel_size=kernel)
        expected = expected[0] if isinstance(expected, tuple) else expected
        out = awkward(numpy.zeros(expected.shape, numpy.float32))
        result = operation(x, kernel_size=kernel, out=out)
        result = result[0] if isinstance(result, tuple) else result
        assert result is out
        numpy.testing.assert_array_equal(out, expected)


@BACKENDS
def test_channels_last_stays_channels_last(backend):
    x = channels_last(numbers((2, 3, 6, 6), 15))
    y, argmax = backend.max_pool2d_forward(x, kernel_size=2)
    assert y.transpose(0, 2, 3, 1).flags.c_contiguous
    assert argmax.transpose(0, 2, 3, 1).flags.c_contiguous


@pytest.mark.parametrize("plane_bytes", [1, 600, 2000])
@pytest.mark.parametrize("case", [c for c in UNDILATED if c.name == "many images"], ids=lambda case: case.name)
def test_images_and_channels_in_blocks(monkeypatch, case, plane_bytes):
    monkeypatch.setattr(blocks, "PLANE_BYTES", plane_bytes)
    x = numbers(case.shape, 17)
    expected, expected_argmax = oracle_max_pool(x, case)
    y, argmax = max_pool(CPU, x, case)
    numpy.testing.assert_array_equal(y, expected)
    numpy.testing.assert_array_equal(argmax, expected_argmax)
    options = (case.kernel, case.stride, case.padding)
    dx = cpu.max_pool2d_backward(y, argmax, input_size=case.shape[2:], **case.options)
    assert max_error(dx, oracle.max_pool_backward(y, argmax, case.shape, *options)) <= 1e-14
    assert max_error(cpu.avg_pool2d_forward(x, **case.options), oracle.avg_pool(x, *options)) <= 1e-14
    dx = cpu.avg_pool2d_backward(y, input_size=case.shape[2:], **case.options)
    assert max_error(dx, oracle.avg_pool_backward(y, case.shape, *options)) <= 1e-14


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1)])
def test_the_number_of_threads_changes_nothing(monkeypatch, kernel, stride, padding):
    x = numbers((40, 8, 32, 32), 16, numpy.float32)
    results = []
    for threads in ("1", "3"):
        monkeypatch.setenv("GPUCNN_NUM_THREADS", threads)
        options = {"kernel_size": kernel, "stride": stride, "padding": padding}
        y, argmax = cpu.max_pool2d_forward(x, **options)
        dx = cpu.max_pool2d_backward(y, argmax, input_size=(32, 32), **options)
        average = cpu.avg_pool2d_forward(x, **options)
        results.append((y, argmax, dx, average, cpu.avg_pool2d_backward(average, input_size=(32, 32), **options)))
    for one, other in zip(*results, strict=True):
        numpy.testing.assert_array_equal(one, other)


@BACKENDS
def test_errors(backend):
    x = numpy.zeros((1, 1, 4, 4))
    with pytest.raises(ProblemError, match="larger than the padded input"):
        backend.max_pool2d_forward(x, kernel_size=5)
    with pytest.raises(ProblemError, match="at most half of the window"):
        backend.avg_pool2d_forward(x, kernel_size=2, padding=2)
    with pytest.raises(DtypeError, match="floating-point"):
        backend.max_pool2d_forward(x.astype(int), kernel_size=2)
    with pytest.raises(DtypeError, match=r"numpy\.ndarray"):
        backend.avg_pool2d_forward([[1.0]], kernel_size=2)
    with pytest.raises(ShapeError, match="out must have the result's shape"):
        backend.max_pool2d_forward(x, kernel_size=2, out=x)
    with pytest.raises(DtypeError, match="out must have the result's dtype"):
        backend.max_pool2d_forward(x, kernel_size=2, out=numpy.zeros((1, 1, 2, 2), numpy.float32))
    with pytest.raises(DtypeError, match="out must be"):
        backend.max_pool2d_forward(x, kernel_size=2, out=[])
    y, argmax = backend.max_pool2d_forward(x, kernel_size=2)
    with pytest.raises(ShapeError, match="output gradient"):
        backend.max_pool2d_backward(y[..., :1], argmax, input_size=(4, 4), kernel_size=2)
    with pytest.raises(ShapeError, match="argmax"):
        backend.max_pool2d_backward(y, argmax[..., :1], input_size=(4, 4), kernel_size=2)
    with pytest.raises(DtypeError, match="argmax must have dtype uint8"):
        backend.max_pool2d_backward(y, argmax.astype(int), input_size=(4, 4), kernel_size=2)
    with pytest.raises(ShapeError, match="output gradient"):
        backend.avg_pool2d_backward(y[..., :1], input_size=(4, 4), kernel_size=2)
    with pytest.raises(ShapeError, match="4 dimensions"):
        backend.adaptive_avg_pool2d_forward(numpy.zeros((2, 2)), output_size=1)
    with pytest.raises(ShapeError, match="at least one pixel"):
        backend.adaptive_avg_pool2d_forward(numpy.zeros((2, 2, 0, 3)), output_size=1)
    with pytest.raises(ShapeError, match="at least one pixel"):
        backend.adaptive_avg_pool2d_backward(numpy.zeros((2, 2, 1, 1)), input_size=(0, 3))
    with pytest.raises(ProblemError, match="output_size"):
        backend.adaptive_avg_pool2d_forward(x, output_size=0)
