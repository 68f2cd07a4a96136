"""Depthwise convolution in compiled loops, where vectors, bands of rows and pages end, against the definition."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gpucnn.ops import cpu
from gpucnn.ops.cpu import compiled
from gpucnn_kernels.problem import Conv2dProblem
from tests.accuracy import error_bound, max_error
from tests.guarded import guarded, guarded_empty
from tests.oracles import convolution as oracle
from tests.problems import arrays, geometry, options

pytestmark = pytest.mark.compiler
Arrays = tuple[NDArray[Any], ...]


def depthwise(
    shape: tuple[int, int, int, int], kernel: tuple[int, int], multiplier: int = 1, **others: Any
) -> Any:
    """The problem of a depthwise convolution of an image of this shape."""
    channels = shape[1]
    return Conv2dProblem.from_shapes(shape, (channels * multiplier, 1, *kernel), groups=channels, **others)


# Widths about the vectors of 4, 8 and 16 numbers and twice those; heights about the 4 rows computed at a time.
WIDTHS = {
    f"{kernel}x{kernel} s{stride} {height}x{width}": depthwise(
        (1, 2, height, width), (kernel, kernel), stride=stride, padding=kernel // 2
    )
    for kernel, stride, height, width in [
        (3, 1, 4, 4), (3, 1, 5, 7), (3, 1, 7, 8), (3, 1, 3, 15), (3, 1, 8, 16), (3, 1, 9, 17), (3, 1, 2, 33),
        (3, 2, 9, 15), (3, 2, 8, 31), (3, 2, 7, 32), (3, 2, 17, 33), (3, 2, 6, 65),
        (5, 1, 6, 15), (5, 1, 5, 33), (5, 2, 9, 31), (5, 2, 12, 34),
    ]
}  # fmt: skip
OTHERS = {
    "two outputs a channel": depthwise((2, 3, 7, 18), (3, 3), 2, padding=1),
    "two outputs a channel, strided": depthwise((2, 2, 9, 35), (3, 3), 2, stride=2, padding=1),
    "dilated": depthwise((1, 2, 9, 20), (3, 3), dilation=2, padding=2),
    "dilated columns, strided": depthwise((1, 2, 8, 37), (3, 3), stride=2, dilation=(1, 3), padding=(1, 2)),
    "stride 3, dilation 3": depthwise((1, 2, 10, 22), (2, 3), stride=3, dilation=3, padding=(0, 3)),
    "stride 3, dilation 2": depthwise((1, 2, 12, 25), (3, 4), stride=3, dilation=2, padding=(2, 3)),
    "gaps": depthwise((2, 2, 11, 23), (2, 2), stride=4),
    "7x7": depthwise((1, 2, 10, 19), (7, 7), padding=3),
    "1x1": depthwise((2, 3, 5, 17), (1, 1)),
    "4x2, one side padded": depthwise((1, 2, 6, 21), (4, 2), padding=(0, 3, 1, 0)),
    "more padding than kernel": depthwise((1, 2, 4, 6), (3, 3), padding=5),
    "more padding than kernel, strided": depthwise((1, 2, 4, 6), (3, 3), stride=2, padding=5),
    "3x3 s1x2": depthwise((1, 2, 7, 35), (3, 3), stride=(1, 2), padding=1),
    "3x3 s2x1": depthwise((1, 2, 9, 18), (3, 3), stride=(2, 1), padding=1),
    "bands of a tall plane": depthwise((1, 1, 203, 40), (3, 3), padding=1),
    "bands of a tall plane, strided": depthwise((1, 1, 301, 33), (5, 5), stride=2, padding=2),
    "a wide row": depthwise((1, 1, 3, 5001), (3, 3), padding=1),
}
PROBLEMS = WIDTHS | OTHERS
CASES = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


def results(problem: Conv2dProblem, x: Any, weight: Any, bias: Any, dy: Any) -> Arrays:
    """Of the three directions, by the compiled loops."""
    others = options(problem)
    assert compiled.usable(x, weight, bias, dy)
    return (
        cpu.conv2d_forward(x, weight, bias, algorithm="depthwise", **others),
        cpu.conv2d_backward_data(dy, weight, input_size=problem.input_shape[2:], algorithm="depthwise", **others),
        cpu.conv2d_backward_filter(dy, x, kernel_size=(problem.R, problem.S), algorithm="depthwise", **others),
    )


def plain(problem: Conv2dProblem, x: Any, weight: Any, bias: Any, dy: Any, dtype: str) -> Arrays:
    """The same, one product after the other in ``dtype``."""
    where = geometry(problem)
    return (
        oracle.plain_forward(x, weight, where, bias, dtype),
        oracle.plain_backward_data(dy, weight, problem.input_shape, where, dtype),
        oracle.plain_backward_filter(dy, x, problem.weight_shape, where, dtype),
    )


def assert_as_exact_as_plain_sums(problem: Conv2dProblem) -> None:
    given = arrays(problem, "float32")
    x, weight, _, dy = (float(abs(array).max()) for array in given)
    for ours, in_float32, truth, term in zip(
        results(problem, *given),
        plain(problem, *given, "float32"),
        plain(problem, *given, "float64"),
        (x * weight, dy * weight, dy * x),
        strict=True,
    ):
        assert ours.dtype == numpy.float32
        assert max_error(ours, truth) <= error_bound(in_float32, truth, term)


@CASES
def test_three_directions(problem: Conv2dProblem) -> None:
    assert_as_exact_as_plain_sums(problem)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_problems(data: st.DataObject) -> None:
    draw = data.draw
    kernel = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.tuples(*[st.integers(0, 4)] * 4))
    least = [
        max(1, d * (k - 1) + 1 - sum(p))
        for k, d, p in zip(kernel, dilation, (padding[:2], padding[2:]), strict=True)
    ]
    height, width = least[0] + draw(st.integers(0, 9)), least[1] + draw(st.integers(0, 40))
    shape = draw(st.integers(1, 2)), draw(st.integers(1, 3)), height, width
    assert_as_exact_as_plain_sums(
        depthwise(shape, kernel, draw(st.integers(1, 2)), stride=stride, padding=padding, dilation=dilation)
    )


@pytest.mark.parametrize("problem", [*WIDTHS.values(), *list(OTHERS.values())[:12]], ids=str)
@pytest.mark.parametrize("end", [True, False])
def test_nothing_beyond_the_arrays_is_touched(problem: Conv2dProblem, end: bool) -> None:
    x, weight, bias, dy = (guarded(array, end) for array in arrays(problem, "float32"))
    others = options(problem)
    expected = results(problem, x, weight, bias, dy)
    outs = [guarded_empty(array.shape, numpy.float32, end) for array in expected]
    cpu.conv2d_forward(x, weight, bias, algorithm="depthwise", out=outs[0], **others)
    size = problem.input_shape[2:]
    cpu.conv2d_backward_data(dy, weight, input_size=size, algorithm="depthwise", out=outs[1], **others)
    window = problem.R, problem.S
    cpu.conv2d_backward_filter(dy, x, kernel_size=window, algorithm="depthwise", out=outs[2], **others)
    for out, result in zip(outs, expected, strict=True):
        numpy.testing.assert_array_equal(out, result)


@pytest.mark.parametrize(
    "problem",
    [
        depthwise((3, 10, 30, 28), (3, 3), padding=1),
        depthwise((2, 5, 120, 60), (5, 5), 2, stride=2, padding=2),
        depthwise((2, 7, 90, 70), (3, 2), dilation=(2, 1)),
    ],
    ids=str,
)
def test_the_number_of_threads_changes_nothing(monkeypatch: pytest.MonkeyPatch, problem: Conv2dProblem) -> None:
    given = arrays(problem, "float32")
    found = []
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("GPUCNN_NUM_THREADS", threads)
        found.append([result.tobytes() for result in results(problem, *given)])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("value", [numpy.nan, numpy.inf])
@pytest.mark.parametrize("problem", [PROBLEMS["3x3 s1 9x17"], PROBLEMS["3x3 s2 17x33"], PROBLEMS["7x7"]], ids=str)
def test_nan_and_infinity_go_where_their_windows_go(problem: Conv2dProblem, value: float) -> None:
    x, weight, bias, dy = arrays(problem, "float32")
    x[0, 0, 1, problem.W - 1] = value
    dy[0, 1, problem.P - 1, 0] = value
    ours = results(problem, x, weight, bias, dy)
    with numpy.errstate(invalid="ignore"):
        truth = plain(problem, x, weight, bias, dy, "float64")
    for result, expected in zip(ours, truth, strict=True):
        touched = ~numpy.isfinite(expected)
        assert touched.any()
        numpy.testing.assert_array_equal(~numpy.isfinite(result), touched)


def test_no_images() -> None:
    x, weight = numpy.zeros((0, 3, 8, 8), "f4"), numpy.ones((3, 1, 3, 3), "f4")
    assert cpu.conv2d_forward(x, weight, groups=3).shape == (0, 3, 6, 6)
    dy = numpy.zeros((0, 3, 6, 6), "f4")
    assert cpu.conv2d_backward_data(dy, weight, input_size=(8, 8), groups=3).shape == x.shape
    assert not cpu.conv2d_backward_filter(dy, x, kernel_size=3, groups=3).any()


def test_auto_is_depthwise_in_every_direction() -> None:
    problem = PROBLEMS["3x3 s2 9x15"]
    chosen = {
        direction: cpu.conv2d_choose(direction, problem, numpy.float32)
        for direction in ("forward", "backward_data", "backward_filter")
    }
    assert set(chosen.values()) == {"depthwise"}
