"""What a training run can be told, with defaults that train most small networks well."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from gpucnn.errors import ArgumentError
from gpucnn.names import look_up, unknown
from gpucnn.optimizers import OPTIMIZERS, Optimizer, make_optimizer, parameter_groups
from gpucnn.schedules import SCHEDULES, Schedule, make_schedule
from gpucnn.training.history import MONITORS
from gpucnn.training.replay import CAPTURE

DEFAULT_LR = {"sgd": 0.05, "adam": 2e-3, "adamw": 2e-3, "rmsprop": 1e-3}
"""The learning rate of each optimizer unless one is given: the highest that its schedule reaches."""

DEFAULT_WEIGHT_DECAY = {"sgd": 5e-4, "adam": 0.0, "adamw": 1e-2, "rmsprop": 0.0}
"""The weight decay of each optimizer unless one is given."""

_WITHOUT_EFFECT_ON_RESULTS = ("checkpoint_seconds", "checkpoint_steps", "workers", "prefetch", "capture")


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """Everything that decides a run's result, and how often it is saved.

    Attributes:
        epochs: passes over the training set.
        batch_size: images in a step.
        optimizer: "sgd", "adam", "adamw" or "rmsprop".
        lr: the highest learning rate; None takes ``DEFAULT_LR`` of the optimizer.
        momentum: of "sgd" and "rmsprop"; the others have their own.
        nesterov: Nesterov's form of the momentum, for "sgd".
        weight_decay: on weights, never on biases and batch norms; None takes ``DEFAULT_WEIGHT_DECAY``.
        schedule: how the learning rate moves: "constant", "step", "cosine" or "one-cycle".
        warmup_epochs: a linear rise before the schedule begins; fractions count.
        step_size: for "step": epochs between falls; None falls after each third of the training.
        gamma: for "step": the factor of a fall.
        label_smoothing: the share of the target spread evenly over the classes, 0 .. below 1.
        class_weights: None; "balanced", which weighs a class by the inverse of its share of the images; or one
            weight a class. For the training loss only: validation counts every image alike.
        clip_norm: the largest norm of all gradients together; larger ones are scaled down. None does not.
        ema_decay: keep an exponential moving average of the weights with this decay (0.99 .. 0.9999) and
            validate, and save as best, the average. None does not.
        early_stopping: stop after this many epochs without a better one. None never does.
        monitor: what "better" means: "accuracy" (ties: the smaller loss) or "loss", both of the validation set.
        seed: decides the order of the images, their augmentation and dropout.
        checkpoint_seconds: save after this time at the latest, besides at the end of every epoch. None does not.
        checkpoint_steps: save after this many steps, too. None does not.
        evaluation_batch_size: images at a time in validation; None takes ``batch_size``, 64 at least.
        workers: threads that prepare batches.
        prefetch: batches that they may be ahead.
        capture: whether steps, and the validation's forward passes, are captured as CUDA graphs and launched by
            one call: "auto" does so on a GPU, for networks of this package's layers; "on" for any on device cuda
            (what their Python does must be the same in each step), "off" never. The weights are the same, bit for
            bit.
        autotune: on a GPU, measure the ways of each convolution when it first comes, and take the fastest, which
            is remembered on the machine: :func:`gpucnn_kernels.autotune`. Ways differ in rounding, and so do
            weights.

    NumPy's numbers are taken like Python's and kept as Python's. Raises ArgumentError for a value out of its
    range or an unknown name, with the nearest match.
    """

    epochs: int = 10
    batch_size: int = 64
    optimizer: str = "adamw"
    lr: float | None = None
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float | None = None
    schedule: str = "one-cycle"
    warmup_epochs: float = 0.0
    step_size: float | None = None
    gamma: float = 0.1
    label_smoothing: float = 0.0
    class_weights: str | Sequence[float] | None = None
    clip_norm: float | None = None
    ema_decay: float | None = None
    early_stopping: int | None = None
    monitor: str = "accuracy"
    seed: int = 0
    checkpoint_seconds: float | None = 60.0
    checkpoint_steps: int | None = None
    evaluation_batch_size: int | None = None
    workers: int = 2
    prefetch: int = 4
    capture: str = "auto"
    autotune: bool = False

    def __post_init__(self) -> None:
        look_up("optimizer", self.optimizer, dict.fromkeys(OPTIMIZERS))
        look_up("schedule", self.schedule, dict.fromkeys(SCHEDULES))
        look_up("monitor", self.monitor, dict.fromkeys(MONITORS))
        look_up("capture", self.capture, dict.fromkeys(CAPTURE))
        for name, least in (("epochs", 1), ("batch_size", 1), ("seed", 0), ("workers", 0), ("prefetch", 1)):
            self._keep(name, _count(name, getattr(self, name), least))
        for name in ("early_stopping", "checkpoint_steps", "evaluation_batch_size"):
            if getattr(self, name) is not None:
                self._keep(name, _count(name, getattr(self, name), 1))
        for name in ("lr", "clip_norm", "step_size", "checkpoint_seconds", "gamma"):
            if getattr(self, name) is not None:
                self._keep(name, _number(name, getattr(self, name), above=0.0))
        for name in ("weight_decay", "warmup_epochs"):
            if getattr(self, name) is not None:
                self._keep(name, _number(name, getattr(self, name), least=0.0))
        for name in ("momentum", "label_smoothing", "ema_decay"):
            if name != "ema_decay" or self.ema_decay is not None:
                self._keep(name, _number(name, getattr(self, name), least=0.0, below=1.0))
        self._keep("nesterov", bool(self.nesterov))
        self._keep("autotune", bool(self.autotune))
        if self.seed >= 1 << 64:
            raise ArgumentError(f"seed must be below 2**64, got {self.seed}")
        if self.warmup_epochs >= self.epochs:
            raise ArgumentError(
                f"warmup_epochs must be less than epochs ({self.epochs}), got {self.warmup_epochs:g}; "
                "warm up for less or train for longer"
            )
        self._check_class_weights()

    def _check_class_weights(self) -> None:
        weights = self.class_weights
        if isinstance(weights, str):
            look_up("class_weights", weights, {"balanced": None})
        elif weights is not None:
            plain = [_number("each of class_weights", weight, least=0.0) for weight in weights]
            if not any(plain):
                raise ArgumentError("class_weights must not all be zero")
            self._keep("class_weights", plain)

    def _keep(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the way past a frozen dataclass's guard

    @property
    def resolved_lr(self) -> float:
        """The highest learning rate of the run."""
        return DEFAULT_LR[self.optimizer] if self.lr is None else self.lr

    @property
    def resolved_weight_decay(self) -> float:
        """The weight decay of the run."""
        return DEFAULT_WEIGHT_DECAY[self.optimizer] if self.weight_decay is None else self.weight_decay

    @property
    def resolved_evaluation_batch_size(self) -> int:
        """Images at a time in validation."""
        return max(self.batch_size, 64) if self.evaluation_batch_size is None else self.evaluation_batch_size

    def make_optimizer(self, model: Any) -> Optimizer:
        """The run's optimizer over ``model``'s parameters."""
        extra: dict[str, Any] = {}
        if self.optimizer in ("sgd", "rmsprop"):
            extra["momentum"] = self.momentum
        if self.optimizer == "sgd":
            extra["nesterov"] = self.nesterov and self.momentum > 0
        groups = parameter_groups(model, self.resolved_weight_decay)
        return make_optimizer(self.optimizer, groups, self.resolved_lr, **extra)

    def make_schedule(self, steps_per_epoch: int) -> Schedule:
        """The run's learning rate by step, for epochs of that many steps."""
        extra: dict[str, Any] = {}
        if self.schedule == "step":
            extra = {"step_size": self.step_size, "gamma": self.gamma}
        total = self.epochs * steps_per_epoch
        warmup = min(round(self.warmup_epochs * steps_per_epoch), total - 1)
        return make_schedule(self.schedule, self.resolved_lr, total, steps_per_epoch, warmup_steps=warmup, **extra)

    def to_dict(self) -> dict[str, Any]:
        """All options by name, fit for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingOptions:
        """Options from :meth:`to_dict`'s form. Raises ArgumentError for an unknown one, with the nearest match."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise ArgumentError(unknown("training option", name, names))
        return cls(**values)

    def differences(self, other: TrainingOptions) -> list[str]:
        """Names of the options that differ and would make the run end elsewhere.

        How often to save and how many threads prepare batches may change when a run is resumed; so may the
        number of epochs where the learning rate does not depend on it.
        """
        free = set(_WITHOUT_EFFECT_ON_RESULTS)
        if self.schedule == "constant" or (self.schedule == "step" and self.step_size is not None):
            free.add("epochs")
        return [
            field.name
            for field in dataclasses.fields(self)
            if field.name not in free and getattr(self, field.name) != getattr(other, field.name)
        ]


def _count(name: str, value: Any, least: int) -> int:
    """``value`` as Python's int. Raises ArgumentError for what is no integer, or too small."""
    is_count = hasattr(value, "__index__") and not isinstance(value, (bool, numpy.bool_))
    if not is_count or value < least:
        raise ArgumentError(f"{name} must be an integer of at least {least}, got {value!r}")
    return operator.index(value)


def _number(
    name: str, value: Any, *, least: float = -math.inf, above: float = -math.inf, below: float = math.inf
) -> float:
    """``value`` as Python's float. Raises ArgumentError for what is no number, or out of range."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, (bool, numpy.bool_))
    if not (is_number and value >= least and value > above and value < below):
        wanted = f"above {above:g}" if above > -math.inf else f"{least:g} or more"
        wanted += f" and below {below:g}" if below < math.inf else " and finite"
        raise ArgumentError(f"{name} must be a number {wanted}, got {value!r}")
    return float(value)
