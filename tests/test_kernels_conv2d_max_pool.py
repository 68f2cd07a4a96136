"""Convolution, activation and max pooling as one kernel, against loops in float64 and against the two kernels."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import numpy
import pytest

import gpucnn_kernels as kernels
from gpucnn_kernels import (
    ArgumentError,
    Conv2dProblem,
    LayoutError,
    Pool2dProblem,
    ProblemError,
    conv2d_forward,
    conv2d_max_pool,
    conv2d_max_pool2d_forward,
    conv2d_max_pool2d_pays,
    max_pool2d_backward,
    max_pool2d_forward,
)
from gpucnn_kernels.runtime.host import order_independent
from tests.accuracy import awkward, max_error
from tests.kernel_accuracy import on_the_host
from tests.kernel_arrays import DTYPES, LAYOUTS, accumulated, cast, error_bound, wide
from tests.oracles import activations, convolution, pooling
from tests.problems import ALL, arrays, geometry, options

__all__ = ["on_the_host"]

HALVES = SimpleNamespace(size=(2, 2), stride=(2, 2), padding=(0, 0), dilation=(1, 1), ceil_mode=False)


def pool(size, stride=None, padding=(0, 0), dilation=(1, 1), ceil_mode=False):
    return SimpleNamespace(
        size=size, stride=stride or size, padding=padding, dilation=dilation, ceil_mode=ceil_mode
    )


CASES = {
    "lenet-1": (ALL["lenet-1"], HALVES),
    "lenet-2": (ALL["lenet-2"], HALVES),  # 150 taps: more than a round
    "animalnet-1": (ALL["animalnet-1"], HALVES),
    "resnet-stem": (ALL["resnet-stem"], pool((3, 3), (2, 2), (1, 1))),
    "19-channels": (Conv2dProblem.from_shapes((3, 2, 9, 8), (19, 2, 3, 3), padding=1), HALVES),
    "one-number": (ALL["one-number"], pool((1, 1))),
    "halves-of-odd": (ALL["k3-same"], HALVES),
    "halves-of-odd-ceil": (ALL["k3-same"], pool((2, 2), ceil_mode=True)),
    "overlapping-padded": (ALL["k5-same"], pool((3, 3), (2, 2), (1, 1))),
    "stride-1": (ALL["k4"], pool((3, 3), (1, 1), (1, 1))),
    "gaps": (ALL["groups-2"], pool((2, 1), (3, 2))),
    "dilated": (ALL["k3-d2"], pool((2, 3), (1, 2), (1, 1), (2, 2), ceil_mode=True)),
    "steps-over-the-image": (ALL["one-number"], pool((2, 2), (1, 1), (1, 1), (1, 2))),
    "depthwise": (ALL["depthwise-multiplier-2"], pool((2, 2), (2, 2), (1, 1))),
    "strided": (ALL["k2-d3x1-s2x3"], pool((2, 2), (1, 1))),
    "padded-beyond": (ALL["padding-beyond-kernel"], HALVES),
    "one-row": (ALL["one-row"], pool((1, 2))),
    "whole": (ALL["k1"], pool((4, 6))),
}
ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": activations.relu,
    "leaky_relu": lambda x: activations.leaky_relu(x, 0.2),
    "gelu": activations.gelu,
    "tanh": numpy.tanh,
}


@cache
def inputs(problem, dtype):
    """(x, weight, bias) of this dtype."""
    return tuple(cast(array, dtype) for array in arrays(problem)[:3])


@cache
def sums(problem, dtype):
    """Of the given (rounded) numbers: in a longer type, and plainly in the accumulating one."""
    x, weight, bias = (wide(array) for array in inputs(problem, dtype))
    longer = numpy.longdouble if dtype == "float64" else numpy.float64
    return tuple(
        convolution.plain_forward(x, weight, geometry(problem), bias, kind)
        for kind in (longer, accumulated(dtype))
    )


def pooled(array, window):
    return pooling.max_pool(array, window.size, window.stride, window.padding, window.dilation, window.ceil_mode)


def pool_options(window):
    return {
        "pool_size": window.size,
        "pool_stride": window.stride,
        "pool_padding": window.padding,
        "pool_dilation": window.dilation,
        "ceil_mode": window.ceil_mode,
    }


def run(problem, window, dtype, arrange=numpy.ascontiguousarray, **more):
    x, weight, bias = inputs(problem, dtype)
    return conv2d_max_pool2d_forward(
        arrange(x), arrange(weight), bias, **pool_options(window), **options(problem), **more
    )


def one_after_the_other(problem, window, dtype, arrange=numpy.ascontiguousarray, **more):
    x, weight, bias = inputs(problem, dtype)
    algorithm = "direct" if problem.C // problem.groups <= 4 else "auto"
    y = conv2d_forward(arrange(x), arrange(weight), bias, algorithm=algorithm, **options(problem), **more)
    return max_pool2d_forward(
        y,
        kernel_size=window.size,
        stride=window.stride,
        padding=window.padding,
        dilation=window.dilation,
        ceil_mode=window.ceil_mode,
    )


@pytest.fixture(params=["wide", "narrow"])
def tile(request, monkeypatch):
    """Each kernel, whatever the size of the problem."""

    def forced(dtype, channels, pixels, groups):
        wide_one = 8 if dtype == "float64" else 16
        return request.param, wide_one if request.param == "wide" else 4, -(-pixels // 128)

    monkeypatch.setattr(conv2d_max_pool, "_tile", forced)
    return request.param


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_case(dtype, tile):
    for name, (problem, window) in CASES.items():
        exact, plain = (activations.elementwise(activations.relu, array) for array in sums(problem, dtype))
        truth, _ = pooled(exact, window)
        close, _ = pooled(wide(cast(plain, dtype)), window)
        for layout, arrange in LAYOUTS.items():
            label = f"{name}, {layout}, {tile}"
            y, argmax = run(problem, window, dtype, arrange, activation="relu")
            assert y.shape == argmax.shape == truth.shape, label
            assert str(y.dtype) == dtype, label
            assert argmax.dtype == numpy.uint8, label
            finite = numpy.isfinite(truth)  # minus infinity where a window holds nothing
            numpy.testing.assert_array_equal(wide(y)[~finite], truth[~finite], label)
            error = max_error(wide(y)[finite], truth[finite].astype(numpy.float64))
            bound = error_bound(close[finite], truth[finite], dtype)
            assert error <= bound, f"{label}: {error:.3g} > {bound:.3g}"
            if problem.C // problem.groups <= 4:  # "direct" adds up in the same order
                expected, places = one_after_the_other(problem, window, dtype, arrange, activation="relu")
                numpy.testing.assert_array_equal(wide(y), wide(expected), label)
                numpy.testing.assert_array_equal(argmax, places, label)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_activation(dtype, tile):
    for name in ("halves-of-odd", "depthwise"):
        problem, window = CASES[name]
        for function, oracle in ACTIVATIONS.items():
            exact, plain = (activations.elementwise(oracle, array) for array in sums(problem, dtype))
            truth = pooled(exact, window)[0].astype(numpy.float64)
            bound = error_bound(pooled(wide(cast(plain, dtype)), window)[0], truth, dtype)
            more = {"activation": function, "negative_slope": 0.2}
            y, argmax = run(problem, window, dtype, **more)
            assert max_error(wide(y), truth) <= bound, f"{name}, {function}, {tile}"
            numpy.testing.assert_array_equal(
                argmax, one_after_the_other(problem, window, dtype, **more)[1], function
            )


def test_the_winner_where_sums_are_added_up_in_another_order():
    """Its exact value is as near to the largest one as the roundings of two sums."""
    problem, window = CASES["lenet-2"]
    exact, plain = sums(problem, "float32")
    _, argmax = run(problem, window, "float32")
    n, k, p, q = numpy.indices(argmax.shape)
    won = exact[n, k, 2 * p + argmax // 2, 2 * q + argmax % 2]
    assert max_error(won, pooled(exact, window)[0]) <= 2 * error_bound(plain, exact, "float32")
    assert len(set(argmax.ravel().tolist())) == 4


@pytest.mark.parametrize("special", [numpy.nan, numpy.inf, -numpy.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_infinities_and_nans(dtype, special, tile):
    """As the two functions: the first NaN wins, minus infinity only where there is nothing else."""
    problem, window = Conv2dProblem.from_shapes((1, 1, 6, 6), (2, 1, 1, 1)), HALVES
    x = numpy.arange(36, dtype=dtype).reshape(1, 1, 6, 6)
    x[0, 0, 0, 1] = x[0, 0, 1, 0] = special
    x[0, 0, 2:4, 2:4] = special
    weight = numpy.array([1, -1], dtype).reshape(2, 1, 1, 1)
    y, argmax = conv2d_max_pool2d_forward(x, weight, pool_size=2)
    expected, places = max_pool2d_forward(conv2d_forward(x, weight, algorithm="direct"), kernel_size=2)
    numpy.testing.assert_array_equal(y, expected)
    numpy.testing.assert_array_equal(argmax, places)
    assert numpy.isnan(y).any() == numpy.isnan(special)
    assert problem.output_shape == (1, 2, 6, 6)
    assert pooled(wide(conv2d_forward(x, weight)), window)[1].tolist() == argmax.tolist()


def test_on_ties_the_first_place_wins(tile):
    """All sums of 16-bit numbers that round to one value are ties, and so are all that ReLU cuts off."""
    x = numpy.full((1, 1, 4, 4), -1, numpy.float32)
    ones = numpy.ones((1, 1, 1, 1), numpy.float32)
    y, argmax = conv2d_max_pool2d_forward(x, ones, pool_size=2, activation="relu")
    assert not y.any()
    assert not argmax.any()
    rising = numpy.arange(16).reshape(1, 4, 4) * 2.0**-16  # beside 1 below half of what 16 bits can tell
    two = numpy.stack([numpy.ones((1, 4, 4)), rising], axis=1).astype("f2")
    y, argmax = conv2d_max_pool2d_forward(two, numpy.ones((1, 2, 1, 1), "f2"), pool_size=2)
    assert (y == 1).all()
    assert not argmax.any()
    exact = (two.astype("f4"), numpy.ones((1, 2, 1, 1), "f4"))
    assert (conv2d_max_pool2d_forward(*exact, pool_size=2)[1] == 3).all(), "which 32 bits can"


# ---------------------------------------------------------------- layouts, out, order


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_out_of_either_layout(dtype, tile):
    for name in ("19-channels", "depthwise"):
        problem, window = CASES[name]
        expected, places = run(problem, window, dtype)
        for source in LAYOUTS.values():
            for target in LAYOUTS.values():
                out = target(cast(numpy.full(expected.shape, numpy.nan), dtype))
                y, argmax = run(problem, window, dtype, source, out=out)
                assert y is out
                numpy.testing.assert_array_equal(wide(out), wide(expected), name)
                numpy.testing.assert_array_equal(argmax, places, name)
                alone = run(problem, window, dtype, source, out=out, with_argmax=False)
                assert alone is out
                numpy.testing.assert_array_equal(wide(out), wide(expected), name)


def test_the_order_of_threads_does_not_matter(tile):
    for name in ("lenet-2", "19-channels", "overlapping-padded", "depthwise"):
        problem, window = CASES[name]
        for arrange in LAYOUTS.values():
            assert order_independent(lambda: run(problem, window, "float32", arrange)), name  # noqa: B023


def test_no_images_and_no_bias():
    problem, window = CASES["halves-of-odd"]
    x, weight, bias = inputs(problem, "float32")
    given = {**pool_options(window), **options(problem)}
    y, argmax = conv2d_max_pool2d_forward(x[:0], weight, **given)
    assert y.shape == argmax.shape == (0, 3, 3, 2)
    bare, _ = conv2d_max_pool2d_forward(x, weight, **given)
    zeros, _ = conv2d_max_pool2d_forward(x, weight, numpy.zeros_like(bias), **given)
    numpy.testing.assert_array_equal(bare, zeros)


def test_the_tile_is_wide_where_there_are_enough():
    assert conv2d_max_pool._tile("float32", 16, 512 * 14 * 14, 1)[:2] == ("wide", 16)
    assert conv2d_max_pool._tile("float64", 16, 512 * 14 * 14, 1)[:2] == ("wide", 8)
    assert conv2d_max_pool._tile("float32", 16, 25, 1) == ("narrow", 4, 1)
    assert conv2d_max_pool._tile("float32", 4, 512 * 14 * 14, 1)[:2] == ("narrow", 4)


# ---------------------------------------------------------------- training, and what is refused


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh"])
def test_the_gradient_needs_the_result_and_the_argmax_only(activation):
    problem, window = CASES["overlapping-padded"]
    x, weight, bias = inputs(problem, "float64")
    y, argmax = run(problem, window, "float64", activation=activation)
    dy = numpy.random.default_rng(3).standard_normal(y.shape)
    size = problem.P, problem.Q
    around = {
        "input_size": size, "kernel_size": window.size, "stride": window.stride, "padding": window.padding,
    }  # fmt: skip
    # Leaky ReLU's backward takes its input; the sign of its result is its input's.
    slope = getattr(kernels, f"{activation}_backward")
    ours = max_pool2d_backward(slope(dy, y), argmax, **around)
    result = conv2d_forward(x, weight, bias, algorithm="direct", activation=activation, **options(problem))
    _, places = max_pool2d_forward(result, kernel_size=window.size, stride=window.stride, padding=window.padding)
    plain = slope(max_pool2d_backward(dy, places, **around), result)
    numpy.testing.assert_allclose(ours, plain, rtol=0, atol=4 * 2.0**-52 * numpy.abs(plain).max())
    assert numpy.abs(plain).max() > 0.1


def test_what_does_not_fit():
    problem, _ = CASES["halves-of-odd"]
    x, weight, bias = inputs(problem, "float32")
    where = options(problem)
    with pytest.raises(ArgumentError, match=r"at most 256 places, got 17x16 = 272; call conv2d_forward and"):
        conv2d_max_pool2d_forward(
            numpy.ones((1, 1, 20, 20), "f4"), numpy.ones((1, 1, 1, 1), "f4"), pool_size=(17, 16)
        )
    with pytest.raises(ProblemError, match="the pooling window"):
        conv2d_max_pool2d_forward(x, weight, pool_size=9, **where)
    with pytest.raises(ArgumentError, match="activation must be one of"):
        conv2d_max_pool2d_forward(x, weight, pool_size=2, activation="swish", **where)
    with pytest.raises(ArgumentError, match=r"bias must have shape \(3,\)"):
        conv2d_max_pool2d_forward(x, weight, bias[:2].copy(), pool_size=2, **where)
    with pytest.raises(LayoutError, match="x of shape"):
        conv2d_max_pool2d_forward(awkward(x), weight, pool_size=2, **where)
    with pytest.raises(ArgumentError, match="out must have shape"):
        conv2d_max_pool2d_forward(x, weight, pool_size=2, out=numpy.empty((3, 3, 3, 3), "f4"), **where)
    square = numpy.ones((1, 1, 2, 2), "f4")
    with pytest.raises(ArgumentError, match="out shares memory with x"):
        conv2d_max_pool2d_forward(square, square[:, :, :1, :1].copy(), pool_size=1, out=square)


def test_where_it_pays():
    def pays(name, size=2, stride=None, **more):
        problem = ALL[name]
        return conv2d_max_pool2d_pays(
            problem, Pool2dProblem.from_shapes(problem.output_shape, size, stride=stride, **more)
        )

    assert pays("lenet-1")
    assert pays("lenet-2")
    assert pays("animalnet-1")
    assert not pays("resnet-stem", 3, 2, padding=1), "windows that overlap"
    assert not pays("animalnet-1", 2, dilation=2), "windows that reach over each other"
    assert not pays("dilated-block", 17), "more than a byte of places"
    assert pays("dilated-block", 16)
    assert not conv2d_max_pool2d_pays(
        Conv2dProblem.from_shapes((1, 32, 9, 9), (32, 32, 3, 3)), Pool2dProblem.from_shapes((1, 32, 7, 7), 2)
    ), "many channels"
