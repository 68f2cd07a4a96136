"""Convolution, activation and max pooling as one kernel, against loops in float64 and against the two kernels."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpucnn_kernels as kernels
from gpucnn_kernels import (
    ArgumentError,
    Conv2dProblem,
    LayoutError,
    Pool2dProblem,
    ProblemError,
    conv2d_cost,
    conv2d_forward,
    conv2d_max_pool,
    conv2d_max_pool2d_forward,
    conv2d_max_pool2d_pays,
    max_pool2d_backward,
    max_pool2d_forward,
)
from gpucnn_kernels.gpu import H200
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


@pytest.fixture(params=["wide", "medium", "narrow"])
def tile(request, monkeypatch):
    """Each kernel for 2 x 2 windows, whatever the size of the problem; of other windows there is one."""
    usual, used = conv2d_max_pool.plan, set()

    def forced(problem, window, dtype, gpu):
        every = conv2d_max_pool.kernels_for(window, dtype)
        kernels = tuple(kernel for kernel in every if kernel.name.endswith(request.param)) or every
        used.update(kernel.name for kernel in kernels)
        return usual(problem, window, dtype, gpu, kernels)

    monkeypatch.setattr(conv2d_max_pool, "plan", forced)
    yield request.param
    assert f"conv2d_max_pool_halves_{request.param}" in used


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


# ---------------------------------------------------------------- plans


def test_windows_in_parts(monkeypatch):
    """Where whole ones do not fit in shared memory: some rows of them at a time, or some places of a row."""
    usual, parts = conv2d_max_pool.plan, set()
    problems = {
        "long": (Conv2dProblem.from_shapes((2, 1, 4, 240), (3, 1, 2, 3)), pool((1, 200), (1, 7), (0, 3))),
        "far": (
            Conv2dProblem.from_shapes((1, 1, 30, 190), (5, 1, 2, 2)),
            pool((12, 20), (3, 5), (0, 0), (2, 9)),
        ),
        "high": (Conv2dProblem.from_shapes((2, 2, 60, 9), (9, 2, 3, 2), stride=2), pool((25, 3), (2, 1), (5, 1))),
        "dilated": (ALL["k3-same"], pool((3, 2), (1, 2), (1, 1), (2, 3), ceil_mode=True)),
        "slices": (ALL["lenet-2"], HALVES),
    }

    def forced(problem, window, dtype, gpu):
        made = usual(problem, window, dtype, gpu, most_bytes=600 * (8 if dtype == "float64" else 4))
        parts.add((made.places_down < window.R, made.places_across < window.S))
        return made

    monkeypatch.setattr(conv2d_max_pool, "plan", forced)
    for dtype in ("float32", "float64", "bfloat16"):
        for name, (problem, window) in problems.items():
            exact, plain = (activations.elementwise(activations.relu, array) for array in sums(problem, dtype))
            truth, close = pooled(exact, window)[0], pooled(wide(cast(plain, dtype)), window)[0]
            for arrange in LAYOUTS.values():
                y, argmax = run(problem, window, dtype, arrange, activation="relu")
                bound = error_bound(close, truth, dtype)
                assert max_error(wide(y), truth.astype(numpy.float64)) <= bound, f"{name}, {dtype}"
                if problem.C <= 4:
                    expected, places = one_after_the_other(problem, window, dtype, arrange, activation="relu")
                    numpy.testing.assert_array_equal(wide(y), wide(expected), name)
                    numpy.testing.assert_array_equal(argmax, places, name)
                alone = run(problem, window, dtype, arrange, activation="relu", with_argmax=False)
                numpy.testing.assert_array_equal(wide(alone), wide(y), name)
    assert parts == {(False, False), (True, False), (True, True), (False, True)}


problems = st.builds(
    lambda n, c, k, height, width, kernel, stride, size, step, pad, dilation: (
        Conv2dProblem.from_shapes(
            (n, c, height + kernel, width + kernel), (k, c, kernel, kernel), stride=stride, padding=kernel // 2
        ),
        {"kernel_size": size, "stride": step, "padding": min(pad, size // 2), "dilation": dilation},
    ),
    st.integers(0, 300), st.integers(1, 40), st.integers(1, 70), st.integers(60, 200), st.integers(60, 200),
    st.sampled_from([1, 2, 3, 5, 11]), st.integers(1, 3), st.integers(1, 16), st.integers(1, 20),
    st.integers(0, 8), st.integers(1, 2),
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(problems, st.sampled_from(["float32", "float64"]), st.sampled_from([2 << 10, 48 << 10]))
def test_a_plan_covers_everything_and_fits(given_problem, dtype, most_bytes):
    problem, window = given_problem
    try:
        window = Pool2dProblem.from_shapes(problem.output_shape, **window)
    except ProblemError:
        return
    made = conv2d_max_pool.plan(problem, window, dtype, H200, most_bytes=most_bytes)
    plan, patch, item = made.plan, made.plan.patch, 8 if dtype == "float64" else 4
    kernel = next(each for each in conv2d_max_pool.kernels_for(window, dtype) if each.name == plan.kernel)
    teams = plan.threads // patch["threads"]
    assert plan.threads % patch["threads"] == patch["threads"] % 32 == 0
    assert plan.threads <= kernel.most_threads
    # Pairs of quads, one below the other: as many as the threads of a team make.
    pairs = -(-patch["images"] * patch["rows"] // 2) * patch["quads"]
    assert pairs <= patch["threads"] * kernel.quads * 4 // item // 2
    assert patch["blocks_down"] * made.rows >= window.P > (patch["blocks_down"] - 1) * made.rows
    assert patch["blocks_across"] * made.columns >= window.Q > (patch["blocks_across"] - 1) * made.columns
    assert patch["parts"] * teams * kernel.outputs >= problem.K
    assert patch["rows"] == (made.rows - 1) * window.stride[0] + (made.places_down - 1) * window.dilation[0] + 1
    columns = (made.columns - 1) * window.stride[1] + (made.places_across - 1) * window.dilation[1] + 1
    assert patch["quads"] * 4 >= columns
    assert made.places_across == window.S or made.places_down == 1, "in the order of the window's places"
    if "halves" in plan.kernel:
        assert (patch["rows"], patch["quads"] * 2) == (2 * made.rows, made.columns), "whole windows"
    images = patch["parts"] * patch["blocks_down"] * patch["blocks_across"] * -(-problem.N // patch["images"])
    assert plan.blocks == images
    exchanged = 0 if "halves" in plan.kernel else teams * 16 * patch["images"] * patch["rows"] * patch["quads"] * 4
    assert exchanged <= plan.shared_bytes <= most_bytes


def test_a_layer_with_few_channels_wastes_few():
    """Six channels of six, not of eight; and where blocks are few they have more warps, of fewer channels each."""

    def planned(n, c, size, k, kernel, **more):
        problem = Conv2dProblem.from_shapes((n, c, size, size), (k, c, kernel, kernel), **more)
        return conv2d_max_pool.plan(problem, Pool2dProblem.from_shapes(problem.output_shape, 2), "float32", H200)

    assert planned(512, 1, 28, 6, 5, padding=2).plan.kernel == "conv2d_max_pool_halves_medium"
    assert planned(64, 3, 224, 16, 3, stride=2).plan.kernel == "conv2d_max_pool_halves_wide"
    few = planned(128, 6, 14, 16, 5).plan
    assert few.kernel == "conv2d_max_pool_halves_narrow"
    assert few.threads == 128


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
    long = Conv2dProblem.from_shapes((1, 1 << 16, 1, 1 << 15), (1 << 16, 1, 1, 1), groups=1 << 16)
    conv2d_max_pool.check_rows(long, (1 << 16) - 1)
    with pytest.raises(
        ArgumentError, match=r"rows span less than 2\^31 numbers, got 32768 columns that are 65536"
    ):
        conv2d_max_pool.check_rows(long, 1 << 16)
    square = numpy.ones((1, 1, 2, 2), "f4")
    with pytest.raises(ArgumentError, match="out shares memory with x"):
        conv2d_max_pool2d_forward(square, square[:, :, :1, :1].copy(), pool_size=1, out=square)


def pays(problem, size=2, stride=None, dtype="float32", **more):
    window = Pool2dProblem.from_shapes(problem.output_shape, size, stride=stride)
    return conv2d_max_pool2d_pays(problem, window, dtype, **more)


def test_where_it_pays():
    """Of what is clear: first layers, whose result is several times what goes in, and LeNet's second one."""
    for n in (1, 32, 128, 512):
        first = Conv2dProblem.from_shapes((n, 1, 28, 28), (6, 1, 5, 5), padding=2)
        seed = Conv2dProblem.from_shapes((n, 3, 224, 224), (16, 3, 3, 3), stride=2)
        for problem in (first, Conv2dProblem.from_shapes((n, 6, 14, 14), (16, 6, 5, 5)), seed):
            assert pays(problem), problem
            # In 16 bits tensor cores are faster for large batches of large images.
            narrow = pays(problem, dtype="bfloat16", precision="bfloat16", channels_last=True)
            assert narrow or (problem is seed and n > 32), problem
    # Many channels are sums for tensor cores, or tiles whose blocks share more of what they read.
    for channels, size in ((64, 56), (256, 14)):
        deep = Conv2dProblem.from_shapes((64, channels, size, size), (channels, channels, 3, 3), padding=1)
        for more in ({}, {"precision": "float32"}, {"dtype": "float16", "precision": "float16"}):
            assert not pays(deep, **more)
    # Windows that overlap so far that most sums would be made several times.
    assert not pays(Conv2dProblem.from_shapes((64, 3, 64, 64), (16, 3, 5, 5), padding=2), 5, 1)
    assert not pays(ALL["dilated-block"], 17), "more than a byte of places"


def test_it_pays_by_the_seconds_of_both_ways():
    problem = Conv2dProblem.from_shapes((64, 3, 224, 224), (16, 3, 3, 3), stride=2)
    window = Pool2dProblem.from_shapes(problem.output_shape, 2)
    apart = conv2d_max_pool.seconds_apart(problem, window, "float32", H200)
    convolution = conv2d_cost.estimate("direct", "forward", problem, "float32", H200).seconds
    sums, left = 64 * 16 * 111 * 111, 64 * 16 * 55 * 55
    assert apart == pytest.approx(convolution + (4 * sums + 5 * left) / (0.9 * 4.8e12) + 3e-6)
    together = conv2d_max_pool.seconds(problem, window, "float32", H200)
    made = conv2d_max_pool.plan(problem, window, "float32", H200).plan
    assert together == pytest.approx(made.seconds(H200) + 3e-6)
    # Of 1 x 1 the memory is what takes the longest: x and what is left of 16 channels.
    thin = Conv2dProblem.from_shapes((64, 1, 512, 512), (1, 1, 1, 1))
    whole = Pool2dProblem.from_shapes(thin.output_shape, 2)
    moved = 4 * (64 * 512 * 512 + 1) + 5 * 64 * 256 * 256
    assert conv2d_max_pool.seconds(thin, whole, "float32", H200) >= moved / (0.9 * 4.8e12) + 3e-6
