"""What holds for every convolution: adjointness, any strides in memory, ``out``, one result for any threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gpucnn_kernels.problem import Conv2dProblem
from tests.backends import BACKENDS, CPU, CUDA, Backend
from tests.oracles import convolution as oracle
from tests.problems import ALL, LARGE, SMALL, arrays, can_do, geometry, options, parameters


def run(
    backend: Backend,
    direction: str,
    problem: Conv2dProblem,
    x: NDArray[Any],
    weight: NDArray[Any],
    dy: NDArray[Any],
    **more: Any,
) -> NDArray[Any]:
    """The operation of one direction, on the arrays that it takes."""
    more = options(problem) | more
    if direction == "forward":
        return backend.conv2d_forward(x, weight, **more)
    if direction == "backward_data":
        return backend.conv2d_backward_data(dy, weight, input_size=(problem.H, problem.W), **more)
    return backend.conv2d_backward_filter(dy, x, kernel_size=(problem.R, problem.S), **more)


DIRECTIONS = ["forward", "backward_data", "backward_filter"]
ALGORITHMS = {
    backend: [(d, a) for d in DIRECTIONS for a in ("auto", *backend.conv2d_algorithms(d))]
    for backend in (CPU, CUDA)
}
WITH_ALGORITHM = pytest.mark.parametrize(
    ("backend", "direction", "algorithm"),
    [
        pytest.param(backend, direction, algorithm, id=f"{backend.name}-{direction}-{algorithm}")
        for backend, algorithms in ALGORITHMS.items()
        for direction, algorithm in algorithms
    ],
)
SHAPES = {"forward": "output_shape", "backward_data": "input_shape", "backward_filter": "weight_shape"}


def able(backend: Backend, direction: str, algorithm: str, names: list[str], dtype: str) -> list[Conv2dProblem]:
    return [ALL[name] for name in names if can_do(algorithm, direction, ALL[name], backend.name, dtype)]


def widest(backend: Backend, algorithm: str) -> str:
    """The dtype that has more digits, of those that the algorithm takes."""
    return "float32" if backend is CPU and algorithm == "direct" else "float64"


# ---------------------------------------------------------------- adjointness


@BACKENDS
@pytest.mark.parametrize("problem", parameters(ALL))
def test_the_gradients_are_the_adjoints_of_forward(backend: Backend, problem: Conv2dProblem) -> None:
    """For the bilinear y(x, w): <dy, y(x, w)> = <dx(dy, w), x> = <dw(dy, x), w>."""
    x, weight, _, dy = arrays(problem)
    y, dx, dw = (run(backend, direction, problem, x, weight, dy) for direction in DIRECTIONS)
    products = float(numpy.vdot(dy, y)), float(numpy.vdot(dx, x)), float(numpy.vdot(dw, weight))
    scale = float(numpy.abs(dy * y).sum())
    assert max(products) - min(products) <= 1e-12 * scale


# ---------------------------------------------------------------- layouts


def channels_last(array: NDArray[Any]) -> NDArray[Any]:
    return numpy.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


def every_other(array: NDArray[Any]) -> NDArray[Any]:
    large = numpy.full([2 * size + 1 for size in array.shape], numpy.nan, array.dtype)
    view = large[1::2, 1::2, 1::2, 1::2]
    view[...] = array
    return view


def backwards(array: NDArray[Any]) -> NDArray[Any]:
    return numpy.ascontiguousarray(array[::-1, ::-1, ::-1, ::-1])[::-1, ::-1, ::-1, ::-1]


def transposed(array: NDArray[Any]) -> NDArray[Any]:
    return numpy.ascontiguousarray(array.transpose(3, 1, 2, 0)).transpose(3, 1, 2, 0)


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


LAYOUTS: list[Callable[[NDArray[Any]], NDArray[Any]]] = [
    channels_last,
    every_other,
    backwards,
    transposed,
    read_only,
]
LAYOUT_PROBLEMS = [
    "k3",
    "k1",
    "k1-grouped",
    "k3-s2",
    "groups-2",
    "depthwise-s2",
    "padding-0-1-2-3",
    "resnet-last",
    "bottleneck",
    "resnet-block",
    "mobilenet-depthwise",
]


@pytest.mark.parametrize("layout", LAYOUTS)
@WITH_ALGORITHM
def test_any_strides(
    backend: Backend, direction: str, algorithm: str, layout: Callable[[NDArray[Any]], NDArray[Any]]
) -> None:
    dtype = widest(backend, algorithm)
    for problem in able(backend, direction, algorithm, LAYOUT_PROBLEMS, dtype):
        given_arrays = [arrays(problem, dtype)[i] for i in (0, 1, 3)]
        expected = run(backend, direction, problem, *given_arrays, algorithm=algorithm)
        laid_out = [layout(array) for array in given_arrays]
        result = run(backend, direction, problem, *laid_out, algorithm=algorithm)
        bound = 1e-13 * numpy.abs(expected).max() * 30 if dtype == "float64" else 0.0
        assert numpy.abs(result - expected).max() <= bound
        for array, before in zip(laid_out, given_arrays, strict=True):
            assert numpy.array_equal(array, before)


# ---------------------------------------------------------------- out


@pytest.mark.parametrize("layout", [numpy.copy, *LAYOUTS[:-1]])
@WITH_ALGORITHM
def test_out(
    backend: Backend, direction: str, algorithm: str, layout: Callable[[NDArray[Any]], NDArray[Any]]
) -> None:
    for problem in able(backend, direction, algorithm, LAYOUT_PROBLEMS, "float32"):
        x, weight, _, dy = arrays(problem, "float32")
        expected = run(backend, direction, problem, x, weight, dy, algorithm=algorithm)
        out = layout(numpy.full(getattr(problem, SHAPES[direction]), numpy.nan, numpy.float32))
        result = run(backend, direction, problem, x, weight, dy, algorithm=algorithm, out=out)
        assert result is out
        assert numpy.array_equal(out, expected)


@WITH_ALGORITHM
def test_out_may_be_an_input(backend: Backend, direction: str, algorithm: str) -> None:
    # One channel and a kernel as large as image and output: x, weight and dy all have one shape.
    problem = Conv2dProblem.from_shapes((1, 1, 3, 3), (1, 1, 3, 3), padding=1)
    inputs = dict(zip(("x", "weight", "bias", "dy"), arrays(problem, widest(backend, algorithm)), strict=True))
    del inputs["bias"]
    expected = run(backend, direction, problem, **inputs, algorithm=algorithm)
    for name, array in inputs.items():
        shared = array.copy()
        result = run(backend, direction, problem, **(inputs | {name: shared}), algorithm=algorithm, out=shared)
        assert result is shared
        assert numpy.array_equal(shared, expected)


# ---------------------------------------------------------------- determinism


@pytest.mark.parametrize(("direction", "algorithm"), ALGORITHMS[CPU])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_thread_count_changes_no_bit(
    direction: str, algorithm: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for problem in able(CPU, direction, algorithm, [*LARGE, "k3", "groups-3-s2"], dtype):
        x, weight, _, dy = arrays(problem, dtype)
        results = []
        for threads in ("1", "2", "5", "2"):
            monkeypatch.setenv("GPUCNN_NUM_THREADS", threads)
            results.append(run(CPU, direction, problem, x, weight, dy, algorithm=algorithm))
        for result in results[1:]:
            assert result.tobytes() == results[0].tobytes()


# ---------------------------------------------------------------- random problems


@st.composite
def problems(draw: st.DrawFn) -> Conv2dProblem:
    def number(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    groups = number(1, 3)
    dilation = number(1, 3), number(1, 3)
    padding = number(0, 4), number(0, 4), number(0, 4), number(0, 4)
    kernel = number(1, 4), number(1, 4)
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    return Conv2dProblem(
        N=number(1, 3),
        C=groups * number(1, 2),
        H=number(max(1, extent[0] - padding[0] - padding[1]), 10),
        W=number(max(1, extent[1] - padding[2] - padding[3]), 10),
        K=groups * number(1, 2),
        R=kernel[0],
        S=kernel[1],
        stride=(number(1, 4), number(1, 4)),
        padding=padding,
        dilation=dilation,
        groups=groups,
    )


@pytest.mark.parametrize("backend", [pytest.param(backend, id=backend.name) for backend in ALGORITHMS])
@settings(max_examples=80, deadline=None)
@given(problem=problems())
def test_random_problems(backend: Backend, problem: Conv2dProblem) -> None:
    x, weight, bias, dy = arrays(problem)
    where = geometry(problem)
    expected = {
        "forward": oracle.plain_forward(x, weight, where, bias),
        "backward_data": oracle.plain_backward_data(dy, weight, problem.input_shape, where),
        "backward_filter": oracle.plain_backward_filter(dy, x, problem.weight_shape, where),
    }
    for direction, algorithm in ALGORITHMS[backend]:
        if not can_do(algorithm, direction, problem, backend.name):
            continue
        more: dict[str, Any] = {"bias": bias} if direction == "forward" else {}
        # What a pass leaves unwritten keeps a number that no result holds.
        out = numpy.full(getattr(problem, SHAPES[direction]), 77777.0)
        result = run(backend, direction, problem, x, weight, dy, algorithm=algorithm, out=out, **more)
        assert result.shape == expected[direction].shape
        assert numpy.abs(result - expected[direction]).max() <= 1e-11


def test_every_small_problem_has_its_own_shape() -> None:
    """A list that holds a problem twice tests less than it says."""
    assert len(set(SMALL.values())) == len(SMALL)
    assert len(set(LARGE.values())) == len(LARGE)
