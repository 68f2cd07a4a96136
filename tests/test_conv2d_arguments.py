"""What the convolutions refuse, and in which words; empty batches; types other than the usual two."""

from __future__ import annotations

from typing import Any

import numpy
import pytest

from gpucnn.errors import ArgumentError, DtypeError, ShapeError
from gpucnn.ops import cpu
from gpucnn_kernels.problem import Conv2dProblem, ProblemError
from tests.oracles import convolution as oracle
from tests.problems import ALL, SMALL, arrays, geometry, options

X, WEIGHT, DY = numpy.zeros((2, 3, 6, 6)), numpy.zeros((4, 3, 3, 3)), numpy.zeros((2, 4, 4, 4))


# ---------------------------------------------------------------- algorithms


def test_an_unknown_algorithm_is_told_the_names() -> None:
    with pytest.raises(ArgumentError, match=r"unknown algorithm 'fft'.*im2col, rows, tensordot, depthwise"):
        cpu.conv2d_forward(X, WEIGHT, algorithm="fft")
    with pytest.raises(ArgumentError, match=r"unknown algorithm 'im2col'.*col2im, dilated, phases, scatter"):
        cpu.conv2d_backward_data(DY, WEIGHT, input_size=(6, 6), algorithm="im2col")
    with pytest.raises(ArgumentError, match=r"unknown algorithm ''.*im2col, rows, tensordot"):
        cpu.conv2d_backward_filter(DY, X, kernel_size=3, algorithm="")


def test_an_algorithm_that_cannot_do_the_problem_says_so() -> None:
    with pytest.raises(ArgumentError, match=r"as many groups as input channels, got groups=1 for 3.*im2col"):
        cpu.conv2d_forward(X, WEIGHT, algorithm="depthwise")
    with pytest.raises(ArgumentError, match=r"as many groups as input channels.*tensordot"):
        cpu.conv2d_backward_filter(DY, X, kernel_size=3, algorithm="depthwise")


def test_an_unknown_direction() -> None:
    with pytest.raises(ArgumentError, match="forward, backward_data, backward_filter, got 'backward'"):
        cpu.conv2d_algorithms("backward")
    with pytest.raises(ArgumentError, match="direction"):
        cpu.conv2d_choose("sideways", SMALL["k3"], "float32")


@pytest.mark.parametrize("direction", ["forward", "backward_data", "backward_filter"])
def test_auto_stands_for_one_of_the_names(direction: str) -> None:
    for problem in SMALL.values():
        assert cpu.conv2d_choose(direction, problem, "float32") in cpu.conv2d_algorithms(direction)


def test_the_table_of_choices() -> None:
    def choices(name: str) -> list[str]:
        directions = ("forward", "backward_data", "backward_filter")
        return [cpu.conv2d_choose(direction, ALL[name], "float32") for direction in directions]

    assert choices("mobilenet-depthwise") == ["depthwise", "phases", "depthwise"]
    assert choices("depthwise-s2") == ["depthwise", "phases", "depthwise"]
    assert choices("bottleneck") == ["im2col", "col2im", "im2col"]
    assert choices("resnet-shortcut") == ["im2col", "col2im", "im2col"]
    assert choices("resnet-stem") == ["im2col", "col2im", "im2col"]
    assert choices("lenet-1") == ["im2col", "phases", "im2col"]
    assert choices("resnet-block") == ["rows", "phases", "rows"]
    assert choices("resnet-down") == ["im2col", "phases", "im2col"]


# ---------------------------------------------------------------- arrays that do not fit


@pytest.mark.parametrize("wrong", [X.astype(int), X.astype(bool), X.astype(complex), [[1.0]], 3.0])
def test_arrays_must_hold_floating_point_numbers(wrong: Any) -> None:
    with pytest.raises(DtypeError, match="x must"):
        cpu.conv2d_forward(wrong, WEIGHT)
    with pytest.raises(DtypeError, match="weight must"):
        cpu.conv2d_forward(X, wrong)
    with pytest.raises(DtypeError, match="bias must"):
        cpu.conv2d_forward(X, WEIGHT, wrong)
    with pytest.raises(DtypeError, match="dy must"):
        cpu.conv2d_backward_data(wrong, WEIGHT, input_size=6)
    with pytest.raises(DtypeError, match="x must"):
        cpu.conv2d_backward_filter(DY, wrong, kernel_size=3)
    with pytest.raises(DtypeError, match="dy must"):
        cpu.conv2d_backward_bias(wrong)
    with pytest.raises(DtypeError, match="x must"):
        cpu.conv_transpose2d_forward(wrong, WEIGHT)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ProblemError, match=r"3 channels.*expects 4"):
        cpu.conv2d_forward(X, numpy.zeros((4, 4, 3, 3)))
    with pytest.raises(ProblemError, match="larger than the padded input"):
        cpu.conv2d_forward(X, numpy.zeros((4, 3, 9, 9)), padding=1)
    with pytest.raises(ShapeError, match=r"bias must have shape \(4,\), got \(3,\)"):
        cpu.conv2d_forward(X, WEIGHT, numpy.zeros(3))
    with pytest.raises(ShapeError, match=r"bias must have shape \(4,\), got \(4, 1\)"):
        cpu.conv2d_forward(X, WEIGHT, numpy.zeros((4, 1)))
    with pytest.raises(ProblemError, match=r"output gradient has shape \(2, 4, 4, 4\)"):
        cpu.conv2d_backward_data(DY, WEIGHT, input_size=(7, 6))
    with pytest.raises(ShapeError, match="weight must have 4 dimensions"):
        cpu.conv2d_backward_data(DY, WEIGHT[0], input_size=6)
    with pytest.raises(ProblemError, match="output gradient has shape"):
        cpu.conv2d_backward_filter(DY, X, kernel_size=5)
    with pytest.raises(ShapeError, match="2 images and x 1"):
        cpu.conv2d_backward_filter(DY, X[:1], kernel_size=3)
    with pytest.raises(ShapeError, match="x must have 4 dimensions"):
        cpu.conv2d_backward_filter(DY, X[0], kernel_size=3)
    with pytest.raises(ShapeError, match="dy must have 4 dimensions"):
        cpu.conv2d_backward_filter(DY[0], X, kernel_size=3)
    with pytest.raises(ShapeError, match="groups=2 must divide the 3 input channels"):
        cpu.conv2d_backward_filter(DY, X, kernel_size=3, groups=2)
    with pytest.raises(ShapeError, match="groups=0"):
        cpu.conv2d_backward_filter(DY, X, kernel_size=3, groups=0)
    with pytest.raises(ShapeError, match="dy must have 4 dimensions"):
        cpu.conv2d_backward_bias(DY[0])


def test_out_that_does_not_fit() -> None:
    with pytest.raises(ShapeError, match=r"\(2, 4, 4, 4\)"):
        cpu.conv2d_forward(X, WEIGHT, out=numpy.zeros((2, 4, 4, 5)))
    with pytest.raises(DtypeError, match=r"float64.*float32"):
        cpu.conv2d_forward(X, WEIGHT, out=numpy.zeros((2, 4, 4, 4), numpy.float32))
    with pytest.raises(DtypeError, match="list"):
        cpu.conv2d_backward_bias(DY, out=[0.0] * 4)


# ---------------------------------------------------------------- empty batches, other types


@pytest.mark.parametrize("name", ["k3-s2", "k1", "depthwise", "padding-beyond-kernel"])
def test_an_empty_batch(name: str) -> None:
    problem = SMALL[name]
    x, weight, bias, dy = arrays(problem, "float32")
    x, dy, size = x[:0], dy[:0], (problem.H, problem.W)
    kernel = (problem.R, problem.S)
    for algorithm in cpu.conv2d_algorithms("forward"):
        if algorithm != "depthwise" or name == "depthwise":
            y = cpu.conv2d_forward(x, weight, bias, algorithm=algorithm, **options(problem))
            assert y.shape == dy.shape
    for algorithm in cpu.conv2d_algorithms("backward_data"):
        if algorithm != "depthwise" or name == "depthwise":
            dx = cpu.conv2d_backward_data(dy, weight, input_size=size, algorithm=algorithm, **options(problem))
            assert dx.shape == x.shape
    for algorithm in cpu.conv2d_algorithms("backward_filter"):
        if algorithm != "depthwise" or name == "depthwise":
            dw = cpu.conv2d_backward_filter(dy, x, kernel_size=kernel, algorithm=algorithm, **options(problem))
            assert dw.shape == weight.shape
            assert not dw.any()
    assert numpy.array_equal(cpu.conv2d_backward_bias(dy), numpy.zeros(problem.K, numpy.float32))


@pytest.mark.parametrize("name", ["k3-s2-same-size", "k1", "depthwise", "resnet"])
def test_half_precision_is_computed_in_single(name: str) -> None:
    """Half-precision results are the single-precision ones of the same numbers, rounded once at the end."""
    problem = SMALL.get(name) or Conv2dProblem(2, 16, 12, 12, 16, 3, 3, padding=(1, 1, 1, 1))
    x, weight, bias, dy = arrays(problem, "float16")
    where = geometry(problem)
    y = cpu.conv2d_forward(x, weight, bias, **options(problem))
    dx = cpu.conv2d_backward_data(dy, weight, input_size=(problem.H, problem.W), **options(problem))
    dw = cpu.conv2d_backward_filter(dy, x, kernel_size=(problem.R, problem.S), **options(problem))
    db = cpu.conv2d_backward_bias(dy)
    wide_x, wide_weight, wide_bias, wide_dy = (array.astype(numpy.float64) for array in (x, weight, bias, dy))
    expected = {
        "y": oracle.plain_forward(wide_x, wide_weight, where, wide_bias),
        "dx": oracle.plain_backward_data(wide_dy, wide_weight, problem.input_shape, where),
        "dw": oracle.plain_backward_filter(wide_dy, wide_x, problem.weight_shape, where),
        "db": wide_dy.sum(axis=(0, 2, 3)),
    }
    for got, truth in zip((y, dx, dw, db), expected.values(), strict=True):
        assert got.dtype == numpy.float16
        # Half a unit in the last place of the largest number, and a little for float32's own rounding.
        assert numpy.abs(got - truth).max() <= 0.51 * numpy.finfo(numpy.float16).eps * numpy.abs(truth).max() * 2


def test_the_result_has_the_type_of_the_input() -> None:
    assert cpu.conv2d_forward(X.astype("float32"), WEIGHT).dtype == numpy.float32
    assert cpu.conv2d_forward(X, WEIGHT.astype("float32")).dtype == numpy.float64
    assert cpu.conv2d_backward_data(DY.astype("float32"), WEIGHT, input_size=6).dtype == numpy.float32
    assert cpu.conv2d_backward_filter(DY, X.astype("float32"), kernel_size=3).dtype == numpy.float32


@pytest.mark.parametrize("value", [numpy.inf, numpy.nan])
def test_infinities_and_nans_are_results_and_not_warnings(value: float) -> None:
    problem = SMALL["k3-same"]
    x, weight, bias, _ = arrays(problem, "float32")
    x[1, 0, 3, 2] = value
    for algorithm in ("im2col", "tensordot"):
        y = cpu.conv2d_forward(x, weight, bias, algorithm=algorithm, **options(problem))
        assert not numpy.isfinite(y[1, :, 3, 2]).any()
        assert numpy.isfinite(y[[0, 2]]).all()
    large = numpy.full((2, 4, 4, 4), 3e38, numpy.float32)
    assert numpy.isinf(cpu.conv2d_backward_bias(large)).all()
