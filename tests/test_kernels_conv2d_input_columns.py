"""Input gradients by columns in shared memory: its kernel by plans that problems would not get, and its plans."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucnn_kernels import (
    Conv2dProblem,
    conv2d_backward_data,
    conv2d_choose,
    conv2d_direct,
    conv2d_input_columns,
    conv_transpose2d_forward,
)
from gpucnn_kernels.conv2d_forward_paths import Epilogue
from gpucnn_kernels.gpu import H200
from gpucnn_kernels.launch import Call
from gpucnn_kernels.runtime.host import order_independent
from tests.accuracy import max_error
from tests.kernel_accuracy import on_the_host
from tests.kernel_arrays import DTYPES, LAYOUTS, accumulated, cast, error_bound, wide
from tests.oracles import convolution
from tests.problems import ALL, SMALL, arrays, geometry, options

__all__ = ["on_the_host"]


def shaped(input_shape: tuple[int, ...], weight_shape: tuple[int, ...], **parameters: Any) -> Conv2dProblem:
    return Conv2dProblem.from_shapes(input_shape, weight_shape, **parameters)


def fits(problem: Conv2dProblem, dtype: str) -> bool:
    few = problem.C // problem.groups <= conv2d_direct.DIRECT_CHANNELS
    return bool(few and conv2d_input_columns.plan(problem, dtype, H200))


PROBLEMS = {
    **{name: problem for name, problem in SMALL.items() if fits(problem, "float64")},
    "lenet-2": ALL["lenet-2"],
    "seven-channels": shaped((5, 7, 9, 11), (10, 7, 3, 3), stride=2, padding=1),
    "many-outputs": shaped((3, 2, 5, 13), (137, 2, 3, 2), padding=1),
    "some-pixels-meet-nothing": shaped((2, 3, 13, 12), (5, 3, 2, 3), stride=(3, 4), dilation=(3, 2)),
    "first-pixels-meet-nothing": shaped((2, 2, 17, 18), (3, 2, 4, 4), stride=3, dilation=2, padding=(0, 1)),
    "groups-of-eight": shaped((2, 16, 6, 7), (12, 8, 3, 3), padding=1, groups=2),
}


@pytest.fixture
def started(monkeypatch):
    """Every input gradient goes by columns; the plans that were taken."""
    used = []

    def faster(problem, dtype, gpu):
        used.append(conv2d_input_columns.plan(problem, dtype, gpu))
        return used[-1]

    monkeypatch.setattr(conv2d_input_columns, "faster", faster)
    yield used
    assert {made.kernel for made in used} == {"conv2d_input_columns"}


@cache
def gradients(problem: Conv2dProblem, dtype: str) -> tuple[Any, ...]:
    """(dy, weight, the gradient in a longer type, the gradient plainly in the accumulating one)."""
    _, weight, _, dy = (cast(array, dtype) for array in arrays(problem))
    kinds = numpy.longdouble if dtype == "float64" else numpy.float64, accumulated(dtype)
    described = wide(dy), wide(weight), problem.input_shape, geometry(problem)
    return dy, weight, *(convolution.plain_backward_data(*described, kind) for kind in kinds)


def run(problem, dy, weight, **more):
    size = problem.H, problem.W
    return conv2d_backward_data(dy, weight, input_size=size, algorithm="direct", **options(problem), **more)


def check(problem, dtype, result, message):
    _, _, truth, plain = gradients(problem, dtype)
    truth = truth.astype(numpy.float64)
    error, bound = max_error(wide(result), truth), error_bound(plain, truth, dtype)
    assert error <= bound, f"{message}: {error:.3g} > {bound:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient(dtype, started):
    for name, problem in PROBLEMS.items():
        dy, weight, *_ = gradients(problem, dtype)
        for layout, arrange in LAYOUTS.items():
            check(problem, dtype, run(problem, arrange(dy), arrange(weight)), f"{name}, {layout}")


def test_any_images_and_channels_of_a_block_in_any_slices(started, monkeypatch):
    search, planned, seen = conv2d_input_columns._plans, conv2d_input_columns.plan.__wrapped__, []
    for name in ("seven-channels", "groups-of-eight", "many-outputs", "first-pixels-meet-nothing"):
        problem, made = PROBLEMS[name], []
        for most in (4 << 10, conv2d_direct.MOST_BYTES):
            monkeypatch.setattr(conv2d_input_columns, "MOST_BYTES", most)
            monkeypatch.setattr(
                conv2d_input_columns, "_plans", lambda *a, made=made: made.extend(search(*a)) or made[-1:]
            )
            planned(problem, "float32", H200)
        dy, weight, *_ = gradients(problem, "float32")
        picked = numpy.random.default_rng(0).permutation(numpy.array(made, object))[:10]
        for plan in picked:
            monkeypatch.setattr(conv2d_input_columns, "plan", lambda *_, plan=plan: plan)
            check(problem, "float32", run(problem, dy, weight), f"{name}, {plan}")
            seen.append((plan.patch["images"] > 1, plan.patch["slice"] < problem.K // problem.groups))
    assert {images for images, _ in seen} == {slices for _, slices in seen} == {False, True}


def test_the_order_of_threads_does_not_matter(started):
    for name in ("seven-channels", "some-pixels-meet-nothing"):
        problem = PROBLEMS[name]
        dy, weight, *_ = gradients(problem, "float32")
        for arrange in LAYOUTS.values():
            assert order_independent(lambda: run(problem, arrange(dy), weight)), name  # noqa: B023


def test_arrays_that_begin_anywhere_and_what_is_beside_them(started):
    problem = PROBLEMS["seven-channels"]
    dy, weight, *_ = gradients(problem, "float32")
    room = numpy.full(numpy.prod(problem.input_shape) + 8, numpy.nan, numpy.float32)
    out = room[3:-5].reshape(problem.input_shape)
    shifted = numpy.concatenate([numpy.zeros(1, dy.dtype), dy.ravel()])[1:].reshape(dy.shape)
    assert run(problem, shifted, weight, out=out) is out
    check(problem, "float32", out, "shifted")
    assert numpy.isnan(room[:3]).all()
    assert numpy.isnan(room[-5:]).all()


def test_infinities_and_nan_reach_their_pixels_alone(started):
    """No zero around dy, nor between its rows, meets a weight: as by the other ways only more strictly."""
    problem = PROBLEMS["seven-channels"]
    dy, weight, *_ = gradients(problem, "float32")
    dy = dy.copy()
    dy[1, 2, 3, 4] = numpy.inf
    dx = run(problem, dy, weight)
    (rows, columns) = (slice(5, 8), slice(7, 10))  # 2 * 3 - 1 and on, 2 * 4 - 1 and on
    reached = numpy.zeros(dx.shape, bool)
    reached[1, :, rows, columns] = True
    assert (numpy.isfinite(dx) == ~reached).all()
    weight = weight.copy()
    weight[0, 3, 1, 1] = numpy.nan
    assert numpy.isnan(run(problem, gradients(problem, "float32")[0], weight)).any(axis=(0, 2, 3)).tolist() == [
        channel == 3 for channel in range(7)
    ]


def test_a_transposed_convolution_with_its_bias(started):
    rng = numpy.random.default_rng(2)
    x, weight = rng.standard_normal((3, 10, 5, 6)), rng.standard_normal((10, 7, 3, 3))
    given_ = [array.astype(numpy.float32) for array in (x, weight, rng.standard_normal(7))]
    one, other = (
        conv_transpose2d_forward(*given_, stride=2, padding=1, algorithm=algorithm)
        for algorithm in ("direct", "phases")
    )
    assert max_error(one, other.astype(numpy.float64)) < 1e-5
    assert started


def test_what_every_way_ends_with(started):
    problem = PROBLEMS["groups-of-eight"]
    dy, weight, truth, _ = gradients(problem, "float32")
    rng = numpy.random.default_rng(3)
    scale, bias = (rng.standard_normal(problem.C).astype(numpy.float32) for _ in range(2))
    residual = rng.standard_normal(problem.input_shape).astype(numpy.float32)
    out = numpy.empty_like(residual)
    with Call(None, dy=dy, weight=weight, scale=scale, bias=bias, residual=residual, out=out) as call:
        terms = {name: call[name] for name in ("scale", "bias", "residual")}
        epilogue = Epilogue(activation="leaky_relu", negative_slope=0.1, **terms)
        conv2d_input_columns.direct_backward_data(call, problem, call["dy"], call["weight"], call["out"], epilogue)
    expected = truth * scale[:, None, None] + bias[:, None, None] + residual
    assert max_error(out, numpy.where(expected > 0, expected, 0.1 * expected)) < 1e-4


def test_lenets_second_layer_goes_that_way():
    problem = ALL["lenet-2"]
    batch = shaped((512, *problem.input_shape[1:]), problem.weight_shape)
    assert conv2d_input_columns.faster(batch, "float32", H200).kernel == "conv2d_input_columns"
    assert conv2d_choose("backward_data", batch, "float32") == "direct"


# ---------------------------------------------------------------- plans

problems = st.builds(
    lambda n, c, k, height, width, kernel, stride, dilation, pad: shaped(
        (n, c, height + kernel * dilation, width + kernel * dilation), (k, c, kernel, kernel), stride=stride,
        padding=pad, dilation=dilation,
    ),
    st.integers(0, 300), st.integers(1, 8), st.integers(1, 200), st.integers(1, 30), st.integers(1, 30),
    st.sampled_from([1, 2, 3, 5, 7, 11]), st.integers(1, 5), st.integers(1, 3), st.integers(0, 6),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(problems, st.sampled_from(["float32", "float64"]))
def test_a_plan_covers_everything_and_fits(problem, dtype):
    made = conv2d_input_columns.plan(problem, dtype, H200)
    if made is None:
        return
    patch, item = made.patch, 8 if dtype == "float64" else 4
    assert made.threads % 32 == 0
    assert 32 <= made.threads <= 256
    assert patch["columns"] % 8 == patch["pitch"] % 4 == 0
    assert patch["columns"] >= patch["channels"] * problem.R * problem.S
    assert patch["pitch"] == patch["units_across"] * 32 // item
    assert patch["pitch"] >= patch["images"] * problem.P * problem.Q
    assert patch["columns"] // 8 * patch["units_across"] <= made.threads
    assert patch["channel_blocks"] * patch["channels"] >= problem.C // problem.groups
    assert made.blocks >= patch["channel_blocks"] * problem.groups * -(-problem.N // patch["images"])
    numbers = max(patch["slice"] * (patch["pitch"] + patch["columns"]), patch["columns"] * patch["pitch"])
    assert numbers * item <= made.shared_bytes <= conv2d_direct.MOST_BYTES
    assert 1 <= patch["slice"] <= problem.K
    assert patch["row_quads"] * 4 >= problem.W
