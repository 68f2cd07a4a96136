"""The compiled direct convolution: sizes around its blocks, its memory's borders, its rounding, its infinities."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gpucnn.errors import ArgumentError
from gpucnn.ops import cpu
from gpucnn.ops.cpu.compiled import direct
from gpucnn.ops.cpu.conv2d import conv2d_backward_filter, conv2d_forward
from gpucnn_kernels.problem import Conv2dProblem
from tests.accuracy import max_error
from tests.guarded import guarded, guarded_empty
from tests.oracles import convolution as oracle
from tests.problems import ALL, arrays, geometry, options, parameters

pytestmark = pytest.mark.compiler

DIRECTIONS = ("forward", "backward_data", "backward_filter")
# What no number of the result is, to see what was left out.
UNWRITTEN = numpy.float32(77777.0)


def run(
    direction: str, problem: Conv2dProblem, inputs: tuple[NDArray[Any], ...], out: NDArray[Any]
) -> NDArray[Any]:
    """The direction's result for (x, weight, bias, dy), in ``out``."""
    x, weight, bias, dy = inputs
    if direction == "forward":
        direct.forward(problem, x, weight, bias, out)
    elif direction == "backward_data":
        direct.backward_data(problem, dy, weight, out)
    else:
        direct.backward_filter(problem, dy, x, out)
    return out


def shape(direction: str, problem: Conv2dProblem) -> tuple[int, ...]:
    shapes = {"forward": problem.output_shape, "backward_data": problem.input_shape}
    return shapes.get(direction, problem.weight_shape)


def truth(direction: str, problem: Conv2dProblem, inputs: tuple[NDArray[Any], ...], dtype: str) -> NDArray[Any]:
    """The plain im2col computation in ``dtype``."""
    x, weight, bias, dy = inputs
    where = geometry(problem)
    if direction == "forward":
        return oracle.plain_forward(x, weight, where, bias, dtype)
    if direction == "backward_data":
        return oracle.plain_backward_data(dy, weight, problem.input_shape, where, dtype)
    return oracle.plain_backward_filter(dy, x, problem.weight_shape, where, dtype)


def assert_right(direction: str, problem: Conv2dProblem) -> None:
    """Every number is written, with an error of at most twice plain im2col's in float32.

    Plain im2col's may be none by luck, so there are a few roundings of a sum that does not cancel on top: of the
    root of its squared terms.
    """
    inputs = arrays(problem, "float32")
    expected = truth(direction, problem, inputs, "float64")
    plain = truth(direction, problem, inputs, "float32")
    result = run(direction, problem, inputs, numpy.full(shape(direction, problem), UNWRITTEN))
    squares = truth(direction, problem, tuple(array.astype("float64") ** 2 for array in inputs), "float64")
    rounding = 4 * numpy.finfo(numpy.float32).eps * numpy.sqrt(squares.max())
    assert max_error(result, expected) <= 2 * max_error(plain, expected) + rounding


def square(n: int, c: int, size: int, k: int, kernel: int, **more: Any) -> Conv2dProblem:
    groups = more.get("groups", 1)
    return Conv2dProblem.from_shapes((n, c, size, size), (k, c // groups, kernel, kernel), **more)


# ---------------------------------------------------------------- results

EDGES = {
    **{f"outputs-{k}": square(2, 5, 12, k, 3, padding=1) for k in range(1, 19)},
    **{f"channels-{c}": square(2, c, 12, 5, 3, padding=1) for c in range(1, 10)},
    **{
        f"size-{size}": square(3, 3, size, 9, 3, padding=1)
        for size in (1, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 48, 49)
    },
    **{f"stride-{step}": square(2, 3, 37, 9, 5, stride=step, padding=2) for step in (2, 3, 4, 5)},
    **{f"joined-rows-{size}": square(3, 6, size, 10, 1) for size in (7, 13, 14, 26, 56, 67)},
    **{f"padded-column-{size}": square(1, 1, size, 1, 1, padding=1) for size in (3, 7, 15)},
    "several-depths": square(2, 96, 9, 17, 3, padding=1),
    "several-cuts-of-outputs": square(1, 4, 5, 1030, 3),
    "images-together": square(37, 40, 6, 72, 3, padding=1),
    "images-together-strided": square(21, 40, 13, 72, 3, stride=2),
    "images-together-grouped": square(21, 80, 6, 144, 3, padding=1, groups=2),
    "bands": square(1, 24, 150, 20, 3, padding=1),
    "bands-strided": square(2, 9, 151, 12, 7, stride=2, padding=3),
    "large-padding": square(2, 2, 5, 3, 3, padding=40),
    "alexnet": square(1, 3, 99, 24, 11, stride=4, padding=2),
}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("problem", parameters(EDGES))
def test_sizes_around_the_blocks(direction: str, problem: Conv2dProblem) -> None:
    assert_right(direction, problem)


@st.composite
def problems(draw: st.DrawFn) -> Conv2dProblem:
    def number(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    groups = number(1, 3)
    dilation = number(1, 3), number(1, 3)
    padding = number(0, 4), number(0, 4), number(0, 4), number(0, 4)
    kernel = number(1, 5), number(1, 5)
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    return Conv2dProblem(
        N=number(1, 9),
        C=groups * number(1, 9),
        H=number(max(1, extent[0] - padding[0] - padding[1]), 24),
        W=number(max(1, extent[1] - padding[2] - padding[3]), 40),
        K=groups * number(1, 20),
        R=kernel[0],
        S=kernel[1],
        stride=(number(1, 5), number(1, 5)),
        padding=padding,
        dilation=dilation,
        groups=groups,
    )


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_random_problems(problem: Conv2dProblem) -> None:
    for direction in DIRECTIONS:
        assert_right(direction, problem)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "name", ["images-together", "bands", "bands-strided", "several-cuts-of-outputs", "alexnet"]
)
def test_the_same_bits_with_any_number_of_threads(
    direction: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = EDGES[name]
    inputs = arrays(problem, "float32")
    results = []
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("GPUCNN_NUM_THREADS", threads)
        results.append(run(direction, problem, inputs, numpy.full(shape(direction, problem), UNWRITTEN)).tobytes())
    assert len(set(results)) == 1


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("problem", parameters(ALL | EDGES))
def test_nothing_beside_the_arrays_is_read_or_written(direction: str, problem: Conv2dProblem, end: bool) -> None:
    x, weight, bias, dy = (guarded(array, end) for array in arrays(problem, "float32"))
    out = guarded_empty(shape(direction, problem), numpy.float32, end)
    out[...] = UNWRITTEN
    run(direction, problem, (x, weight, bias, dy), out)
    assert not (out == UNWRITTEN).any()


# ---------------------------------------------------------------- infinities and NaNs


@pytest.mark.parametrize("value", [numpy.inf, numpy.nan])
@pytest.mark.parametrize("name", ["size-17", "stride-2", "images-together", "joined-rows-13"])
def test_infinities_stay_where_they_belong(name: str, value: float) -> None:
    """Each number that meets none in the definition is finite, and as if there were none."""
    problem = EDGES[name]
    x, weight, bias, dy = arrays(problem, "float32")
    x[0, 0, 0, 0] = value
    where = options(problem)
    size = (problem.R, problem.S)
    y = conv2d_forward(x, weight, bias, algorithm="direct", **where)
    dw = conv2d_backward_filter(dy, x, kernel_size=size, algorithm="direct", **where)
    marked = numpy.zeros_like(x)
    marked[0, 0, 0, 0] = 1
    ones = numpy.ones_like
    met_y = conv2d_forward(marked.astype("float64"), ones(weight, "float64"), **where) != 0
    met_dw = conv2d_backward_filter(ones(dy, "float64"), marked.astype("float64"), kernel_size=size, **where) != 0
    for met in (met_y, met_dw):
        assert met.any()
        assert not met.all()
    assert numpy.array_equal(~numpy.isfinite(y), met_y)
    assert numpy.array_equal(~numpy.isfinite(dw), met_dw)
    if numpy.isinf(value):
        assert numpy.isinf(y[met_y]).all()
        assert numpy.isinf(dw[met_dw]).all()


@pytest.mark.parametrize("groups", [1, 3], ids=["dense", "depthwise"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_padding_by_thousands_takes_little_memory(direction: str, groups: int) -> None:
    """A kernel that reaches as far as it is padded: laid out with its zeros, 5 x 4 pixels would be gigabytes.

    Only the middle of the kernel meets the image, so this is a 1 x 1 convolution.
    """
    far, channels = 3000, 3 // groups
    random = numpy.random.default_rng(5)
    x, dy = (random.integers(-4, 5, (2, 3, 5, 4)).astype("f4") for _ in range(2))
    weight = random.integers(-4, 5, (3, channels, 3, 3)).astype("f4")
    problem = Conv2dProblem.from_shapes(x.shape, weight.shape, padding=far, dilation=far, groups=groups)
    assert cpu.conv2d_choose(direction, problem, "float32") not in ("direct", "depthwise")
    arrays, size = {
        "forward": ((x, weight), {}),
        "backward_data": ((dy, weight), {"input_size": (5, 4)}),
        "backward_filter": ((dy, x), {"kernel_size": 3}),
    }[direction]
    convolve = getattr(cpu, f"conv2d_{direction}")
    found = convolve(*arrays, **size, padding=far, dilation=far, groups=groups)
    middle = weight[:, :, 1, 1]
    if groups == 1:
        expected = {
            "forward": numpy.einsum("kc,nchw->nkhw", middle, x),
            "backward_data": numpy.einsum("kc,nkhw->nchw", middle, dy),
            "backward_filter": numpy.einsum("nkhw,nchw->kc", dy, x),
        }[direction]
    else:
        expected = {
            "forward": middle[:, :, None] * x,
            "backward_data": middle[:, :, None] * dy,
            "backward_filter": (dy * x).sum((0, 2, 3))[:, None],
        }[direction]
    if direction == "backward_filter":
        numpy.testing.assert_array_equal(found[:, :, 1, 1], expected)
        found[:, :, 1, 1] = 0
        assert not found.any()
    else:
        numpy.testing.assert_array_equal(found, expected)
    with pytest.raises(ArgumentError, match=r"too much memory for .*; choose auto or one of"):
        convolve(*arrays, **size, padding=far, dilation=far, groups=groups, algorithm="direct")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_usual_problems_fit(direction: str) -> None:
    usual = [
        Conv2dProblem.from_shapes((64, 64, 1024, 1024), (64, 64, 3, 3), padding=1),
        Conv2dProblem.from_shapes((1, 2048, 14, 14), (2048, 2048, 3, 3), padding=1),
        Conv2dProblem.from_shapes((1, 512, 1, 16_000), (512, 512, 1, 9), padding=(0, 4)),
        Conv2dProblem.from_shapes((8, 3, 1000, 1000), (96, 3, 11, 11), stride=4),
    ]
    assert all(direct.fits(direction, problem) for problem in usual)
