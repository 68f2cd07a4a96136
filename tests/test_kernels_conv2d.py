"""The convolution kernels, forward and input gradient, on the host runtime, against oracles written as loops."""

from __future__ import annotations

from functools import cache

import numpy
import pytest

from gpucnn_kernels import (
    Conv2dProblem,
    ProblemError,
    conv2d_algorithms,
    conv2d_backward_data,
    conv2d_forward,
)
from gpucnn_kernels import conv2d_forward_paths as forward_paths
from gpucnn_kernels.conv2d_tiles import IMPLICIT_TILES, IMPLICIT_TILES_FLOAT64, implicit_tile
from gpucnn_kernels.gpu import H200
from gpucnn_kernels.runtime.host import order_independent
from tests.accuracy import channels_last, max_error
from tests.kernel_accuracy import on_the_host
from tests.kernel_arrays import DTYPES, EPSILON, LAYOUTS, accumulated, cast, error_bound, wide
from tests.oracles import activations, convolution
from tests.problems import ALL, SMALL, arrays, geometry, options

__all__ = ["on_the_host"]

FORWARD = ("implicit_gemm", "direct", "depthwise", "im2col")
BACKWARD_DATA = ("phases", "direct", "dilated", "col2im", "scatter", "depthwise")
MIXED = ("k3-s2", "groups-2", "rectangular-2x5", "depthwise-s2", "k1", "resnet-down")  # layouts combined freely
ACTIVATIONS = {
    "relu": activations.relu,
    "leaky_relu": lambda x: activations.leaky_relu(x, 0.2),
    "relu6": activations.relu6,
    "sigmoid": activations.sigmoid,
    "tanh": numpy.tanh,
    "gelu": activations.gelu,
    "gelu_tanh": activations.gelu_tanh,
    "silu": activations.silu,
}


def shaped(input_shape, weight_shape, **parameters):
    return Conv2dProblem.from_shapes(input_shape, weight_shape, **parameters)


# More channels than the shared list has: several tiles of them, full and not, and long sums.
WIDE = {
    "outputs-70": shaped((2, 13, 9, 8), (70, 13, 3, 3), stride=2, padding=1),
    "outputs-130-k1": shaped((3, 36, 7, 7), (130, 36, 1, 1)),
    "groups-2-of-40": shaped((1, 80, 6, 9), (80, 40, 3, 2), dilation=2, padding=2, groups=2),
    "wide-image": shaped((1, 34, 5, 150), (66, 34, 1, 3), padding=(0, 1)),
    "k4-s3": shaped((2, 41, 13, 11), (37, 41, 4, 4), stride=3, padding=2),
    "long-sums": shaped((1, 500, 5, 5), (6, 500, 3, 3), padding=1),
    "eleven": shaped((1, 3, 40, 37), (18, 3, 11, 11), stride=4, padding=2),  # more taps than a round of "direct"
}


def runs(algorithm, problem):
    depth = problem.C // problem.groups
    return depth <= {"direct": 8, "depthwise": 1}.get(algorithm, depth)


@cache
def inputs(problem, dtype):
    """(x, weight, bias, dy) of this dtype."""
    return tuple(cast(array, dtype) for array in arrays(problem))


@cache
def truth_and_plain(problem, dtype, direction):
    """The sums of the given (rounded) numbers without error, and made plainly in the accumulating dtype."""
    x, weight, bias, dy = (wide(array) for array in inputs(problem, dtype))
    where, summed = geometry(problem), accumulated(dtype)
    longer = numpy.longdouble if dtype == "float64" else numpy.float64
    small = problem in SMALL.values()
    if direction == "forward":
        plain = convolution.plain_forward(x, weight, where, bias, summed)
        if small:
            return convolution.forward_loops(x, weight, where, bias), plain
        return convolution.plain_forward(x, weight, where, bias, longer), plain
    shape = problem.input_shape
    plain = convolution.plain_backward_data(dy, weight, shape, where, summed)
    if small:
        return convolution.backward_data_loops(dy, weight, shape, where), plain
    return convolution.plain_backward_data(dy, weight, shape, where, longer), plain


def assert_right(result, problem, dtype, direction, label):
    truth, plain = truth_and_plain(problem, dtype, direction)
    assert result.shape == truth.shape, label
    assert str(result.dtype) == dtype, label
    error, bound = max_error(wide(result), truth), error_bound(plain, truth, dtype)
    assert error <= bound, f"{label}: {error:.3g} > {bound:.3g}"


def forward(problem, dtype, algorithm="auto", arrange=numpy.ascontiguousarray, arrange_weight=None, **more):
    x, weight, bias, _ = inputs(problem, dtype)
    weight = (arrange_weight or arrange)(weight)
    return conv2d_forward(arrange(x), weight, bias, algorithm=algorithm, **options(problem), **more)


def backward(problem, dtype, algorithm="auto", arrange=numpy.ascontiguousarray, arrange_weight=None, **more):
    _, weight, _, dy = inputs(problem, dtype)
    weight = (arrange_weight or arrange)(weight)
    size = problem.H, problem.W
    return conv2d_backward_data(
        arrange(dy), weight, input_size=size, algorithm=algorithm, **options(problem), **more
    )


def is_laid_out(array, layout):
    dense = array if layout == "contiguous" else array.transpose(0, 2, 3, 1)
    return dense.flags.c_contiguous


def result_layout(source_shape, layout):
    """Of a result: its source's. One of one pixel or one channel is in both layouts, its result contiguous."""
    both = all(is_laid_out(numpy.empty(source_shape), one) for one in LAYOUTS)
    return "contiguous" if both else layout


def every_combination(name):
    both = [(one, one) for one in LAYOUTS]
    return both + ([("contiguous", "channels_last"), ("channels_last", "contiguous")] if name in MIXED else [])


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("algorithm", ["auto", *FORWARD])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(dtype, algorithm):
    for name, problem in ALL.items():
        if not runs(algorithm, problem):
            continue
        for layout, weights in every_combination(name):
            y = forward(problem, dtype, algorithm, LAYOUTS[layout], LAYOUTS[weights])
            assert_right(y, problem, dtype, "forward", f"{name}, x {layout}, weight {weights}")
            assert is_laid_out(y, result_layout(problem.input_shape, layout)), name


@pytest.mark.parametrize("algorithm", ["auto", *BACKWARD_DATA])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_data(dtype, algorithm):
    for name, problem in ALL.items():
        if not runs(algorithm, problem):
            continue
        for layout, weights in every_combination(name):
            dx = backward(problem, dtype, algorithm, LAYOUTS[layout], LAYOUTS[weights])
            assert_right(dx, problem, dtype, "backward_data", f"{name}, dy {layout}, weight {weights}")
            assert is_laid_out(dx, result_layout(problem.output_shape, layout)), name


@pytest.mark.parametrize("size", ["small", "medium", "large"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tile_size(dtype, size, monkeypatch):
    used = set()

    def forced(gpu, dtype, *sizes):
        tiles = IMPLICIT_TILES_FLOAT64 if dtype == "float64" else IMPLICIT_TILES
        [tile] = [tile for tile in tiles if tile.name.endswith(size)]
        used.add(tile.name)
        return tile

    monkeypatch.setattr(forward_paths, "implicit_tile", forced)
    for name, problem in WIDE.items():
        for layout, arrange in LAYOUTS.items():
            y = forward(problem, dtype, "implicit_gemm", arrange)
            assert_right(y, problem, dtype, "forward", f"{name}, {layout}")
            for algorithm in ("phases", "dilated"):
                dx = backward(problem, dtype, algorithm, arrange)
                assert_right(dx, problem, dtype, "backward_data", f"{name}, {algorithm}, {layout}")
    assert used == {f"conv2d_implicit_gemm_{size}"}


def test_the_tile_is_as_large_as_is_filled_and_there_are_enough_of():
    vgg, resnet = shaped((64, 64, 56, 56), (64, 64, 3, 3)), shaped((256, 128, 28, 28), (128, 128, 3, 3))

    def tile(dtype, channels, positions):
        return implicit_tile(H200, dtype, channels, positions, 1, 576.0).name.removeprefix("conv2d_implicit_gemm_")

    for dtype in ("float32", "float16", "bfloat16"):
        assert tile(dtype, resnet.K, resnet.N * resnet.P * resnet.Q) == "large"
        assert tile(dtype, vgg.K, vgg.N * vgg.P * vgg.Q) == "medium"
        assert tile(dtype, 192, 1 << 20) == "medium"  # a quarter of the large tiles would be empty
        assert tile(dtype, 32, 1 << 30) == "small"
        assert tile(dtype, 512, 49) == "small"
    assert tile("float64", vgg.K, vgg.N * vgg.P * vgg.Q) != "small"
    assert tile("float64", 32, 1 << 30) == "small"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_paths_on_wide_problems(dtype):
    for name, problem in WIDE.items():
        for algorithm in ("direct", "im2col"):
            if runs(algorithm, problem):
                for layout, arrange in LAYOUTS.items():
                    y = forward(problem, dtype, algorithm, arrange)
                    assert_right(y, problem, dtype, "forward", f"{name}, {algorithm}, {layout}")
        for algorithm in ("col2im", "scatter"):
            dx = backward(problem, dtype, algorithm)
            assert_right(dx, problem, dtype, "backward_data", f"{name}, {algorithm}")


def test_random_problems():
    """Strides, dilations and kernels whose common divisors, gaps and overlaps nobody thought of."""
    generator = numpy.random.default_rng(20)
    done = 0
    while done < 120:
        numbers = {
            "stride": tuple(int(n) for n in generator.integers(1, 7, 2)),
            "dilation": tuple(int(n) for n in generator.integers(1, 7, 2)),
            "padding": tuple(int(n) for n in generator.integers(0, 6, 4)),
            "groups": int(generator.integers(1, 3)),
        }
        size, kernel = generator.integers(1, 15, 2), generator.integers(1, 5, 2)
        weight_shape = (2 * numbers["groups"], int(generator.integers(1, 4)), *map(int, kernel))
        try:
            problem = shaped((2, weight_shape[1] * numbers["groups"], *map(int, size)), weight_shape, **numbers)
        except ProblemError:
            continue
        done += 1
        for algorithm in ("implicit_gemm", "direct"):
            assert_right(forward(problem, "float64", algorithm), problem, "float64", "forward", str(problem))
        for algorithm in BACKWARD_DATA:
            if runs(algorithm, problem):
                dx = backward(problem, "float64", algorithm)
                assert_right(dx, problem, "float64", "backward_data", f"{algorithm}, {problem}")


def test_more_units_than_blocks(monkeypatch):
    """Phases and groups beyond a grid's 65,535 blocks along z are done by the blocks that there are."""
    for name in ("k2-d3x1-s2x3", "groups-3-s2", "stride-larger-than-image", "depthwise-multiplier-2"):
        y, dx = forward(ALL[name], "float32", "implicit_gemm"), backward(ALL[name], "float32", "phases")
        for most in (1, 2):
            monkeypatch.setattr(forward_paths, "_MOST_UNITS", most)
            numpy.testing.assert_array_equal(forward(ALL[name], "float32", "implicit_gemm"), y, name)
            numpy.testing.assert_array_equal(backward(ALL[name], "float32", "phases"), dx, name)
            monkeypatch.undo()


def test_columns_are_made_for_some_images_at_a_time(monkeypatch):
    plenty = forward_paths.WORKSPACE_BYTES
    for name in ("k3-same", "k1-grouped", "lenet-2"):
        results = []
        for most in (plenty, 1, 5000):
            monkeypatch.setattr(forward_paths, "WORKSPACE_BYTES", most)
            for arrange in LAYOUTS.values():
                y = forward(ALL[name], "float32", "im2col", arrange)
                dx = backward(ALL[name], "float32", "col2im", arrange)
                assert_right(y, ALL[name], "float32", "forward", f"{name}, {most}")
                assert_right(dx, ALL[name], "float32", "backward_data", f"{name}, {most}")
            results.append(forward_paths.batches(ALL[name], "float32", pointwise=False))
        assert len(results[0]) == 1
        assert len(results[1]) == ALL[name].N


def test_phases_leave_out_the_zeros_between_rows():
    """Zero times infinity is NaN: it shows which products are made."""
    dy, weight = numpy.ones((1, 1, 3, 3), numpy.float32), numpy.ones((1, 1, 3, 3), numpy.float32)
    weight[0, 0, 1, 1] = numpy.inf  # meets input pixels (2p, 2q) at padding 1
    both = {
        algorithm: conv2d_backward_data(dy, weight, input_size=(5, 5), stride=2, padding=1, algorithm=algorithm)
        for algorithm in ("phases", "dilated")
    }
    met = numpy.zeros((5, 5), bool)
    met[::2, ::2] = True
    assert (both["phases"][0, 0][met] == numpy.inf).all()
    assert numpy.isfinite(both["phases"][0, 0][~met]).all()
    assert numpy.isnan(both["dilated"][0, 0][~met]).all()


# ---------------------------------------------------------------- bias and activation


@pytest.mark.parametrize("algorithm", FORWARD)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(dtype, algorithm):
    for name in ("k3-s2", "depthwise", "k1"):
        problem = ALL[name]
        if not runs(algorithm, problem):
            continue
        sums, plain_sums = truth_and_plain(problem, dtype, "forward")
        for function, oracle in ACTIVATIONS.items():
            truth, plain = (activations.elementwise(oracle, array) for array in (sums, plain_sums))
            # A GPU's tanh and exp have up to two units of error in the last place, the plain ones hardly any.
            bound = error_bound(plain, truth, dtype) + 2 * EPSILON[accumulated(dtype)] * abs(truth).max()
            for arrange in LAYOUTS.values():
                y = forward(problem, dtype, algorithm, arrange, activation=function, negative_slope=0.2)
                assert max_error(wide(y), truth) <= bound, f"{name}, {function}"


@pytest.mark.parametrize("algorithm", FORWARD)
def test_without_bias(algorithm):
    problem = ALL["depthwise-multiplier-2"]
    x, weight, bias, _ = inputs(problem, "float32")
    bare = conv2d_forward(x, weight, algorithm=algorithm, **options(problem))
    zeros = conv2d_forward(x, weight, numpy.zeros_like(bias), algorithm=algorithm, **options(problem))
    numpy.testing.assert_array_equal(bare, zeros)
    relu = conv2d_forward(x, weight, algorithm=algorithm, activation="relu", **options(problem))
    numpy.testing.assert_array_equal(relu, numpy.maximum(bare, 0))


# ---------------------------------------------------------------- results, layouts, order, empty batches


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_out_of_either_layout(dtype):
    for name in ("k3-s2", "depthwise", "resnet-last", "k1"):
        problem = ALL[name]
        for direction, run, shape in (
            ("forward", forward, problem.output_shape),
            ("backward_data", backward, problem.input_shape),
        ):
            for algorithm in conv2d_algorithms(direction):
                if not runs(algorithm, problem):
                    continue
                for source in LAYOUTS.values():
                    for target in LAYOUTS.values():
                        out = target(cast(numpy.full(shape, numpy.nan), dtype))
                        assert run(problem, dtype, algorithm, source, out=out) is out
                        assert_right(out, problem, dtype, direction, f"{name}, {algorithm}")


def test_the_order_of_threads_does_not_matter():
    for name, problem in {**SMALL, "wide": WIDE["outputs-70"], "eleven": WIDE["eleven"]}.items():
        for arrange in LAYOUTS.values():
            for algorithm in FORWARD:
                if runs(algorithm, problem):
                    run = lambda algorithm=algorithm: forward(problem, "float32", algorithm, arrange)  # noqa: B023, E731
                    assert order_independent(run), f"{name}, {algorithm}"
            for algorithm in BACKWARD_DATA:
                if algorithm != "scatter" and runs(algorithm, problem):
                    run = lambda algorithm=algorithm: backward(problem, "float32", algorithm, arrange)  # noqa: B023, E731
                    assert order_independent(run), f"{name}, {algorithm}"


def test_no_images():
    weight = numpy.ones((3, 1, 2, 2), numpy.float32)
    for algorithm in ("auto", *FORWARD):
        y = conv2d_forward(
            numpy.empty((0, 3, 5, 5), numpy.float32), weight, groups=3, algorithm=algorithm, activation="relu"
        )
        assert y.shape == (0, 3, 4, 4)
    for algorithm in ("auto", *BACKWARD_DATA):
        dx = conv2d_backward_data(
            numpy.empty((0, 3, 4, 4), numpy.float32), weight, input_size=5, groups=3, algorithm=algorithm
        )
        assert dx.shape == (0, 3, 5, 5)


def test_channels_last_arrays_are_read_as_they_are():
    """Not as the same bytes in the other order: the results differ, and only one is right.

    Of whole numbers, whose sums are exact in every order.
    """
    problem = SMALL["k3-s2"]
    x, weight = (numpy.round(8 * array).astype(numpy.float32) for array in inputs(problem, "float32")[:2])
    y, last = (
        conv2d_forward(arrange(x), arrange(weight), algorithm="implicit_gemm", **options(problem))
        for arrange in (numpy.ascontiguousarray, channels_last)
    )
    assert numpy.abs(y).max() > 8
    numpy.testing.assert_array_equal(last, y)
