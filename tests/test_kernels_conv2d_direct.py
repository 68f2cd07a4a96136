"""The direct convolution's plans, and its kernels by plans that small problems would not get."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucnn_kernels import (
    ArgumentError,
    Conv2dProblem,
    conv2d_backward_data,
    conv2d_direct,
    conv2d_forward,
    conv2d_input_columns,
)
from gpucnn_kernels.gpu import H200
from gpucnn_kernels.runtime.host import order_independent
from tests.accuracy import max_error
from tests.kernel_accuracy import on_the_host
from tests.kernel_arrays import DTYPES, LAYOUTS, accumulated, cast, error_bound, wide
from tests.oracles import activations, convolution
from tests.problems import ALL, arrays, geometry, options

__all__ = ["on_the_host"]


def shaped(input_shape: tuple[int, ...], weight_shape: tuple[int, ...], **parameters: Any) -> Conv2dProblem:
    return Conv2dProblem.from_shapes(input_shape, weight_shape, **parameters)


PROBLEMS = {
    **{name: ALL[name] for name in ("k3-same", "k3-d2-s2", "padding-beyond-kernel-s3", "groups-3-s2")},
    "seven-channels": shaped((2, 7, 9, 21), (10, 7, 3, 3), stride=2, padding=1),
    "many-outputs": shaped((3, 2, 5, 13), (37, 2, 3, 2), padding=1),
    "long-rows": shaped((2, 1, 3, 300), (4, 1, 2, 9), stride=(1, 4), padding=(0, 4)),
    "eleven": shaped((1, 3, 27, 26), (9, 3, 11, 11), stride=4, padding=2),
}


@pytest.fixture(params=[kernel.name for kernel in conv2d_direct.KERNELS])
def forced(request, monkeypatch):
    """One of the kernels, and so little shared memory that sums come in slices."""
    kernels = tuple(kernel for kernel in conv2d_direct.KERNELS if kernel.name == request.param)
    usual, used, sliced = conv2d_direct.plan, [], []

    def plan(problem, transposed, dtype, gpu):
        words = 700 if dtype == "float64" else 600
        used.append(usual(problem, transposed, dtype, gpu, kernels, words * (8 if dtype == "float64" else 4)))
        taps = used[-1].patch["channels"] * used[-1].patch["taps_down"] * used[-1].patch["taps_across"]
        sliced.append(taps < (problem.K if transposed else problem.C) // problem.groups * problem.R * problem.S)
        return used[-1]

    monkeypatch.setattr(conv2d_direct, "plan", plan)
    monkeypatch.setattr(conv2d_input_columns, "plan", lambda *_: None)
    yield request.param
    assert {made.kernel for made in used} == {request.param}
    assert any(sliced)


@cache
def inputs(problem: Conv2dProblem, dtype: str) -> tuple[Any, ...]:
    """(x, weight, bias, dy) of this dtype."""
    return tuple(cast(array, dtype) for array in arrays(problem))


@cache
def sums(problem: Conv2dProblem, dtype: str, direction: str) -> tuple[Any, Any]:
    """In a longer type, and plainly in the accumulating one."""
    x, weight, bias, dy = (wide(array) for array in inputs(problem, dtype))
    where = geometry(problem)
    longer = numpy.longdouble if dtype == "float64" else numpy.float64
    kinds = longer, accumulated(dtype)
    if direction == "forward":
        return tuple(convolution.plain_forward(x, weight, where, bias, kind) for kind in kinds)  # type: ignore[return-value]
    shape = problem.input_shape
    return tuple(convolution.plain_backward_data(dy, weight, shape, where, kind) for kind in kinds)  # type: ignore[return-value]


def run(problem, dtype, direction, arrange=numpy.ascontiguousarray, **more):
    x, weight, bias, dy = inputs(problem, dtype)
    if direction == "forward":
        return conv2d_forward(arrange(x), arrange(weight), bias, algorithm="direct", **options(problem), **more)
    size = problem.H, problem.W
    return conv2d_backward_data(
        arrange(dy), arrange(weight), input_size=size, algorithm="direct", **options(problem), **more
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_in_slices(dtype, forced):
    for name, problem in PROBLEMS.items():
        for direction in ("forward", "backward_data"):
            truth, plain = sums(problem, dtype, direction)
            for layout, arrange in LAYOUTS.items():
                result = run(problem, dtype, direction, arrange)
                error = max_error(wide(result), truth.astype(numpy.float64))
                bound = error_bound(plain, truth.astype(numpy.float64), dtype)
                assert error <= bound, f"{name}, {direction}, {layout}, {forced}: {error:.3g} > {bound:.3g}"


def test_the_order_of_threads_does_not_matter(forced):
    for name in ("seven-channels", "padding-beyond-kernel-s3"):
        for direction in ("forward", "backward_data"):
            for arrange in LAYOUTS.values():
                assert order_independent(lambda: run(PROBLEMS[name], "float32", direction, arrange)), name  # noqa: B023


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("channels", [1, 7, 8])
def test_what_is_written_in_quads_and_what_is_not(dtype, channels):
    """Aligned rows and channels, rows of odd length, arrays that begin at odd places; a residual, any function."""
    for columns in (8, 11):
        problem = shaped((2, 3, 6, columns), (channels, 3, 3, 3), padding=1)
        x, weight, bias, _ = inputs(problem, dtype)
        truth, plain = sums(problem, dtype, "forward")
        residual = cast(numpy.random.default_rng(1).standard_normal(truth.shape), dtype)
        for arrange in LAYOUTS.values():
            for shift in (0, 1):
                room = numpy.zeros(truth.size + 8, weight.dtype)
                order = (0, 2, 3, 1) if arrange is not numpy.ascontiguousarray else (0, 1, 2, 3)
                lengths = [truth.shape[axis] for axis in order]
                back = [order.index(axis) for axis in range(4)]
                out = room[shift : shift + truth.size].reshape(lengths).transpose(back)
                for function, oracle in (("relu", activations.relu), ("silu", activations.silu)):
                    for term in (None, residual):
                        y = conv2d_forward(
                            arrange(x), weight, bias, algorithm="direct", activation=function, padding=1, out=out,
                            residual=None if term is None else arrange(term),
                        )  # fmt: skip
                        assert y is out
                        added = 0 if term is None else wide(term)
                        exact, close = (activations.elementwise(oracle, each + added) for each in (truth, plain))
                        bound = error_bound(close, exact.astype(numpy.float64), dtype)
                        assert max_error(wide(y), exact.astype(numpy.float64)) <= bound
                assert not wide(room[:shift]).any(), "in front of it"
                assert not wide(room[shift + truth.size :]).any(), "behind it"


def test_rows_that_are_too_long():
    x = numpy.lib.stride_tricks.as_strided(numpy.zeros(1, numpy.float32), (1, 1, 1, 4), (0, 0, 0, 0))
    assert conv2d_forward(numpy.array(x), numpy.ones((1, 1, 1, 1), "f4"), algorithm="direct").shape == (1, 1, 1, 4)
    with pytest.raises(ArgumentError, match="at most 8 input channels a group, got 9"):
        conv2d_forward(numpy.zeros((1, 9, 3, 3), "f4"), numpy.zeros((2, 9, 1, 1), "f4"), algorithm="direct")


# ---------------------------------------------------------------- plans

problems = st.builds(
    lambda n, c, k, height, width, kernel, stride, dilation, pad: shaped(
        (n, c, height + kernel * dilation, width + kernel * dilation), (k, c, kernel, kernel), stride=stride,
        padding=pad, dilation=dilation,
    ),
    st.integers(0, 300), st.integers(1, 8), st.integers(1, 200), st.integers(1, 300), st.integers(1, 300),
    st.sampled_from([1, 2, 3, 5, 7, 11, 40]), st.integers(1, 5), st.integers(1, 3), st.integers(0, 6),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(problems, st.booleans(), st.sampled_from(["float32", "float64"]), st.sampled_from([2 << 10, 48 << 10]))
def test_a_plan_covers_everything_and_fits(problem, transposed, dtype, most_bytes):
    made = conv2d_direct.plan(problem, transposed, dtype, H200, most_bytes=most_bytes)
    patch, item = made.patch, 8 if dtype == "float64" else 4
    kernel = next(kernel for kernel in conv2d_direct.KERNELS if kernel.name == made.kernel)
    outputs = problem.C if transposed else problem.K
    down, across = conv2d_direct.sides(problem, transposed)
    assert made.threads % patch["threads"] == patch["threads"] % 32 == 0
    assert 32 <= made.threads <= kernel.most_threads
    assert patch["images"] * patch["rows"] * patch["quads"] <= patch["threads"] * kernel.quads * 4 // item
    assert patch["blocks_down"] * patch["rows"] >= down.outputs
    assert patch["blocks_across"] * patch["quads"] * 4 >= across.outputs
    assert patch["parts"] * made.threads // patch["threads"] * kernel.outputs >= outputs
    assert patch["lanes"] in (8, 16, 32)
    taps = patch["channels"] * patch["taps_down"] * patch["taps_across"]
    source = patch["images"] * patch["channels"] * patch["height"] * patch["planes"] * patch["pitch"]
    weights = made.threads // patch["threads"] * kernel.outputs + 4
    assert (source + taps * weights) * item + 8 * taps <= made.shared_bytes <= most_bytes
    assert made.threads * 4 * item <= made.shared_bytes, "the way to memory of what is not aligned"
    assert patch["pitch"] % 4 == 0
