"""Learning-rate schedules: functions of the step number alone.

``schedule(step)`` is the learning rate of optimizer step ``step``, counted from 0. Nothing is remembered between
calls, so a run that is resumed at step 1000 asks for step 1000 and goes on as if nothing had happened. Past its
last step a schedule stays at its final value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from gpucnn.errors import ArgumentError
from gpucnn.names import look_up, unknown


class Schedule(Protocol):
    """The learning rate of a step; the first step is step 0."""

    def __call__(self, step: int) -> float:
        """The learning rate of optimizer step ``step``."""


def _check_step(step: int) -> None:
    if step < 0:
        raise ArgumentError(f"a schedule's step counts from 0, got {step}")


def _check_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ArgumentError(f"{name} must be above 0 and finite, got {value!r}")


def _check_rate(name: str, value: float) -> None:
    if not (value >= 0 and math.isfinite(value)):
        raise ArgumentError(f"{name} must be 0 or more and finite, got {value!r}")


def _check_count(name: str, value: int, minimum: int = 1) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < minimum:
        raise ArgumentError(f"{name} must be an integer of at least {minimum}, got {value!r}")


def _between(start: float, end: float, share: float) -> float:
    """From ``start`` (share 0) to ``end`` (share 1) along half a cosine wave."""
    return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * share))


@dataclass(frozen=True, slots=True)
class ConstantSchedule:
    """``lr`` at every step."""

    lr: float

    def __post_init__(self) -> None:
        _check_rate("lr", self.lr)

    def __call__(self, step: int) -> float:
        """``lr``."""
        _check_step(step)
        return self.lr


@dataclass(frozen=True, slots=True)
class StepSchedule:
    """``lr`` times ``gamma`` once for every ``step_size`` steps done (PyTorch's StepLR)."""

    lr: float
    step_size: int
    gamma: float = 0.1

    def __post_init__(self) -> None:
        _check_rate("lr", self.lr)
        _check_count("step_size", self.step_size)
        _check_positive("gamma", self.gamma)

    def __call__(self, step: int) -> float:
        """``lr * gamma ** (step // step_size)``."""
        _check_step(step)
        return float(self.lr * self.gamma ** (step // self.step_size))


@dataclass(frozen=True, slots=True)
class CosineSchedule:
    """Half a cosine wave from ``lr`` at step 0 to ``minimum`` at step ``total_steps``.

    Loshchilov and Hutter, "SGDR", 2017, without restarts; PyTorch's CosineAnnealingLR with T_max = total_steps.
    """

    lr: float
    total_steps: int
    minimum: float = 0.0

    def __post_init__(self) -> None:
        _check_rate("lr", self.lr)
        _check_count("total_steps", self.total_steps)
        _check_rate("minimum", self.minimum)

    def __call__(self, step: int) -> float:
        """The wave at ``step``."""
        _check_step(step)
        return _between(self.lr, self.minimum, min(step, self.total_steps) / self.total_steps)


@dataclass(frozen=True, slots=True)
class OneCycleSchedule:
    """One rise and one fall (Smith and Topin, "Super-convergence", 2018), both along half a cosine wave.

    From ``max_lr / div_factor`` up to ``max_lr`` in the first ``pct_start`` (a share, 0 to 1) of the steps, then
    down to ``max_lr / div_factor / final_div_factor`` at the last. PyTorch's OneCycleLR, except that a rise of
    a single step (where PyTorch divides by zero) is at ``max_lr`` at once.
    """

    max_lr: float
    total_steps: int
    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4

    def __post_init__(self) -> None:
        _check_rate("max_lr", self.max_lr)
        _check_count("total_steps", self.total_steps)
        if not 0 <= self.pct_start <= 1:
            raise ArgumentError(f"pct_start is a share from 0 to 1, got {self.pct_start!r}")
        _check_positive("div_factor", self.div_factor)
        _check_positive("final_div_factor", self.final_div_factor)

    def __call__(self, step: int) -> float:
        """The cycle at ``step``."""
        _check_step(step)
        initial = self.max_lr / self.div_factor
        final = initial / self.final_div_factor
        peak, last = self.pct_start * self.total_steps - 1.0, self.total_steps - 1.0
        if step <= peak:
            return _between(initial, self.max_lr, step / peak) if peak > 0 else self.max_lr
        if step >= last:
            return final
        return _between(self.max_lr, final, (step - peak) / (last - peak))


@dataclass(frozen=True, slots=True)
class WarmUp:
    """A linear rise to ``schedule``'s first learning rate in ``steps`` steps, then the schedule from its step 0.

    The first step takes ``start_factor`` of that learning rate. PyTorch's SequentialLR of a LinearLR and the
    schedule.
    """

    schedule: Schedule
    steps: int
    start_factor: float = 0.01

    def __post_init__(self) -> None:
        _check_count("warm-up steps", self.steps, minimum=0)
        if not 0 <= self.start_factor <= 1:
            raise ArgumentError(f"start_factor is a share from 0 to 1, got {self.start_factor!r}")

    def __call__(self, step: int) -> float:
        """The rise, or ``schedule(step - steps)``."""
        _check_step(step)
        if step >= self.steps:
            return self.schedule(step - self.steps)
        return self.schedule(0) * (self.start_factor + (1.0 - self.start_factor) * step / self.steps)


def _constant(lr: float, total_steps: int, steps_per_epoch: int) -> Schedule:
    return ConstantSchedule(lr)


def _step(
    lr: float, total_steps: int, steps_per_epoch: int, step_size: float | None = None, gamma: float = 0.1
) -> Schedule:
    # Without a step size the rate falls twice, after each third of the training.
    steps = math.ceil(total_steps / 3) if step_size is None else round(step_size * steps_per_epoch)
    return StepSchedule(lr, max(steps, 1), gamma)


def _cosine(lr: float, total_steps: int, steps_per_epoch: int, minimum: float = 0.0) -> Schedule:
    return CosineSchedule(lr, total_steps, minimum)


def _one_cycle(
    lr: float,
    total_steps: int,
    steps_per_epoch: int,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> Schedule:
    return OneCycleSchedule(lr, total_steps, pct_start, div_factor, final_div_factor)


_MAKERS: dict[str, tuple[Callable[..., Schedule], tuple[str, ...]]] = {
    "constant": (_constant, ()),
    "step": (_step, ("step_size", "gamma")),
    "cosine": (_cosine, ("minimum",)),
    "one-cycle": (_one_cycle, ("pct_start", "div_factor", "final_div_factor")),
}

SCHEDULES = tuple(_MAKERS)
"""The names that :func:`make_schedule` takes."""


def make_schedule(
    name: str,
    lr: float,
    total_steps: int,
    steps_per_epoch: int,
    *,
    warmup_steps: int = 0,
    warmup_start_factor: float = 0.01,
    **options: Any,
) -> Schedule:
    """The schedule called ``name`` ("constant", "step", "cosine" or "one-cycle") for a training of that length.

    Args:
        name: which schedule.
        lr: its largest learning rate.
        total_steps: optimizer steps of the whole training, the warm-up's included.
        steps_per_epoch: optimizer steps in an epoch.
        warmup_steps: how many of the steps rise linearly before the schedule begins; see :class:`WarmUp`.
        warmup_start_factor: the share of the schedule's first learning rate that the warm-up starts at.
        **options: "step": ``step_size`` in *epochs* (default: a third of the training) and ``gamma``; "cosine":
            ``minimum``; "one-cycle": ``pct_start``, ``div_factor``, ``final_div_factor``. None stands for the
            default.

    Raises ArgumentError for an unknown name or option (with the nearest match) or a value out of its range.
    """
    maker, accepted = look_up("schedule", name, _MAKERS)
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in accepted:
            raise ArgumentError(unknown(f"option of the {name} schedule", option, accepted))
    _check_count("total_steps", total_steps)
    _check_count("steps_per_epoch", steps_per_epoch)
    _check_count("warmup_steps", warmup_steps, minimum=0)
    if warmup_steps >= total_steps:
        raise ArgumentError(
            f"a warm-up of {warmup_steps} steps leaves nothing of the training's {total_steps}; warm up for less "
            "or train for longer"
        )
    if "step_size" in given:
        _check_positive("step_size", given["step_size"])
    schedule = maker(lr, total_steps - warmup_steps, steps_per_epoch, **given)
    return WarmUp(schedule, warmup_steps, warmup_start_factor) if warmup_steps else schedule
