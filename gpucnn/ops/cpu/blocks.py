"""Work cut into blocks that stay in the processor's cache, so that several NumPy passes cost one trip to memory.

The cut depends on the arrays alone, never on the number of threads, and every block writes its own part of the
result: the answer is the same on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.ops.cpu import compiled
from gpucnn.ops.cpu.memory import calculation_dtype, flat_views
from gpucnn.ops.cpu.threads import parallel_for

ELEMENTS = 1 << 16
"""Numbers in a block of an element-wise operation: a few such blocks fit the second-level cache.

A NumPy pass over a block there costs some 0.1 ns a number; half the size costs 10 % more in calls, a quarter 30 %.
"""

SMALL = 1 << 17
"""Numbers below which an operation is done before another thread has woken up."""

PLANE_BYTES = 1 << 19
"""Bytes of input in a block of whole images or channels."""


def ranges(count: int, step: int) -> list[slice]:
    """0 .. count cut into slices of ``step`` (the last may be shorter)."""
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def image_blocks(shape: Sequence[int], item_bytes: int) -> list[tuple[slice, slice]]:
    """(images, channels) slices that cover an (N, C, H, W) array in blocks of about PLANE_BYTES."""
    n, c, h, w = shape
    planes = max(1, PLANE_BYTES // max(1, h * w * item_bytes))
    if planes >= c:
        return [(images, slice(0, c)) for images in ranges(n, max(1, planes // max(1, c)))]
    return [(slice(i, i + 1), channels) for i in range(n) for channels in ranges(c, planes)]


def elementwise(
    kernel: Callable[..., None],
    out: NDArray[Any],
    *inputs: NDArray[Any],
    loop: Callable[..., None] | None = None,
) -> NDArray[Any]:
    """Run ``kernel(out, *inputs)`` over equal blocks of the arrays and return ``out``.

    The arrays have one shape; ``out`` may be one of the inputs. Half precision is calculated in float32. ``loop``,
    where given, is the same as a compiled loop, ``loop(count, *inputs, out)``, which then does all of float32.
    """
    if loop is not None and _looped(loop, out, inputs):
        return out
    wide = calculation_dtype(out.dtype)

    def calculate(target: NDArray[Any], sources: Sequence[NDArray[Any]]) -> None:
        # inf and NaN are answers here, not warnings; errstate is a thread's own, so each block sets it.
        with numpy.errstate(all="ignore"):
            if wide == out.dtype:
                kernel(target, *sources)
            else:
                scratch = numpy.empty(target.shape, wide)
                kernel(scratch, *(source.astype(wide) for source in sources))
                target[...] = scratch

    views = flat_views(out, *inputs)
    if views is None:
        calculate(out, inputs)
        return out
    flat_out, flat_inputs = views[0], views[1:]

    parts = ranges(flat_out.size, ELEMENTS)

    def task(number: int) -> None:
        part = parts[number]
        calculate(flat_out[part], [view[part] for view in flat_inputs])

    parallel_for(len(parts), task, small=flat_out.size < SMALL)
    return out


def _looped(loop: Callable[..., None], out: NDArray[Any], inputs: Sequence[NDArray[Any]]) -> bool:
    """Whether the compiled loop did it: in any layout, as arrays without a common order in memory are copied."""
    if compiled.usable(out, *inputs):
        loop(out.size, *inputs, out)
        return True
    if not compiled.available() or any(array.dtype != numpy.float32 for array in (out, *inputs)):
        return False
    views = flat_views(out, *inputs)
    if views is not None and compiled.usable(*views):
        loop(out.size, *views[1:], views[0])
        return True
    contiguously(lambda *arrays: loop(out.size, *arrays), out, *inputs)
    return True


def contiguously(loop: Callable[..., None], out: NDArray[Any], *inputs: NDArray[Any]) -> NDArray[Any]:
    """Run a compiled ``loop(*inputs, out)`` on arrays in C order, copies where they are not; returns ``out``."""
    given = [numpy.require(array, requirements=("C", "A")) for array in inputs]
    if out.flags.c_contiguous and out.flags.aligned:
        loop(*given, out)
    else:
        result = numpy.empty(out.shape, out.dtype)
        loop(*given, result)
        out[...] = result
    return out
