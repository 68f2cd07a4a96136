"""Every convolution algorithm on every shared problem, in both precisions, against oracles written as loops."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy
import pytest
from numpy.typing import NDArray

from gpucnn_kernels.problem import Conv2dProblem
from tests.backends import BACKENDS, CPU, CUDA, NUMPY, Backend
from tests.oracles import convolution as oracle
from tests.problems import ALL, LARGE, SMALL, arrays, can_do, geometry, options, parameters

ALGORITHMS = {
    CPU: {
        "forward": ("im2col", "rows", "bands", "tensordot", "depthwise", "winograd", "direct"),
        "backward_data": ("col2im", "dilated", "phases", "scatter", "depthwise", "winograd", "direct"),
        "backward_filter": ("im2col", "rows", "bands", "tensordot", "depthwise", "winograd", "direct"),
    },
    CUDA: {
        "forward": ("implicit_gemm", "direct", "depthwise", "im2col"),
        "backward_data": ("phases", "direct", "dilated", "col2im", "scatter", "depthwise"),
        "backward_filter": ("implicit_gemm", "direct", "im2col", "depthwise"),
    },
}
ALGORITHMS[NUMPY] = ALGORITHMS[CPU]
WITH_LOOPS = ("auto", "depthwise", "winograd")  # what the CPU does in another way where it has compiled loops
DTYPES = ("float32", "float64")
LONG_DOUBLE_IS_LONGER = numpy.finfo(numpy.longdouble).nmant > numpy.finfo(numpy.float64).nmant


@cache
def truth_and_plain(problem: Conv2dProblem, dtype: str) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """For each direction, the truth for arrays of ``dtype``, and the plain computation in ``dtype``.

    The truth comes from the loops where there are not too many products, otherwise from the plain computation in
    long double, which on the machines that have none is float64 and then good for float32 alone.
    """
    x, weight, bias, dy = arrays(problem, dtype)
    shape, where = problem, geometry(problem)
    plain = {
        "forward": oracle.plain_forward(x, weight, where, bias, dtype),
        "backward_data": oracle.plain_backward_data(dy, weight, shape.input_shape, where, dtype),
        "backward_filter": oracle.plain_backward_filter(dy, x, shape.weight_shape, where, dtype),
    }
    if problem in SMALL.values():
        truth = {
            "forward": oracle.forward_loops(x, weight, where, bias),
            "backward_data": oracle.backward_data_loops(dy, weight, shape.input_shape, where),
            "backward_filter": oracle.backward_filter_loops(dy, x, shape.weight_shape, where),
        }
    else:
        wide = numpy.longdouble
        truth = {
            "forward": oracle.plain_forward(x, weight, where, bias, wide),
            "backward_data": oracle.plain_backward_data(dy, weight, shape.input_shape, where, wide),
            "backward_filter": oracle.plain_backward_filter(dy, x, shape.weight_shape, where, wide),
        }
    return {direction: (truth[direction], plain[direction]) for direction in plain}


WINOGRAD_FACTOR = 20  # what its transforms may add to the plain sum's rounding


def assert_as_exact_as_plain(
    backend: Backend, result: NDArray[Any], direction: str, problem: Conv2dProblem, dtype: str, algorithm: str
) -> None:
    """Our largest error is at most twice the plain computation's, or a few units in the last place."""
    if algorithm == "auto":
        algorithm = backend.conv2d_choose(direction, problem, dtype)
    factor = WINOGRAD_FACTOR if algorithm == "winograd" else 2
    truth, plain = truth_and_plain(problem, dtype)[direction]
    assert result.shape == truth.shape
    assert result.dtype == numpy.dtype(dtype)
    error = numpy.abs(result - truth).max()
    plain_error = numpy.abs(plain - truth).max()
    assert error <= factor * plain_error + 2 * factor * numpy.finfo(dtype).eps * numpy.abs(truth).max()


def cases(direction: str) -> Any:
    """Every problem, in both precisions, on the backends with "auto" and each algorithm that can do it."""
    found = [
        pytest.param(backend, problem, dtype, algorithm, id=f"{backend.name}-{name}-{dtype}-{algorithm}")
        for backend, algorithms in ALGORITHMS.items()
        for name, problem in ALL.items()
        for dtype in DTYPES
        for algorithm in ("auto", *algorithms[direction])
        if can_do(algorithm, direction, problem, backend.name, dtype)
        if backend is not NUMPY or (algorithm in WITH_LOOPS and dtype == "float32")
        if dtype == "float32" or name in SMALL or LONG_DOUBLE_IS_LONGER
    ]
    return pytest.mark.parametrize(("backend", "problem", "dtype", "algorithm"), found)


@BACKENDS
def test_the_lists_of_algorithms(backend: Backend) -> None:
    for direction, names in ALGORITHMS[backend].items():
        assert backend.conv2d_algorithms(direction) == names


@pytest.mark.parametrize("problem", parameters(SMALL))
def test_the_plain_oracles_agree_with_the_loops(problem: Conv2dProblem) -> None:
    for truth, plain in truth_and_plain(problem, "float64").values():
        assert numpy.abs(plain - truth).max() <= 1e-13


@cases("forward")
def test_forward(backend: Backend, problem: Conv2dProblem, dtype: str, algorithm: str) -> None:
    x, weight, bias, _ = arrays(problem, dtype)
    y = backend.conv2d_forward(x, weight, bias, algorithm=algorithm, **options(problem))
    assert_as_exact_as_plain(backend, y, "forward", problem, dtype, algorithm)


@cases("backward_data")
def test_backward_data(backend: Backend, problem: Conv2dProblem, dtype: str, algorithm: str) -> None:
    _, weight, _, dy = arrays(problem, dtype)
    size = (problem.H, problem.W)
    dx = backend.conv2d_backward_data(dy, weight, input_size=size, algorithm=algorithm, **options(problem))
    assert_as_exact_as_plain(backend, dx, "backward_data", problem, dtype, algorithm)


@cases("backward_filter")
def test_backward_filter(backend: Backend, problem: Conv2dProblem, dtype: str, algorithm: str) -> None:
    x, _, _, dy = arrays(problem, dtype)
    size = (problem.R, problem.S)
    dw = backend.conv2d_backward_filter(dy, x, kernel_size=size, algorithm=algorithm, **options(problem))
    assert_as_exact_as_plain(backend, dw, "backward_filter", problem, dtype, algorithm)


@cases("forward")
def test_forward_without_bias_is_forward_with_zeros(
    backend: Backend, problem: Conv2dProblem, dtype: str, algorithm: str
) -> None:
    x, weight, bias, _ = arrays(problem, dtype)
    plain = backend.conv2d_forward(x, weight, algorithm=algorithm, **options(problem))
    zeros = backend.conv2d_forward(x, weight, numpy.zeros_like(bias), algorithm=algorithm, **options(problem))
    assert numpy.array_equal(plain, zeros)


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*LARGE, "k3", "one-number"])
def test_backward_bias(backend: Backend, name: str, dtype: str) -> None:
    problem = ALL[name]
    dy = arrays(problem, dtype)[3]
    gradient = backend.conv2d_backward_bias(dy)
    assert gradient.dtype == numpy.dtype(dtype)
    truth = [math.fsum(map(float, dy[:, k].ravel())) for k in range(problem.K)]
    plain = dy.transpose(1, 0, 2, 3).reshape(problem.K, -1).cumsum(axis=1, dtype=dtype)[:, -1]
    error, plain_error = numpy.abs(gradient - truth).max(), numpy.abs(plain - truth).max()
    assert error <= 2 * plain_error + 4 * numpy.finfo(dtype).eps * numpy.abs(truth).max()
