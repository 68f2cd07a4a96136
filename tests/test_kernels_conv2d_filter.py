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
    conv2d_filter_direct,
    conv2d_tiles,
    runtime,
)
from gpucnn_kernels.conv2d_filter import (
    conv2d_backward_bias,
    conv2d_backward_filter,
    filter_algorithms,
)
from gpucnn_kernels.gpu import H200
from gpucnn_kernels.linear import linear_backward_bias
from gpucnn_kernels.runtime.host import order_independent
from tests.accuracy import awkward, channels_last, max_error
from tests.kernel_arrays import DTYPES, EPSILON, LAYOUTS, accumulated, cast, error_bound, wide
from tests.oracles.convolution import backward_filter_loops, plain_backward_filter
from tests.problems import ALL, LARGE, SMALL, arrays, geometry, options

# Tiles of 64 x 64 with edges left over, groups of them, and many kernel positions a channel.
MORE = {
    "wide-tiles": Conv2dProblem.from_shapes((2, 8, 11, 10), (70, 8, 3, 3), padding=1),
    "wide-tiles-grouped": Conv2dProblem.from_shapes((1, 16, 9, 8), (140, 8, 3, 3), stride=2, groups=2),
    "depthwise-k7": Conv2dProblem.from_shapes((2, 5, 12, 11), (10, 1, 7, 7), padding=3, groups=5),
    "depthwise-wide": Conv2dProblem.from_shapes((3, 40, 9, 9), (40, 1, 3, 3), padding=1, groups=40),
    "large-tiles": Conv2dProblem.from_shapes((2, 15, 9, 10), (131, 15, 3, 3), padding=1),
    "few-wide-outputs": Conv2dProblem.from_shapes((2, 3, 33, 150), (70, 3, 3, 3), padding=1),
    "eleven-s4": Conv2dProblem.from_shapes((2, 3, 63, 59), (20, 3, 11, 11), stride=4, padding=2),
    "many-columns": Conv2dProblem.from_shapes((1, 8, 13, 14), (9, 8, 7, 9), padding=(3, 4), dilation=(2, 1)),
    "few-grouped": Conv2dProblem.from_shapes(
        (3, 6, 9, 16), (18, 2, 3, 5), stride=(2, 1), padding=(1, 2), groups=3
    ),
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
    return [name for name in filter_algorithms() if takes(name, problem)]


def takes(name, problem, dtype="float32"):
    if name == "direct":
        return conv2d_filter_direct.takes(problem, dtype)
    return name != "depthwise" or problem.groups == problem.C


def gradient(dy, x, problem, **others):
    kernel = (problem.R, problem.S)
    return conv2d_backward_filter(dy, x, kernel_size=kernel, **options(problem), **others)


def is_channels_last(array):
    return array.transpose(0, 2, 3, 1).flags.c_contiguous


# ---------------------------------------------------------------- right


@pytest.mark.parametrize("tile", [tile.name for tile in conv2d_tiles.FILTER_TILES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tile(dtype, tile, monkeypatch):
    """Whichever is reckoned to be faster: edges left over, groups, several parts of the positions."""
    monkeypatch.setattr(conv2d_filter, "_LEAST", 40)
    for name in ("large-tiles", "wide-tiles-grouped", "one-channel"):
        problem = MORE[name]
        x, _, _, dy = (cast(array, dtype) for array in arrays(problem))
        described = wide(dy), wide(x), problem.weight_shape, geometry(problem)
        expected = plain_backward_filter(*described, numpy.longdouble).astype(numpy.float64)
        bound = error_bound(plain_backward_filter(*described, accumulated(dtype)), expected, dtype)
        sums = wide(dy).sum(axis=(0, 2, 3))
        for arrange_x, arrange_dy in BOTH_LAYOUTS:
            bias = cast(numpy.full(problem.K, numpy.nan), dtype)
            with conv2d_tiles.forced(tile):
                given = arrange_dy(dy), arrange_x(x), problem
                dw = gradient(*given, algorithm="implicit_gemm")
                both = gradient(*given, algorithm="implicit_gemm", bias_out=bias)
            assert max_error(wide(dw), expected) <= bound, f"{name}, {tile}"
            assert dw.tobytes() == both.tobytes()
            assert max_error(wide(bias), sums) <= EPSILON[dtype] * (1 + abs(sums).max()) * 4, f"{name}, {tile}"


@pytest.mark.parametrize("algorithm", filter_algorithms())
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_problems(dtype, algorithm):
    for name, problem in SMALL.items():
        if not takes(algorithm, problem, dtype):
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
        if not takes(algorithm, problem, dtype) or seldom:
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


@pytest.mark.parametrize("shape", [(700, 3, 5, 7), (40, 2, 13, 17), (3, 5, 61, 67), (9, 40, 3, 61)])
def test_the_bias_of_planes_shorter_and_longer_than_a_block_takes_every_number_once(shape):
    # Integers whose sums are exact: planes that end within a thread's eight loads, and numbers left over.
    dy = numpy.random.default_rng(0).integers(-8, 9, shape).astype(numpy.float32)
    for arranged in LAYOUTS.values():
        assert conv2d_backward_bias(arranged(dy)).tolist() == dy.sum(axis=(0, 2, 3)).tolist()
    rows = dy.reshape(shape[0] * shape[1], -1)
    assert linear_backward_bias(rows).tolist() == rows.sum(axis=0).tolist()


def test_long_sums_are_exact_where_the_numbers_are():
    # 200,000 ones in float32, 70,000 halves in float16: whatever the parts, nothing is lost or doubled.
    for arranged in LAYOUTS.values():
        dy = arranged(numpy.ones((10, 3, 100, 200), numpy.float32))
        assert conv2d_backward_bias(dy).tolist() == [200_000] * 3
        x = arranged(numpy.ones((10, 2, 100, 200), numpy.float32))
        for algorithm in ("implicit_gemm", "direct", "im2col"):
            dw = conv2d_backward_filter(dy, x, kernel_size=1, algorithm=algorithm)
            assert (dw == 200_000).all(), algorithm
        halves = arranged(numpy.full((7, 1, 100, 100), 0.5, numpy.float16))
        assert conv2d_backward_bias(halves).tolist() == [numpy.float16(35_000)]
        for algorithm in filter_algorithms():
            dw = conv2d_backward_filter(halves, halves, kernel_size=1, algorithm=algorithm)
            assert dw.tolist() == [[[[numpy.float16(17_500)]]]], algorithm


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bias_with_the_weight(dtype):
    """Summed in the same pass or beside it, the weight's numbers being what they are without."""
    for name in ("k3", "groups-2", "lenet-1", "depthwise-multiplier-2", "k2-s3-gaps", "few-grouped", "eleven-s4"):
        problem = (ALL | MORE)[name]
        x, _, _, dy = (cast(array, dtype) for array in arrays(problem))
        expected = wide(dy).sum(axis=(0, 2, 3), dtype=numpy.longdouble).astype(numpy.float64)
        plain = numpy.cumsum(
            wide(dy).transpose(1, 0, 2, 3).reshape(problem.K, -1), axis=1, dtype=accumulated(dtype)
        )
        bound = error_bound(plain[:, -1], expected, dtype)
        for algorithm, arranged in itertools.product(algorithms(problem), LAYOUTS.values()):
            if not takes(algorithm, problem, dtype):
                continue
            dw = gradient(arranged(dy), arranged(x), problem, algorithm=algorithm)
            room = cast(numpy.full(2 * problem.K, numpy.nan), dtype)
            for bias in (room[: problem.K].copy(), room[problem.K :]):
                both = gradient(arranged(dy), arranged(x), problem, algorithm=algorithm, bias_out=bias)
                assert max_error(wide(bias), expected) <= bound, (name, algorithm)
                assert max_error(wide(both), wide(dw)) <= 1e-2 if dtype != "float64" else 1e-12, (name, algorithm)
            assert numpy.isnan(wide(room[: problem.K])).all(), "written beside bias_out"


@pytest.mark.parametrize("value", [numpy.inf, -numpy.inf, numpy.nan])
@pytest.mark.parametrize("algorithm", ["implicit_gemm", "direct"])
def test_infinities_and_nans_reach_only_the_taps_that_meet_them(algorithm, value):
    """Also at the end of rows that fill no whole number of quads: zero times infinity shows what is multiplied."""
    for width, stride, padding in itertools.product((8, 9, 10, 11), (1, 2), (0, 1)):
        problem = Conv2dProblem.from_shapes((2, 2, 6, width), (3, 2, 3, 3), stride=stride, padding=padding)
        x, _, _, dy = (abs(array).astype(numpy.float32) + 1 for array in arrays(problem))
        for h, w in ((0, 0), (2, width - 1), (5, width - 2), (5, width - 1)):
            spoiled = x.copy()
            spoiled[1, 1, h, w] = value
            expected = plain_backward_filter(dy, spoiled, problem.weight_shape, geometry(problem))
            for arranged in LAYOUTS.values():
                dw = gradient(arranged(dy), arranged(spoiled), problem, algorithm=algorithm)
                assert numpy.array_equal(numpy.isfinite(dw), numpy.isfinite(expected)), (
                    width,
                    stride,
                    padding,
                    h,
                    w,
                )
                assert numpy.array_equal(numpy.isnan(dw), numpy.isnan(expected)), (width, stride, padding, h, w)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shapes", [((2, 3, 9, 16), (5, 3, 3, 3)), ((24, 1, 4, 4), (3, 1, 3, 3))], ids=str)
def test_direct_reads_images_wherever_they_start(shapes, dtype):
    """Four numbers at a time only where their address allows it; the sums' order is that of the shape alone."""
    problem = Conv2dProblem.from_shapes(*shapes, padding=1)
    x, _, _, dy = arrays(problem, dtype)
    expected = gradient(dy, x, problem, algorithm="direct")
    for start in range(5):
        memory = numpy.empty(dy.size + 8, dtype)
        shifted = memory[start : start + dy.size].reshape(dy.shape)
        shifted[:] = dy
        assert gradient(shifted, x, problem, algorithm="direct").tobytes() == expected.tobytes()


def test_direct_in_every_tile_and_share(monkeypatch):
    """What is searched for is how the work is laid out: any of it gives the sums."""
    for name in ("few-wide-outputs", "few-grouped", "many-columns", "lenet-2"):
        problem = (ALL | MORE)[name]
        x, _, _, dy = arrays(problem, "float32")
        described = wide(dy), wide(x), problem.weight_shape, geometry(problem)
        expected = plain_backward_filter(*described, numpy.longdouble).astype(numpy.float64)
        bound = error_bound(plain_backward_filter(*described, "float32"), expected, "float32")
        sums = wide(dy).sum(axis=(0, 2, 3))
        made = []
        search = conv2d_filter_direct._plans
        monkeypatch.setattr(
            conv2d_filter_direct,
            "_plans",
            lambda *a, made=made, search=search: made.extend(search(*a)) or made[-1:],
        )
        conv2d_filter_direct.plan.__wrapped__(problem, "float32", H200, bias=True)
        monkeypatch.undo()
        assert len({plan.column_blocks for plan in made}) > 1
        # Among them what neighbours add up, by threads that then write it and by such as do not have all yet.
        plans = list(numpy.random.default_rng(0).permutation(numpy.array(made, object)))
        kinds = {(plan.neighbours, plan.splits == plan.neighbours): plan for plan in plans}
        assert {neighbours for neighbours, _ in kinds} == {1, 2, 4}
        assert {alone for _, alone in kinds} == {False, True}
        for plan in [*kinds.values(), *plans[:8]]:
            monkeypatch.setattr(conv2d_filter_direct, "plan", lambda *a, plan=plan, **b: plan)
            bias = numpy.empty(problem.K, numpy.float32)
            dw = gradient(dy, x, problem, algorithm="direct", bias_out=bias)
            assert max_error(wide(dw), expected) <= bound, plan
            assert max_error(wide(bias), sums) <= 1e-4 * (1 + abs(sums).max()), plan
            monkeypatch.undo()


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
    for groups, algorithm in [(1, "implicit_gemm"), (1, "direct"), (2, "im2col"), (4, "depthwise"), (4, "auto")]:
        db = numpy.full(4, numpy.nan, numpy.float32)
        dw = conv2d_backward_filter(dy, x, kernel_size=3, groups=groups, algorithm=algorithm, bias_out=db)
        assert (db == 0).all(), algorithm
        assert dw.shape == (4, 4 // groups, 3, 3)
        assert (dw == 0).all(), algorithm
    assert conv2d_backward_bias(dy).tolist() == [0, 0, 0, 0]


# ---------------------------------------------------------------- deterministic, and split as it may


def test_the_order_of_threads_changes_nothing():
    for name in (
        "resnet-block",
        "wide-tiles",
        "depthwise-k7",
        "k3-d2-s2",
        "groups-3-s2",
        "depthwise-wide",
        "eleven-s4",
    ):
        problem = (ALL | MORE)[name]
        x, _, _, dy = arrays(problem, "float32")
        for arranged in LAYOUTS.values():
            dy_there, x_there = arranged(dy), arranged(x)

            def run(dy=dy_there, x=x_there, problem=problem):
                results = [conv2d_backward_bias(dy)]
                for algorithm in algorithms(problem):
                    bias = numpy.empty(problem.K, dy.dtype)
                    results += [gradient(dy, x, problem, algorithm=algorithm, bias_out=bias), bias]
                return results

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
    assert filter_algorithms() == ("implicit_gemm", "direct", "im2col", "depthwise")
    assert conv2d_choose("backward_filter", ALL["depthwise"], "float32") == "depthwise"
    assert conv2d_choose("backward_filter", ALL["depthwise-multiplier-2"], "float16") == "depthwise"
    assert conv2d_choose("backward_filter", ALL["one-number"], "float32") == "implicit_gemm"
    assert conv2d_choose("backward_filter", ALL["resnet-block"], "float32") == "implicit_gemm"
    assert conv2d_choose("backward_filter", ALL["groups-2"], "float32") == "direct"
    for name in ("lenet-1", "animalnet-1"):
        assert conv2d_choose("backward_filter", ALL[name], "float32") == "direct"
    problem = ALL["depthwise"]
    x, _, _, dy = arrays(problem, "float32")
    chosen = gradient(dy, x, problem)
    assert chosen.tobytes() == gradient(dy, x, problem, algorithm="depthwise").tobytes()


def test_what_does_not_fit():
    x, dy = numpy.zeros((1, 4, 5, 5), numpy.float32), numpy.zeros((1, 6, 3, 3), numpy.float32)
    with pytest.raises(ArgumentError, match="auto, implicit_gemm, direct, im2col, depthwise, got 'fft'"):
        conv2d_backward_filter(dy, x, kernel_size=3, algorithm="fft")
    with pytest.raises(ArgumentError, match="one input channel a group, got 2; use 'implicit_gemm'"):
        conv2d_backward_filter(dy, x, kernel_size=3, groups=2, algorithm="depthwise")
    nine, sixty = numpy.zeros((1, 9, 5, 5), numpy.float32), numpy.zeros((1, 8, 300, 300), numpy.float32)
    with pytest.raises(ArgumentError, match="at most 8 input channels a group, got 9; use 'implicit_gemm'"):
        conv2d_backward_filter(dy, nine, kernel_size=3, algorithm="direct")
    with pytest.raises(ArgumentError, match=r"'direct' .* does not fit; use 'implicit_gemm'"):
        conv2d_backward_filter(sixty[:, :, :2, :2], sixty, kernel_size=150, stride=150, algorithm="direct")
    with pytest.raises(ArgumentError, match=r"bias_out must have shape \(6,\)"):
        conv2d_backward_filter(dy, x, kernel_size=3, bias_out=numpy.zeros(5, numpy.float32))
    with pytest.raises(DtypeError, match="bias_out is float64"):
        conv2d_backward_filter(dy, x, kernel_size=3, bias_out=numpy.zeros(6))
    with pytest.raises(ArgumentError, match="bias_out shares memory with dy"):
        conv2d_backward_filter(dy, x, kernel_size=3, bias_out=dy.ravel()[:6])
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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("algorithm", ["auto", "implicit_gemm", "direct", "im2col", "tensor"])
def test_sums_of_16_bits_that_nothing_has_rounded(dtype, algorithm):
    """In float32, they are what is rounded to 16 bits otherwise."""
    problem = ALL["lenet-2"]
    x = cast(numpy.random.default_rng(0).standard_normal(problem.input_shape), dtype)
    dy = cast(numpy.random.default_rng(1).standard_normal(problem.output_shape), dtype)
    more = {"kernel_size": (problem.R, problem.S), "stride": problem.stride, "padding": problem.padding}
    more["algorithm"] = algorithm
    rounded_bias, wide_bias = numpy.empty(problem.K, x.dtype), numpy.empty(problem.K, "float32")
    rounded = conv2d_backward_filter(dy, x, **more, bias_out=rounded_bias)
    sums = numpy.full(problem.weight_shape, numpy.nan, "float32")
    assert conv2d_backward_filter(dy, x, **more, out=sums, bias_out=wide_bias) is sums
    numpy.testing.assert_array_equal(sums.astype(x.dtype), rounded)
    numpy.testing.assert_array_equal(wide_bias.astype(x.dtype), rounded_bias)
    assert numpy.mean(sums != rounded.astype("float32")) > 0.5
    mixed = numpy.full(problem.K, numpy.nan, "float32")  # the weight's rounded, the bias's not
    numpy.testing.assert_array_equal(conv2d_backward_filter(dy, x, **more, bias_out=mixed), rounded)
    assert numpy.abs(mixed - wide_bias).max() <= 1e-5 * numpy.abs(wide_bias).max()
    apart = numpy.empty(problem.K, "float32")
    assert conv2d_backward_bias(dy, out=apart) is apart
    assert numpy.abs(apart - wide_bias).max() <= 1e-5 * numpy.abs(wide_bias).max()
    with pytest.raises(DtypeError, match="out is float64, but dy is"):
        conv2d_backward_filter(dy, x, **more, out=sums.astype("float64"))
