"""Depthwise convolutions whose threads make runs of numbers, against oracles, in long and in short runs."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy
import pytest

from gpucnn_kernels import Conv2dProblem, conv2d_backward_data, conv2d_forward
from gpucnn_kernels import conv2d_forward_paths as forward_paths
from gpucnn_kernels.launch import Call
from gpucnn_kernels.runtime.host import order_independent
from tests.accuracy import max_error
from tests.kernel_accuracy import on_the_host
from tests.kernel_arrays import DTYPES, LAYOUTS, accumulated, cast, error_bound, wide
from tests.oracles import activations, convolution
from tests.problems import arrays, geometry, options

__all__ = ["on_the_host"]


def shaped(channels: int, size: tuple[int, int], kernel: int, **parameters: Any) -> Conv2dProblem:
    shape = (2, channels, *size)
    return Conv2dProblem.from_shapes(shape, (channels, 1, kernel, kernel), groups=channels, **parameters)


PROBLEMS = {
    "k3": shaped(5, (11, 9), 3, padding=1),
    "k3-long": shaped(3, (61, 3), 3, padding=(0, 2, 1, 0)),
    "k3-s2": shaped(4, (13, 8), 3, stride=2, padding=1),
    "k5": shaped(3, (9, 10), 5, padding=2),
    "k5-s2": shaped(3, (12, 11), 5, stride=2, padding=(2, 1, 1, 2)),
    "padding-beyond": shaped(2, (4, 3), 3, padding=4),
    "one-row": shaped(7, (1, 6), 3, padding=1),
}


@pytest.fixture(params=["long", "short"])
def runs(request, monkeypatch):
    if request.param == "long":
        monkeypatch.setattr(forward_paths, "_ENOUGH_THREADS", 0)
    return request.param


@cache
def inputs(problem: Conv2dProblem, dtype: str) -> tuple[Any, ...]:
    """(x, weight, bias, dy) of this dtype."""
    return tuple(cast(array, dtype) for array in arrays(problem))


def sums(problem, dtype, direction):
    """In a longer type, and plainly in the accumulating one."""
    x, weight, bias, dy = (wide(array) for array in inputs(problem, dtype))
    where, shape = geometry(problem), problem.input_shape
    longer = numpy.longdouble if dtype == "float64" else numpy.float64
    if direction == "forward":
        return [convolution.plain_forward(x, weight, where, bias, kind) for kind in (longer, accumulated(dtype))]
    kinds = longer, accumulated(dtype)
    return [convolution.plain_backward_data(dy, weight, shape, where, kind) for kind in kinds]


def run(problem, dtype, direction, arrange, **more):
    x, weight, bias, dy = inputs(problem, dtype)
    given = {"algorithm": "depthwise", **options(problem), **more}
    if direction == "forward":
        return conv2d_forward(arrange(x), arrange(weight), bias, **given)
    return conv2d_backward_data(arrange(dy), arrange(weight), input_size=(problem.H, problem.W), **given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_problem(dtype, runs, monkeypatch):
    launch, started = Call.launch, []
    monkeypatch.setattr(
        Call,
        "launch",
        lambda self, source, kernel, *rest, **more: (
            started.append(kernel),
            launch(self, source, kernel, *rest, **more),
        ),
    )
    for name, problem in PROBLEMS.items():
        for direction in ("forward", "backward_data"):
            truth, plain = sums(problem, dtype, direction)
            truth = truth.astype(numpy.float64)
            for layout, arrange in LAYOUTS.items():
                result = run(problem, dtype, direction, arrange)
                error, bound = max_error(wide(result), truth), error_bound(plain, truth, dtype)
                assert error <= bound, f"{name}, {direction}, {layout}, {runs}: {error:.3g} > {bound:.3g}"
    sizes = {f"conv2d_depthwise_{size}x{size}_stride_{stride}" for size in (3, 5) for stride in (1, 2)}
    assert set(started) == sizes | {"conv2d_depthwise"}, "the gradient at stride 2 has the kernel for any problem"


def test_what_a_sum_ends_with(runs):
    problem = PROBLEMS["k3-long"]
    _, _, bias, _ = inputs(problem, "float32")
    for arrange in LAYOUTS.values():
        bare = run(problem, "float32", "forward", arrange)
        residual = cast(numpy.random.default_rng(2).standard_normal(bare.shape), "float32")
        y = run(problem, "float32", "forward", arrange, residual=arrange(residual), scale=bias, activation="gelu")
        x, weight, _, _ = inputs(problem, "float32")
        alone = conv2d_forward(arrange(x), arrange(weight), algorithm="depthwise", **options(problem))
        exact = alone.astype("f8") * bias[:, None, None] + bias[:, None, None] + residual
        truth = activations.elementwise(activations.gelu, exact)
        assert max_error(y, truth) <= 8 * 2.0**-24 * max(1.0, float(numpy.abs(exact).max()))


def test_the_order_of_threads_does_not_matter(runs):
    for name in ("k3-long", "k5-s2"):
        for arrange in LAYOUTS.values():
            for direction in ("forward", "backward_data"):
                assert order_independent(lambda: run(PROBLEMS[name], "float32", direction, arrange)), name  # noqa: B023


def test_more_images_than_blocks(monkeypatch):
    problem = PROBLEMS["k3"]
    expected = run(problem, "float32", "forward", numpy.ascontiguousarray)
    monkeypatch.setattr(forward_paths, "_MOST_UNITS", 3)  # 11 rows are two runs of 4 and one of 3
    monkeypatch.setattr(forward_paths, "_SHORT_RUN", 1)
    numpy.testing.assert_array_equal(run(problem, "float32", "forward", numpy.ascontiguousarray), expected)
    monkeypatch.setattr(forward_paths, "_MOST_UNITS", 1)
    numpy.testing.assert_array_equal(run(problem, "float32", "forward", numpy.ascontiguousarray), expected)
