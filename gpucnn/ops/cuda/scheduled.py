"""Operations of a training step that is captured in a graph, beside those of the contract.

A graph starts its kernels with the arguments of the capture. So what changes from step to step is read from memory
when the kernels run, and what a plain step asks Python is decided by a kernel: nothing here waits for the GPU. The
bits are those of the contract's operations.
"""

from __future__ import annotations

from typing import Any

import gpucnn_kernels as kernels
from gpucnn.ops.checks import check_classification
from gpucnn.ops.contract import Array
from gpucnn.ops.cuda.arrays import call, check_devices, contiguous, finish, is_contiguous, is_image
from gpucnn.ops.cuda.losses import classification
from gpucnn.ops.cuda.optimizers import update
from gpucnn_kernels import training_step
from gpucnn_kernels.cross_entropy import softmax_cross_entropy_step
from gpucnn_kernels.training_step import VERDICT

__all__ = [
    "VERDICT",
    "adam_step",
    "average_step",
    "clip",
    "cross_entropy_step",
    "dropout_forward",
    "judge_gradient",
    "judge_step",
    "rmsprop_step",
    "scale",
    "sgd_step",
]


def sgd_step(
    parameter: Array,
    gradient: Array,
    momentum_buffer: Array | None,
    *,
    schedule: Array,
    proceed: Array,
    **options: Any,
) -> None:
    """The contract's, but for ``schedule`` in place of lr and first_step, and ``proceed``."""
    state = {"momentum_buffer": momentum_buffer}
    update(kernels.sgd_step, parameter, gradient, state, schedule=schedule, proceed=proceed, **options)


def adam_step(
    parameter: Array,
    gradient: Array,
    first_moment: Array,
    second_moment: Array,
    *,
    schedule: Array,
    proceed: Array,
    **options: Any,
) -> None:
    """The contract's, but for ``schedule`` in place of lr and step, and ``proceed``."""
    state = {"first_moment": first_moment, "second_moment": second_moment}
    update(kernels.adam_step, parameter, gradient, state, schedule=schedule, proceed=proceed, **options)


def rmsprop_step(
    parameter: Array,
    gradient: Array,
    square_average: Array,
    momentum_buffer: Array | None,
    gradient_average: Array | None,
    *,
    schedule: Array,
    proceed: Array,
    **options: Any,
) -> None:
    """The contract's, but for ``schedule`` in place of lr, and ``proceed``."""
    state = {
        "square_average": square_average,
        "momentum_buffer": momentum_buffer,
        "gradient_average": gradient_average,
    }
    update(kernels.rmsprop_step, parameter, gradient, state, schedule=schedule, proceed=proceed, **options)


def cross_entropy_step(
    logits: Array,
    labels: Array,
    *,
    done: Array,
    weight: Array | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    reduction: str = "mean",
    scaling: Array | None = None,
) -> tuple[Array, Array, Array]:
    """(loss, its gradient times ``scaling``, how many logits are largest at their label) of class numbers (N,).

    Of logits in 16 bits the loss is float32, as if they were converted first, and the gradient at last.
    What the contract's two operations give, unchecked labels, and ``done``: see
    :func:`gpucnn_kernels.cross_entropy.softmax_cross_entropy_step`.
    """
    check_devices(logits=logits, labels=labels, weight=weight)
    check_classification(logits, "the logits", labels, weight, label_smoothing, reduction, ignore_index)
    scores, wanted, weights = classification(logits, labels, weight)
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "reduction": reduction, "scaling": scaling}
    options["ignore_index"] = ignore_index
    made = call(softmax_cross_entropy_step, scores, wanted, weight=weights, done=done, wide=True, **options)
    loss, gradient, correct = made
    return loss, finish(gradient, None, logits.dtype), correct


def scale(x: Array, factor: Array) -> None:
    """X *= factor, in place: an array of one float64."""
    call(kernels.scale, x, factor)


def judge_step(squares: Array, loss: Array, correct: Array, verdict: Array) -> None:
    """``verdict`` (5,) of a step, as VERDICT names them: see :func:`gpucnn_kernels.training_step.judge_step`."""
    call(training_step.judge_step, squares, loss, correct, verdict=verdict)


def judge_gradient(gradient: Array, squares: Array, place: int, done: Array, **verdict: Array) -> None:
    """The sum of squares of a part of the gradient, and perhaps the verdict, in one launch.

    See :func:`gpucnn_kernels.training_step.judge_gradient`.
    """
    call(training_step.judge_gradient, gradient, squares, place, done=done, **verdict)


def clip(x: Array, total: Array, max_norm: float) -> None:
    """X scaled to the share of ``max_norm``, where the norm of all gradients, ``total`` its square, is larger."""
    call(training_step.clip_by_total, x, total, max_norm=max_norm)


def average_step(live: Array, average: Array, share: Array, proceed: Array) -> None:
    """Average += share * (live - average), unless ``proceed`` is 0."""
    call(training_step.average_step, live, average, share=share, proceed=proceed)


def dropout_forward(
    x: Array, *, probability: float, seed: int, offset: int, start: Array, per_channel: bool = False
) -> tuple[Array, Array]:
    """The contract's, but for ``start``, an array of one uint64 that is added to the offset."""
    fits = is_image(x) if x.ndim == 4 else is_contiguous(x)
    given = x if fits else contiguous(x)
    options = {"seed": seed, "offset": offset, "start": start, "per_channel": per_channel}
    y, mask = call(kernels.dropout_forward, given, probability=probability, **options)
    return y, mask
