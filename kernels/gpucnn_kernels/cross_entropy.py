"""Softmax cross-entropy and its gradient, in PyTorch's definition. Public as ``losses``' functions.

Logits are float32, float16, bfloat16 or float64 and contiguous, (N, C); computed in float32 (float64 for float64),
summed over the batch in float64. Class weights are float32 (float64 for float64 logits).
"""

from __future__ import annotations

from typing import Any

from gpucnn_kernels.arrays import DeviceArray
from gpucnn_kernels.errors import ArgumentError, DtypeError
from gpucnn_kernels.launch import Call, blocks_for
from gpucnn_kernels.overlap import require_apart, require_same_or_apart
from gpucnn_kernels.problem import ProblemError
from gpucnn_kernels.runtime import ITEM_SIZES
from gpucnn_kernels.softmax import row_threads
from gpucnn_kernels.source import SCALARS

SOURCE = "cross_entropy"
REDUCTIONS = ("mean", "sum", "none")
LABELS = ("uint8", "int32", "int64")
"""The dtypes of class numbers."""

MAX_PARTS = 1024
"""Blocks that each leave a partial sum: enough to fill a GPU, few enough for one block to add up."""


def check_reduction(reduction: str) -> None:
    """Raise ArgumentError unless ``reduction`` is "mean", "sum" or "none"."""
    if reduction not in REDUCTIONS:
        choices = ", ".join(map(repr, REDUCTIONS))
        raise ArgumentError(f"reduction must be one of {choices}, got {reduction!r}")


def require_weight(call: Call, name: str, dtype: str) -> None:
    """Raise DtypeError unless the weights ``name``, where given, have the accumulating type for ``dtype``."""
    weight, accumulate = call.get(name), SCALARS[dtype][1]
    if weight is not None and weight.dtype != accumulate:
        raise DtypeError(
            f"{name} must be {accumulate} where the loss is computed in {accumulate}, as for {dtype} input; got "
            f"{weight.dtype}, convert it with .astype('{accumulate}')"
        )


class _Targets:
    """The targets of a call, checked, as the kernels take them."""

    def __init__(self, call: Call, rows: str, label_smoothing: float, ignore_index: int | None) -> None:
        first, targets = call[rows], call["targets"]
        if len(first.shape) != 2:
            raise ProblemError(f"{rows} must have 2 dimensions (N, classes), got shape {first.shape}")
        self.samples, self.classes = first.shape
        if not 0 <= label_smoothing <= 1:
            raise ArgumentError(f"label_smoothing must lie between 0 and 1, got {label_smoothing!r}")
        if self.classes == 0:
            raise ProblemError(f"{rows} must have at least one class, got shape {first.shape}")
        self.dtype = call.floating(rows)
        self.labels = len(targets.shape) == 1
        if self.labels:
            if targets.dtype not in LABELS:
                raise DtypeError(
                    f"targets (N,) are class numbers, {', '.join(LABELS)}, got {targets.dtype}; convert them with "
                    ".astype('int64'), or give probabilities of shape (N, C)"
                )
            call.require("targets", shape=(self.samples,))
        else:
            if targets.dtype not in SCALARS:
                raise DtypeError(
                    f"targets of shape {targets.shape} are probabilities and must be {self.dtype}, as {rows}, got "
                    f"{targets.dtype}; class numbers have shape ({self.samples},)"
                )
            call.floating(rows, "targets")
            call.require("targets", shape=first.shape)
        require_weight(call, "weight", self.dtype)
        call.require("weight", shape=(self.classes,))
        call.contiguous(rows, "targets", "weight")
        if ignore_index is not None and (isinstance(ignore_index, bool) or not hasattr(ignore_index, "__index__")):
            raise ArgumentError(f"ignore_index must be an integer or None, got {ignore_index!r}")
        # No label is what its dtype has no number for.
        if not self.labels and ignore_index is not None and ignore_index >= 0:
            raise ArgumentError(
                f"ignore_index={ignore_index} is a class number, and targets of shape {targets.shape} are "
                "probabilities"
            )
        self.ignoring = self.labels and ignore_index is not None and _fits(ignore_index, targets.dtype)
        self.counted = self.labels and (self.ignoring or call.get("weight") is not None)
        shape = {
            "samples": self.samples,
            "classes": self.classes,
            "labels": self.labels,
            "ignoring": self.ignoring,
            "ignored": ignore_index if self.ignoring else 0,
            "soft": label_smoothing / self.classes,
            "hard": 1 - label_smoothing,
        }
        self.label_arguments: dict[str, Any] = {
            f"labels_{dtype}": targets if self.labels and targets.dtype == dtype else None for dtype in LABELS
        }
        self.arguments: dict[str, Any] = {
            **self.label_arguments,
            "targets": None if self.labels else targets,
            "weight": call.get("weight"),
            "shape": shape,
        }
        self.threads = row_threads(self.classes)


def softmax_cross_entropy_forward(
    logits: Any,
    targets: Any,
    *,
    weight: Any = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    reduction: str = "mean",
    check_targets: bool = True,
    stream: Any = None,
) -> Any:
    """(loss, probabilities) for logits (N, C) and targets (N,) of class numbers or (N, C) of probabilities.

    With smoothing e, the target is (1 - e) * one_hot + e / C; a class weight multiplies each class's term, and
    for class numbers "mean" divides by the sum of the targets' weights. Samples of the class number
    ``ignore_index``, which need be none of 0 .. C - 1, have a loss of 0, and "mean" does not count them: over
    nothing but such samples it is NaN, as in PyTorch. ``reduction`` is "mean", "sum" (loss then a 0-d array on the
    device) or "none" (loss (N,)). Loss and probabilities have the dtype of the logits.

    Class numbers are uint8, int32 or int64; probabilities have the dtype of the logits. A class number outside
    0 .. C - 1 raises ArgumentError. To see it, the call waits for the GPU, once; ``check_targets=False`` does not
    wait (and can be captured in a graph): such a sample's loss, and with it the whole loss, is then NaN. Nothing
    out of bounds is read in either case.
    """
    check_reduction(reduction)
    with Call(stream, logits=logits, targets=targets, weight=weight) as call:
        given = _Targets(call, "logits", label_smoothing, ignore_index)
        probabilities = call.empty(call["logits"].shape, given.dtype)
        single = reduction != "none"
        loss = call.empty(() if single else (given.samples,), given.dtype)
        blocks = min(blocks_for(given.samples, given.threads[1]), MAX_PARTS)
        partial: dict[str, Any] = {
            "block_losses": call.scratch(max(blocks, 1), "float64"),
            "block_weights": call.scratch(max(blocks, 1), "float64"),
            "block_invalid": call.scratch(max(blocks, 1), "int64"),
        }
        call.launch(
            SOURCE,
            "cross_entropy_forward",
            blocks,
            given.threads,
            scalar=given.dtype,
            logits=call["logits"],
            probabilities=probabilities,
            losses=None if single else loss,
            **given.arguments,
            **partial,
        )
        check = given.labels and check_targets
        if single or check:
            invalid = call.scratch(1, "int64")
            call.launch(
                SOURCE,
                "cross_entropy_finish",
                1,
                scalar=given.dtype,
                loss=loss if single else None,
                invalid=invalid,
                block_count=blocks,
                samples=given.samples,
                divide_by_weights=reduction == "mean" and given.counted,
                divisor=given.samples if reduction == "mean" else 1,
                **partial,
            )
            if check:
                _raise_for(int(invalid.array[0].item()), call["targets"], given)
        return call.give(loss, probabilities)


def _raise_for(position: int, targets: DeviceArray, given: _Targets) -> None:
    if position < given.samples:
        raise ArgumentError(
            f"label {targets.array[position].item()} at position {position} is out of range: with {given.classes} "
            f"classes, labels are 0 .. {given.classes - 1}; check the data set and the model's number of classes"
        )


def softmax_cross_entropy_backward(
    probabilities: Any,
    targets: Any,
    *,
    weight: Any = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    reduction: str = "mean",
    out: Any = None,
    stream: Any = None,
) -> Any:
    """The gradient for the logits of the loss ("none": of the sum of the losses), (N, C).

    ``probabilities`` are the forward result, and ``out`` may be them. A sample of the class number
    ``ignore_index`` gets a gradient of zeros, one whose class number is outside 0 .. C - 1 one of NaNs; the
    forward pass is the one that raises. "mean" takes a launch more, of many samples two, where there are weights
    or an ``ignore_index`` that the targets' dtype has.
    """
    check_reduction(reduction)
    with Call(stream, probabilities=probabilities, targets=targets, weight=weight, out=out) as call:
        given = _Targets(call, "probabilities", label_smoothing, ignore_index)
        call.floating("probabilities", "out")
        call.contiguous("out")
        gradient = call.output(call["probabilities"].shape, given.dtype)
        if call.get("out") is not None:
            require_same_or_apart(gradient, call["probabilities"])
            require_apart(gradient, call["targets"], call.get("weight"))
        weights = _sum_of_weights(call, given) if reduction == "mean" and given.counted else None
        call.launch(
            SOURCE,
            "cross_entropy_backward",
            blocks_for(given.samples, given.threads[1]),
            given.threads,
            scalar=given.dtype,
            probabilities=call["probabilities"],
            weights=weights,
            gradient=gradient,
            divisor=given.samples if reduction == "mean" else 1,
            **given.arguments,
        )
        return call.give(gradient)


def softmax_cross_entropy_step(
    logits: Any,
    targets: Any,
    *,
    done: Any,
    weight: Any = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    reduction: str = "mean",
    scaling: Any = None,
    wide: bool = False,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """(loss, gradient, correct) of a training step, for class numbers: one launch.

    It is two, of many samples three, where "mean" divides by weights or there is an ``ignore_index``.

    Loss and gradient have the bits of :func:`softmax_cross_entropy_forward` with ``check_targets=False`` and
    :func:`softmax_cross_entropy_backward`, correct (0-d, int64) counts the samples whose label is the first class
    with the largest logit, a NaN being larger than any number. ``scaling``, an array of one float64, multiplies
    the gradient. With ``wide`` the bits are those of logits that were converted to the accumulating dtype before
    (float32 for 16 bits), which the loss has then, and a gradient converted to the logits' dtype after it was
    scaled. ``reduction`` is "mean" or "sum". ``done`` (1,), int32, is zero, and zero again afterwards: one
    array for launches that do not overlap.

    Raises ArgumentError for the reduction "none" and for targets that are probabilities.
    """
    check_reduction(reduction)
    if reduction == "none":
        raise ArgumentError("a training step's loss is reduced: reduction must be 'mean' or 'sum', got 'none'")
    with Call(stream, logits=logits, targets=targets, weight=weight, scaling=scaling, done=done, out=out) as call:
        given = _Targets(call, "logits", label_smoothing, ignore_index)
        if not given.labels:
            raise ArgumentError(f"targets must be class numbers (N,), got shape {call['targets'].shape}")
        call.floating("logits", "out")
        call.contiguous("out")
        call.require("scaling", "float64", (1,))
        call.require("done", "int32", (1,))
        gradient = call.output(call["logits"].shape, given.dtype)
        require_apart(gradient, call["logits"], call["targets"], call.get("weight"))
        wide = wide and given.dtype != SCALARS[given.dtype][1]
        loss = call.empty((), SCALARS[given.dtype][1] if wide else given.dtype)
        correct = call.empty((), "int64")
        blocks = max(1, min(blocks_for(given.samples, given.threads[1]), MAX_PARTS))
        arguments = {name: value for name, value in given.arguments.items() if name != "targets"}
        call.launch(
            SOURCE,
            "cross_entropy_step",
            blocks,
            given.threads,
            scalar=given.dtype,
            logits=call["logits"],
            weights=_sum_of_weights(call, given) if reduction == "mean" and given.counted else None,
            scaling=call.get("scaling"),
            gradient=gradient,
            loss=None if wide else loss,
            wide_loss=loss if wide else None,
            correct=correct,
            block_losses=call.scratch(blocks, "float64"),
            block_weights=call.scratch(blocks, "float64"),
            block_correct=call.scratch(blocks, "int64"),
            done=call["done"],
            divisor=given.samples if reduction == "mean" else 1,
            **arguments,
        )
        return call.give(loss, gradient, correct)


def _fits(number: int, dtype: str) -> bool:
    bits = 8 * ITEM_SIZES[dtype]
    return 0 <= number < 1 << bits if dtype == "uint8" else -1 << (bits - 1) <= number < 1 << (bits - 1)


def _sum_of_weights(call: Call, given: _Targets) -> DeviceArray:
    """The sum of the labels' weights, or their number without weights, in one number on the device."""
    blocks = max(1, min(blocks_for(given.samples), MAX_PARTS))
    sums, total = call.scratch(blocks, "float64"), call.scratch(1, "float64")
    steps: list[tuple[int, int, DeviceArray | None, DeviceArray]] = [
        (blocks, given.samples, None, total if blocks == 1 else sums)
    ]
    if blocks > 1:
        steps.append((1, blocks, sums, total))
    for grid, count, summed, result in steps:
        call.launch(
            SOURCE,
            "cross_entropy_divisor",
            grid,
            scalar=given.dtype,
            weight=call.get("weight"),
            sums=summed,
            block_sums=result,
            count=count,
            shape=given.arguments["shape"],
            **given.label_arguments,
        )
    return total
