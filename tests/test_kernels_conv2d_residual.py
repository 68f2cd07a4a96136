"""A second gradient that every input gradient of a convolution adds before it is stored, against float64."""

from __future__ import annotations

from functools import cache

import numpy
import pytest

import gpucnn_kernels
from gpucnn_kernels import (
    ArgumentError,
    Conv2dProblem,
    DtypeError,
    LayoutError,
    conv2d_backward_data,
    tuning,
    tuning_memory,
)
from gpucnn_kernels import conv2d_forward_paths as forward_paths
from gpucnn_kernels.conv2d_tiles import forced
from gpucnn_kernels.runtime.host import order_independent
from tests.accuracy import channels_last, max_error
from tests.kernel_accuracy import on_the_host
from tests.kernel_arrays import DTYPES, LAYOUTS, accumulated, cast, error_bound, wide
from tests.oracles import convolution
from tests.problems import ALL, LARGE, SMALL, arrays, geometry, options

__all__ = ["on_the_host"]

ALGORITHMS = ("phases", "direct", "dilated", "col2im", "scatter", "depthwise", "tensor", "wgmma")
WAYS = [
    (dtype, algorithm)
    for dtype in DTYPES
    for algorithm in ALGORITHMS
    if dtype not in {"tensor": ("float64",), "wgmma": ("float32", "float64")}.get(algorithm, ())
]
EVERY_WAY = pytest.mark.parametrize(("dtype", "algorithm"), WAYS)
SOME = ("resnet-down", "resnet-shortcut", "depthwise-s2", "k1", "k3-s2", "groups-2")


def runs(algorithm, problem):
    depth = problem.C // problem.groups
    return depth <= {"direct": 8, "depthwise": 1}.get(algorithm, depth)


def chosen(algorithm, names=SOME):
    return {name: ALL[name] for name in names if runs(algorithm, ALL[name])}


@cache
def inputs(problem, dtype):
    """(dy, weight, a residual), of this dtype."""
    x, weight, _, dy = arrays(problem)
    return cast(dy, dtype), cast(weight, dtype), cast(x, dtype)  # any numbers of the result's shape


@cache
def sums(problem, dtype):
    """Of the given (rounded) numbers, with the residual: in a longer type, and plainly in the accumulating one."""
    dy, weight, residual = map(wide, inputs(problem, dtype))
    longer = numpy.longdouble if dtype == "float64" else numpy.float64
    return tuple(
        convolution.plain_backward_data(dy, weight, problem.input_shape, geometry(problem), kind).astype(kind)
        + residual.astype(kind)
        for kind in (longer, accumulated(dtype))
    )


def result_layout(problem, arrange):
    """How the result lies: contiguous where dy lies both ways."""
    both = problem.K == 1 or problem.P * problem.Q == 1
    return numpy.ascontiguousarray if both else arrange


def run(problem, dtype, algorithm, arrange=numpy.ascontiguousarray, **more):
    dy, weight, residual = inputs(problem, dtype)
    more = {"residual": result_layout(problem, arrange)(residual), "algorithm": algorithm, **more}
    return conv2d_backward_data(
        arrange(dy), arrange(weight), input_size=(problem.H, problem.W), **options(problem), **more
    )


def assert_right(dx, problem, dtype, label):
    truth, plain = sums(problem, dtype)
    assert dx.shape == truth.shape, label
    assert str(dx.dtype) == dtype, label
    error, bound = max_error(wide(dx), truth), error_bound(plain, truth, dtype)
    assert error <= bound, f"{label}: {error:.3g} > {bound:.3g}"


@EVERY_WAY
def test_every_problem(dtype, algorithm):
    problems = ALL if dtype == "float32" else {**SMALL, "resnet-down": LARGE["resnet-down"]}
    for name, problem in problems.items():
        if not runs(algorithm, problem):
            continue
        for layout, arrange in LAYOUTS.items():
            dx = run(problem, dtype, algorithm, arrange)
            assert_right(dx, problem, dtype, f"{name}, {layout}")


@EVERY_WAY
def test_the_sum_is_rounded_once(dtype, algorithm):
    """Of numbers whose sums are exact in float32 and not in 16 bits."""
    random = numpy.random.default_rng(3)
    for name, problem in chosen(algorithm).items():
        dy, weight, residual = (
            cast(random.integers(-most, most + 1, shape) / part, dtype)
            for most, part, shape in (
                (60, 4, problem.output_shape),
                (60, 4, problem.weight_shape),
                (250, 8, problem.input_shape),
            )
        )
        found = [wide(array) for array in (dy, weight)]
        exact = convolution.plain_backward_data(*found, problem.input_shape, geometry(problem), numpy.float64)
        for layout, arrange in LAYOUTS.items():
            dx = conv2d_backward_data(
                arrange(dy),
                arrange(weight),
                input_size=(problem.H, problem.W),
                residual=arrange(residual),
                algorithm=algorithm,
                **options(problem),
            )
            numpy.testing.assert_array_equal(dx, cast(exact + wide(residual), dtype), f"{name}, {layout}")


@pytest.mark.parametrize(
    ("dtype", "algorithm"), [("float32", "auto"), *(way for way in WAYS if way[0] in ("float32", "float64"))]
)
def test_the_bits_of_the_sum_of_both(dtype, algorithm):
    """What is not rounded to fewer bits than it was summed in may be added a launch later."""
    for name, problem in chosen(algorithm).items():
        for arrange in LAYOUTS.values():
            alone = run(problem, dtype, algorithm, arrange, residual=None)
            both = run(problem, dtype, algorithm, arrange)
            numpy.testing.assert_array_equal(both, alone + inputs(problem, dtype)[2], name)


@EVERY_WAY
def test_where_no_tap_meets_a_pixel_the_residual_is_alone(dtype, algorithm):
    for name in ("k2-s3-gaps", "stride-larger-than-image", "k1-strided", "dilation-equals-stride-3"):
        problem = ALL[name]
        if not runs(algorithm, problem):
            continue
        ones = numpy.ones(problem.output_shape), numpy.ones(problem.weight_shape)
        met = convolution.plain_backward_data(*ones, problem.input_shape, geometry(problem), numpy.float64) > 0
        assert met.any()
        assert not met.all()
        for arrange in LAYOUTS.values():
            dx, residual = run(problem, dtype, algorithm, arrange), inputs(problem, dtype)[2]
            numpy.testing.assert_array_equal(dx[~met], residual[~met], name)
            assert (dx[met] != residual[met]).any()


@EVERY_WAY
def test_out_may_be_the_residual(dtype, algorithm):
    for name, problem in chosen(algorithm).items():
        for source in LAYOUTS.values():
            for target in LAYOUTS.values():
                residual = target(inputs(problem, dtype)[2]).copy("K")
                apart = target(numpy.full_like(residual, numpy.nan))
                assert run(problem, dtype, algorithm, source, residual=residual, out=apart) is apart
                numpy.testing.assert_array_equal(residual, inputs(problem, dtype)[2], "it is left as it was")
                assert run(problem, dtype, algorithm, source, residual=residual, out=residual) is residual
                numpy.testing.assert_array_equal(residual, apart, name)
                assert_right(residual, problem, dtype, name)


@pytest.mark.parametrize("algorithm", ["col2im", "scatter"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_that_are_made_for_some_images_at_a_time(dtype, algorithm, monkeypatch):
    """Each part of the batch meets its own part of the residual, also where that is the result."""
    problem = ALL["k3-same"]
    monkeypatch.setattr(forward_paths, "WORKSPACE_BYTES", 1)
    for arrange in LAYOUTS.values():
        residual = arrange(inputs(problem, dtype)[2]).copy("K")
        assert_right(run(problem, dtype, algorithm, arrange, residual=residual), problem, dtype, algorithm)
        run(problem, dtype, algorithm, arrange, residual=residual, out=residual)
        assert_right(residual, problem, dtype, f"{algorithm}, in place")


@pytest.mark.parametrize("in_place", [False, True])
def test_a_sum_of_three_products_that_is_taken_again(in_place):
    """The largest number rounded to tf32 is infinite; what is taken again in float32 meets the residual once."""
    largest = numpy.finfo("f4").max
    problem = Conv2dProblem.from_shapes((2, 8, 5, 6), (4, 8, 1, 1))
    dy = numpy.zeros(problem.output_shape, "f4")
    dy[1, 2, 3, 4] = largest
    weight = numpy.full(problem.weight_shape, 0.5, "f4")
    for arrange in LAYOUTS.values():
        residual = arrange(numpy.full(problem.input_shape, -1.0e38, "f4"))
        expected = residual.copy("K")
        expected[1, :, 3, 4] = numpy.float32(0.5) * largest - numpy.float32(1.0e38)
        dx = conv2d_backward_data(
            arrange(dy),
            weight,
            input_size=(5, 6),
            residual=residual,
            out=residual if in_place else None,
            algorithm="tensor",
        )
        numpy.testing.assert_array_equal(dx, expected)


@EVERY_WAY
def test_nothing_begins_at_16_bytes(dtype, algorithm):
    """The same bits as where all arrays do."""

    def shifted(array):
        order = numpy.argsort([-stride for stride in array.strides], kind="stable")
        memory = numpy.empty(array.size + 32, array.dtype)
        first = (-memory.ctypes.data % 16) // array.itemsize + 1
        view = memory[first : first + array.size].reshape(array.transpose(order).shape)
        view[...] = array.transpose(order)
        return view.transpose(numpy.argsort(order))

    for name, problem in chosen(algorithm, ("resnet-down", "depthwise-s2", "k1")).items():
        dy, weight, residual = inputs(problem, dtype)
        for arrange in LAYOUTS.values():
            expected = run(problem, dtype, algorithm, arrange)
            for begins in (shifted, arrange):
                out = shifted(numpy.full_like(expected, numpy.nan))
                conv2d_backward_data(
                    begins(arrange(dy)),
                    begins(arrange(weight)),
                    input_size=(problem.H, problem.W),
                    residual=shifted(arrange(residual)),
                    out=out,
                    algorithm=algorithm,
                    **options(problem),
                )
                numpy.testing.assert_array_equal(out, expected, name)


@pytest.mark.parametrize("tile", ["small", "medium", "large"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tile_of_the_implicit_product(dtype, tile):
    """Fragments of 16 bytes that fit into rows of channels and of positions, and that do not; stride phases."""
    for shape, outputs, stride in (((2, 132, 9, 8), 12, 1), ((3, 70, 7, 9), 5, 2)):
        problem = Conv2dProblem.from_shapes(shape, (outputs, shape[1], 3, 3), padding=1, stride=stride)
        for layout, arrange in LAYOUTS.items():
            with forced(f"conv2d_implicit_gemm_{tile}"):
                dx = run(problem, dtype, "phases", arrange)
            assert_right(dx, problem, dtype, f"{shape}, {layout}")


def test_the_order_of_threads_does_not_matter():
    for algorithm in ALGORITHMS[:-1]:
        if algorithm == "scatter":
            continue
        problem = ALL["depthwise-s2" if algorithm == "depthwise" else "k3-s2"]
        for arrange in LAYOUTS.values():
            for in_place in (False, True):

                def work(in_place=in_place, algorithm=algorithm, arrange=arrange, problem=problem):
                    residual = arrange(inputs(problem, "float32")[2]).copy("K")
                    out = residual if in_place else None
                    return run(problem, "float32", algorithm, arrange, residual=residual, out=out)

                assert order_independent(work), algorithm


def test_measuring_adds_it_once(monkeypatch, tmp_path):
    """Every way is tried many times, and all but the last are to leave the residual as it was."""
    monkeypatch.setattr(tuning_memory, "cache_folder", lambda kind: tmp_path)
    monkeypatch.setattr(tuning, "_used", {})
    tuning_memory.memory_of.cache_clear()
    try:
        problem = ALL["k1"]
        residual = inputs(problem, "float32")[2].copy()
        with gpucnn_kernels.autotune():
            run(problem, "float32", "auto", residual=residual, out=residual)
        assert_right(residual, problem, "float32", "in place")
    finally:
        tuning_memory.memory_of.cache_clear()


def test_no_images():
    weight = numpy.ones((3, 1, 2, 2), numpy.float32)
    nothing = numpy.empty((0, 3, 4, 4), numpy.float32), weight
    for algorithm in ("auto", *ALGORITHMS[:-1]):
        residual = numpy.empty((0, 3, 5, 5), numpy.float32)
        given = {"input_size": 5, "groups": 3, "algorithm": algorithm, "residual": residual}
        assert conv2d_backward_data(*nothing, **given).shape == (0, 3, 5, 5)
        assert conv2d_backward_data(*nothing, **given, out=residual) is residual


def test_what_does_not_fit():
    problem = ALL["k3-s2"]
    dy, weight, residual = inputs(problem, "float32")
    where = {"input_size": (problem.H, problem.W), **options(problem)}
    with pytest.raises(ArgumentError, match=r"residual must have shape \(2, 3, 9, 9\), got \(2, 3, 9, 8\)"):
        conv2d_backward_data(dy, weight, residual=numpy.ascontiguousarray(residual[..., :8]), **where)
    with pytest.raises(LayoutError, match=r"residual has strides .* but the result has .* the same memory format"):
        conv2d_backward_data(dy, weight, residual=channels_last(residual), **where)
    with pytest.raises(DtypeError, match="residual is float16, but dy is float32"):
        conv2d_backward_data(dy, weight, residual=residual.astype("f2"), **where)
    memory = numpy.zeros(residual.size + 1, "f4")
    shifted = memory[1:].reshape(residual.shape)
    with pytest.raises(ArgumentError, match="out shares memory with residual, but shifted"):
        conv2d_backward_data(dy, weight, residual=shifted, out=memory[:-1].reshape(residual.shape), **where)
