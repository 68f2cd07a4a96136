"""Winograd's convolution in compiled loops: where vectors, runs of tiles, panels and pages end."""

from __future__ import annotations

import os
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gpucnn.ops import cpu
from gpucnn.ops.cpu import compiled
from gpucnn.ops.cpu.compiled import winograd
from gpucnn_kernels.problem import Conv2dProblem
from tests.guarded import guarded, guarded_empty
from tests.oracles import convolution as oracle
from tests.problems import arrays, geometry, options

pytestmark = pytest.mark.compiler

DIRECTIONS = ("forward", "backward_data", "backward_filter")
FACTOR = 20  # what the transforms may add to the plain sum's rounding


def case(n: int, c: int, h: int, w: int, k: int, kernel: int, padding: Any = 1) -> Any:
    problem = Conv2dProblem.from_shapes((n, c, h, w), (k, c, kernel, kernel), padding=padding)
    return pytest.param(problem, id=f"{n}x{c}x{h}x{w}-{k}-k{kernel}-p{padding}")


CASES = [
    # one output, one tile, and one tile and a bit
    case(1, 1, 3, 3, 1, 3, 0),
    case(1, 2, 6, 6, 3, 3, 0),
    case(1, 2, 7, 6, 3, 3, 0),
    case(1, 2, 5, 5, 2, 5, 0),
    case(2, 2, 6, 7, 3, 5, 2),
    # channels about the vectors of 4, 8 and 16, and panels of up to four of them
    *(
        case(1, c, 5, 6, k, 3)
        for c, k in ((3, 4), (5, 7), (8, 9), (15, 17), (17, 15), (16, 33), (33, 48), (49, 64))
    ),
    *(case(1, c, 5, 6, k, 5, 2) for c, k in ((4, 17), (17, 3), (33, 32))),
    case(1, 65, 5, 6, 70, 3),
    # rows of tiles about a piece of 16, images of several rows and of less than one
    *(case(1, 2, 5, width, 3, 3) for width in (15, 16, 17, 60, 64, 65, 68, 127, 129)),
    *(case(1, 2, 3, width, 3, 5, 2) for width in (31, 32, 33, 34, 65)),
    case(7, 3, 9, 9, 2, 3),
    case(30, 2, 2, 2, 3, 3),
    # padding of none, of one side, and as wide as the kernel allows
    case(1, 2, 9, 10, 3, 3, (0, 1, 2, 0)),
    case(1, 2, 9, 10, 3, 3, 2),
    case(1, 2, 9, 10, 3, 5, (4, 0, 1, 3)),
    # several runs of tiles, and more of them than shares of the filter gradient
    case(3, 3, 90, 50, 5, 3),
    case(1, 3, 203, 190, 5, 3),
    # too many filters for the cache: stretches of the depth, several runs, and more tiles than are done together
    case(1, 130, 8, 9, 132, 3),
    case(3, 150, 21, 23, 100, 3),
    case(2, 140, 9, 11, 110, 5, 2),
    case(1, 1024, 42, 45, 16, 3),
]
EVERY = pytest.mark.parametrize("problem", CASES)
EACH = pytest.mark.parametrize("direction", DIRECTIONS)
SWITCHED_ON = pytest.mark.skipif(os.environ.get("GPUCNN_COMPILED") == "0", reason="GPUCNN_COMPILED=0")


def run(direction: str, problem: Conv2dProblem, given: tuple[NDArray[Any], ...], **more: Any) -> NDArray[Any]:
    x, weight, bias, dy = given
    more |= {"algorithm": "winograd", **options(problem)}
    if direction == "forward":
        return cpu.conv2d_forward(x, weight, bias, **more)
    if direction == "backward_data":
        return cpu.conv2d_backward_data(dy, weight, input_size=(problem.H, problem.W), **more)
    return cpu.conv2d_backward_filter(dy, x, kernel_size=(problem.R, problem.S), **more)


def plainly(direction: str, problem: Conv2dProblem, dtype: str, *, sizes: bool = False) -> NDArray[Any]:
    """In float64 the truth, in float32 what our rounding is measured against; of the ``sizes``, without signs."""
    x, weight, bias, dy = (array.astype(dtype) for array in arrays(problem, "float32"))
    if sizes:
        x, weight, bias, dy = (numpy.abs(array) for array in (x, weight, bias, dy))
    where = geometry(problem)
    if direction == "forward":
        return oracle.plain_forward(x, weight, where, bias, dtype)
    if direction == "backward_data":
        return oracle.plain_backward_data(dy, weight, problem.input_shape, where, dtype)
    return oracle.plain_backward_filter(dy, x, problem.weight_shape, where, dtype)


def shape_of(direction: str, problem: Conv2dProblem) -> tuple[int, ...]:
    return {
        "forward": problem.output_shape,
        "backward_data": problem.input_shape,
        "backward_filter": problem.weight_shape,
    }[direction]


def assert_close(
    result: NDArray[Any], direction: str, problem: Conv2dProblem, scale: NDArray[Any] | None = None
) -> None:
    """Within FACTOR of the plain error; a few units of the truth's last place, or ``scale``'s, are no error."""
    truth = plainly(direction, problem, "float64")
    plain = numpy.abs(plainly(direction, problem, "float32") - truth).max()
    assert result.shape == truth.shape
    # Plain sums of few terms may be exact by luck.
    largest = numpy.abs(truth if scale is None else scale).max()
    bound = FACTOR * (plain + 2 * numpy.finfo("float32").eps * largest)
    assert numpy.abs(result - truth).max() <= bound


@EACH
@EVERY
def test_at_the_ends_of_vectors_runs_and_panels(direction: str, problem: Conv2dProblem) -> None:
    out = numpy.full(shape_of(direction, problem), 77777, "float32")  # what is not written stays
    assert run(direction, problem, arrays(problem, "float32"), out=out) is out
    assert_close(out, direction, problem)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_problems(data: st.DataObject) -> None:
    kernel = data.draw(st.sampled_from((3, 5)))
    padding = tuple(data.draw(st.integers(0, kernel - 1)) for _ in range(4))
    height = data.draw(st.integers(max(1, kernel - padding[0] - padding[1]), 24))
    width = data.draw(st.integers(max(1, kernel - padding[2] - padding[3]), 24))
    n, c, k = (data.draw(st.integers(1, most)) for most in (3, 36, 36))
    problem = Conv2dProblem.from_shapes((n, c, height, width), (k, c, kernel, kernel), padding=padding)
    for direction in DIRECTIONS:
        # One output of a few terms may be next to nothing, and its rounding is that of the terms.
        scale = plainly(direction, problem, "float64", sizes=True)
        assert_close(run(direction, problem, arrays(problem, "float32")), direction, problem, scale)


@EACH
@pytest.mark.parametrize("end", [True, False], ids=["end", "begin"])
@EVERY
def test_nothing_outside_the_arrays_is_touched(problem: Conv2dProblem, end: bool, direction: str) -> None:
    plain = arrays(problem, "float32")
    close = tuple(guarded(array, end) for array in plain)
    out = guarded_empty(shape_of(direction, problem), end=end)
    assert numpy.array_equal(run(direction, problem, close, out=out), run(direction, problem, plain))


@EACH
@EVERY
def test_the_same_bits_with_any_number_of_threads(
    direction: str, problem: Conv2dProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for threads in "123":
        monkeypatch.setenv("GPUCNN_NUM_THREADS", threads)
        results.append(run(direction, problem, arrays(problem, "float32")))
    assert numpy.array_equal(results[0], results[1])
    assert numpy.array_equal(results[0], results[2])


@EACH
def test_the_same_bits_of_any_strides(direction: str) -> None:
    problem = Conv2dProblem.from_shapes((2, 5, 9, 10), (6, 5, 3, 3), padding=1)
    plain = arrays(problem, "float32")
    turned = tuple(numpy.ascontiguousarray(array.T).T for array in plain)
    assert numpy.array_equal(run(direction, problem, turned), run(direction, problem, plain))


@pytest.mark.parametrize("bad", [numpy.nan, numpy.inf, -numpy.inf])
@pytest.mark.parametrize("kernel", [3, 5])
def test_what_is_not_finite_stays_within_its_tiles(kernel: int, bad: float) -> None:
    problem = Conv2dProblem.from_shapes((3, 4, 12, 12), (5, 4, kernel, kernel), padding=kernel // 2)
    x, weight, bias, dy = arrays(problem, "float32")
    y = run("forward", problem, (x, weight, bias, dy))
    spoiled = x.copy()
    spoiled[1, 2, 5, 6] = bad
    found = run("forward", problem, (spoiled, weight, bias, dy))
    reach = kernel // 2
    assert not numpy.isfinite(found[1, :, 5 - reach : 6 + reach, 6 - reach : 7 + reach]).any()
    touched = ~numpy.isfinite(found[1]).all(axis=0)
    size = 7 - kernel
    starts = size * (numpy.arange(12) // size) - reach  # where the six inputs of each output's tile begin
    rows, columns = ((starts <= place) & (place < starts + 6) for place in (5, 6))
    assert not touched[~(rows[:, None] & columns)].any()
    assert numpy.array_equal(found[1][:, ~touched], y[1][:, ~touched])
    assert numpy.array_equal(found[[0, 2]], y[[0, 2]])
    dw = run("backward_filter", problem, (spoiled, weight, bias, dy))
    assert not numpy.isfinite(dw[:, 2]).any()
    assert numpy.isfinite(dw[:, [0, 1, 3]]).all()


@SWITCHED_ON
@EACH
def test_they_are_what_runs(direction: str) -> None:
    """NumPy's transforms evaluate the same polynomials by other roundings: equal bits would mean that they ran."""
    problem = Conv2dProblem.from_shapes((2, 20, 13, 11), (17, 20, 3, 3), padding=1)
    given = arrays(problem, "float32")
    with compiled.switched(False):
        numpys = run(direction, problem, given)
    found = run(direction, problem, given)
    assert not numpy.array_equal(found, numpys)
    assert_close(numpys, direction, problem)


@SWITCHED_ON
def test_no_memory_is_an_error_and_passes() -> None:
    channels = 1 << 40  # their tiles would take more than there are addresses
    problem = Conv2dProblem.from_shapes((1, channels, 4, 4), (1, channels, 3, 3), padding=1)
    array = numpy.zeros(1, "float32")
    with pytest.raises(MemoryError, match="winograd_forward"):
        winograd.convolve(problem, array, array, None, array, turned=False)
    with pytest.raises(MemoryError, match="winograd_backward_filter"):
        winograd.backward_filter(problem, array, array, array)
    again = Conv2dProblem.from_shapes((1, 130, 8, 9), (132, 130, 3, 3), padding=1)
    for direction in DIRECTIONS:
        assert_close(run(direction, again, arrays(again, "float32")), direction, again)
