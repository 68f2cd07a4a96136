"""Depthwise convolutions whose threads go down an image, against oracles, in long and in short runs."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy
import pytest

from gpucnn_kernels import (
    Conv2dProblem,
    conv2d_backward_data,
    conv2d_backward_filter,
    conv2d_filter_depthwise,
    conv2d_forward,
    depthwise_forms,
)
from gpucnn_kernels import conv2d_forward_paths as forward_paths
from gpucnn_kernels.launch import Call
from gpucnn_kernels.runtime.host import order_independent
from tests.accuracy import channels_last, max_error
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
    # Columns in packs, channels in pairs, and neither; a strip's last columns that are none; padding on one side.
    "packs": shaped(4, (9, 8), 3, padding=1),
    "packs-s2": shaped(2, (13, 16), 3, stride=2, padding=1),
    "packs-beyond": shaped(2, (7, 8), 3, padding=(1, 1, 1, 5)),
    "packs-k5": shaped(3, (12, 8), 5, padding=2),
    "packs-k5-s2": shaped(3, (12, 16), 5, stride=2, padding=2),
    "pairs": shaped(6, (8, 7), 3, padding=(0, 1, 1, 1)),
    "pairs-s2": shaped(70, (9, 9), 3, stride=2, padding=1),
    "one-pixel": shaped(34, (3, 3), 3),
}
FORMS = {f"3x3_stride_{stride}{form}" for stride in (1, 2) for form in ("_columns", "_channels", "")} | {
    f"5x5_stride_{stride}{form}" for stride in (1, 2) for form in ("_columns", "")
}


def shifted(array):
    """The same numbers, one element behind a boundary of packs."""
    memory = numpy.empty(array.size + 33, array.dtype)
    first = -memory.ctypes.data // array.itemsize % 32 + 1
    made = memory[first : first + array.size].reshape(array.shape)
    made[...] = array
    return made


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
            for layout, arrange in (LAYOUTS | {"shifted": shifted}).items():
                result = run(problem, dtype, direction, arrange)
                error, bound = max_error(wide(result), truth), error_bound(plain, truth, dtype)
                assert error <= bound, f"{name}, {direction}, {layout}, {runs}: {error:.3g} > {bound:.3g}"
    sizes = {f"conv2d_depthwise_{form}" for form in FORMS}
    assert set(started) == sizes | {"conv2d_depthwise"}, "the gradient at stride 2 has the kernel for any problem"


@pytest.mark.parametrize("name", ["k3-long", "packs", "pairs"])
def test_what_a_sum_ends_with(runs, name):
    problem = PROBLEMS[name]
    x, weight, bias, _ = inputs(problem, "float32")
    for arrange in LAYOUTS.values():
        alone = conv2d_forward(arrange(x), arrange(weight), algorithm="depthwise", **options(problem))
        residual = cast(numpy.random.default_rng(2).standard_normal(alone.shape), "float32")
        exact = alone.astype("f8") * bias[:, None, None] + bias[:, None, None] + residual
        truth = activations.elementwise(activations.gelu, exact)
        more = {"scale": bias, "activation": "gelu"}
        y = run(problem, "float32", "forward", arrange, residual=arrange(residual), **more)
        assert max_error(y, truth) <= 8 * 2.0**-24 * max(1.0, float(numpy.abs(exact).max()))
    y = run(problem, "float32", "forward", numpy.ascontiguousarray, residual=shifted(residual), **more)
    assert max_error(y, truth) <= 8 * 2.0**-24 * max(1.0, float(numpy.abs(exact).max()))


def test_the_order_of_threads_does_not_matter(runs):
    for name in ("k3-long", "k5-s2", "packs", "pairs"):
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


# ---------------------------------------------------------------- the filter's gradient


def filter_gradient(problem, dtype, arrange_dy, arrange_x):
    x, _, _, dy = inputs(problem, dtype)
    given = {"kernel_size": (problem.R, problem.S), "algorithm": "depthwise", **options(problem)}
    return conv2d_backward_filter(arrange_dy(dy), arrange_x(x), **given)


@pytest.fixture(params=["one part", "many parts"])
def parts(request, monkeypatch):
    if request.param == "many parts":
        for name, value in {"_RUN": 3, "_SHORT_RUN": 3, "_THREADS": 33}.items():
            monkeypatch.setattr(conv2d_filter_depthwise, name, value)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_filter_gradients_of_every_form(dtype, parts, monkeypatch):
    launch, started = Call.launch, set()
    monkeypatch.setattr(
        Call,
        "launch",
        lambda self, source, kernel, *rest, **more: (
            started.add(kernel),
            launch(self, source, kernel, *rest, **more),
        ),
    )
    longer = numpy.longdouble if dtype == "float64" else numpy.float64
    for name, problem in PROBLEMS.items():
        x, _, _, dy = (wide(array) for array in inputs(problem, dtype))
        described = dy, x, problem.weight_shape, geometry(problem)
        truth = convolution.plain_backward_filter(*described, longer).astype(numpy.float64)
        bound = error_bound(convolution.plain_backward_filter(*described, accumulated(dtype)), truth, dtype)
        arrangements = [*LAYOUTS.values(), shifted]
        for arrange_x in arrangements:
            for arrange_dy in arrangements:
                error = max_error(wide(filter_gradient(problem, dtype, arrange_dy, arrange_x)), truth)
                assert error <= bound, f"{name}, {arrange_x}, {arrange_dy}, {parts}: {error:.3g} > {bound:.3g}"
    assert started == {f"filter_gradient_depthwise_{form}" for form in FORMS} | {"filter_gradient_finish"}


def test_the_forms_of_a_filter_gradient(monkeypatch):
    """Which images are read in packs: those that begin, and whose rows and channels end, on their boundaries."""
    made = []
    form_of = depthwise_forms.form_of
    monkeypatch.setattr(
        conv2d_filter_depthwise, "form_of", lambda *given: made.append(form_of(*given)) or made[-1]
    )

    def form(name, arrange_dy, arrange_x, dtype="float32"):
        filter_gradient(PROBLEMS[name], dtype, arrange_dy, arrange_x)
        return made[-1].suffix

    plain = numpy.ascontiguousarray
    for dtype in DTYPES:
        assert form("packs", plain, plain, dtype) == "_columns"
        assert form("packs", channels_last, channels_last, dtype) == "_channels"
        assert form("pairs", plain, plain, dtype) == ""
        assert form("k3", channels_last, channels_last, dtype) == "", "five channels"
    for mixed in [(plain, channels_last), (channels_last, plain), (shifted, plain), (plain, shifted)]:
        assert form("packs", *mixed) == ""
    assert form("packs-k5", channels_last, channels_last) == ""


def test_an_infinite_number_stays_where_it_is(parts):
    """It is multiplied by what there is of dy, and not by the rows and columns that a thread has beside it."""
    for name in ("packs", "pairs", "k3", "k3-s2", "k5", "packs-k5-s2"):
        problem = PROBLEMS[name]
        for place in ((0, 0), (-1, -1), (problem.H // 2, problem.W // 2), (problem.H - 2, 1)):
            x, _, _, dy = (array.copy() for array in inputs(problem, "float32"))
            x[1, 0, place[0], place[1]] = numpy.inf
            described = wide(dy), wide(x), problem.weight_shape, geometry(problem)
            with numpy.errstate(invalid="ignore"):
                truth = convolution.backward_filter_loops(*described)
            given = {"kernel_size": (problem.R, problem.S), "algorithm": "depthwise", **options(problem)}
            for arrange in LAYOUTS.values():
                dw = wide(conv2d_backward_filter(arrange(dy), arrange(x), **given))
                numpy.testing.assert_array_equal(numpy.isnan(dw), numpy.isnan(truth), f"{name}, {place}")
                numpy.testing.assert_array_equal(dw[numpy.isinf(truth)], truth[numpy.isinf(truth)])


def test_the_order_of_threads_does_not_matter_to_filter_gradients(parts):
    for name in ("packs", "pairs-s2", "k5"):
        for arrange in LAYOUTS.values():
            assert order_independent(lambda: filter_gradient(PROBLEMS[name], "float32", arrange, arrange)), name  # noqa: B023


def test_how_a_filter_gradient_is_split():
    """Every position is in one part, and no grid is larger than a GPU takes."""
    for shape, kernel, more in [
        ((256, 64, 56, 56), 3, {"padding": 1}),
        ((256, 960, 7, 7), 3, {"padding": 1}),
        ((1, 1, 4, 4), 3, {}),
        ((2, 144, 56, 56), 3, {"padding": 1, "stride": 2}),
        ((100_000, 2, 112, 8), 5, {"padding": 2}),
    ]:
        problem = Conv2dProblem.from_shapes(shape, (shape[1], 1, kernel, kernel), groups=shape[1], **more)
        for form in (depthwise_forms.Form("", 4, 1), depthwise_forms.Form("", 1, 1)):
            for across in (False, True):
                made = conv2d_filter_depthwise.plan(problem, form, across)
                assert made.runs * made.run >= problem.P > (made.runs - 1) * made.run
                assert made.strips * form.columns >= problem.Q > (made.strips - 1) * form.columns
                assert made.units == problem.N * made.runs * made.strips
                assert made.parts * made.part >= made.units > (made.parts - 1) * made.part
                assert made.width * made.blocks * form.channels >= problem.C
                assert 1 <= made.width * made.lines <= 128
                assert made.parts <= 65535
