"""Losses and their gradients: softmax cross-entropy, binary cross-entropy with logits, mean squared error.

Arrays are float32, float16, bfloat16 or float64; computed in float32 (float64 for float64), summed in float64. A
loss has the dtype of the input; "mean" and "sum" give a 0-d array on the device, and nothing waits for it (but see
``check_targets`` of :func:`softmax_cross_entropy_forward`). Weights are float32, float64 for float64 input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpucnn_kernels.arrays import DeviceArray
from gpucnn_kernels.cross_entropy import (
    MAX_PARTS,
    check_reduction,
    require_weight,
    softmax_cross_entropy_backward,
    softmax_cross_entropy_forward,
)
from gpucnn_kernels.errors import ArgumentError
from gpucnn_kernels.launch import Call, blocks_for

__all__ = [
    "binary_cross_entropy_with_logits_backward",
    "binary_cross_entropy_with_logits_forward",
    "mean_squared_error_backward",
    "mean_squared_error_forward",
    "softmax_cross_entropy_backward",
    "softmax_cross_entropy_forward",
]

SOURCE = "losses"
SOURCES: dict[str, tuple[dict[str, str], ...]] = {SOURCE: ({},), "cross_entropy": ({},)}

_AXES = ("first", "second", "third", "fourth")


def _forward(call: Call, kernel: str, first: DeviceArray, reduction: str, **arguments: Any) -> Any:
    """Start an element-by-element loss, and where it is reduced the sum of its blocks' sums."""
    single = reduction != "none"
    loss = call.empty(() if single else first.shape, first.dtype, like=None if single else first)
    blocks = blocks_for(first.size)
    blocks = min(blocks, MAX_PARTS) if single else blocks
    sums = call.scratch(max(blocks, 1), "float64") if single else None
    terms = None if single else loss
    call.launch(
        SOURCE,
        kernel,
        blocks,
        scalar=first.dtype,
        terms=terms,
        block_sums=sums,
        count=first.size,
        **arguments,
    )
    if sums is not None:
        divisor = first.size if reduction == "mean" else 1
        call.launch(
            SOURCE,
            "loss_finish",
            1,
            scalar=first.dtype,
            block_sums=sums,
            loss=loss,
            block_count=blocks,
            divisor=divisor,
        )
    return call.give(loss)


# ---------------------------------------------------------------- binary cross-entropy


def _steps(weight: DeviceArray | None, shape: Sequence[int]) -> list[int]:
    """The distances between a weight's numbers along the axes of ``shape``, 0 where it is repeated."""
    if weight is None:
        return [0] * len(shape)
    missing = len(shape) - len(weight.shape)
    lengths, strides = (1,) * missing + weight.shape, (0,) * missing + weight.strides
    if missing < 0 or any(own not in (1, length) for own, length in zip(lengths, shape, strict=True)):
        raise ArgumentError(
            f"{weight.name} of shape {weight.shape} does not broadcast to logits of {tuple(shape)}"
        )
    return [0 if own == 1 else stride for own, stride in zip(lengths, strides, strict=True)]


def _places(call: Call) -> dict[str, int | bool]:
    """Where the weights of each element lie: the axes of the logits in the order of memory, as few as will do."""
    logits = call["logits"]
    pairs = list(
        zip(
            logits.shape,
            _steps(call.get("weight"), logits.shape),
            _steps(call.get("positive_weight"), logits.shape),
            strict=True,
        )
    )
    order = sorted(range(len(pairs)), key=lambda axis: (-logits.strides[axis], -logits.shape[axis]))
    merged: list[tuple[int, int, int]] = []
    for length, weight, positive in (pairs[axis] for axis in order if logits.shape[axis] != 1):
        if merged and merged[-1][1:] == (weight * length, positive * length):
            merged[-1] = merged[-1][0] * length, weight, positive
        else:
            merged.append((length, weight, positive))
    if len(merged) > len(_AXES):
        weights = [call.get("weight"), call.get("positive_weight")]
        shapes = " and ".join(str(array.shape) for array in weights if array is not None)
        raise ArgumentError(
            f"weights of {shapes} are repeated along more than {len(_AXES)} groups of axes of {logits.shape}; "
            "broadcast them first, with ascontiguousarray(broadcast_to(weight, logits.shape))"
        )
    axes = len(merged) > 1
    merged = [(1, 0, 0)] * (len(_AXES) - len(merged)) + merged
    places: dict[str, int | bool] = {"axes": axes}
    for name, (length, weight, positive) in zip(_AXES, merged, strict=True):
        if name != "first":
            places[name] = max(length, 1)
        places[f"weight_{name}"], places[f"positive_{name}"] = weight, positive
    return places


def _binary_arguments(call: Call, *names: str) -> dict[str, Any]:
    dtype = call.floating("logits", "targets", *names)
    call.elementwise("logits", "targets", *names)
    require_weight(call, "weight", dtype)
    require_weight(call, "positive_weight", dtype)
    return {
        "logits": call["logits"],
        "targets": call["targets"],
        "weight": call.get("weight"),
        "positive_weight": call.get("positive_weight"),
        "places": _places(call),
    }


def binary_cross_entropy_with_logits_forward(
    logits: Any,
    targets: Any,
    *,
    weight: Any = None,
    positive_weight: Any = None,
    reduction: str = "mean",
    stream: Any = None,
) -> Any:
    """-(p * t * log(s) + (1 - t) * log(1 - s)) * w with s = sigmoid(logits), without overflow.

    ``logits`` and ``targets`` agree in shape, dtype and layout, any dense one; ``weight`` (w) and
    ``positive_weight`` (p) broadcast to their shape, from any strides. With "none" the loss has that shape and
    layout.
    """
    check_reduction(reduction)
    with Call(stream, logits=logits, targets=targets, weight=weight, positive_weight=positive_weight) as call:
        arguments = _binary_arguments(call)
        return _forward(call, "binary_cross_entropy_forward", call["logits"], reduction, **arguments)


def binary_cross_entropy_with_logits_backward(
    logits: Any,
    targets: Any,
    *,
    weight: Any = None,
    positive_weight: Any = None,
    reduction: str = "mean",
    out: Any = None,
    stream: Any = None,
) -> Any:
    """The gradient for the logits ("none": of the sum of the losses); ``out`` may be logits or targets."""
    check_reduction(reduction)
    arrays = {"logits": logits, "targets": targets, "weight": weight, "positive_weight": positive_weight}
    with Call(stream, **arrays, out=out) as call:
        arguments = _binary_arguments(call, "out")
        first = call["logits"]
        gradient = call.output(first.shape, first.dtype, like=first)
        call.launch(
            SOURCE,
            "binary_cross_entropy_backward",
            blocks_for(first.size),
            scalar=first.dtype,
            gradient=gradient,
            count=first.size,
            divisor=max(first.size, 1) if reduction == "mean" else 1,
            **arguments,
        )
        return call.give(gradient)


# ---------------------------------------------------------------- mean squared error


def mean_squared_error_forward(
    prediction: Any, target: Any, *, reduction: str = "mean", stream: Any = None
) -> Any:
    """(prediction - target) ** 2, its mean or sum; both agree in shape, dtype and layout, any dense one."""
    check_reduction(reduction)
    with Call(stream, prediction=prediction, target=target) as call:
        call.floating("prediction", "target")
        call.elementwise("prediction", "target")
        first = call["prediction"]
        return _forward(call, "squared_error_forward", first, reduction, prediction=first, target=call["target"])


def mean_squared_error_backward(
    prediction: Any, target: Any, *, reduction: str = "mean", out: Any = None, stream: Any = None
) -> Any:
    """2 * (prediction - target), over the element count for "mean"; ``out`` may be one of the two."""
    check_reduction(reduction)
    with Call(stream, prediction=prediction, target=target, out=out) as call:
        dtype = call.floating("prediction", "target", "out")
        call.elementwise("prediction", "target", "out")
        first = call["prediction"]
        gradient = call.output(first.shape, dtype, like=first)
        call.launch(
            SOURCE,
            "squared_error_backward",
            blocks_for(first.size),
            scalar=dtype,
            prediction=first,
            target=call["target"],
            gradient=gradient,
            count=first.size,
            factor=2 / max(first.size, 1) if reduction == "mean" else 2,
        )
        return call.give(gradient)
