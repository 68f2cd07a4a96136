"""The gradients of a convolution's weight and bias, the kernels, on the host runtime against loops."""

import itertools

import numpy
import pytest

from gpucnn_kernels import (
    ArgumentError,
    Conv2dProblem,
    DtypeError,
    LayoutError,
    ProblemError,
    conv2d_choose,
    conv2d_filter,
    conv2d_tiles,
    runtime,
)
from gpucnn_kernels.conv2d_filter import (
    conv2d_backward_bias,
    conv2d_backward_filter,
    filter_algorithms,
)
from gpucnn_kernels.runtime.host import order_independent
from tests.accuracy import awkward, channels_last, max_error
from tests.kernel_arrays import DTYPES, LAYOUTS, accumulated, cast, error_bound, wide
from tests.oracles.convolution import backward_filter_loops, plain_backward_filter
from tests.problems import ALL, LARGE, SMALL, arrays, geometry, options

# Tiles of 64 x 64 with edges left over, groups of them, and many kernel positions a channel.
MORE = {
    "wide-tiles": Conv2dProblem.from_shapes((2, 8, 11, 10), (70, 8, 3, 3), padding=1),
    "wide-tiles-grouped": Conv2dProblem.from_shapes((1, 16, 9, 8), (140, 8, 3, 3), stride=2, groups=2),
    "depthwise-k7": Conv2dProblem.from_shapes((2, 5, 12, 11), (10, 1, 7, 7), padding=3, groups=5),
    "depthwise-wide": Conv2dProblem.from_shapes((3, 40, 9, 9), (40, 1, 3, 3), padding=1, groups=40),
    "one-channel": Conv2dProblem.from_shapes((3, 1, 20, 19), (6, 1, 5, 5), padding=2),
}
SOME_LARGE = ("animalnet-1", "resnet-shortcut", "resnext-block", "one-tall-image")
BOTH_LAYOUTS = list(itertools.product(LAYOUTS.values(), LAYOUTS.values()))


@pytest.fixture(autouse=True)
def host():
    with runtime.using("host"):
        yield


def algorithms(problem):
    """The names that can run for the problem."""
    return [name for name in filter_algorithms() if name != "depthwise" or problem.groups == problem.C]


def gradient(dy, x, problem, **others):
    kernel = (problem.R, problem.S)
    return conv2d_backward_filter(dy, x, kernel_size=kernel, **options(problem), **others)


def is_channels_last(array):
    return array.transpose(0, 2, 3, 1).flags.c_contiguous


# ---------------------------------------------------------------- right


@pytest.mark.parametrize("tile", ["filter_gradient_wide", "filter_gradient_narrow"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_tiles(dtype, tile, monkeypatch):
    """Whichever is reckoned to be faster: edges left over, groups, several parts of the positions."""
    monkeypatch.setattr(conv2d_filter, "_LEAST", 40)
    for name in ("wide-tiles", "wide-tiles-grouped", "one-channel"):
        problem = MORE[name]
        x, _, _, dy = (cast(array, dtype) for array in arrays(problem))
        described = wide(dy), wide(x), problem.weight_shape, geometry(problem)
        expected = plain_backward_filter(*described, numpy.longdouble).astype(numpy.float64)
        bound = error_bound(plain_backward_filter(*described, accumulated(dtype)), expected, dtype)
        for arrange_x, arrange_dy in BOTH_LAYOUTS:
            with conv2d_tiles.forced(tile):
                dw = gradient(arrange_dy(dy), arrange_x(x), problem, algorithm="implicit_gemm")
            assert max_error(wide(dw), expected) <= bound, f"{name}, {tile}"


@pytest.mark.parametrize("algorithm", filter_algorithms())
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_problems(dtype, algorithm):
    for name, problem in SMALL.items():
        if algorithm not in algorithms(problem):
            continue
        x, _, _, dy = (cast(array, dtype) for array in arrays(problem))
        described = wide(dy), wide(x), problem.weight_shape, geometry(problem)
        expected = backward_filter_loops(*described)
        plain = plain_backward_filter(*described, accumulated(dtype))
        bound = error_bound(plain, expected, dtype)
        for arrange_x, arrange_dy in BOTH_LAYOUTS:
            dw = gradient(arrange_dy(dy), arrange_x(x), problem, algorithm=algorithm)
            assert dw.dtype == x.dtype
            assert dw.shape == problem.weight_shape, name
            assert max_error(wide(dw), expected) <= bound, name


@pytest.mark.parametrize("algorithm", filter_algorithms())
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_problems(dtype, algorithm):
    for name, problem in (LARGE | MORE).items():
        seldom = dtype in ("bfloat16", "float64") and name not in MORE and name not in SOME_LARGE
        if algorithm not in algorithms(problem) or seldom:
            continue
        x, _, _, dy = (cast(array, dtype) for array in arrays(problem))
        described = wide(dy), wide(x), problem.weight_shape, geometry(problem)
        expected = plain_backward_filter(*described, numpy.longdouble).astype(numpy.float64)
        plain = plain_backward_filter(*described, accumulated(dtype))
        bound = error_bound(plain, expected, dtype)
        for arranged in LAYOUTS.values():
            dw = gradient(arranged(dy), arranged(x), problem, algorithm=algorithm)
            assert max_error(wide(dw), expected) <= bound, name


def test_the_bias():
    for name, problem in (ALL | MORE).items():
        for dtype in DTYPES if name in SMALL else ("float32", "float16"):
            dy = cast(arrays(problem)[3], dtype)
            expected = wide(dy).sum(axis=(0, 2, 3), dtype=numpy.longdouble).astype(numpy.float64)
            in_order = wide(dy).transpose(1, 0, 2, 3).reshape(problem.K, -1)
            plain = numpy.cumsum(in_order, axis=1, dtype=accumulated(dtype))[:, -1]
            for layout, arranged in LAYOUTS.items():
                db = conv2d_backward_bias(arranged(dy))
                assert db.dtype == dy.dtype
                assert db.shape == (problem.K,)
                assert max_error(wide(db), expected) <= error_bound(plain, expected, dtype), f"{name}, {layout}"


def test_long_sums_are_exact_where_the_numbers_are():
    # 200,000 ones in float32, 70,000 halves in float16: whatever the parts, nothing is lost or doubled.
    for arranged in LAYOUTS.values():
        dy = arranged(numpy.ones((10, 3, 100, 200), numpy.float32))
        assert conv2d_backward_bias(dy).tolist() == [200_000] * 3
        x = arranged(numpy.ones((10, 2, 100, 200), numpy.float32))
        for algorithm in ("implicit_gemm", "im2col"):
            dw = conv2d_backward_filter(dy, x, kernel_size=1, algorithm=algorithm)
            assert (dw == 200_000).all(), algorithm
        halves = arranged(numpy.full((7, 1, 100, 100), 0.5, numpy.float16))
        assert conv2d_backward_bias(halves).tolist() == [numpy.float16(35_000)]
        for algorithm in filter_algorithms():
            dw = conv2d_backward_filter(halves, halves, kernel_size=1, algorithm=algorithm)
            assert dw.tolist() == [[[[numpy.float16(17_500)]]]], algorithm


# ---------------------------------------------------------------- layouts and out=


@pytest.mark.parametrize("algorithm", filter_algorithms())
def test_the_result_is_laid_out_as_x(algorithm):
    problem = ALL["mobilenet-depthwise" if algorithm == "depthwise" else "groups-2"]
    x, _, _, dy = arrays(problem, "float32")
    results = []
    for arrange_x, arrange_dy in BOTH_LAYOUTS:
        dw = gradient(arrange_dy(dy), arrange_x(x), problem, algorithm=algorithm)
        assert is_channels_last(dw) if arrange_x is channels_last else dw.flags.c_contiguous
        results.append(dw)
        for arranged in LAYOUTS.values():
            out = arranged(numpy.full(problem.weight_shape, numpy.nan, numpy.float32))
            assert gradient(arrange_dy(dy), arrange_x(x), problem, algorithm=algorithm, out=out) is out
            assert max_error(out, wide(dw)) <= 1e-4
    for other in results[1:]:
        assert max_error(other, wide(results[0])) <= 1e-4


def test_out_of_the_bias():
    dy = numpy.ones((2, 3, 4, 5), numpy.float32)
    out = numpy.full(3, numpy.nan, numpy.float32)
    assert conv2d_backward_bias(dy, out=out) is out
    assert out.tolist() == [40, 40, 40]
    with pytest.raises(ArgumentError, match="out shares memory with dy"):
        conv2d_backward_bias(dy, out=dy.ravel()[:3])
    with pytest.raises(ArgumentError, match=r"out must have shape \(3,\)"):
        conv2d_backward_bias(dy, out=numpy.zeros(4, numpy.float32))


def test_an_empty_batch():
    x, dy = numpy.zeros((0, 4, 6, 6), numpy.float32), numpy.zeros((0, 4, 4, 4), numpy.float32)
    for groups, algorithm in [(1, "implicit_gemm"), (2, "im2col"), (4, "depthwise"), (4, "auto")]:
        dw = conv2d_backward_filter(dy, x, kernel_size=3, groups=groups, algorithm=algorithm)
        assert dw.shape == (4, 4 // groups, 3, 3)
        assert (dw == 0).all(), algorithm
    assert conv2d_backward_bias(dy).tolist() == [0, 0, 0, 0]


# ---------------------------------------------------------------- deterministic, and split as it may


def test_the_order_of_threads_changes_nothing():
    for name in ("resnet-block", "wide-tiles", "depthwise-k7", "k3-d2-s2", "groups-3-s2", "depthwise-wide"):
        problem = (ALL | MORE)[name]
        x, _, _, dy = arrays(problem, "float32")
        for arranged in LAYOUTS.values():
            dy_there, x_there = arranged(dy), arranged(x)

            def run(dy=dy_there, x=x_there, problem=problem):
                results = [gradient(dy, x, problem, algorithm=algorithm) for algorithm in algorithms(problem)]
                return [*results, conv2d_backward_bias(dy)]

            assert order_independent(run), name


def test_images_in_chunks_of_columns(monkeypatch):
    problem = ALL["lenet-2"]
    x, _, _, dy = arrays(problem, "float32")
    whole = gradient(dy, x, problem, algorithm="im2col")
    image = problem.C * problem.R * problem.S * problem.P * problem.Q * 4
    for images in (0, 1, 2, 4, 100):
        monkeypatch.setattr(conv2d_filter, "_COLUMN_BYTES", images * image)
        assert gradient(dy, x, problem, algorithm="im2col").tobytes() == whole.tobytes()


@pytest.mark.parametrize("name", ["lenet-1", "resnet-block", "depthwise-wide", "wide-tiles"])
def test_any_number_of_parts(monkeypatch, name):
    problem = (ALL | MORE)[name]
    x, _, _, dy = arrays(problem)
    expected = gradient(dy, x, problem, algorithm="im2col")
    for least, memory in [(1, 1 << 30), (16, 1 << 30), (100, 1 << 30), (1, 0), (1, 5 * expected.nbytes)]:
        monkeypatch.setattr(conv2d_filter, "_LEAST", least)
        monkeypatch.setattr(conv2d_filter, "_PARTIAL_BYTES", memory)
        for algorithm in algorithms(problem):
            for arranged in LAYOUTS.values():
                dw = gradient(arranged(dy), arranged(x), problem, algorithm=algorithm)
                assert max_error(dw, expected) <= 1e-11, f"{algorithm}, at least {least}, {memory} bytes"


# ---------------------------------------------------------------- names and errors


def test_the_choice():
    assert filter_algorithms() == ("implicit_gemm", "im2col", "depthwise")
    assert conv2d_choose("backward_filter", ALL["depthwise"], "float32") == "depthwise"
    assert conv2d_choose("backward_filter", ALL["depthwise-multiplier-2"], "float16") == "depthwise"
    assert conv2d_choose("backward_filter", ALL["one-number"], "float32") == "implicit_gemm"
    assert conv2d_choose("backward_filter", ALL["groups-2"], "float32") == "implicit_gemm"
    problem = ALL["depthwise"]
    x, _, _, dy = arrays(problem, "float32")
    chosen = gradient(dy, x, problem)
    assert chosen.tobytes() == gradient(dy, x, problem, algorithm="depthwise").tobytes()


def test_what_does_not_fit():
    x, dy = numpy.zeros((1, 4, 5, 5), numpy.float32), numpy.zeros((1, 6, 3, 3), numpy.float32)
    with pytest.raises(ArgumentError, match="auto, implicit_gemm, im2col, depthwise, got 'fft'"):
        conv2d_backward_filter(dy, x, kernel_size=3, algorithm="fft")
    with pytest.raises(ArgumentError, match="one input channel a group, got 2; use 'implicit_gemm'"):
        conv2d_backward_filter(dy, x, kernel_size=3, groups=2, algorithm="depthwise")
    with pytest.raises(ProblemError, match=r"dy has shape \(1, 6, 3, 3\).*gives \(1, 6, 5, 5\)"):
        conv2d_backward_filter(dy, x, kernel_size=3, padding=1)
    with pytest.raises(ProblemError, match=r"groups=3 .* 4 channels of x"):
        conv2d_backward_filter(dy, x, kernel_size=3, groups=3)
    with pytest.raises(ProblemError, match="groups=0"):
        conv2d_backward_filter(dy, x, kernel_size=3, groups=0)
    with pytest.raises(ProblemError, match="dy must have 4 dimensions"):
        conv2d_backward_filter(dy[0], x, kernel_size=3)
    with pytest.raises(ProblemError, match="4 dimensions"):
        conv2d_backward_filter(dy, x[0], kernel_size=3)
    with pytest.raises(ProblemError, match="4 dimensions"):
        conv2d_backward_bias(dy[0])
    with pytest.raises(DtypeError, match="x is float64, but dy is float32"):
        conv2d_backward_filter(dy, x.astype(numpy.float64), kernel_size=3)
    with pytest.raises(DtypeError, match="dy must be one of float32"):
        conv2d_backward_bias(dy.astype(numpy.int64))
    for arrange in (awkward, numpy.asfortranarray):
        with pytest.raises(LayoutError, match="x "):
            conv2d_backward_filter(dy, arrange(x), kernel_size=3)
        with pytest.raises(LayoutError, match="dy "):
            conv2d_backward_filter(arrange(dy), x, kernel_size=3)
        with pytest.raises(LayoutError, match="dy "):
            conv2d_backward_bias(arrange(dy))
        with pytest.raises(LayoutError, match="out "):
            conv2d_backward_filter(dy, x, kernel_size=3, out=arrange(numpy.zeros((6, 4, 3, 3), numpy.float32)))
    memory = numpy.zeros(400, numpy.float32)
    with pytest.raises(ArgumentError, match="out shares memory with x"):
        conv2d_backward_filter(
            dy, memory[:100].reshape(x.shape), kernel_size=3, out=memory[99 : 99 + 216].reshape(6, 4, 3, 3)
        )
