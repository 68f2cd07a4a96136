"""What a captured step needs of kernels: numbers and decisions in memory, and the bits of a plain step."""

from __future__ import annotations

import math

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpucnn_kernels as kernels
from gpucnn_kernels import ArgumentError, DtypeError
from gpucnn_kernels.launch import Call
from gpucnn_kernels.optimizer_step import adam_schedule, rmsprop_schedule, sgd_schedule
from gpucnn_kernels.runtime.host import order_independent
from gpucnn_kernels.training_step import average_step, clip_by_total, judge_gradient, judge_step
from tests.kernel_accuracy import EVERY_DTYPE, normal, on_the_host, wide

__all__ = ["on_the_host"]

FLOATS = pytest.mark.parametrize("dtype", ["float32", "float64"])


def one(value, dtype="float64"):
    return numpy.array([value], dtype)


SGD = {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
ADAM = {"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.03}
RMSPROP = {"alpha": 0.95, "momentum": 0.9, "weight_decay": 0.02}


def sgd(lr, step):
    return SGD | {"lr": lr, "first_step": step == 1}, sgd_schedule(lr, step == 1)


def adam(lr, step, decoupled=False):
    numbers = adam_schedule(lr, 0.9, 0.999, 0.03, decoupled, step)
    return ADAM | {"lr": lr, "decoupled": decoupled, "step": step}, numbers


def adamw(lr, step):
    return adam(lr, step, True)


def rmsprop(lr, step):
    return RMSPROP | {"lr": lr}, rmsprop_schedule(lr)


OPTIMIZERS = pytest.mark.parametrize(
    ("function", "arguments", "buffers"),
    [
        (kernels.sgd_step, sgd, 1),
        (kernels.adam_step, adam, 2),
        (kernels.adam_step, adamw, 2),
        (kernels.rmsprop_step, rmsprop, 3),
    ],
    ids=["sgd", "adam", "adamw", "rmsprop"],
)


@EVERY_DTYPE
@OPTIMIZERS
def test_a_scheduled_step_has_the_bits_of_a_plain_one(dtype, function, arguments, buffers):
    plain = [normal(37, 1, dtype), *(numpy.zeros(37, wide(dtype)) for _ in range(buffers))]
    scheduled = [array.copy() for array in plain]
    stale, _ = arguments(7.0, 1)  # what was known when the step was captured
    for step, lr in enumerate((0.1, 0.03, 0.02), 1):
        gradient = normal(37, step + 10, dtype)
        options, numbers = arguments(lr, step)
        function(plain[0], gradient, *plain[1:], **options)
        schedule = numpy.array(numbers, "float64")
        function(scheduled[0], gradient, *scheduled[1:], **stale, schedule=schedule, proceed=one(1.0))
        for ours, theirs in zip(scheduled, plain, strict=True):
            assert ours.tobytes() == theirs.tobytes()
    assert numpy.isfinite(plain[0].astype("f8")).all()


@OPTIMIZERS
def test_nothing_changes_where_the_step_must_not_proceed(function, arguments, buffers):
    arrays = [normal(300, 1, "float32"), *(normal(300, 2 + n, "float32") for n in range(buffers))]
    before = [array.tobytes() for array in arrays]
    options, numbers = arguments(0.1, 2)
    gradient = numpy.full(300, numpy.nan, "float32")
    function(arrays[0], gradient, *arrays[1:], **options, schedule=numpy.array(numbers), proceed=one(0.0))
    assert [array.tobytes() for array in arrays] == before
    function(arrays[0], gradient, *arrays[1:], **options, schedule=numpy.array(numbers), proceed=one(1.0))
    assert [array.tobytes() for array in arrays] != before


@OPTIMIZERS
def test_a_schedule_that_does_not_fit(function, arguments, buffers):
    arrays = [normal(5, n, "float32") for n in range(2 + buffers)]
    options, numbers = arguments(0.1, 2)
    with pytest.raises(ArgumentError, match=rf"schedule must have shape \({len(numbers)},\), got \(7,\)"):
        function(*arrays, **options, schedule=numpy.zeros(7))
    with pytest.raises(DtypeError, match="schedule must be float64, got float32"):
        function(*arrays, **options, schedule=numpy.zeros(len(numbers), "float32"))
    with pytest.raises(ArgumentError, match=r"proceed must have shape \(1,\)"):
        function(*arrays, **options, proceed=numpy.zeros(2))


def test_adams_step_counts_from_one():
    with pytest.raises(ArgumentError, match="counts from 1, got 0"):
        adam_schedule(0.1, 0.9, 0.999, 0.0, False, 0)


@EVERY_DTYPE
@pytest.mark.parametrize("factor", [1 / 65536, 0.3])
def test_a_factor_from_memory(dtype, factor):
    plain, scheduled = normal(301, 0, dtype), normal(301, 0, dtype)
    kernels.scale(plain, factor)
    kernels.scale(scheduled, one(factor))
    assert scheduled.tobytes() == plain.tobytes()


def test_a_sum_of_squares_stays_on_the_device():
    x, out = normal((7, 40), 3, "float32"), one(0.0)
    assert kernels.sum_of_squares(x, out=out) is out
    assert out[0] == kernels.sum_of_squares(x)


@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_the_parts_are_summed_as_fsum_does(parts):
    verdict = numpy.zeros(5)
    squares = numpy.array(parts, "float64")
    judge_step(squares, numpy.array(0.5, "float32"), numpy.array(3), verdict=verdict)
    total = math.fsum(parts)
    assert verdict.tolist() == [1.0, 0.5, math.sqrt(total), 3.0, total]


def test_parts_that_lie_halfway():
    tiny = 2.0**-60
    for parts in ([1.0, 2.0**-53, tiny], [1.0, 2.0**-53], [1 + 2.0**-52, 2.0**-53], [tiny] * 5 + [1.0, 2.0**-53]):
        verdict = numpy.zeros(5)
        judge_step(numpy.array(parts), numpy.array(1.0), numpy.array(0), verdict=verdict)
        assert verdict[4] == math.fsum(parts)


@FLOATS
@pytest.mark.parametrize(
    ("squares", "loss", "proceed"),
    [
        ([1.0, 2.0], 0.5, 1.0),
        ([1.0, math.inf], 0.5, 0.0),
        ([math.nan, 1.0], 0.5, 0.0),
        ([1.0, 2.0], math.inf, 0.0),
        ([1.0, 2.0], math.nan, 0.0),
        ([1.0, 2.0], -math.inf, 0.0),
    ],
)
def test_the_verdict(dtype, squares, loss, proceed):
    verdict = numpy.full(5, numpy.nan)
    given_back = judge_step(numpy.array(squares), numpy.array(loss, dtype), numpy.array(17), verdict=verdict)
    assert given_back is verdict
    total = sum(squares)
    expected = [proceed, loss, math.sqrt(total), 17.0, total]
    assert numpy.array_equal(verdict, expected, equal_nan=True)


@EVERY_DTYPE
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clipping_by_the_norm_of_several_arrays(dtype, max_norm):
    parts = [normal(40, n, dtype) for n in range(2)]
    expected = [part.copy() for part in parts]
    total = math.fsum(kernels.sum_of_squares(part) for part in parts)
    factor = max_norm / (math.sqrt(total) + 1e-6)
    for part, plain in zip(parts, expected, strict=True):
        clip_by_total(part, one(total), max_norm=max_norm)
        if factor < 1:
            kernels.scale(plain, factor)
        assert part.tobytes() == plain.tobytes()
    with pytest.raises(ArgumentError, match="max_norm must be above 0, got 0"):
        clip_by_total(parts[0], one(1.0), max_norm=0)


@pytest.mark.parametrize("total", [math.inf, math.nan])
def test_an_undefined_norm_clips_nothing(total):
    part = normal(40, 1, "float32")
    before = part.tobytes()
    clip_by_total(part, one(total), max_norm=1e-3)
    assert part.tobytes() == before


@FLOATS
def test_the_average_has_the_bits_of_three_operations(dtype):
    live, average = normal((3, 400), 0, dtype), normal((3, 400), 1, dtype)
    expected = average.copy()
    difference = live - expected
    difference *= 0.0123
    expected += difference
    average_step(live, average, share=one(0.0123), proceed=one(0.0))
    assert average.tobytes() == normal((3, 400), 1, dtype).tobytes()
    average_step(live, average, share=one(0.0123), proceed=one(1.0))
    assert average.tobytes() == expected.tobytes()
    with pytest.raises(DtypeError, match="live must be float32 or float64, got float16"):
        average_step(live.astype("float16"), average.astype("float16"), share=one(0.5))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("start", [0, 4, 12345678, (1 << 40) + 8, (1 << 60) + 4])
def test_dropout_from_a_start_in_memory(per_channel, start):
    x = normal((3, 5, 4, 3), 0, "float32")
    options = {"probability": 0.4, "seed": 99, "per_channel": per_channel}
    plain = kernels.dropout_forward(x, offset=start + 16, **options)
    scheduled = kernels.dropout_forward(x, offset=16, start=one(start, "uint64"), **options)
    for ours, theirs in zip(scheduled, plain, strict=True):
        assert ours.tobytes() == theirs.tobytes()
    with pytest.raises(DtypeError, match="start must be uint64, got int64"):
        kernels.dropout_forward(x, offset=16, start=one(start, "int64"), **options)


@FLOATS
@pytest.mark.parametrize("count", [0, 1, 300, 5000, 9001])
def test_a_gradient_is_judged_with_the_bits_of_its_sum(dtype, count, monkeypatch):
    names, launch = [], Call.launch

    def noted(self, source, kernel, *arguments, **options):
        names.append(kernel)
        launch(self, source, kernel, *arguments, **options)

    gradient, correct = normal(count, 3, numpy.dtype(dtype)), numpy.array(17)
    for bad, value in ((None, 0.7), (None, numpy.nan), (numpy.inf, 0.7), (numpy.nan, 0.7)):
        if bad is not None and count:
            gradient[count // 2] = bad
        loss = numpy.array(value, dtype)
        expected, verdict, squares = numpy.zeros(5), numpy.full(5, 9.0), numpy.array([0.3, 0.0, 1e-30])
        kernels.sum_of_squares(gradient, out=squares[1:2])
        judge_step(squares, loss, correct, verdict=expected)
        done, ours = numpy.zeros(1, "int32"), numpy.array([0.3, 9.0, 1e-30])
        with monkeypatch.context() as patch:
            patch.setattr(Call, "launch", noted)
            names.clear()
            judge_gradient(gradient, ours, 1, done=done)
            assert ours.tobytes() == squares.tobytes()
            assert verdict.tolist() == [9.0] * 5
            ours[1] = 9
            judge_gradient(gradient, ours, 1, done=done, loss=loss, correct=correct, verdict=verdict)
        assert names == ["judge_gradient"] * 2
        assert done.tolist() == [0]
        assert ours.tobytes() == squares.tobytes()
        assert verdict.tobytes() == expected.tobytes()


def test_a_gradient_is_judged_alike_in_any_order_of_blocks():
    gradient, loss, correct = normal(30000, 5, numpy.dtype("float32")), numpy.array(1, "f4"), numpy.array(3)

    def run():
        squares, verdict, done = numpy.zeros(2), numpy.zeros(5), numpy.zeros(1, "int32")
        judge_gradient(gradient[:17000], squares, 0, done=done)
        judge_gradient(gradient[17000:], squares, 1, done=done, loss=loss, correct=correct, verdict=verdict)
        return [squares, verdict]

    assert order_independent(run)


def test_what_is_not_judged():
    squares, done, gradient = numpy.zeros(2), numpy.zeros(1, "int32"), numpy.zeros(3, "f4")
    given = {"loss": numpy.array(1, "f4"), "correct": numpy.array(3), "verdict": numpy.zeros(5)}
    with pytest.raises(DtypeError, match="loss is float32, but gradient is float64"):
        judge_gradient(numpy.zeros(3), squares, 0, done=done, **given)
    with pytest.raises(DtypeError, match="done must be int32"):
        judge_gradient(gradient, squares, 0, done=numpy.zeros(1))
    with pytest.raises(ArgumentError, match=r"verdict must have shape \(5,\)"):
        judge_gradient(gradient, squares, 0, done=done, **given | {"verdict": numpy.zeros(4)})
    with pytest.raises(ArgumentError, match="give all or none"):
        judge_gradient(gradient, squares, 0, done=done, loss=given["loss"])
    with pytest.raises(ArgumentError, match="have no place 2"):
        judge_gradient(gradient, squares, 2, done=done)
