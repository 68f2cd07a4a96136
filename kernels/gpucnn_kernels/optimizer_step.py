"""Optimizer steps in place on flat buffers, and the norm of a gradient and clipping by it.

A step takes 1-d contiguous arrays of one length: parameter and gradient of one dtype (float32, float16, bfloat16
or float64), state of float32 (float64 with float64 parameters). 16-bit state is refused: an average of squared
gradients vanishes in it. Arithmetic is that of the state, rounded once to the parameter's dtype. The gradient is
never changed.

A step that is captured in a graph, and started many times, must find in memory what changes from one to the
next. So each takes ``schedule``, float64 numbers that it reads when it runs, in place of the arguments that
:func:`sgd_schedule`, :func:`adam_schedule` or :func:`rmsprop_schedule` turn into them; and ``proceed``, an array
of one float64, where 0 leaves everything as it is. With either, the bits are those of the same step without.
"""

from __future__ import annotations

import math
from typing import Any

from gpucnn_kernels.arrays import DeviceArray
from gpucnn_kernels.errors import ArgumentError
from gpucnn_kernels.launch import Call, blocks_for
from gpucnn_kernels.runtime import ITEM_SIZES
from gpucnn_kernels.source import SCALARS

SOURCE = "optimizer_step"
SUM_SOURCE = "sum_of_squares"
SOURCES: dict[str, tuple[dict[str, str], ...]] = {SOURCE: ({},), SUM_SOURCE: ({},)}

CLIP_EPSILON = 1e-6  # PyTorch's, so that a norm of 0 divides nothing
_ELEMENTS_A_THREAD = 16
_MOST_SUMS = 1024  # blocks of the first pass: fixed, so that the sum has one order of addition on every GPU


def sgd_step(
    parameter: Any,
    gradient: Any,
    momentum_buffer: Any,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first_step: bool = False,
    schedule: Any = None,
    proceed: Any = None,
    stream: Any = None,
) -> None:
    """PyTorch's SGD on 1-d arrays, in place; ``first_step`` starts the momentum at the gradient itself.

    g = gradient + weight_decay * p (with ``maximize`` -gradient); b = momentum * b + (1 - dampening) * g; p -= lr
    * b, or with ``nesterov`` p -= lr * (g + momentum * b). Raises ArgumentError for a momentum without its buffer.
    """
    if momentum and momentum_buffer is None:
        raise ArgumentError(f"SGD with momentum={momentum} needs a momentum_buffer, got None")
    arrays = {"momentum_buffer": momentum_buffer if momentum else None, "schedule": schedule, "proceed": proceed}
    with Call(stream, parameter=parameter, gradient=gradient, **arrays) as call:
        options = {"lr": lr, "momentum": momentum, "keep": 1 - dampening, "weight_decay": weight_decay}
        flags = {"nesterov": int(nesterov), "maximize": int(maximize), "first_step": int(first_step)}
        _step(call, "sgd_step", options | flags, len(sgd_schedule(lr, first_step)), velocity="momentum_buffer")


def sgd_schedule(lr: float, first_step: bool) -> tuple[float, ...]:
    """The numbers of a ``schedule`` that stand for these arguments of :func:`sgd_step`."""
    return lr, float(first_step)


def adam_step(
    parameter: Any,
    gradient: Any,
    first_moment: Any,
    second_moment: Any,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    step: int = 1,
    schedule: Any = None,
    proceed: Any = None,
    stream: Any = None,
) -> None:
    """Adam (Kingma and Ba), or AdamW (Loshchilov and Hutter) where ``decoupled``; ``step`` counts from 1.

    The bias corrections 1 - beta^step are worked out in double precision on the host. Raises ArgumentError for a
    step below 1.
    """
    numbers = adam_schedule(lr, beta1, beta2, weight_decay, decoupled, step)
    arrays = {"first_moment": first_moment, "second_moment": second_moment}
    changing = {"schedule": schedule, "proceed": proceed}
    with Call(stream, parameter=parameter, gradient=gradient, **arrays, **changing) as call:
        options = {
            "step_size": numbers[0],
            "root_correction": numbers[1],
            "rest_1": 1 - beta1,
            "beta2": beta2,
            "rest_2": 1 - beta2,
            "epsilon": epsilon,
            "weight_decay": numbers[2],
            "decoupled": int(decoupled),
        }
        _require_given(call, *arrays)
        state = {"first_moment": "first_moment", "second_moment": "second_moment"}
        _step(call, "adam_step", options, len(numbers), **state)


def adam_schedule(
    lr: float, beta1: float, beta2: float, weight_decay: float, decoupled: bool, step: int
) -> tuple[float, ...]:
    """The numbers of a ``schedule`` that stand for these arguments of :func:`adam_step`.

    Raises ArgumentError for a step below 1.
    """
    if step < 1:
        raise ArgumentError(f"Adam's step counts from 1, got {step}")
    decay = lr * weight_decay if decoupled else weight_decay
    return lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), decay


def rmsprop_step(
    parameter: Any,
    gradient: Any,
    square_average: Any,
    momentum_buffer: Any,
    gradient_average: Any,
    *,
    lr: float,
    alpha: float = 0.99,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    schedule: Any = None,
    proceed: Any = None,
    stream: Any = None,
) -> None:
    """PyTorch's RMSprop, centered where ``gradient_average`` is given.

    Raises ArgumentError for a momentum without its buffer.
    """
    if momentum and momentum_buffer is None:
        raise ArgumentError(f"RMSprop with momentum={momentum} needs a momentum_buffer, got None")
    arrays = {
        "square_average": square_average,
        "momentum_buffer": momentum_buffer if momentum else None,
        "gradient_average": gradient_average,
        "schedule": schedule,
        "proceed": proceed,
    }
    with Call(stream, parameter=parameter, gradient=gradient, **arrays) as call:
        options = {
            "lr": lr,
            "alpha": alpha,
            "rest": 1 - alpha,
            "epsilon": epsilon,
            "weight_decay": weight_decay,
            "momentum": momentum,
        }
        _require_given(call, "square_average")
        _step(
            call,
            "rmsprop_step",
            options,
            len(rmsprop_schedule(lr)),
            square_average="square_average",
            velocity="momentum_buffer",
            gradient_average="gradient_average",
        )


def rmsprop_schedule(lr: float) -> tuple[float, ...]:
    """The numbers of a ``schedule`` that stand for this argument of :func:`rmsprop_step`."""
    return (lr,)


def _require_given(call: Call, *names: str) -> None:
    """Raise DtypeError where one of these arguments is None: a kernel would do without that state, or fail."""
    for name in names:
        call[name]


def _step(call: Call, kernel: str, options: dict[str, Any], scheduled: int, **state: str) -> None:
    """Check the buffers and start ``kernel``; ``state`` is the argument's name by the kernel's parameter.

    ``scheduled`` is how many numbers its schedule has.
    """
    dtype = call.floating("parameter", "gradient")
    parameter = call["parameter"]
    if len(parameter.shape) != 1:
        raise ArgumentError(f"parameter must be a flat buffer of 1 dimension, got shape {parameter.shape}")
    call.require("gradient", shape=parameter.shape)
    for name in state.values():
        call.require(name, SCALARS[dtype][1], parameter.shape)
    call.require("schedule", "float64", (scheduled,))
    call.require("proceed", "float64", (1,))
    call.contiguous("parameter", "gradient", "schedule", *state.values())
    buffers: dict[str, Any] = {kernel_name: call.get(name) for kernel_name, name in state.items()}
    call.launch(
        SOURCE,
        kernel,
        blocks_for(parameter.size, per_thread=16 // ITEM_SIZES[SCALARS[dtype][1]]),  # 16 bytes of each state
        scalar=dtype,
        parameter=parameter,
        gradient=call["gradient"],
        count=parameter.size,
        options=options,
        schedule=call.get("schedule"),
        proceed=call.get("proceed"),
        **buffers,
    )


# ---------------------------------------------------------------- norms


def sum_of_squares(x: Any, *, out: Any = None, stream: Any = None) -> Any:
    """The sum of x * x over all elements of a dense array, accumulated in float64; inf or NaN pass through.

    A Python number, for which it waits for the GPU; or with ``out``, an array of one float64, that array, and
    nothing waits. The same numbers give the same bits, on any GPU.
    """
    with Call(stream, x=x, out=out) as call:
        call.floating("x")
        call.elementwise("x")
        call.require("out", "float64", (1,))
        total = _sum_of_squares(call, call["x"], call.get("out"))
        return _number(total) if out is None else out


def scale(x: Any, factor: Any, *, stream: Any = None) -> None:
    """X *= factor, in place, for a dense array. 16-bit numbers are multiplied in float32.

    The factor is a number, or an array of one float64 that is read when the kernel runs.
    """
    scheduled = factor if getattr(factor, "shape", ()) else None
    with Call(stream, x=x, factor=scheduled) as call:
        call.require("factor", "float64", (1,))
        dtype = call.floating("x")
        call.elementwise("x")
        array = call["x"]
        call.launch(
            SUM_SOURCE,
            "scale_elements",
            blocks_for(array.size),
            scalar=dtype,
            x=array,
            count=array.size,
            factor=factor if scheduled is None else 1.0,
            scheduled=call.get("factor"),
        )


def clip_by_norm(x: Any, *, max_norm: float, stream: Any = None) -> float:
    """Scale a dense array in place by min(1, max_norm / (norm + 1e-6)), as PyTorch does; the norm before.

    An infinite or undefined norm leaves the array as it is: look at the answer. The scaling does not wait for the
    norm to reach the host; the answer does. Raises ArgumentError for a ``max_norm`` that is not above 0.
    """
    if not max_norm > 0:
        raise ArgumentError(f"max_norm must be above 0, got {max_norm!r}")
    with Call(stream, x=x) as call:
        dtype = call.floating("x")
        call.elementwise("x")
        array = call["x"]
        total = _sum_of_squares(call, array)
        call.launch(
            SUM_SOURCE,
            "clip_elements",
            blocks_for(array.size),
            scalar=dtype,
            x=array,
            sum=total,
            count=array.size,
            max_norm=max_norm,
            epsilon=CLIP_EPSILON,
        )
        return math.sqrt(_number(total))


def _sum_of_squares(call: Call, x: DeviceArray, out: DeviceArray | None = None) -> DeviceArray:
    """An array of one float64, still on the device: ``out`` where it is given."""
    blocks = blocks_of_squares(x.size)
    partial, total = call.scratch(blocks, "float64"), out or call.scratch(1, "float64")
    call.launch(SUM_SOURCE, "squares_by_block", blocks, scalar=x.dtype, x=x, partial=partial, count=x.size)
    call.launch(SUM_SOURCE, "sum_of_blocks", 1, scalar=x.dtype, partial=partial, sum=total, count=blocks)
    return total


def blocks_of_squares(count: int) -> int:
    """How many blocks sum the squares of ``count`` elements: by them alone, so that the sum has the same bits."""
    return min(max(blocks_for(count, per_thread=_ELEMENTS_A_THREAD), 1), _MOST_SUMS)


def _number(array: DeviceArray) -> float:
    """The one element of an array, once the stream has reached it."""
    return float(array.array.item())
