"""The pooling kernels on the host runtime, against loops over every window."""

import dataclasses
import functools

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpucnn_kernels as kernels
from gpucnn_kernels import ArgumentError, DtypeError, LayoutError, ProblemError, launch, pooling, runtime
from gpucnn_kernels.runtime.host import order_independent
from tests.accuracy import awkward, channels_last
from tests.kernel_accuracy import (
    DTYPES,
    EVERY_DTYPE,
    LAYOUTS,
    assert_close,
    follows,
    normal,
    on_the_host,
    placed,
    poisoned,
)
from tests.oracles import pooling as oracle
from tests.pool_problems import POOL_PROBLEMS, PoolCase

__all__ = ["on_the_host"]

UNDILATED = [case for case in POOL_PROBLEMS if case.dilation == (1, 1)]
OTHER = {"contiguous": "channels_last", "channels_last": "contiguous"}


def window(case):
    return case.kernel, case.stride, case.padding, case.dilation, case.ceil_mode


def argmax_dtype(case):
    return numpy.uint8 if case.kernel[0] * case.kernel[1] <= 256 else numpy.int32


def max_forward(x, case, **options):
    return kernels.max_pool2d_forward(x, **case.options, dilation=case.dilation, **options)


def max_backward(dy, argmax, case, **options):
    return kernels.max_pool2d_backward(
        dy, argmax, input_size=case.shape[2:], **case.options, dilation=case.dilation, **options
    )


@functools.cache
def ties(case):
    """(x, y, argmax): few different values, so that ties are everywhere, infinities and NaN among them."""
    random = numpy.random.default_rng(1)
    values = [-numpy.inf, numpy.inf, numpy.nan, -2.0, -1.0, 0.0, 1.5]
    x = random.choice(values, case.shape, p=[0.25, 0.05, 0.05, 0.2, 0.2, 0.15, 0.1])
    return x, *oracle.max_pool(x, *window(case))


@functools.cache
def integer_gradients(case):
    """(dy, argmax, dx): small integers, whose sums are exact in every dtype."""
    x = numpy.random.default_rng(5).integers(-3, 4, case.shape).astype(float)
    _, argmax = oracle.max_pool(x, *window(case))
    dy = numpy.random.default_rng(6).integers(-8, 9, argmax.shape).astype(float)
    return dy, argmax, oracle.max_pool_backward(dy, argmax, case.shape, *window(case))


# ---------------------------------------------------------------- max


@EVERY_DTYPE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_max_pool(dtype, layout):
    for case in POOL_PROBLEMS:
        x, expected, expected_argmax = ties(case)
        x = LAYOUTS[layout](x.astype(dtype))
        y, argmax = max_forward(x, case)
        assert y.dtype == dtype
        assert argmax.dtype == argmax_dtype(case)
        assert follows(y, x)
        assert follows(argmax, x)
        numpy.testing.assert_array_equal(y.astype(float), expected, case.name)
        numpy.testing.assert_array_equal(argmax, expected_argmax, case.name)


@EVERY_DTYPE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_max_pool_backward(dtype, layout):
    arrange = LAYOUTS[layout]
    for case in POOL_PROBLEMS:
        dy, argmax, expected = integer_gradients(case)
        dy = arrange(dy.astype(dtype))
        dx = max_backward(dy, arrange(argmax.astype(argmax_dtype(case))), case)
        assert dx.dtype == dtype
        assert follows(dx, dy)
        numpy.testing.assert_array_equal(dx.astype(float), expected, case.name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_max_pool_into_given_arrays_of_the_other_layout(layout):
    arrange, other = LAYOUTS[layout], LAYOUTS[OTHER[layout]]
    for case in POOL_PROBLEMS:
        x, expected, expected_argmax = ties(case)
        out = poisoned(expected.shape, numpy.float32, OTHER[layout])
        y, argmax = max_forward(arrange(x.astype(numpy.float32)), case, out=out)
        assert y is out
        numpy.testing.assert_array_equal(y, expected, case.name)
        numpy.testing.assert_array_equal(argmax, expected_argmax, case.name)
        dy, argmax, expected = integer_gradients(case)
        out = poisoned(case.shape, numpy.float32, layout)
        places = other(argmax.astype(argmax_dtype(case)))
        assert max_backward(arrange(dy.astype(numpy.float32)), places, case, out=out) is out
        numpy.testing.assert_array_equal(out, expected, case.name)


SMALL = [
    dataclasses.replace(case, shape=(case.shape[0], 16, *case.shape[2:]))
    for case in POOL_PROBLEMS
    if case.kernel in ((2, 2), (3, 3)) and case.dilation == (1, 1) and 0 not in case.shape
]


@pytest.fixture
def started(monkeypatch):
    """The names of the kernels that were started."""
    names = []
    start = launch.Call.launch

    def record(self, source, kernel, *arguments, **options):
        names.append(kernel)
        return start(self, source, kernel, *arguments, **options)

    monkeypatch.setattr(launch.Call, "launch", record)
    return names


@EVERY_DTYPE
@pytest.mark.parametrize("form", ["planes", "packs", "off the boundary", "layouts mixed"])
def test_small_windows(dtype, form, started, monkeypatch):
    monkeypatch.setattr(pooling, "_ENOUGH_BLOCKS", 2)  # threads go on to further planes
    arrange = numpy.ascontiguousarray if form == "planes" else channels_last
    own = form in ("planes", "packs")
    elements = int(form == "off the boundary")
    for case in SMALL:
        x, expected, expected_argmax = ties(case)
        out = numpy.ascontiguousarray if form == "layouts mixed" else arrange
        out = placed(out(numpy.full(expected.shape, 54321, dtype)), elements)
        started.clear()
        _, argmax = max_forward(placed(arrange(x.astype(dtype)), elements), case, out=out)
        assert started == [f"max_pool_forward_{form}" if own else "max_pool_forward"]
        numpy.testing.assert_array_equal(out.astype(float), expected, case.name)
        numpy.testing.assert_array_equal(argmax, expected_argmax, case.name)

        dy, argmax, expected = integer_gradients(case)
        out = numpy.ascontiguousarray if form == "layouts mixed" else arrange
        out = placed(out(numpy.full(case.shape, 54321, dtype)), elements)
        started.clear()
        max_backward(
            placed(arrange(dy.astype(dtype)), elements), arrange(argmax.astype(numpy.uint8)), case, out=out
        )
        own_backward = own and case.stride == (2, 2)
        assert started == [f"max_pool_backward_{form}" if own_backward else "max_pool_backward"]
        numpy.testing.assert_array_equal(out.astype(float), expected, case.name)


@EVERY_DTYPE
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["relu", "leaky_relu", "sigmoid", "tanh"])
def test_back_through_pooling_and_the_activation_before(dtype, layout, name):
    """The bits of two launches, as every pixel that several windows chose has one result."""
    slope = (
        {"negative_slope": 0.25} if name == "leaky_relu" else {}
    )  # exact, so that sums may be rounded before it
    arrange = LAYOUTS[layout]
    for number, case in enumerate(POOL_PROBLEMS):
        apart = all(s >= d * (k - 1) + 1 for s, d, k in zip(case.stride, case.dilation, case.kernel, strict=True))
        if not apart and name in ("sigmoid", "tanh"):
            continue
        x = arrange(getattr(kernels, f"{name}_forward")(normal(case.shape, number, dtype), **slope))
        y, argmax = max_forward(x, case)
        dy = arrange(normal(y.shape, number + 1, dtype))
        before = max_backward(dy, argmax, case, out=poisoned(case.shape, dtype, layout))
        wanted = getattr(kernels, f"{name}_backward")(before, x, **slope)
        for out in (None, poisoned(case.shape, dtype, OTHER[layout])):
            dx = max_backward(dy, argmax, case, y=y, activation=name, **slope, out=out)
            numpy.testing.assert_array_equal(dx, wanted, case.name)


def test_relu_before_pooling_stops_infinities():
    case = next(case for case in POOL_PROBLEMS if case.name == "halves")
    y, argmax = max_forward(normal(case.shape, 0, numpy.float32) - 1, case)
    relu = numpy.maximum(y, 0)
    assert (relu == 0).any()
    dy = numpy.where(relu > 0, numpy.float32(1), numpy.float32(numpy.inf))
    assert numpy.isfinite(max_backward(dy, argmax, case, y=relu, activation="relu")).all()


def test_max_pool_backward_keeps_infinities_where_they_belong():
    x = normal((1, 2, 7, 7), 7, numpy.float32)
    for stride in (1, 2, 3):
        y, argmax = kernels.max_pool2d_forward(x, kernel_size=2, stride=stride)
        dy = numpy.full(y.shape, numpy.inf, numpy.float32)
        dx = kernels.max_pool2d_backward(dy, argmax, input_size=(7, 7), kernel_size=2, stride=stride)
        expected = oracle.max_pool_backward(dy, argmax, x.shape, (2, 2), (stride, stride))
        numpy.testing.assert_array_equal(dx, expected)


def test_overlapping_half_precision_gradients_are_added_in_single():
    # 2048 + 1 is 2048 in float16: only the whole sum may be rounded.
    case = PoolCase("one pixel in every window", (1, 1, 5, 5), (3, 3), (1, 1))
    dy = numpy.ones((1, 1, 3, 3), numpy.float16)
    dy[0, 0, 0, 0] = 2048
    argmax = numpy.array([[8, 7, 6], [5, 4, 3], [2, 1, 0]], numpy.uint8).reshape(1, 1, 3, 3)
    dx = max_backward(dy, argmax, case)
    assert dx[0, 0, 2, 2] == 2056
    assert numpy.count_nonzero(dx) == 1


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_small_windows_of_random_problems(data):
    size, stride = data.draw(st.sampled_from([2, 3])), data.draw(st.integers(1, 3))
    padding = data.draw(st.tuples(st.integers(0, 1), st.integers(0, 1)))
    height, width = data.draw(st.integers(size, 11)), data.draw(st.integers(size, 11))
    shape = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 3, 4, 12])), height, width
    case = PoolCase("random", shape, (size, size), (stride, stride), padding, ceil_mode=data.draw(st.booleans()))
    arrange = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))]
    random = numpy.random.default_rng(data.draw(st.integers(0, 99)))
    x = random.choice([-numpy.inf, -1.0, 0.0, 1.0, numpy.nan], shape).astype(numpy.float32)
    with runtime.using("host"):
        y, argmax = max_forward(arrange(x), case)
        expected, expected_argmax = oracle.max_pool(x, *window(case))
        numpy.testing.assert_array_equal(y, expected)
        numpy.testing.assert_array_equal(argmax, expected_argmax)
        dy = arrange(random.integers(-9, 10, y.shape).astype(numpy.float32))
        dx = max_backward(dy, argmax, case, out=arrange(poisoned(shape, x.dtype)))
        numpy.testing.assert_array_equal(dx, oracle.max_pool_backward(dy, expected_argmax, shape, *window(case)))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_pooling_of_random_problems(data):
    kernel = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    stride = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = data.draw(st.integers(0, kernel[0] // 2)), data.draw(st.integers(0, kernel[1] // 2))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = data.draw(st.integers(least[0], least[0] + 6)), data.draw(st.integers(least[1], least[1] + 6))
    shape = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), *size
    case = PoolCase("random", shape, kernel, stride, padding, dilation, data.draw(st.booleans()))
    arrange = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))]
    random = numpy.random.default_rng(data.draw(st.integers(0, 99)))
    x = random.integers(-2, 3, shape).astype(numpy.float32)
    with runtime.using("host"):
        y, argmax = max_forward(arrange(x), case)
        expected, expected_argmax = oracle.max_pool(x, *window(case))
        numpy.testing.assert_array_equal(y, expected)
        numpy.testing.assert_array_equal(argmax, expected_argmax)
        dy = random.integers(-9, 10, y.shape).astype(numpy.float32)
        dx = max_backward(arrange(dy), argmax, case, out=arrange(poisoned(shape, x.dtype)))
        numpy.testing.assert_array_equal(dx, oracle.max_pool_backward(dy, expected_argmax, shape, *window(case)))
        if dilation == (1, 1):
            pad = data.draw(st.booleans())
            mean = kernels.avg_pool2d_forward(arrange(x), **case.options, count_include_pad=pad)
            expected = oracle.avg_pool(x, kernel, stride, padding, case.ceil_mode, pad)
            assert_close(mean, expected, 2)
            share = kernels.avg_pool2d_backward(
                arrange(dy), input_size=size, **case.options, count_include_pad=pad
            )
            expected = oracle.avg_pool_backward(dy, shape, kernel, stride, padding, case.ceil_mode, pad)
            assert_close(share, expected, 40)


# ---------------------------------------------------------------- average


@functools.cache
def averages(case, count_include_pad, dtype):
    """(x, y, dy, dx); x and dy already rounded to the dtype."""
    options = case.kernel, case.stride, case.padding, case.ceil_mode, count_include_pad
    x = normal(case.shape, 8, dtype)
    y = oracle.avg_pool(x, *options)
    dy = normal(y.shape, 9, dtype)
    return x, y, dy, oracle.avg_pool_backward(dy, case.shape, *options)


@EVERY_DTYPE
@pytest.mark.parametrize("count_include_pad", [True, False])
def test_avg_pool(dtype, count_include_pad):
    for case in UNDILATED:
        x, expected, dy, expected_dx = averages(case, count_include_pad, dtype)
        options = {**case.options, "count_include_pad": count_include_pad}
        for arrange in LAYOUTS.values():
            y = kernels.avg_pool2d_forward(arrange(x), **options)
            assert y.dtype == dtype
            assert follows(y, arrange(x))
            assert_close(y, expected, abs(x).max(initial=0).astype(float), case.name)
            dx = kernels.avg_pool2d_backward(arrange(dy), input_size=case.shape[2:], **options)
            assert follows(dx, arrange(dy))
            assert_close(dx, expected_dx, abs(dy).max(initial=0).astype(float), case.name)


@EVERY_DTYPE
@pytest.mark.parametrize("form", ["planes", "packs", "off the boundary"])
def test_averages_of_one_layout(dtype, form, started, monkeypatch):
    monkeypatch.setattr(pooling, "_ENOUGH_BLOCKS", 2)  # threads go on to further planes
    arrange = numpy.ascontiguousarray if form == "planes" else channels_last
    elements = int(form == "off the boundary")
    cases = [*SMALL, PoolCase("whole image", (2, 16, 5, 7), (5, 7), (5, 7))]
    for case in cases:
        for count_include_pad in (True, False):
            x, expected, dy, expected_dx = averages(case, count_include_pad, dtype)
            options = {**case.options, "count_include_pad": count_include_pad}
            started.clear()
            y = kernels.avg_pool2d_forward(
                placed(arrange(x), elements), out=placed(arrange(expected.astype(dtype)), elements), **options
            )
            small, apart = case in SMALL, min(numpy.subtract(case.stride, case.kernel)) >= 0
            if expected[0, 0].size > 1:  # an output of one pixel has both layouts
                suffix = f"_{form}" if small and not elements else ""
                assert started in (["average_pool_forward_large_window"], [f"average_pool_forward{suffix}"])
            assert_close(y, expected, abs(x).max().astype(float), case.name)
            started.clear()
            dx = placed(arrange(numpy.full(case.shape, 54321, dtype)), elements)
            kernels.avg_pool2d_backward(
                placed(arrange(dy), elements), input_size=case.shape[2:], out=dx, **options
            )
            suffix = f"_{form}" if apart and not elements else ""
            assert started == [f"average_pool_backward{suffix}"]
            assert_close(dx, expected_dx, abs(dy).max().astype(float), case.name)


ADAPTIVE = [
    ((2, 3, 7, 9), (1, 1)),
    ((2, 3, 7, 9), (3, 4)),
    ((2, 8, 6, 9), (3, 3)),  # the windows of a pooling with this stride
    ((1, 2, 5, 5), (5, 5)),
    ((1, 2, 3, 4), (5, 7)),  # more outputs than pixels
    ((1, 5, 40, 33), (1, 1)),  # a warp a plane
    ((1, 2, 29, 70), (3, 2)),  # a warp a window of parts of lines
    ((2, 3, 24, 9), (2, 1)),  # and of whole lines
    ((1, 1, 1, 1), (2, 3)),
    ((0, 3, 6, 6), (2, 2)),
]


@EVERY_DTYPE
def test_adaptive_avg_pool(dtype):
    for shape, size in ADAPTIVE:
        x = normal(shape, 10, dtype)
        expected = oracle.adaptive_avg_pool(x, size)
        dy = normal(expected.shape, 11, dtype)
        expected_dx = oracle.adaptive_avg_pool_backward(dy, shape[2:])
        for arrange in LAYOUTS.values():
            y = kernels.adaptive_avg_pool2d_forward(arrange(x), output_size=size)
            assert y.dtype == dtype
            assert follows(y, arrange(x))
            assert_close(y, expected, abs(x).max(initial=0).astype(float), f"{shape} to {size}")
            dx = kernels.adaptive_avg_pool2d_backward(arrange(dy), input_size=shape[2:])
            assert follows(dx, arrange(dy))
            # More outputs than pixels: a pixel adds up several gradients.
            scale = abs(dy).max(initial=0).astype(float) * max(1, dy.size / max(1, x.size))
            assert_close(dx, expected_dx, scale, f"{shape} to {size}")
    x = normal((1, 2, 4, 4), 0, dtype)
    assert kernels.adaptive_avg_pool2d_forward(x, output_size=2).shape == (1, 2, 2, 2)


def test_average_into_given_arrays_of_the_other_layout():
    for shape, size in ADAPTIVE:
        x = normal(shape, 12, numpy.float64)
        expected = oracle.adaptive_avg_pool(x, size)
        for layout, arrange in LAYOUTS.items():
            out = poisoned(expected.shape, numpy.float64, OTHER[layout])
            assert kernels.adaptive_avg_pool2d_forward(arrange(x), output_size=size, out=out) is out
            assert_close(out, expected, abs(x).max(initial=0), f"{shape} to {size}")
            dx = poisoned(shape, numpy.float64, layout)
            assert kernels.adaptive_avg_pool2d_backward(out, input_size=shape[2:], out=dx) is dx
            assert_close(dx, oracle.adaptive_avg_pool_backward(out, shape[2:]), 2 * expected.size, str(shape))


def test_more_planes_than_a_grid_has_rows(monkeypatch):
    # The kernels walk through what the grid does not cover; real grids cover 65,535 rows.
    monkeypatch.setattr(pooling, "_MOST_BLOCKS_Y", 2)
    case = PoolCase("many planes", (7, 40, 12, 11), (3, 2), (2, 2), (1, 1))
    x = normal(case.shape, 13, numpy.float32)
    expected, expected_argmax = oracle.max_pool(x, *window(case))
    dy = normal(expected.shape, 14, numpy.float32)
    for arrange in LAYOUTS.values():
        y, argmax = max_forward(arrange(x), case)
        numpy.testing.assert_array_equal(y, expected)
        numpy.testing.assert_array_equal(argmax, expected_argmax)
        dx = max_backward(arrange(dy), argmax, case)
        assert_close(dx, oracle.max_pool_backward(dy, argmax, case.shape, *window(case)), 4)
        mean = kernels.avg_pool2d_forward(arrange(x), **case.options)
        assert_close(mean, oracle.avg_pool(x, case.kernel, case.stride, case.padding), 4)


# ---------------------------------------------------------------- everything


def test_no_result_depends_on_the_order_of_threads():
    case = PoolCase("overlapping", (2, 4, 12, 14), (3, 3), (2, 2), (1, 1))
    for arrange in LAYOUTS.values():
        x = arrange(normal(case.shape, 15, numpy.float32))

        def run(x=x, arrange=arrange):
            y, argmax = max_forward(x, case)
            dy = arrange(normal(y.shape, 16, numpy.float32))
            return [
                y,
                argmax,
                max_backward(dy, argmax, case),
                kernels.avg_pool2d_forward(x, **case.options),
                kernels.avg_pool2d_backward(dy, input_size=case.shape[2:], **case.options),
                kernels.adaptive_avg_pool2d_forward(x, output_size=(1, 2)),
                kernels.adaptive_avg_pool2d_backward(dy, input_size=(9, 20)),
            ]

        assert order_independent(run)


def test_errors():
    x = numpy.zeros((1, 2, 6, 6), numpy.float32)
    y, argmax = kernels.max_pool2d_forward(x, kernel_size=2)
    with pytest.raises(LayoutError, match="neither contiguous nor channels-last"):
        kernels.max_pool2d_forward(awkward(x), kernel_size=2)
    with pytest.raises(LayoutError, match="neither contiguous nor channels-last"):
        kernels.avg_pool2d_forward(x.transpose(0, 1, 3, 2), kernel_size=2)
    with pytest.raises(LayoutError, match="out"):
        kernels.adaptive_avg_pool2d_forward(x, output_size=3, out=awkward(numpy.zeros((1, 2, 3, 3), x.dtype)))
    with pytest.raises(ArgumentError, match="4 dimensions"):
        kernels.avg_pool2d_forward(x[0], kernel_size=2)
    with pytest.raises(DtypeError, match="x must be one of float32"):
        kernels.max_pool2d_forward(x.astype(numpy.int32), kernel_size=2)
    with pytest.raises(ProblemError, match="larger than the padded input"):
        kernels.avg_pool2d_forward(x, kernel_size=9)
    with pytest.raises(ProblemError, match="at most half of the window"):
        kernels.max_pool2d_forward(x, kernel_size=2, padding=2)
    with pytest.raises(ArgumentError, match=r"dy must have shape \(1, 2, 2, 2\), got \(1, 2, 3, 3\)"):
        kernels.max_pool2d_backward(y, argmax, input_size=(6, 6), kernel_size=3)
    with pytest.raises(ArgumentError, match=r"argmax must have shape \(1, 2, 3, 3\)"):
        kernels.max_pool2d_backward(y, argmax[:, :1], input_size=(6, 6), kernel_size=2)
    with pytest.raises(DtypeError, match="argmax must be uint8, got int32"):
        kernels.max_pool2d_backward(y, argmax.astype(numpy.int32), input_size=(6, 6), kernel_size=2)
    with pytest.raises(ArgumentError, match="dy must have shape"):
        kernels.avg_pool2d_backward(y, input_size=(6, 6), kernel_size=3)
    with pytest.raises(ArgumentError, match="out must have shape"):
        kernels.avg_pool2d_forward(x, kernel_size=2, out=x)
    with pytest.raises(DtypeError, match="out is float64, but x is float32"):
        kernels.max_pool2d_forward(x, kernel_size=2, out=numpy.zeros(y.shape))
    with pytest.raises(ArgumentError, match="out shares memory with x"):
        kernels.max_pool2d_forward(x, kernel_size=1, out=x)
    with pytest.raises(ProblemError, match="at least one pixel"):
        kernels.adaptive_avg_pool2d_forward(x[:, :, :0], output_size=1)
    with pytest.raises(ProblemError, match="at least one pixel"):
        kernels.adaptive_avg_pool2d_backward(x, input_size=(0, 3))
    with pytest.raises(ProblemError, match="gives at least one pixel"):
        kernels.adaptive_avg_pool2d_backward(x[:, :, :, :0], input_size=(3, 3))
    with pytest.raises(ProblemError, match="output_size"):
        kernels.adaptive_avg_pool2d_forward(x, output_size=0)


def test_activations_that_pooling_does_not_go_back_through():
    dy, argmax = numpy.zeros((1, 1, 2, 2), numpy.float32), numpy.zeros((1, 1, 2, 2), numpy.uint8)
    options = {"input_size": (4, 4), "kernel_size": 2}
    with pytest.raises(ArgumentError, match=r"back through identity, relu, .*, got activation='gelu'"):
        kernels.max_pool2d_backward(dy, argmax, **options, y=dy, activation="gelu")
    with pytest.raises(ArgumentError, match="by the pooled result: give it as y"):
        kernels.max_pool2d_backward(dy, argmax, **options, activation="relu")
    with pytest.raises(ArgumentError, match="where negative_slope is above 0, got -1"):
        kernels.max_pool2d_backward(dy, argmax, **options, y=dy, activation="leaky_relu", negative_slope=-1)
    with pytest.raises(ArgumentError, match=r"y has shape \(1, 1, 2, 1\), but dy has shape \(1, 1, 2, 2\)"):
        kernels.max_pool2d_backward(dy, argmax, **options, y=dy[..., :1].copy(), activation="relu")


def test_one_channel_is_both_layouts():
    x = normal((2, 1, 6, 5), 17, DTYPES["float32"])
    expected, _ = kernels.max_pool2d_forward(x, kernel_size=2)
    y, _ = kernels.max_pool2d_forward(channels_last(x), kernel_size=2)
    numpy.testing.assert_array_equal(y, expected)
    assert y.flags.c_contiguous
    assert y.transpose(0, 2, 3, 1).flags.c_contiguous
