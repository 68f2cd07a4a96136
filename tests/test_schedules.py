"""Schedules against the formulas of PyTorch's documentation, and against its step-by-step recurrences."""

from __future__ import annotations

import dataclasses
import math

import pytest

from gpucnn.errors import ArgumentError
from gpucnn.schedules import (
    SCHEDULES,
    ConstantSchedule,
    CosineSchedule,
    OneCycleSchedule,
    StepSchedule,
    WarmUp,
    make_schedule,
)


def rates(schedule, count):
    return [schedule(step) for step in range(count)]


def assert_close(actual, expected, bound=1e-12):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert abs(one - other) <= bound * max(abs(other), 1e-300) + 1e-16


def test_constant():
    assert rates(ConstantSchedule(0.3), 5) == [0.3] * 5


def test_step_multiplies_by_gamma_each_step_size():
    lr, expected = 0.3, []
    for step in range(30):
        if step and step % 7 == 0:
            lr *= 0.25
        expected.append(lr)
    assert_close(rates(StepSchedule(0.3, 7, 0.25), 30), expected)


def test_cosine_follows_the_recurrence():
    # lr(t + 1) = minimum + (lr(t) - minimum) * (1 + cos(pi (t + 1) / T)) / (1 + cos(pi t / T))
    total, minimum, lr, expected = 40, 0.01, 0.3, []
    for step in range(total):
        expected.append(lr)
        ratio = (1 + math.cos(math.pi * (step + 1) / total)) / (1 + math.cos(math.pi * step / total))
        lr = minimum + (lr - minimum) * ratio
    schedule = CosineSchedule(0.3, total, minimum)
    assert_close(rates(schedule, total), expected, bound=1e-11)
    assert abs(schedule(total) - minimum) <= 1e-16
    assert schedule(10 * total) == schedule(total)


def one_cycle_oracle(step, max_lr, total, pct, div, final_div):
    start, end = max_lr / div, max_lr / div / final_div
    top, last = pct * total - 1, total - 1
    if step <= top:
        share, low, high = step / top, start, max_lr
    else:
        share, low, high = (step - top) / (last - top), max_lr, end
    return high + (low - high) * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize(
    ("total", "pct", "div", "final_div"), [(50, 0.3, 25.0, 1e4), (37, 0.41, 7.0, 100.0), (3, 0.9, 2.0, 5.0)]
)
def test_one_cycle(total, pct, div, final_div):
    schedule = OneCycleSchedule(0.3, total, pct, div, final_div)
    expected = [one_cycle_oracle(step, 0.3, total, pct, div, final_div) for step in range(total)]
    assert_close(rates(schedule, total), expected, bound=1e-11)
    assert schedule(total) == schedule(total + 99) == 0.3 / div / final_div


def test_one_cycle_rises_to_the_peak_and_falls_to_the_end():
    values = rates(OneCycleSchedule(1.0, 100), 100)
    assert abs(values[0] - 1 / 25) <= 1e-15
    assert max(values) == values[29]
    assert abs(values[29] - 1.0) <= 1e-15
    assert values[:30] == sorted(values[:30])
    assert values[29:] == sorted(values[29:], reverse=True)
    assert abs(values[-1] - 1 / 25 / 1e4) <= 1e-18


@pytest.mark.parametrize(("total", "pct"), [(10, 0.1), (1, 1.0), (2, 0.5)])
def test_one_cycle_whose_rise_is_one_step_starts_at_the_peak(total, pct):
    assert OneCycleSchedule(0.5, total, pct)(0) == 0.5


def test_one_cycle_of_a_single_step_without_a_rise_is_at_its_end():
    assert OneCycleSchedule(0.5, 1, 0.3)(0) == 0.5 / 25 / 1e4
    assert abs(OneCycleSchedule(0.5, 4, 0.0)(0) - one_cycle_oracle(0, 0.5, 4, 0.0, 25.0, 1e4)) <= 1e-16


def test_warm_up_rises_linearly_and_then_the_schedule_begins():
    inner = CosineSchedule(0.4, 20)
    schedule = WarmUp(inner, 8, 0.25)
    expected = [0.4 * (0.25 + 0.75 * step / 8) for step in range(8)]
    expected += [0.4 * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(20)]
    assert_close(rates(schedule, 28), expected, bound=1e-11)


def test_warm_up_of_no_steps_is_the_schedule():
    assert rates(WarmUp(StepSchedule(1.0, 2), 0), 6) == rates(StepSchedule(1.0, 2), 6)


def test_schedules_are_functions_of_the_step_alone():
    schedule = make_schedule("one-cycle", 0.1, 60, 10, warmup_steps=5)
    forwards = rates(schedule, 60)
    backwards = [schedule(step) for step in reversed(range(60))]
    assert forwards == backwards[::-1]
    with pytest.raises(dataclasses.FrozenInstanceError):
        CosineSchedule(0.1, 10).lr = 0.2


def test_make_schedule_by_name():
    assert set(SCHEDULES) == {"constant", "step", "cosine", "one-cycle"}
    assert make_schedule("constant", 0.1, 100, 10) == ConstantSchedule(0.1)
    assert make_schedule("step", 0.1, 100, 10, step_size=3, gamma=0.5) == StepSchedule(0.1, 30, 0.5)
    assert make_schedule("step", 0.1, 100, 10, step_size=None) == StepSchedule(0.1, 34, 0.1)
    assert make_schedule("step", 0.1, 100, 10, step_size=0.01) == StepSchedule(0.1, 1, 0.1)
    assert make_schedule("cosine", 0.1, 100, 10, minimum=0.01) == CosineSchedule(0.1, 100, 0.01)
    assert make_schedule("one-cycle", 0.1, 100, 10, pct_start=0.2, div_factor=5.0, final_div_factor=9.0) == (
        OneCycleSchedule(0.1, 100, 0.2, 5.0, 9.0)
    )
    assert make_schedule("cosine", 0.1, 100, 10, warmup_steps=20, warmup_start_factor=0.5) == (
        WarmUp(CosineSchedule(0.1, 80), 20, 0.5)
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_schedule("cosin", 0.1, 10, 1), "unknown schedule 'cosin'; did you mean 'cosine'"),
        (lambda: make_schedule("one_cycle", 0.1, 10, 1), "did you mean 'one-cycle'"),
        (lambda: make_schedule("zzz", 0.1, 10, 1), r"unknown schedule 'zzz' \(there is constant, "),
        (lambda: make_schedule("step", 0.1, 10, 1, gama=1), "did you mean 'gamma'"),
        (lambda: make_schedule("constant", 0.1, 10, 1, gamma=1), r"'gamma' \(there is none\)"),
        (lambda: make_schedule("step", 0.1, 10, 1, step_size=0), "step_size must be above 0"),
        (lambda: make_schedule("cosine", 0.1, 10, 1, warmup_steps=10), "leaves nothing of the training's 10"),
        (lambda: make_schedule("cosine", 0.1, 0, 1), "total_steps must be an integer of at least 1"),
        (lambda: make_schedule("cosine", 0.1, 10, 0), "steps_per_epoch"),
        (lambda: make_schedule("cosine", 0.1, 10, 1, warmup_steps=-1), "warmup_steps"),
        (lambda: ConstantSchedule(-1.0), "lr must be 0 or more"),
        (lambda: ConstantSchedule(math.nan), "lr must be 0 or more"),
        (lambda: StepSchedule(0.1, 2.5), "step_size must be an integer"),
        (lambda: StepSchedule(0.1, 2, 0.0), "gamma must be above 0"),
        (lambda: CosineSchedule(0.1, True), "total_steps"),
        (lambda: CosineSchedule(0.1, 5, -1.0), "minimum"),
        (lambda: OneCycleSchedule(0.1, 5, 1.5), "pct_start is a share"),
        (lambda: OneCycleSchedule(0.1, 5, 0.3, 0.0), "div_factor"),
        (lambda: OneCycleSchedule(0.1, 5, 0.3, 1.0, math.inf), "final_div_factor"),
        (lambda: WarmUp(ConstantSchedule(0.1), 3, 2.0), "start_factor is a share"),
        (lambda: WarmUp(ConstantSchedule(0.1), -3), "warm-up steps"),
        (lambda: WarmUp(ConstantSchedule(0.1), 3)(-1), "counts from 0, got -1"),
        (lambda: ConstantSchedule(0.1)(-1), "counts from 0"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()
