"""Optimizer steps in place on flat buffers, and what they share.

The kernels keep an optimizer's state in float32 (float64 with float64 parameters), as the optimizers do; state of
other dtypes, and buffers with gaps, are copied, stepped and copied back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpucnn_kernels as kernels
from gpucnn.ops.checks import check_buffers, check_momentum, check_step, require_floating
from gpucnn.ops.contract import Array
from gpucnn.ops.cuda.arrays import (
    accumulating_dtype,
    call,
    check_devices,
    contiguous,
    dense,
    write_back,
)


def update(
    function: Callable[..., Any], parameter: Array, gradient: Array, state: dict[str, Array | None], **options: Any
) -> None:
    """A step by ``function`` of gpucnn_kernels, on checked buffers of any layout and dtype."""
    check_devices(parameter=parameter, gradient=gradient, **state)
    check_buffers(parameter, gradient, *state.values())
    wide = accumulating_dtype(parameter.dtype)
    stepped = contiguous(parameter, parameter.dtype)
    buffers = {name: None if buffer is None else contiguous(buffer, wide) for name, buffer in state.items()}
    call(function, stepped, contiguous(gradient, parameter.dtype), *buffers.values(), **options)
    write_back(parameter, stepped)
    for name, buffer in state.items():
        if buffer is not None:
            write_back(buffer, buffers[name])


def sgd_step(
    parameter: Array,
    gradient: Array,
    momentum_buffer: Array | None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first_step: bool = False,
) -> None:
    """PyTorch's SGD on 1-d arrays, in place; ``first_step`` starts the momentum at the gradient itself."""
    check_momentum("SGD", momentum, momentum_buffer)
    update(
        kernels.sgd_step,
        parameter,
        gradient,
        {"momentum_buffer": momentum_buffer},
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
        first_step=first_step,
    )


def adam_step(
    parameter: Array,
    gradient: Array,
    first_moment: Array,
    second_moment: Array,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    step: int = 1,
) -> None:
    """Adam (Kingma and Ba), or AdamW (Loshchilov and Hutter) where ``decoupled``; ``step`` counts from 1."""
    check_step(step)
    update(
        kernels.adam_step,
        parameter,
        gradient,
        {"first_moment": first_moment, "second_moment": second_moment},
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        epsilon=epsilon,
        weight_decay=weight_decay,
        decoupled=decoupled,
        step=step,
    )


def rmsprop_step(
    parameter: Array,
    gradient: Array,
    square_average: Array,
    momentum_buffer: Array | None,
    gradient_average: Array | None,
    *,
    lr: float,
    alpha: float = 0.99,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
) -> None:
    """PyTorch's RMSprop, centered where ``gradient_average`` is given."""
    check_momentum("RMSprop", momentum, momentum_buffer)
    update(
        kernels.rmsprop_step,
        parameter,
        gradient,
        {
            "square_average": square_average,
            "momentum_buffer": momentum_buffer,
            "gradient_average": gradient_average,
        },
        lr=lr,
        alpha=alpha,
        epsilon=epsilon,
        weight_decay=weight_decay,
        momentum=momentum,
    )


def sum_of_squares(x: Array) -> float:
    """The sum of x * x over all elements, accumulated in float64; inf or NaN pass through. Waits for the GPU."""
    check_devices(x=x)
    require_floating(x, "the array")
    return float(call(kernels.sum_of_squares, dense(x, x.dtype)))


def scale(x: Array, factor: float) -> None:
    """X *= factor, in place."""
    check_devices(x=x)
    require_floating(x, "the array")
    given = dense(x, x.dtype)
    call(kernels.scale, given, factor)
    write_back(x, given)
