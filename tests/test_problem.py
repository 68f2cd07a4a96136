"""Every shape formula against counting: windows are placed one after the other until they no longer fit."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gpucnn_kernels.problem import (
    Conv2dProblem,
    Pool2dProblem,
    ProblemError,
    conv_transpose2d_problem,
    pair,
    resolve_padding,
    window_extent,
)
from tests.problems import ALL, SMALL, parameters

SIZES, KERNELS, STEPS, PADS = st.integers(1, 20), st.integers(1, 6), st.integers(1, 5), st.integers(0, 6)


def places(size: int, before: int, after: int, kernel: int, stride: int, dilation: int) -> list[list[int]]:
    """For each window that lies wholly in the padded line, the places that it touches (padding is negative or
    beyond ``size``)."""
    windows = []
    start = -before
    while start + dilation * (kernel - 1) < size + after:
        windows.append([start + dilation * i for i in range(kernel)])
        start += stride
    return windows


# ---------------------------------------------------------------- numbers


def test_pair() -> None:
    assert pair(3, "stride") == (3, 3)
    assert pair((2, 5), "stride") == (2, 5)
    assert pair([4], "stride") == (4, 4)
    assert pair(numpy.int64(2), "stride") == (2, 2)  # type: ignore[arg-type]  # a NumPy integer is an index too
    assert pair(0, "padding", 0) == (0, 0)


@pytest.mark.parametrize("value", [(1, 2, 3), (), 1.5, (1, 2.0), "3", None, True, (1, "2")])
def test_pair_refuses(value: Any) -> None:
    with pytest.raises(ProblemError, match="stride must be"):
        pair(value, "stride")


def test_pair_refuses_small_numbers() -> None:
    with pytest.raises(ProblemError, match=r"stride must be at least 1, got \(1, 0\)"):
        pair((1, 0), "stride")
    with pytest.raises(ProblemError, match="padding must be at least 0"):
        pair(-1, "padding", 0)


def test_resolve_padding() -> None:
    def resolve(padding: Any, kernel: tuple[int, int] = (3, 3), dilation: tuple[int, int] = (1, 1)) -> Any:
        return resolve_padding(padding, kernel, (1, 1), dilation)

    assert resolve(2) == (2, 2, 2, 2)
    assert resolve((1, 2)) == (1, 1, 2, 2)
    assert resolve((1, 2, 3, 4)) == (1, 2, 3, 4)
    assert resolve("valid") == (0, 0, 0, 0)
    assert resolve("same") == (1, 1, 1, 1)
    assert resolve("same", (4, 1)) == (1, 2, 0, 0)
    assert resolve("same", (2, 4), (3, 1)) == (1, 2, 1, 2)


@pytest.mark.parametrize("padding", [(1, 2, 3), -1, (0, -1), "full", 1.0, None])
def test_resolve_padding_refuses(padding: Any) -> None:
    with pytest.raises(ProblemError, match="padding must"):
        resolve_padding(padding, (3, 3), (1, 1), (1, 1))


def test_same_padding_needs_stride_1() -> None:
    with pytest.raises(ProblemError, match=r"needs stride 1, got stride \(1, 2\)"):
        resolve_padding("same", (3, 3), (1, 2), (1, 1))


@given(SIZES, KERNELS, STEPS)
def test_same_padding_keeps_the_size(size: int, kernel: int, dilation: int) -> None:
    problem = Conv2dProblem.from_shapes(
        (1, 1, size, size + 1), (1, 1, kernel, 1), padding="same", dilation=dilation
    )
    assert problem.output_shape == (1, 1, size, size + 1)
    assert 0 <= problem.padding[1] - problem.padding[0] <= 1


@given(KERNELS, STEPS)
def test_window_extent(kernel: int, dilation: int) -> None:
    touched = [dilation * i for i in range(kernel)]
    assert window_extent(kernel, dilation) == touched[-1] - touched[0] + 1


# ---------------------------------------------------------------- convolution


@given(SIZES, PADS, PADS, KERNELS, STEPS, STEPS)
def test_the_output_length_is_the_number_of_windows(
    size: int, before: int, after: int, kernel: int, stride: int, dilation: int
) -> None:
    windows = places(size, before, after, kernel, stride, dilation)
    rows: dict[str, Any] = {
        "stride": (stride, 1),
        "padding": (before, after, 0, 0),
        "dilation": (dilation, 1),
    }
    columns: dict[str, Any] = {
        "stride": (1, stride),
        "padding": (0, 0, before, after),
        "dilation": (1, dilation),
    }
    if not windows:
        with pytest.raises(ProblemError, match="larger than the padded input"):
            Conv2dProblem.from_shapes((1, 1, size, 1), (1, 1, kernel, 1), **rows)
        with pytest.raises(ProblemError, match="larger than the padded input"):
            Conv2dProblem.from_shapes((1, 1, 1, size), (1, 1, 1, kernel), **columns)
        return
    assert len(windows) == Conv2dProblem.from_shapes((1, 1, size, 1), (1, 1, kernel, 1), **rows).P
    assert len(windows) == Conv2dProblem.from_shapes((1, 1, 1, size), (1, 1, 1, kernel), **columns).Q


@pytest.mark.parametrize("problem", parameters(ALL))
def test_the_shared_problems(problem: Conv2dProblem) -> None:
    top, bottom, left, right = problem.padding
    rows = places(problem.H, top, bottom, problem.R, problem.stride[0], problem.dilation[0])
    columns = places(problem.W, left, right, problem.S, problem.stride[1], problem.dilation[1])
    assert problem.output_shape == (problem.N, problem.K, len(rows), len(columns))
    assert problem.input_shape == (problem.N, problem.C, problem.H, problem.W)
    assert problem.weight_shape == (problem.K, problem.C // problem.groups, problem.R, problem.S)
    assert problem.extent == (rows[0][-1] - rows[0][0] + 1, columns[0][-1] - columns[0][0] + 1)
    options: dict[str, Any] = {
        "stride": problem.stride,
        "padding": problem.padding,
        "dilation": problem.dilation,
        "groups": problem.groups,
    }
    assert Conv2dProblem.from_shapes(problem.input_shape, problem.weight_shape, **options) == problem
    size = (problem.H, problem.W)
    again = Conv2dProblem.from_output(problem.output_shape, problem.weight_shape, size, **options)
    assert again == problem


def test_flops_are_two_a_product() -> None:
    problem = Conv2dProblem.from_shapes((2, 4, 5, 6), (6, 2, 3, 2), stride=2, groups=2)
    products = 0
    for _ in numpy.ndindex(problem.output_shape):
        for _ in numpy.ndindex(problem.weight_shape[1:]):
            products += 1
    assert problem.flops == 2 * products


def test_a_problem_is_immutable_and_comparable() -> None:
    problem = SMALL["k3"]
    with pytest.raises(AttributeError):
        problem.N = 5  # type: ignore[misc]  # that it is frozen is what is tested
    assert problem == Conv2dProblem.from_shapes(problem.input_shape, problem.weight_shape)
    assert len({problem, Conv2dProblem.from_shapes(problem.input_shape, problem.weight_shape)}) == 1


@pytest.mark.parametrize(
    ("input_shape", "weight_shape", "options", "words"),
    [
        ((3, 5, 5), (4, 3, 3, 3), {}, "input of a 2d convolution must have 4 dimensions"),
        ((1, 3, 5, 5), (4, 3, 3), {}, "weight of a 2d convolution must have 4 dimensions"),
        ((1, 3, 5, 5), (4, 2, 3, 3), {}, "input has 3 channels .* expects 2"),
        ((1, 4, 5, 5), (4, 4, 3, 3), {"groups": 2}, "input has 4 channels .* expects 8"),
        ((1, 4, 5, 5), (3, 2, 3, 3), {"groups": 2}, "groups=2 must divide both the 4 .* and the 3"),
        ((1, 3, 5, 5), (4, 3, 3, 3), {"groups": 0}, "groups must be at least 1"),
        ((1, 3, 5, 5), (4, 3, 6, 3), {}, r"kernel of 6x3 .* padded input of 5x5"),
        ((1, 3, 5, 5), (4, 3, 3, 3), {"dilation": 3, "padding": (0, 0, 0, 2)}, "kernel of 7x7 .* of 5x7"),
        ((1, 3, 0, 5), (4, 3, 1, 1), {"padding": 2}, "H must be at least 1, got 0"),
        ((1, 3, 5, 5), (4, 3, 3, 0), {}, "S must be at least 1, got 0"),
        ((1, 3, 5, 5), (0, 3, 3, 3), {}, "K must be at least 1, got 0"),
        ((1, 3, 5, 5), (4, 3, 3, 3), {"stride": 0}, "stride must be at least 1"),
        ((1, 3, 5, 5), (4, 3, 3, 3), {"dilation": 0}, "dilation must be at least 1"),
    ],
)
def test_convolutions_that_do_not_fit(
    input_shape: tuple[int, ...], weight_shape: tuple[int, ...], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ProblemError, match=words):
        Conv2dProblem.from_shapes(input_shape, weight_shape, **options)


def test_numbers_that_do_not_fit() -> None:
    with pytest.raises(ProblemError, match="N must not be negative"):
        Conv2dProblem(-1, 1, 3, 3, 1, 2, 2)
    with pytest.raises(ProblemError, match=r"has shape \(1, 4, 3, 3\), but .* gives \(1, 4, 2, 2\)"):
        Conv2dProblem.from_output((1, 4, 3, 3), (4, 3, 3, 3), (5, 5), stride=2)
    with pytest.raises(ProblemError, match="output gradient of a 2d convolution must have 4 dimensions"):
        Conv2dProblem.from_output((4, 3, 3), (4, 3, 3, 3), (5, 5))


# ---------------------------------------------------------------- transposed convolution


@given(SIZES, KERNELS, STEPS, STEPS, PADS, st.integers(0, 4))
def test_the_transposed_length_reaches_the_last_place_touched(
    size: int, kernel: int, stride: int, dilation: int, padding: int, extra: int
) -> None:
    assume(extra < max(stride, dilation))
    touched = [h * stride + r * dilation for h in range(size) for r in range(kernel)]
    length = max(touched) + 1 - 2 * padding + extra
    options: dict[str, Any] = {
        "stride": (stride, 1),
        "padding": (padding, 0),
        "dilation": (dilation, 1),
        "output_padding": (extra, 0),
    }
    if length < 1:
        with pytest.raises(ProblemError, match="would have an output of"):
            conv_transpose2d_problem((2, 3, size, 2), (3, 5, kernel, 1), **options)
        return
    # Where the extra rows make room for one more window of the convolution, it is not this one's adjoint.
    if len(places(length, padding, padding, kernel, stride, dilation)) != size:
        with pytest.raises(ProblemError, match="output gradient has shape"):
            conv_transpose2d_problem((2, 3, size, 2), (3, 5, kernel, 1), **options)
        return
    problem = conv_transpose2d_problem((2, 3, size, 2), (3, 5, kernel, 1), **options)
    assert problem.input_shape == (2, 5, length, 2)
    assert problem.output_shape == (2, 3, size, 2)


@pytest.mark.parametrize(
    ("input_shape", "weight_shape", "options", "words"),
    [
        ((3, 5, 5), (3, 4, 3, 3), {}, "input of a transposed 2d convolution must have 4 dimensions"),
        ((1, 3, 5, 5), (3, 4, 3), {}, "weight of a transposed 2d convolution must have 4 dimensions"),
        ((1, 3, 5, 5), (4, 3, 3, 3), {}, "input has 3 channels .* expects 4"),
        ((1, 3, 5, 5), (3, 4, 3, 3), {"output_padding": 1}, r"output_padding \(1, 1\) must be smaller"),
        ((1, 3, 1, 1), (3, 4, 3, 3), {"padding": 2}, "would have an output of -1 rows or columns"),
    ],
)
def test_transposed_convolutions_that_do_not_fit(
    input_shape: tuple[int, ...], weight_shape: tuple[int, ...], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ProblemError, match=words):
        conv_transpose2d_problem(input_shape, weight_shape, **options)


# ---------------------------------------------------------------- pooling


@given(SIZES, PADS, KERNELS, STEPS, STEPS)
def test_the_pooled_length_is_the_number_of_windows(
    size: int, padding: int, kernel: int, stride: int, dilation: int
) -> None:
    assume(2 * padding <= kernel)
    windows = places(size, padding, padding, kernel, stride, dilation)
    options: dict[str, Any] = {
        "stride": (stride, 1),
        "padding": (padding, 0),
        "dilation": (dilation, 1),
    }
    if not windows:
        with pytest.raises(ProblemError, match="the pooling window"):
            Pool2dProblem.from_shapes((1, 1, size, 1), (kernel, 1), **options)
        return
    rows = Pool2dProblem.from_shapes((1, 1, size, 1), (kernel, 1), **options)
    assert len(windows) == rows.P
    options = {key: value[::-1] for key, value in options.items()}
    assert len(windows) == Pool2dProblem.from_shapes((1, 1, 1, size), (1, kernel), **options).Q

    # Rounded up: one window more, cut off by the edge, if places are left over and it starts before they end.
    reached = windows[-1][-1]
    next_start = windows[-1][0] + stride
    one_more = reached < size + padding - 1 and next_start < size
    ceiled = Pool2dProblem.from_shapes((1, 1, 1, size), (1, kernel), ceil_mode=True, **options)
    assert len(windows) + one_more == ceiled.Q


def test_pooling_defaults_and_shapes() -> None:
    problem = Pool2dProblem.from_shapes((2, 3, 7, 9), (2, 3))
    assert problem.stride == (2, 3)
    assert problem.input_shape == (2, 3, 7, 9)
    assert problem.output_shape == (2, 3, 3, 3)
    assert problem.extent == (2, 3)
    assert Pool2dProblem.from_shapes((2, 3, 7, 9), 2, stride=3, ceil_mode=True).output_shape == (2, 3, 3, 3)


@pytest.mark.parametrize(
    ("shape", "kernel", "options", "words"),
    [
        ((3, 7, 9), 2, {}, "input of 2d pooling must have 4 dimensions"),
        ((2, 3, 7, 9), 2, {"padding": 2}, "at most half of the window 2x2"),
        ((2, 3, 7, 9), 8, {}, "pooling window of 8x8 .* padded input of 7x9"),
        ((2, 3, 7, 9), 0, {}, "kernel_size must be at least 1"),
        ((2, 3, 7, 9), 2, {"stride": 0}, "stride must be at least 1"),
        ((2, 3, 7, 9), 2, {"padding": "same"}, "padding must be made of integers"),
    ],
)
def test_poolings_that_do_not_fit(
    shape: tuple[int, ...], kernel: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ProblemError, match=words):
        Pool2dProblem.from_shapes(shape, kernel, **options)
