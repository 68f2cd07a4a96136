"""im2col and col2im against loops, and as one another's adjoints."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from numpy.typing import NDArray

from gpucnn.errors import DtypeError, ShapeError
from gpucnn_kernels.problem import Conv2dProblem, ProblemError
from tests.backends import BACKENDS, Backend
from tests.problems import ALL, SMALL, arrays, parameters


def window_options(problem: Conv2dProblem) -> dict[str, Any]:
    return {
        "kernel_size": (problem.R, problem.S),
        "stride": problem.stride,
        "padding": problem.padding,
        "dilation": problem.dilation,
    }


def columns_by_loops(x: NDArray[Any], problem: Conv2dProblem) -> tuple[NDArray[Any], NDArray[Any]]:
    """The columns, and for each of their elements the flat index of the pixel that it is, -1 for padding."""
    top, _, left, _ = problem.padding
    columns, sources = [], []
    for n in range(problem.N):
        for c in range(problem.C):
            for r in range(problem.R):
                for s in range(problem.S):
                    for p in range(problem.P):
                        for q in range(problem.Q):
                            h = p * problem.stride[0] - top + r * problem.dilation[0]
                            w = q * problem.stride[1] - left + s * problem.dilation[1]
                            inside = 0 <= h < problem.H and 0 <= w < problem.W
                            columns.append(x[n, c, h, w] if inside else 0.0)
                            sources.append(((n * problem.C + c) * problem.H + h) * problem.W + w if inside else -1)
    shape = (problem.N, problem.C * problem.R * problem.S, problem.P * problem.Q)
    return numpy.reshape(columns, shape), numpy.reshape(sources, shape)


@BACKENDS
@pytest.mark.parametrize("problem", parameters(SMALL))
def test_im2col_and_col2im_are_the_loops(backend: Backend, problem: Conv2dProblem) -> None:
    x = arrays(problem)[0]
    columns, sources = columns_by_loops(x, problem)
    result = backend.im2col(x, **window_options(problem))
    assert result.dtype == x.dtype
    assert numpy.array_equal(result, columns)

    values = numpy.random.default_rng(3).standard_normal(columns.shape)
    image = [0.0] * x.size
    for source, value in zip(sources.ravel(), values.ravel(), strict=True):
        if source >= 0:
            image[source] += value
    expected = numpy.reshape(image, x.shape)
    size = (problem.H, problem.W)
    result = backend.col2im(values, input_size=size, **window_options(problem))
    assert result.shape == x.shape
    assert numpy.abs(result - expected).max() <= 1e-14 * problem.R * problem.S


@BACKENDS
@pytest.mark.parametrize("problem", parameters(ALL))
def test_col2im_is_the_adjoint_of_im2col(backend: Backend, problem: Conv2dProblem) -> None:
    x = arrays(problem)[0]
    columns = backend.im2col(x, **window_options(problem))
    values = numpy.random.default_rng(4).standard_normal(columns.shape)
    image = backend.col2im(values, input_size=(problem.H, problem.W), **window_options(problem))
    difference = abs(float(numpy.vdot(values, columns)) - float(numpy.vdot(image, x)))
    assert difference <= 1e-12 * float(numpy.abs(values * columns).sum()) + 1e-13


@BACKENDS
@pytest.mark.parametrize("name", ["k3-s2", "padding-0-1-2-3", "k1", "bottleneck"])
def test_strides_and_out(backend: Backend, name: str) -> None:
    problem = ALL[name]
    x = arrays(problem, "float32")[0]
    expected = backend.im2col(x, **window_options(problem))
    channels_last = numpy.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    out = numpy.full((expected.shape[2], *expected.shape[:2]), numpy.nan, numpy.float32).transpose(1, 2, 0)
    assert backend.im2col(channels_last, out=out, **window_options(problem)) is out
    assert numpy.array_equal(out, expected)

    size = (problem.H, problem.W)
    image = backend.col2im(expected, input_size=size, **window_options(problem))
    into = numpy.full(x.transpose(2, 3, 1, 0).shape, numpy.nan, numpy.float32).transpose(3, 2, 0, 1)
    assert backend.col2im(out, input_size=size, out=into, **window_options(problem)) is into
    assert numpy.array_equal(into, image)


@BACKENDS
def test_half_precision_is_added_up_in_single(backend: Backend) -> None:
    columns = numpy.full((1, 9, 36), 0.1, numpy.float16)
    columns[0, 0] = 1000
    image = backend.col2im(columns, input_size=8, kernel_size=3)
    assert image.dtype == numpy.float16
    # In float16 each of the eight tenths added to 1000 would be lost or rounded to a multiple of a half.
    assert image[0, 0, 2, 2] == numpy.float16(1000 + 8 * float(numpy.float16(0.1)))


@BACKENDS
def test_an_empty_batch(backend: Backend) -> None:
    columns = backend.im2col(numpy.zeros((0, 3, 5, 5)), kernel_size=3)
    assert columns.shape == (0, 27, 9)
    assert backend.col2im(columns, input_size=5, kernel_size=3).shape == (0, 3, 5, 5)


@BACKENDS
def test_what_does_not_fit(backend: Backend) -> None:
    with pytest.raises(ProblemError, match="4 dimensions"):
        backend.im2col(numpy.zeros((3, 5, 5)), kernel_size=3)
    with pytest.raises(ProblemError, match="larger than the padded input"):
        backend.im2col(numpy.zeros((1, 3, 5, 5)), kernel_size=6)
    with pytest.raises(DtypeError, match="x must hold"):
        backend.im2col(numpy.zeros((1, 3, 5, 5), int), kernel_size=3)
    with pytest.raises(ShapeError, match=r"\(1, 27, 9\)"):
        backend.im2col(numpy.zeros((1, 3, 5, 5)), kernel_size=3, out=numpy.zeros((1, 9, 27)))
    with pytest.raises(DtypeError, match="columns must hold"):
        backend.col2im(numpy.zeros((1, 27, 9), int), input_size=5, kernel_size=3)
    for shape in [(27, 9), (1, 26, 9), (1, 0, 9)]:
        with pytest.raises(ShapeError, match=r"shape \(N, C \* 3 \* 3, P \* Q\)"):
            backend.col2im(numpy.zeros(shape), input_size=5, kernel_size=3)
    with pytest.raises(ShapeError, match="3x3 = 9 windows"):
        backend.col2im(numpy.zeros((1, 27, 8)), input_size=5, kernel_size=3)
