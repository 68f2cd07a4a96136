"""Optimizer steps in place on flat 1-d buffers, PyTorch's update formulas; and what they share.

float32 is done by the compiled loops where there are such (``compiled/optimizers.py``). What
follows is of the NumPy way.

Each step walks the buffers in blocks, so that its ten or so NumPy passes meet the numbers in the cache.

Limit: each buffer read, and written where it changes: 5 trips for SGD with momentum, 7 for Adam, 0.14 ns a number
and trip at the speed of a copy. Measured on one thread, in turns, ns a parameter in float32:

===============================================  ===  ====
                                                 SGD  Adam
===============================================  ===  ====
blocks half as large, copies of the gradient     1.5  2.6
scratch memory, a factor less (here)             1.1  2.6
===============================================  ===  ====

Adam's 13 passes cost more than its trips: one fewer, as second += (1 - beta2) (g^2 - second), gained 3 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy

from gpucnn.ops.checks import check_buffers, check_momentum, check_step, require_floating
from gpucnn.ops.cpu import compiled
from gpucnn.ops.cpu.blocks import ELEMENTS, SMALL, ranges
from gpucnn.ops.cpu.compiled import optimizers as loops
from gpucnn.ops.cpu.compiled import sums
from gpucnn.ops.cpu.memory import FloatArray, calculation_dtype, flat_views
from gpucnn.ops.cpu.threads import parallel_for, scratch

_SQUARES = 1 << 13  # below OpenBLAS's threshold for threads, so that a sum has one order of addition


def _update(kernel: Callable[..., None], parameter: FloatArray, *buffers: FloatArray | None) -> None:
    """Run ``kernel`` on equal blocks of the buffers, each float32 or wider; what it changed is written back."""
    wide = calculation_dtype(parameter.dtype)
    parts = ranges(parameter.size, ELEMENTS)

    def task(number: int) -> None:
        blocks = [None if buffer is None else buffer[parts[number]] for buffer in (parameter, *buffers)]
        with numpy.errstate(all="ignore"):
            if all(block is None or block.dtype == wide for block in blocks):
                kernel(*blocks)
                return
            calculated = [None if block is None else block.astype(wide) for block in blocks]
            kernel(*calculated)
            for index, (block, value) in enumerate(zip(blocks, calculated, strict=True)):
                if index != 1 and block is not None and value is not None:  # number 1 is the gradient
                    block[...] = value

    parallel_for(len(parts), task, small=parameter.size < SMALL)


def sgd_step(
    parameter: FloatArray,
    gradient: FloatArray,
    momentum_buffer: FloatArray | None,
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
    check_buffers(parameter, gradient, momentum_buffer)
    if compiled.usable(parameter, gradient, momentum_buffer):
        velocity = momentum_buffer if momentum else None
        rates = (lr, momentum, 1 - dampening, weight_decay, -1.0 if maximize else 1.0)
        loops.sgd_step(parameter.size, parameter, gradient, velocity, *rates, int(nesterov), int(first_step))
        return

    def kernel(parameter: FloatArray, gradient: FloatArray, velocity: FloatArray | None) -> None:
        work = scratch("step", gradient.shape, gradient.dtype)
        if weight_decay:
            numpy.multiply(parameter, -weight_decay if maximize else weight_decay, out=work)
            work += gradient
            gradient = work
        # The sign of a gradient to climb is the learning rate's without momentum, else that of its share below.
        sign = -1 if maximize else 1
        if not momentum or velocity is None:
            numpy.multiply(gradient, sign * lr, out=work)
            parameter -= work
            return
        if first_step:
            numpy.multiply(gradient, sign, out=velocity)
        else:
            velocity *= momentum
            share = sign * (1 - dampening)
            velocity += gradient if share == 1 else gradient * share
        if nesterov:
            step = velocity * momentum
            step += gradient * sign if maximize else gradient
            numpy.multiply(step, lr, out=work)
        else:
            numpy.multiply(velocity, lr, out=work)
        parameter -= work

    _update(kernel, parameter, gradient, momentum_buffer)


def adam_step(
    parameter: FloatArray,
    gradient: FloatArray,
    first_moment: FloatArray,
    second_moment: FloatArray,
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
    step_size = lr / (1 - beta1**step)
    root_correction = 1 / math.sqrt(1 - beta2**step)
    check_buffers(parameter, gradient, first_moment, second_moment)
    if compiled.usable(parameter, gradient, first_moment, second_moment):
        shrink, decay = (1 - lr * weight_decay, 0.0) if decoupled else (1.0, weight_decay)
        rates = (step_size / root_correction, beta2, 1 - beta1, 1 - beta2, epsilon / root_correction)
        moments = (first_moment, second_moment)
        loops.adam_step(parameter.size, parameter, gradient, *moments, *rates, decay, shrink)
        return

    def kernel(parameter: FloatArray, gradient: FloatArray, first: FloatArray, second: FloatArray) -> None:
        if weight_decay and decoupled:
            parameter *= 1 - lr * weight_decay
        elif weight_decay:
            gradient = gradient + weight_decay * parameter
        change = numpy.subtract(gradient, first, out=scratch("change", first.shape, first.dtype))
        change *= 1 - beta1
        first += change
        numpy.multiply(gradient, gradient, out=change)
        change *= 1 - beta2
        second *= beta2
        second += change
        # step_size * first / (root_correction * sqrt(second) + epsilon), with a factor less.
        numpy.sqrt(second, out=change)
        change += epsilon / root_correction
        numpy.divide(first, change, out=change)
        change *= step_size / root_correction
        parameter -= change

    _update(kernel, parameter, gradient, first_moment, second_moment)


def rmsprop_step(
    parameter: FloatArray,
    gradient: FloatArray,
    square_average: FloatArray,
    momentum_buffer: FloatArray | None,
    gradient_average: FloatArray | None,
    *,
    lr: float,
    alpha: float = 0.99,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
) -> None:
    """PyTorch's RMSprop, centered where ``gradient_average`` is given."""
    check_momentum("RMSprop", momentum, momentum_buffer)
    check_buffers(parameter, gradient, square_average, momentum_buffer, gradient_average)
    if compiled.usable(parameter, gradient, square_average, momentum_buffer, gradient_average):
        averages = (square_average, momentum_buffer if momentum else None, gradient_average)
        rates = (lr, alpha, 1 - alpha, epsilon, weight_decay, momentum)
        loops.rmsprop_step(parameter.size, parameter, gradient, *averages, *rates)
        return

    def kernel(
        parameter: FloatArray,
        gradient: FloatArray,
        square: FloatArray,
        velocity: FloatArray | None,
        average: FloatArray | None,
    ) -> None:
        if weight_decay:
            gradient = gradient + weight_decay * parameter
        work = gradient * gradient
        work *= 1 - alpha
        square *= alpha
        square += work
        if average is None:
            numpy.sqrt(square, out=work)
        else:
            numpy.subtract(gradient, average, out=work)
            work *= 1 - alpha
            average += work
            numpy.multiply(average, average, out=work)
            numpy.subtract(square, work, out=work)
            # Rounding may leave a variance just below 0 where the gradient hardly changes.
            numpy.maximum(work, 0, out=work)
            numpy.sqrt(work, out=work)
        work += epsilon
        numpy.divide(gradient, work, out=work)
        if momentum and velocity is not None:
            velocity *= momentum
            velocity += work
            numpy.multiply(velocity, lr, out=work)
        else:
            work *= lr
        parameter -= work

    _update(kernel, parameter, gradient, square_average, momentum_buffer, gradient_average)


def sum_of_squares(x: FloatArray) -> float:
    """The sum of x * x over all elements, accumulated in float64; inf or NaN pass through."""
    require_floating(x, "the array")
    views = flat_views(x)
    flat = views[0] if views is not None else x.reshape(-1)
    if compiled.usable(flat):
        return sums.sum_of_squares(flat)
    parts = ranges(flat.size, 8 * _SQUARES)
    totals = numpy.zeros(len(parts), numpy.float64)

    def task(number: int) -> None:
        part = flat[parts[number]]
        with numpy.errstate(all="ignore"):
            total = 0.0
            for chunk in ranges(part.size, _SQUARES):
                wide = part[chunk].astype(numpy.float64)
                total += float(numpy.dot(wide, wide))
            totals[number] = total

    parallel_for(len(parts), task, small=flat.size < SMALL)
    return math.fsum(totals) if numpy.isfinite(totals).all() else float(totals.sum())


def scale(x: FloatArray, factor: float) -> None:
    """X *= factor, in place."""
    require_floating(x, "the array")
    if compiled.usable(x):
        loops.scale(x.size, factor, x)
        return
    with numpy.errstate(all="ignore"):
        numpy.multiply(x, x.dtype.type(factor), out=x)
