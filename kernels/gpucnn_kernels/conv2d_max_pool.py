"""Convolution, bias, activation and max pooling as one kernel: the layers of small networks.

cuda/conv2d_max_pool.cu says how. What a block makes is planned here as :mod:`gpucnn_kernels.conv2d_direct` plans,
by counting instructions, and :func:`conv2d_max_pool2d_pays` holds the seconds of the one launch against those of
two: the convolution by the way that is chosen for it, and the pooling of its result.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gpucnn_kernels import conv2d_cost
from gpucnn_kernels.conv2d import by_channel, result_array
from gpucnn_kernels.conv2d_choice import chosen, least_precision
from gpucnn_kernels.conv2d_direct import MOST_BYTES, Kernel, Plan, made_of, multiply_add_clocks, sides
from gpucnn_kernels.conv2d_forward_paths import Epilogue, axes, channel_counts, filter_strides, strides
from gpucnn_kernels.conv2d_tiles import cache_bandwidth
from gpucnn_kernels.errors import ArgumentError
from gpucnn_kernels.gpu import H200, Gpu
from gpucnn_kernels.launch import Call
from gpucnn_kernels.problem import Conv2dProblem, IntOrPair, Padding, Pool2dProblem, window_extent
from gpucnn_kernels.runtime import itemsize

SOURCES: dict[str, tuple[dict[str, str], ...]] = {"conv2d_max_pool": ({},)}

SHARED_BYTES = {
    f"conv2d_max_pool_{kind}": MOST_BYTES for kind in ("halves_wide", "halves_medium", "halves_narrow", "windows")
}

MOST_PLACES = 256
"""Of a pooling window: its argmax is one byte."""

_QUAD = 4  # neighbouring positions of a row that a thread makes
_PAIR = 2  # of such rows
_WARP = 32
_ALONE = 32, 1, 1, 1, 1  # the smallest tile: one pooled pixel of one image

# Instructions of a warp beside those of a direct convolution, counted in the code for sm_90 (float32).
_OF_A_HALVED_NUMBER = (
    5  # looking for the largest of four, for each of them; bias, function and writing are direct's
)
_OF_AN_EXCHANGED_NUMBER = 3
_OF_A_WINDOW = 130  # of so many channels as are in shared memory at a time
_OF_A_PLACE = 34


@dataclass(frozen=True, slots=True)
class PooledPlan:
    """What a block makes and costs: the convolution's ``plan``, and beside it the kernel's struct Pool.

    ``rows`` x ``columns`` pooled pixels of each of its images, whose windows come in parts of ``places_down`` x
    ``places_across`` places.
    """

    plan: Plan
    rows: int
    columns: int
    places_down: int
    places_across: int


def kernels_for(pool: Pool2dProblem, dtype: str) -> tuple[Kernel, ...]:
    """Those that can do it. Of float64 a thread makes fewer channels, and as many quads, which a Kernel halves."""
    double = dtype == "float64"
    quads = 4 if double else 2
    if not _halves(pool):
        return (Kernel("conv2d_max_pool_windows", quads, 4 if double else 8, 256, 256),)
    return (
        Kernel("conv2d_max_pool_halves_wide", quads, 4 if double else 8, 256, 384 if double else 512),
        Kernel("conv2d_max_pool_halves_medium", quads, 2 if double else 6, 256, 512),
        Kernel("conv2d_max_pool_halves_narrow", quads, 2 if double else 4, 256, 512),
    )


def _halves(pool: Pool2dProblem) -> bool:
    """Whether windows are 2 x 2 and lie side by side."""
    return (pool.R, pool.S, pool.stride, pool.padding, pool.dilation) == (2, 2, (2, 2), (0, 0), (1, 1))


# ---------------------------------------------------------------- plans


@functools.lru_cache(maxsize=4096)
def plan(
    problem: Conv2dProblem,
    pool: Pool2dProblem,
    dtype: str,
    gpu: Gpu,
    kernels: tuple[Kernel, ...] | None = None,
    most_bytes: int = MOST_BYTES,
) -> PooledPlan:
    """The plan that takes the least time; of equals the first. Windows come in as few parts as fit.

    ``kernels`` are those to choose from, without them all that can do it.
    """
    for part in _parts(pool):
        for alone in (False, True):
            plans = [
                made
                for kernel in kernels or kernels_for(pool, dtype)
                for tile in ([_ALONE] if alone else _tiles(kernel, problem, pool, part, dtype))
                if (made := _made(kernel, problem, pool, part, tile, dtype, gpu, most_bytes)) is not None
            ]
            if plans:
                return min(plans, key=lambda made: made.plan.seconds(gpu))
    raise AssertionError("a quad alone fits in any memory")


def _parts(pool: Pool2dProblem) -> Iterator[tuple[int, int]]:
    """(rows, columns) of places at a time: whole windows, then fewer of their rows, then parts of one row."""
    for count in range(1, pool.R + 1):
        yield -(-pool.R // count), pool.S
    for count in range(2, pool.S + 1):
        yield 1, -(-pool.S // count)


def _tiles(
    kernel: Kernel, problem: Conv2dProblem, pool: Pool2dProblem, part: tuple[int, int], dtype: str
) -> Iterator[tuple[int, int, int, int, int]]:
    """(threads of a team, teams, images, pooled rows, pooled columns): what blocks may make."""
    outputs, images = problem.K // problem.groups, max(1, problem.N)
    pairs_of_thread = kernel.quads * 4 // _item(dtype) // _PAIR
    high, wide = (window_extent(part[axis], pool.dilation[axis]) for axis in (0, 1))
    for teams, threads in itertools.product((1, 2, 4, 8), (32, 64, 128, 192, 256)):
        if threads * teams > kernel.most_threads or (teams > 1 and (teams - 1) * kernel.outputs >= outputs):
            continue
        room = threads * pairs_of_thread
        for columns in _even_parts(pool.Q, (room * _QUAD - wide) // pool.stride[1] + 1, 6):
            lines = room // -(-((columns - 1) * pool.stride[1] + wide) // _QUAD) * _PAIR
            for rows in _even_parts(pool.P, (lines - high) // pool.stride[0] + 1, 4):
                together = max(1, min(images, lines // ((rows - 1) * pool.stride[0] + high)))
                yield threads, teams, -(-images // -(-images // together)), rows, columns


def _even_parts(count: int, longest: int, most: int) -> Iterator[int]:
    """How long 1, 2, 3... even parts of ``count`` are: of those of at most ``longest`` the first ``most``."""
    if longest < 1:
        return
    before = 0
    for parts in range(-(-count // longest), count + 1):
        length = -(-count // parts)
        if length != before:
            yield length
            before, most = length, most - 1
        if most == 0:
            return


def _made(
    kernel: Kernel,
    problem: Conv2dProblem,
    pool: Pool2dProblem,
    part: tuple[int, int],
    tile: tuple[int, int, int, int, int],
    dtype: str,
    gpu: Gpu,
    most_bytes: int,
) -> PooledPlan | None:
    """The plan of a tile, or None where it does not fit."""
    threads, teams, images, rows, columns = tile
    item = _item(dtype)
    high, wide = (window_extent(part[axis], pool.dilation[axis]) for axis in (0, 1))
    patch_rows = (rows - 1) * pool.stride[0] + high
    quads = -(-((columns - 1) * pool.stride[1] + wide) // _QUAD)
    columns = (quads * _QUAD - wide) // pool.stride[1] + 1  # as many as they hold
    if -(-images * patch_rows // _PAIR) * quads > threads * (kernel.quads * 4 // item // _PAIR):
        return None
    outputs, summed = problem.K // problem.groups, problem.C // problem.groups
    # As many positions as the blocks make, of which neighbours may make some twice.
    blocks = -(-pool.P // rows), -(-pool.Q // columns)
    down, across = sides(problem, transposed=False)
    down = dataclasses.replace(down, outputs=blocks[0] * patch_rows)
    across = dataclasses.replace(across, outputs=blocks[1] * quads * _QUAD)
    made = made_of(
        kernel, problem, (threads, teams, images, patch_rows, quads), outputs, summed, down, across, item,
        multiply_add_clocks(gpu, dtype), most_bytes,
    )  # fmt: skip
    if made is None:
        return None
    warps = threads * teams // _WARP
    numbers = kernel.quads * 4 // item * kernel.outputs * _QUAD  # of a thread
    shared_bytes, pooling = made.shared_bytes, numbers * _OF_A_HALVED_NUMBER
    parts = -(-pool.R // part[0]) * -(-pool.S // part[1])
    if not _halves(pool):
        together = 16 // item
        shared_bytes = max(shared_bytes, item * teams * together * images * patch_rows * quads * _QUAD)
        if shared_bytes > most_bytes:
            return None
        windows = -(-images * rows * columns // threads) * -(-kernel.outputs // together)
        pooling = numbers * _OF_AN_EXCHANGED_NUMBER + windows * (_OF_A_WINDOW + part[0] * part[1] * _OF_A_PLACE)
    made = dataclasses.replace(
        made, shared_bytes=shared_bytes, instructions=parts * (made.instructions + warps * pooling)
    )
    return PooledPlan(made, rows, columns, *part)


def _item(dtype: str) -> int:
    return 8 if dtype == "float64" else 4


# ---------------------------------------------------------------- whether it pays


def conv2d_max_pool2d_pays(
    problem: Conv2dProblem,
    pool: Pool2dProblem,
    dtype: Any = "float32",
    *,
    precision: str | None = None,
    channels_last: bool = False,
    gpu: Gpu = H200,
) -> bool:
    """Whether the one kernel is reckoned faster than the convolution and then the pooling ``pool`` of its result.

    Both are sums of :mod:`gpucnn_kernels.conv2d_cost`'s kind, of instructions, bytes and launches: the convolution
    goes the way that "auto" is for such images, ``precision`` and GPU. A window of more than 256 places is for two
    launches in any case, as the argmax of the one kernel is a byte.
    """
    if pool.R * pool.S > MOST_PLACES:
        return False
    least = least_precision(str(dtype), precision)
    return _pays(problem, pool, str(dtype), least, channels_last, gpu)


@functools.lru_cache(maxsize=4096)
def _pays(
    problem: Conv2dProblem, pool: Pool2dProblem, dtype: str, precision: str | None, channels_last: bool, gpu: Gpu
) -> bool:
    apart = seconds_apart(problem, pool, dtype, gpu, precision=precision, channels_last=channels_last)
    return seconds(problem, pool, dtype, gpu) < apart


def seconds(problem: Conv2dProblem, pool: Pool2dProblem, dtype: str, gpu: Gpu) -> float:
    """Of the one launch: the longest of instructions, what blocks fetch through the cache, and memory."""
    made, item = plan(problem, pool, dtype, gpu).plan, itemsize(dtype)
    once = item * sum(math.prod(shape) for shape in (problem.input_shape, problem.weight_shape))
    once += (item + 1) * math.prod(pool.output_shape)
    fetched = made.blocks * made.copied * item / cache_bandwidth(gpu)
    return max(made.seconds(gpu), fetched, _memory(gpu, once)) + conv2d_cost.LAUNCH_SECONDS


def seconds_apart(
    problem: Conv2dProblem,
    pool: Pool2dProblem,
    dtype: str,
    gpu: Gpu,
    *,
    precision: str | None = None,
    channels_last: bool = False,
) -> float:
    """Of the convolution by the way that is chosen for it, and of a pooling that moves each of its bytes once."""
    least = least_precision(dtype, precision)
    way = chosen("forward", problem, dtype, gpu=gpu, precision=least, channels_last=channels_last)
    convolution = conv2d_cost.estimate(
        way, "forward", problem, dtype, gpu, precision=least, channels_last=channels_last
    )
    item = itemsize(dtype)
    moved = item * math.prod(pool.input_shape) + (item + 1) * math.prod(pool.output_shape)
    return convolution.seconds + _memory(gpu, moved) + conv2d_cost.LAUNCH_SECONDS


def _memory(gpu: Gpu, moved: float) -> float:
    return moved / (conv2d_cost.REACHED_BANDWIDTH * gpu.bandwidth)


# ---------------------------------------------------------------- the launch


def conv2d_max_pool2d_forward(
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    pool_size: IntOrPair,
    pool_stride: IntOrPair | None = None,
    pool_padding: IntOrPair = 0,
    pool_dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    activation: str = "identity",
    negative_slope: float = 0.01,
    with_argmax: bool = True,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """(y, argmax), both (N, K, P', Q'): max pooling of a convolution's result, all of it in one launch.

    What begins with ``pool_``, and ``ceil_mode``, are :func:`gpucnn_kernels.max_pool2d_forward`'s, the rest
    :func:`gpucnn_kernels.conv2d_forward`'s. y and argmax (uint8, for :func:`gpucnn_kernels.max_pool2d_backward`)
    are what the two functions give one after the other with algorithm "direct", up to the rounding of the sums;
    the convolution's own result is made nowhere. With ``with_argmax=False``, for inference, y alone is answered,
    and no argmax is made.

    Training needs no more: where the activation's slope is a function of its result (ReLU, leaky ReLU of a slope
    above 0, sigmoid, tanh), the gradient for the sums is max_pool2d_backward of the activation's backward at y,
    since only the winners have one.

    x, weight and ``out`` may each be contiguous or channels-last; results are laid out as ``out``, or as x. Raises
    what the two functions raise, and ArgumentError for a window of more than 256 places or rows of x that span
    2^31 numbers.
    """
    with Call(stream, x=x, weight=weight, bias=bias, out=out) as call:
        dtype = call.floating("x", "weight", "bias", "out")
        images, weights = call["x"], call["weight"]
        problem = Conv2dProblem.from_shapes(
            images.shape, weights.shape, stride=stride, padding=padding, dilation=dilation, groups=groups
        )
        pool = Pool2dProblem.from_shapes(
            problem.output_shape,
            pool_size,
            stride=pool_stride,
            padding=pool_padding,
            dilation=pool_dilation,
            ceil_mode=ceil_mode,
        )
        if pool.R * pool.S > MOST_PLACES:
            raise ArgumentError(
                f"a pooling window in one kernel with its convolution has at most {MOST_PLACES} places, got "
                f"{pool.R}x{pool.S} = {pool.R * pool.S}; call conv2d_forward and max_pool2d_forward"
            )
        check_rows(problem, images.strides[3])
        epilogue = Epilogue(by_channel(call, "bias", problem.K), activation, negative_slope)
        y = result_array(call, pool.output_shape, dtype, images, epilogue.bias)
        argmax = call.empty(pool.output_shape, "uint8", like=y, name="argmax") if with_argmax else None
        channels = channel_counts(problem, transposed=False)
        vertical, horizontal = axes(problem, transposed=False)
        made = plan(problem, pool, dtype, call.gpu)
        call.launch(
            "conv2d_max_pool",
            made.plan.kernel,
            made.plan.blocks,
            made.plan.threads,
            scalar=dtype,
            shared_bytes=made.plan.shared_bytes,
            x=images,
            x_strides=strides(images),
            filter=weights,
            filter_strides=filter_strides(weights, problem, transposed=False),
            bias=epilogue.bias,
            y=y,
            y_strides=strides(y),
            argmax=argmax,
            channels=channels,
            vertical=vertical,
            horizontal=horizontal,
            pool=_pool(pool, made),
            epilogue=epilogue.fields,
            patch=made.plan.patch,
        )
        return call.give(y) if argmax is None else call.give(y, argmax)


def check_rows(problem: Conv2dProblem, apart: int) -> None:
    """Raise ArgumentError for rows whose columns, so many numbers ``apart``, span more than an int counts."""
    if problem.N and problem.W * apart >= 1 << 31:
        raise ArgumentError(
            "a convolution in one kernel with its pooling is for images whose rows span less than 2^31 numbers, "
            f"got {problem.W} columns that are {apart} apart; call conv2d_forward and max_pool2d_forward"
        )


def _pool(pool: Pool2dProblem, made: PooledPlan) -> dict[str, int]:
    """The kernel's struct Pool."""
    fields = {letter: getattr(pool, letter) for letter in "PQRS"}
    for name in ("stride", "padding", "dilation"):
        fields[f"{name}_h"], fields[f"{name}_w"] = getattr(pool, name)
    for name in ("rows", "columns", "places_down", "places_across"):
        fields[name] = getattr(made, name)
    return fields
