"""im2col and col2im, the kernels, on the host runtime against loops."""

import numpy
import pytest

from gpucnn_kernels import ArgumentError, DtypeError, LayoutError, ProblemError, col2im, im2col, runtime
from gpucnn_kernels import columns as module
from gpucnn_kernels.arrays import device_array
from gpucnn_kernels.columns import columns_shape, images, launch_col2im, launch_im2col
from gpucnn_kernels.launch import Call
from gpucnn_kernels.problem import Conv2dProblem
from gpucnn_kernels.runtime.host import order_independent
from tests.accuracy import awkward, channels_last, max_error
from tests.kernel_arrays import DTYPES, EPSILON, LAYOUTS, accumulated, cast, wide
from tests.oracles.im2col import sources as sources_by_loops
from tests.problems import ALL, LARGE, SMALL, arrays, geometry

# Of the large ones: tiles of channels that are full, half full and left over, many planes, wide and tall images.
SOME_LARGE = ("bottleneck", "resnet-last", "resnet-down", "mobilenet-depthwise", "one-tall-image", "wide-rows")
PROBLEMS = SMALL | {name: LARGE[name] for name in SOME_LARGE}


def window_options(problem):
    return {
        "kernel_size": (problem.R, problem.S),
        "stride": problem.stride,
        "padding": problem.padding,
        "dilation": problem.dilation,
    }


@pytest.fixture(autouse=True)
def host():
    with runtime.using("host"):
        yield


@pytest.fixture(scope="module")
def by_loops():
    """By problem: for each element of the columns the flat index of its pixel, -1 for padding."""
    return {
        name: sources_by_loops(
            problem.input_shape, (problem.R, problem.S), (problem.P, problem.Q), geometry(problem)
        )
        for name, problem in PROBLEMS.items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_im2col_is_the_loops(dtype, by_loops):
    for name, problem in PROBLEMS.items():
        x = cast(arrays(problem)[0], dtype)
        expected = numpy.append(x.ravel(), x.dtype.type(0))[by_loops[name]]  # the index -1 is the 0 at the end
        for layout, arranged in LAYOUTS.items():
            columns = im2col(arranged(x), **window_options(problem))
            assert columns.dtype == x.dtype
            assert columns.flags.c_contiguous
            assert columns.shape == expected.shape, name
            assert columns.tobytes() == expected.tobytes(), f"{name}, {layout}"


def test_a_window_that_has_kernels_of_its_own(monkeypatch):
    started = set()
    launch = Call.launch

    def record(self, source, kernel, *given, **more):
        started.add(kernel)
        return launch(self, source, kernel, *given, **more)

    monkeypatch.setattr(Call, "launch", record)
    monkeypatch.setattr(module, "_ENOUGH_BLOCKS", 1)  # threads go on to further planes
    for options in ({}, {"stride": 2, "padding": 1}, {"stride": (1, 3), "padding": (1, 0), "dilation": (2, 1)}):
        problem = Conv2dProblem.from_shapes((3, 5, 14, 11), (1, 5, 3, 3), **options)
        sources = sources_by_loops(problem.input_shape, (3, 3), (problem.P, problem.Q), geometry(problem))
        x = numpy.random.default_rng(1).integers(-9, 10, problem.input_shape).astype(numpy.float32)
        columns = im2col(x, **window_options(problem))
        numpy.testing.assert_array_equal(columns, numpy.append(x.ravel(), 0)[sources])
        # Small integers, whose sums are exact.
        expected = numpy.bincount(sources[sources >= 0], columns[sources >= 0], x.size).reshape(x.shape)
        image = col2im(columns, input_size=x.shape[2:], **window_options(problem))
        numpy.testing.assert_array_equal(image, expected)
    assert started == {"im2col_planes", "col2im_gather_planes"}


@pytest.mark.parametrize("algorithm", ["gather", "scatter"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_col2im_is_the_loops(dtype, algorithm, by_loops):
    for name, problem in PROBLEMS.items():
        sources = by_loops[name]
        values = cast(numpy.random.default_rng(3).standard_normal(sources.shape), dtype)
        inside = sources >= 0
        size = problem.N * problem.C * problem.H * problem.W
        # bincount adds one number after the other in float64.
        expected, magnitude = (
            numpy.bincount(sources[inside], terms[inside], size).reshape(problem.input_shape)
            for terms in (wide(values), numpy.abs(wide(values)))
        )
        terms = problem.R * problem.S
        bound = terms * EPSILON[accumulated(dtype)] / 2 * magnitude + EPSILON[dtype] / 2 * numpy.abs(expected)
        for layout, arranged in LAYOUTS.items():
            out = arranged(cast(numpy.full(problem.input_shape, numpy.nan), dtype))
            image = col2im(
                values,
                input_size=(problem.H, problem.W),
                algorithm=algorithm,
                out=out,
                **window_options(problem),
            )
            assert image is out
            assert (numpy.abs(wide(image) - expected) <= bound).all(), f"{name}, {layout}"
        if algorithm == "gather" and name in ("k3", "k3-s2"):
            fresh = col2im(values, input_size=(problem.H, problem.W), **window_options(problem))
            assert fresh.flags.c_contiguous
            assert fresh.dtype == values.dtype
            assert fresh.tobytes() == numpy.ascontiguousarray(out).tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_in_the_accumulating_type_round_the_image_once(layout):
    # 2048 + nine quarters: each of them, and each partial sum in float16, would be rounded away.
    problem = ALL["resnet-block"]
    columns = numpy.full(columns_shape(problem), 0.25, numpy.float32)
    columns[:, ::9] += 2048
    for algorithm in ("gather", "scatter"):
        image = LAYOUTS[layout](numpy.full(problem.input_shape, numpy.nan, numpy.float16))
        with Call(None, columns=columns, x=image) as call:
            launch_col2im(call, call["columns"], call["x"], problem, algorithm)
        expected = numpy.float16(2048 + 9 * 0.25)
        assert expected != numpy.float16(2048)
        assert (image[:, :, 1:-1, 1:-1] == expected).all(), algorithm


def test_a_part_of_a_batch():
    for layout, arranged in LAYOUTS.items():
        for name in ("many-images", "bottleneck", "k3"):
            problem = ALL[name]
            x = arranged(arrays(problem, "float32")[0])
            whole = im2col(x, **window_options(problem))
            _, *matrix = columns_shape(problem)
            part = numpy.full((1, *matrix), numpy.nan, numpy.float32)
            with Call(None, x=x, part=part) as call:
                last = images(call["x"], problem.N - 1, problem.N)
                launch_im2col(call, last, call["part"], problem)
            assert part[0].tobytes() == whole[-1].tobytes(), f"{name}, {layout}"
            assert images(device_array(runtime.current(), x, "x"), 1, 1).size == 0


def test_scatter_and_gather_are_the_adjoint_of_im2col():
    for name, problem in LARGE.items():
        x = arrays(problem)[0]
        columns = im2col(x, **window_options(problem))
        values = numpy.random.default_rng(4).standard_normal(columns.shape)
        for algorithm in ("gather", "scatter"):
            image = col2im(
                values, input_size=(problem.H, problem.W), algorithm=algorithm, **window_options(problem)
            )
            difference = abs(float(numpy.vdot(values, columns)) - float(numpy.vdot(image, x)))
            assert difference <= 1e-12 * float(numpy.abs(values * columns).sum()), f"{name}, {algorithm}"


def test_the_order_of_threads_changes_nothing():
    for name in ("bottleneck", "resnet-down", "padding-0-1-2-3", "k3-d2-s2"):
        problem = ALL[name]
        for layout, arranged in LAYOUTS.items():
            x = arranged(arrays(problem, "float32")[0])
            columns = im2col(x, **window_options(problem))
            into = numpy.empty_like(x)

            def run(x=x, columns=columns, problem=problem, into=into):
                into.fill(numpy.nan)
                options = window_options(problem)
                col2im(columns, input_size=(problem.H, problem.W), out=into, **options)
                return [im2col(x, **options), into.copy()]

            assert order_independent(run), f"{name}, {layout}"


def test_scatter_differs_by_rounding_only():
    problem = ALL["resnet-block"]
    columns = numpy.random.default_rng(5).standard_normal(columns_shape(problem)).astype(numpy.float32)
    size = (problem.H, problem.W)
    one, other = (
        col2im(columns, input_size=size, algorithm=algorithm, **window_options(problem))
        for algorithm in ("gather", "scatter")
    )
    assert max_error(one, other) <= 9 * EPSILON["float32"] * float(numpy.abs(one).max())


def test_an_empty_batch():
    columns = im2col(numpy.zeros((0, 3, 5, 5), numpy.float32), kernel_size=3)
    assert columns.shape == (0, 27, 9)
    for algorithm in ("gather", "scatter"):
        assert col2im(columns, input_size=5, kernel_size=3, algorithm=algorithm).shape == (0, 3, 5, 5)


def test_out():
    x = numpy.arange(25.0).reshape(1, 1, 5, 5)
    out = numpy.full((1, 4, 16), numpy.nan)
    assert im2col(x, kernel_size=2, out=out) is out
    assert out[0, 3].tolist() == x[0, 0, 1:, 1:].ravel().tolist()
    with pytest.raises(LayoutError, match="out of shape"):
        im2col(x, kernel_size=2, out=awkward(out))
    with pytest.raises(ArgumentError, match=r"out must have shape \(1, 4, 16\), got \(1, 16, 4\)"):
        im2col(x, kernel_size=2, out=numpy.zeros((1, 16, 4)))
    with pytest.raises(DtypeError, match="out is float32, but x is float64"):
        im2col(x, kernel_size=2, out=out.astype(numpy.float32))
    memory = numpy.zeros(64 + 25)
    with pytest.raises(ArgumentError, match="out shares memory with x"):
        im2col(memory[50:75].reshape(1, 1, 5, 5), kernel_size=2, out=memory[:64].reshape(1, 4, 16))
    assert im2col(memory[64:].reshape(1, 1, 5, 5), kernel_size=2, out=memory[:64].reshape(1, 4, 16)).any() == 0
    with pytest.raises(ArgumentError, match="out shares memory with columns"):
        col2im(out, input_size=5, kernel_size=2, out=out.ravel()[:25].reshape(1, 1, 5, 5))


def test_what_does_not_fit():
    x = numpy.zeros((1, 3, 5, 5))
    with pytest.raises(ProblemError, match="4 dimensions"):
        im2col(x[0], kernel_size=3)
    with pytest.raises(ProblemError, match="larger than the padded input"):
        im2col(x, kernel_size=6)
    with pytest.raises(DtypeError, match="x must be one of float32"):
        im2col(x.astype(numpy.int32), kernel_size=3)
    for given in (awkward(x), x[:, :, ::2], numpy.asfortranarray(x)):
        with pytest.raises(LayoutError, match="x "):
            im2col(given, kernel_size=2)
    for shape in [(27, 9), (1, 26, 9), (1, 0, 9)]:
        with pytest.raises(ProblemError, match=r"shape \(N, C \* 3 \* 3, P \* Q\)"):
            col2im(numpy.zeros(shape), input_size=5, kernel_size=3)
    columns = numpy.zeros((1, 27, 9))
    with pytest.raises(ProblemError, match="3x3 = 9 windows"):
        col2im(columns[:, :, :8], input_size=5, kernel_size=3)
    with pytest.raises(LayoutError, match="columns of shape"):
        col2im(channels_last(columns[..., None])[..., 0], input_size=5, kernel_size=3)
    with pytest.raises(LayoutError, match="out"):
        col2im(columns, input_size=5, kernel_size=3, out=numpy.asfortranarray(x))
    with pytest.raises(ArgumentError, match="gather, scatter, got 'sum'"):
        col2im(columns, input_size=5, kernel_size=3, algorithm="sum")
