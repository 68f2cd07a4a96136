"""What the convolutions refuse, and in which words; empty batches; types other than the usual two."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from numpy.typing import NDArray

from gpucnn.errors import ArgumentError, DtypeError, ShapeError
from gpucnn.ops.cpu import compiled
from gpucnn_kernels.problem import Conv2dProblem, ProblemError
from tests.backends import BACKENDS, CPU, CUDA, NUMPY, Backend
from tests.oracles import convolution as oracle
from tests.problems import ALL, SMALL, arrays, can_do, geometry, options

X, WEIGHT, DY = numpy.zeros((2, 3, 6, 6)), numpy.zeros((4, 3, 3, 3)), numpy.zeros((2, 4, 4, 4))


# ---------------------------------------------------------------- algorithms


@BACKENDS
def test_an_unknown_algorithm_is_told_the_names(backend: Backend) -> None:
    def told(name: str, direction: str) -> str:
        names = ", ".join(backend.conv2d_algorithms(direction))
        return f"unknown algorithm '{name}' for conv2d {direction}; choose auto or one of {names}$"

    with pytest.raises(ArgumentError, match=told("fft", "forward")):
        backend.conv2d_forward(X, WEIGHT, algorithm="fft")
    with pytest.raises(ArgumentError, match=told("im2col", "backward_data")):
        backend.conv2d_backward_data(DY, WEIGHT, input_size=(6, 6), algorithm="im2col")
    with pytest.raises(ArgumentError, match=told("", "backward_filter")):
        backend.conv2d_backward_filter(DY, X, kernel_size=3, algorithm="")


@BACKENDS
def test_an_algorithm_that_cannot_do_the_problem_says_so(backend: Backend) -> None:
    with pytest.raises(ArgumentError, match=r"as many groups as input channels, got groups=1 for 3.*im2col"):
        backend.conv2d_forward(X, WEIGHT, algorithm="depthwise")
    with pytest.raises(ArgumentError, match=r"as many groups as input channels.*im2col"):
        backend.conv2d_backward_filter(DY, X, kernel_size=3, algorithm="depthwise")
    with pytest.raises(ArgumentError, match="at most 8 input channels a group, got 9"):
        CUDA.conv2d_forward(numpy.zeros((1, 9, 6, 6)), numpy.zeros((4, 9, 3, 3)), algorithm="direct")


@BACKENDS
def test_an_unknown_direction(backend: Backend) -> None:
    with pytest.raises(ArgumentError, match="forward, backward_data, backward_filter, got 'backward'"):
        backend.conv2d_algorithms("backward")
    with pytest.raises(ArgumentError, match="direction"):
        backend.conv2d_choose("sideways", SMALL["k3"], "float32")


@BACKENDS
@pytest.mark.parametrize("direction", ["forward", "backward_data", "backward_filter"])
def test_auto_stands_for_one_of_the_names_that_can_do_it(backend: Backend, direction: str) -> None:
    for problem in ALL.values():
        name = backend.conv2d_choose(direction, problem, "float32")
        assert name in backend.conv2d_algorithms(direction)
        assert can_do(name, direction, problem, backend.name, "float32")


def test_the_table_of_choices() -> None:
    def choices(name: str, backend: Backend = NUMPY, dtype: str = "float32") -> list[str]:
        directions = ("forward", "backward_data", "backward_filter")
        return [backend.conv2d_choose(direction, ALL[name], dtype) for direction in directions]

    assert choices("mobilenet-depthwise") == ["depthwise", "depthwise", "depthwise"]
    assert choices("depthwise-s2") == ["depthwise", "depthwise", "depthwise"]
    assert choices("bottleneck") == ["im2col", "col2im", "im2col"]
    assert choices("resnet-shortcut") == ["im2col", "col2im", "im2col"]
    assert choices("resnet-stem") == ["bands", "col2im", "bands"]
    assert choices("lenet-1") == ["bands", "col2im", "bands"]
    assert choices("resnet-block") == ["rows", "phases", "rows"]
    assert choices("resnet-down") == ["im2col", "col2im", "im2col"]
    if compiled.available():
        for name in ("bottleneck", "resnet-stem", "resnet-down", "lenet-1", "groups-2"):
            assert choices(name, CPU) == choices(name, CPU, "float16") == ["direct", "direct", "direct"]
        assert choices("mobilenet-depthwise", CPU) == ["depthwise", "depthwise", "depthwise"]
        assert choices("bottleneck", CPU, "float64") == choices("bottleneck", NUMPY, "float64")


def test_what_direct_cannot_do() -> None:
    with pytest.raises(ArgumentError, match=r"'direct' computes in float32, got float64; .* one of im2col, rows"):
        CPU.conv2d_forward(X, WEIGHT, algorithm="direct")
    x, dy = X.astype("float32"), DY.astype("float32")
    with pytest.raises(ArgumentError, match=r"'direct' is not there: .*switche[ds].*; .* one of im2col, rows"):
        NUMPY.conv2d_backward_filter(dy, x, kernel_size=3, algorithm="direct")


def test_the_table_of_choices_on_a_gpu() -> None:
    def choices(name: str, dtype: str = "float32") -> list[str]:
        return [CUDA.conv2d_choose(direction, ALL[name], dtype) for direction in ("forward", "backward_data")]

    assert choices("mobilenet-depthwise") == ["depthwise", "depthwise"]
    assert choices("resnet-stem")[0] == "direct"
    assert choices("bottleneck") == ["im2col", "col2im"]
    assert choices("resnet-block") == ["implicit_gemm", "phases"]


# ---------------------------------------------------------------- arrays that do not fit


@BACKENDS
@pytest.mark.parametrize("wrong", [X.astype(int), X.astype(bool), X.astype(complex), [[1.0]], 3.0])
def test_arrays_must_hold_floating_point_numbers(backend: Backend, wrong: Any) -> None:
    with pytest.raises(DtypeError, match="x must"):
        backend.conv2d_forward(wrong, WEIGHT)
    with pytest.raises(DtypeError, match="weight must"):
        backend.conv2d_forward(X, wrong)
    with pytest.raises(DtypeError, match="bias must"):
        backend.conv2d_forward(X, WEIGHT, wrong)
    with pytest.raises(DtypeError, match="dy must"):
        backend.conv2d_backward_data(wrong, WEIGHT, input_size=6)
    with pytest.raises(DtypeError, match="x must"):
        backend.conv2d_backward_filter(DY, wrong, kernel_size=3)
    with pytest.raises(DtypeError, match="dy must"):
        backend.conv2d_backward_bias(wrong)
    with pytest.raises(DtypeError, match="x must"):
        backend.conv_transpose2d_forward(wrong, WEIGHT)


@BACKENDS
def test_shapes_that_do_not_fit(backend: Backend) -> None:
    with pytest.raises(ProblemError, match=r"3 channels.*expects 4"):
        backend.conv2d_forward(X, numpy.zeros((4, 4, 3, 3)))
    with pytest.raises(ProblemError, match="larger than the padded input"):
        backend.conv2d_forward(X, numpy.zeros((4, 3, 9, 9)), padding=1)
    with pytest.raises(ShapeError, match=r"bias must have shape \(4,\), got \(3,\)"):
        backend.conv2d_forward(X, WEIGHT, numpy.zeros(3))
    with pytest.raises(ShapeError, match=r"bias must have shape \(4,\), got \(4, 1\)"):
        backend.conv2d_forward(X, WEIGHT, numpy.zeros((4, 1)))
    with pytest.raises(ProblemError, match=r"output gradient has shape \(2, 4, 4, 4\)"):
        backend.conv2d_backward_data(DY, WEIGHT, input_size=(7, 6))
    with pytest.raises(ShapeError, match="weight must have 4 dimensions"):
        backend.conv2d_backward_data(DY, WEIGHT[0], input_size=6)
    with pytest.raises(ProblemError, match="output gradient has shape"):
        backend.conv2d_backward_filter(DY, X, kernel_size=5)
    with pytest.raises(ShapeError, match="2 images and x 1"):
        backend.conv2d_backward_filter(DY, X[:1], kernel_size=3)
    with pytest.raises(ShapeError, match="x must have 4 dimensions"):
        backend.conv2d_backward_filter(DY, X[0], kernel_size=3)
    with pytest.raises(ShapeError, match="dy must have 4 dimensions"):
        backend.conv2d_backward_filter(DY[0], X, kernel_size=3)
    with pytest.raises(ShapeError, match="groups=2 must divide the 3 input channels"):
        backend.conv2d_backward_filter(DY, X, kernel_size=3, groups=2)
    with pytest.raises(ShapeError, match="groups=0"):
        backend.conv2d_backward_filter(DY, X, kernel_size=3, groups=0)
    with pytest.raises(ShapeError, match="dy must have 4 dimensions"):
        backend.conv2d_backward_bias(DY[0])


@BACKENDS
def test_out_that_does_not_fit(backend: Backend) -> None:
    with pytest.raises(ShapeError, match=r"\(2, 4, 4, 4\)"):
        backend.conv2d_forward(X, WEIGHT, out=numpy.zeros((2, 4, 4, 5)))
    with pytest.raises(DtypeError, match=r"float64.*float32"):
        backend.conv2d_forward(X, WEIGHT, out=numpy.zeros((2, 4, 4, 4), numpy.float32))
    with pytest.raises(DtypeError, match="list"):
        backend.conv2d_backward_bias(DY, out=[0.0] * 4)


# ---------------------------------------------------------------- empty batches, other types


@BACKENDS
@pytest.mark.parametrize("name", ["k3-s2", "k1", "depthwise", "padding-beyond-kernel"])
def test_an_empty_batch(backend: Backend, name: str) -> None:
    problem = SMALL[name]
    x, weight, bias, dy = arrays(problem, "float32")
    x, dy, size, kernel = x[:0], dy[:0], (problem.H, problem.W), (problem.R, problem.S)

    def run(direction: str, algorithm: str) -> NDArray[Any]:
        more = {"algorithm": algorithm, **options(problem)}
        if direction == "forward":
            return backend.conv2d_forward(x, weight, bias, **more)
        if direction == "backward_data":
            return backend.conv2d_backward_data(dy, weight, input_size=size, **more)
        return backend.conv2d_backward_filter(dy, x, kernel_size=kernel, **more)

    for direction, expected in {"forward": dy, "backward_data": x, "backward_filter": 0 * weight}.items():
        for algorithm in ("auto", *backend.conv2d_algorithms(direction)):
            if can_do(algorithm, direction, problem, backend.name, x.dtype):
                assert numpy.array_equal(run(direction, algorithm), expected), f"{direction} by {algorithm}"
    assert numpy.array_equal(backend.conv2d_backward_bias(dy), numpy.zeros(problem.K, numpy.float32))


@BACKENDS
@pytest.mark.parametrize("name", ["k3-s2-same-size", "k1", "depthwise", "resnet"])
def test_half_precision_is_computed_in_single(backend: Backend, name: str) -> None:
    """Half-precision results are the single-precision ones of the same numbers, rounded once at the end."""
    problem = SMALL.get(name) or Conv2dProblem(2, 16, 12, 12, 16, 3, 3, padding=(1, 1, 1, 1))
    x, weight, bias, dy = arrays(problem, "float16")
    where = geometry(problem)
    y = backend.conv2d_forward(x, weight, bias, **options(problem))
    dx = backend.conv2d_backward_data(dy, weight, input_size=(problem.H, problem.W), **options(problem))
    dw = backend.conv2d_backward_filter(dy, x, kernel_size=(problem.R, problem.S), **options(problem))
    db = backend.conv2d_backward_bias(dy)
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


@BACKENDS
def test_the_result_has_the_type_of_the_input(backend: Backend) -> None:
    assert backend.conv2d_forward(X.astype("float32"), WEIGHT).dtype == numpy.float32
    assert backend.conv2d_forward(X, WEIGHT.astype("float32")).dtype == numpy.float64
    assert backend.conv2d_backward_data(DY.astype("float32"), WEIGHT, input_size=6).dtype == numpy.float32
    assert backend.conv2d_backward_filter(DY, X.astype("float32"), kernel_size=3).dtype == numpy.float32


@BACKENDS
@pytest.mark.parametrize("value", [numpy.inf, numpy.nan])
def test_infinities_and_nans_are_results_and_not_warnings(backend: Backend, value: float) -> None:
    problem = SMALL["k3-same"]
    x, weight, bias, _ = arrays(problem, "float32")
    x[1, 0, 3, 2] = value
    for algorithm in backend.conv2d_algorithms("forward"):
        if not can_do(algorithm, "forward", problem, backend.name, x.dtype):
            continue
        y = backend.conv2d_forward(x, weight, bias, algorithm=algorithm, **options(problem))
        assert not numpy.isfinite(y[1, :, 3, 2]).any()
        assert numpy.isfinite(y[[0, 2]]).all()
    large = numpy.full((2, 4, 4, 4), 3e38, numpy.float32)
    assert numpy.isinf(backend.conv2d_backward_bias(large)).all()
