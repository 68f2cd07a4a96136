"""Convolutions with more weights than columns, whose tasks are parts of the channels."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from numpy.typing import NDArray

from gpucnn.ops import cpu
from gpucnn.ops.cpu import compiled, conv2d_wide
from gpucnn_kernels.problem import Conv2dProblem
from tests.oracles import convolution as oracle
from tests.problems import arrays, geometry, options

PROBLEMS = {
    "2x2": Conv2dProblem.from_shapes((3, 250, 2, 2), (258, 250, 3, 3), padding=1),
    "stride-2": Conv2dProblem.from_shapes((2, 256, 5, 6), (260, 256, 3, 3), stride=2, padding=1),
    "uneven": Conv2dProblem.from_shapes(
        (2, 90, 9, 6), (300, 90, 5, 4), stride=(3, 1), padding=(2, 0, 1, 3), dilation=(1, 2)
    ),
    "pointwise-stride-2": Conv2dProblem.from_shapes((2, 800, 3, 3), (700, 800, 1, 1), stride=2),
    "one-output": Conv2dProblem.from_shapes((1, 256, 3, 3), (256, 256, 3, 3)),
}
ALL = pytest.mark.parametrize("problem", [pytest.param(problem, id=name) for name, problem in PROBLEMS.items()])


def results(problem: Conv2dProblem, dtype: str) -> dict[str, NDArray[Any]]:
    x, weight, bias, dy = arrays(problem, dtype)
    size, kernel = (problem.H, problem.W), (problem.R, problem.S)
    more = options(problem)
    return {
        "y": cpu.conv2d_forward(x, weight, bias, algorithm="im2col", **more),
        "dx": cpu.conv2d_backward_data(dy, weight, input_size=size, algorithm="col2im", **more),
        "dw": cpu.conv2d_backward_filter(dy, x, kernel_size=kernel, algorithm="im2col", **more),
    }


def plain(problem: Conv2dProblem, held: str, dtype: str) -> dict[str, NDArray[Any]]:
    """The plain sums in ``dtype`` of the numbers that ``held`` holds."""
    x, weight, bias, dy = (array.astype(dtype) for array in arrays(problem, held))
    where = geometry(problem)
    return {
        "y": oracle.plain_forward(x, weight, where, bias, dtype),
        "dx": oracle.plain_backward_data(dy, weight, problem.input_shape, where, dtype),
        "dw": oracle.plain_backward_filter(dy, x, problem.weight_shape, where, dtype),
    }


@ALL
def test_as_exact_as_the_plain_sum(problem: Conv2dProblem) -> None:
    assert conv2d_wide.fits(problem)
    truth, single = plain(problem, "float32", "float64"), plain(problem, "float32", "float32")
    for name, result in results(problem, "float32").items():
        error, plain_error = (numpy.abs(other - truth[name]).max() for other in (result, single[name]))
        assert result.dtype == numpy.float32
        assert error <= 2 * plain_error + 4 * numpy.finfo("float32").eps * numpy.abs(truth[name]).max(), name


@ALL
def test_in_double_precision(problem: Conv2dProblem) -> None:
    truth = plain(problem, "float64", "float64")
    for name, result in results(problem, "float64").items():
        assert numpy.abs(result - truth[name]).max() <= 1e-11, name


@ALL
def test_the_same_bits_with_any_number_of_threads(problem: Conv2dProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUCNN_NUM_THREADS", "1")
    alone = results(problem, "float32")
    monkeypatch.setenv("GPUCNN_NUM_THREADS", "3")
    for name, result in results(problem, "float32").items():
        assert numpy.array_equal(result, alone[name]), name


def test_auto_takes_it_where_outputs_are_few_and_weights_are_large() -> None:
    problem = PROBLEMS["2x2"]
    with compiled.switched(False):
        assert cpu.conv2d_choose("forward", problem, "float32") == "im2col"
        assert cpu.conv2d_choose("backward_data", problem, "float32") == "col2im"
        assert cpu.conv2d_choose("backward_filter", problem, "float32") == "im2col"
    many = Conv2dProblem.from_shapes((64, 250, 20, 20), (258, 250, 3, 3), padding=1)
    assert not conv2d_wide.fits(many)
    assert cpu.conv2d_choose("backward_data", many, "float64") == "phases"
