"""How long each way of a convolution takes, by a page of arithmetic, and so which way is taken.

A way's time is the longest of what runs side by side in its main launch, what other launches move, and the
launches themselves:

    seconds = max(arithmetic, cache, memory) + passes + launches * LAUNCH_SECONDS
    memory  = (each array once, and what it reads or writes of workspaces) / (the memory's bandwidth)
    passes  = (what copies into and out of workspaces move) / (the memory's bandwidth)

Arithmetic and cache are those of a grid of tiles: :mod:`gpucnn_kernels.conv2d_tiles`. Arithmetic is that of whole
blocks, by every way: what they do before and behind their loops is counted, but for the beginnings of the first
blocks, which are in LAUNCH_SECONDS. It is much of the time where a sum has few terms, as in a first layer. Source
channels that are filled up with zeros are multiplied like others.

Constants marked [E] are estimates until they are measured on a GPU, [P] follow from published figures. Because of
the first an estimate is not followed blindly: see :func:`choose`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from gpucnn_kernels import (
    conv2d_direct,
    conv2d_filter_depthwise,
    conv2d_filter_direct,
    conv2d_first_layer,
    conv2d_first_layer_filter,
    conv2d_input_columns,
)
from gpucnn_kernels.conv2d_forward_paths import depthwise_instructions, depthwise_slides, stride_phases, terms
from gpucnn_kernels.conv2d_tiles import (
    CUBLAS_TENSOR_TILES,
    CUBLAS_TILES,
    Tile,
    around,
    cache_bandwidth,
    even_filter_parts,
    filter_parts,
    filter_seconds,
    filter_tile,
    implicit_tile,
    plain_rate,
    tensor_filter_tile,
    tensor_rate,
    tensor_tile,
    tiled,
    wgmma_tile,
)
from gpucnn_kernels.gpu import Gpu
from gpucnn_kernels.problem import Conv2dProblem
from gpucnn_kernels.runtime import itemsize

LAUNCH_SECONDS = 3e-6  # [P] an empty launch, below which nothing is; the next begins when the one before has ended
REACHED_BANDWIDTH = 0.9  # [P] of the datasheet's: 4.3 of 4.8 TB/s of an H200 in a copy
MARGIN = 1.25  # [E] an estimate has to be better by this to be believed against the path that is known to be good
DEPTHWISE_SHARE = 0.1  # [E] a multiply-add needs a load, and a bound for each
FILTER_DEPTHWISE_SHARE = (
    0.06  # [E] for any filter: nine tenths of the 9 multiply-adds of 132 instructions, as compiled for sm_90
)
COLUMN_BYTES = 256 << 20  # of the workspace for columns: more is done some images at a time


@dataclass(frozen=True, slots=True)
class Estimate:
    """A way's time in seconds, and its parts."""

    path: str
    tile: str
    arithmetic: float
    cache: float
    memory: float
    launches: int = 1
    passes: float = 0.0

    @property
    def seconds(self) -> float:
        """The longest part of the main launch, the other passes, and the launches."""
        return max(self.arithmetic, self.cache, self.memory) + self.passes + self.launches * LAUNCH_SECONDS

    @property
    def limit(self) -> str:
        """What takes the longest: "arithmetic", "cache", "memory", "passes" or "launches"."""
        parts = {
            "arithmetic": self.arithmetic,
            "cache": self.cache,
            "memory": self.memory,
            "passes": self.passes,
            "launches": self.launches * LAUNCH_SECONDS,
        }
        return max(parts, key=lambda name: parts[name])


# ---------------------------------------------------------------- the ways of a problem


@dataclass(frozen=True, slots=True)
class Sizes:
    """A problem in one direction as products of matrices: of each unit ``channels`` x ``positions`` sums."""

    channels: int
    positions: int
    units: int

    @staticmethod
    def of(problem: Conv2dProblem, direction: str) -> Sizes:
        """Of "forward" or "backward_data", whose units are groups, and there of each stride phase."""
        phases, positions = stride_phases(problem, direction == "backward_data")
        channels = problem.K if direction == "forward" else problem.C
        return Sizes(channels // problem.groups, positions, phases * problem.groups)

    @property
    def covered(self) -> tuple[int, int, int]:
        """What tiles have to cover."""
        return self.channels, self.positions, self.units


def estimate(
    path: str,
    direction: str,
    problem: Conv2dProblem,
    dtype: str,
    gpu: Gpu,
    *,
    precision: str | None = None,
    channels_last: bool = False,
) -> Estimate:
    """The time of ``path``, a name that ``algorithm`` takes, on images that are ``channels_last`` or contiguous.

    Raises ValueError for a path that there is not.
    """
    if direction == "backward_filter":
        return _filter_gradient(path, problem, dtype, gpu, precision, channels_last)
    sizes, item = Sizes.of(problem, direction), itemsize(dtype)
    once = _arrays(problem, item)
    depth = terms(problem, direction == "backward_data")
    if path in ("implicit_gemm", "phases"):
        tile = implicit_tile(gpu, dtype, *sizes.covered, depth)
        return _product(path, tile, sizes, depth, plain_rate(gpu, dtype), item, once, gpu)
    if path == "tensor" and direction == "forward" and conv2d_first_layer.takes(problem, dtype, precision):
        first = conv2d_first_layer.plan(problem, dtype, gpu)
        return Estimate(path, first.kernel.name, first.seconds(gpu, dtype), 0.0, _memory(gpu, once))
    if path in ("tensor", "wgmma"):
        depth = terms(problem, direction == "backward_data", 16 // item)
        tile = tensor_tile(gpu, dtype, precision, *sizes.covered, depth)
        if path == "wgmma":
            tile = wgmma_tile(gpu, dtype, *sizes.covered, depth)
        made = _product(path, tile, sizes, depth, tensor_rate(gpu, dtype, precision), item, once, gpu)
        packed, launches = _packing(problem, item, channels_last, direction)
        return replace(made, launches=1 + launches, passes=_memory(gpu, packed))
    if path == "direct":
        if direction == "forward":
            plan = conv2d_direct.plan(problem, False, dtype, gpu)
        else:
            plan = conv2d_input_columns.faster(problem, dtype, gpu)
        fetched = plan.blocks * plan.copied * item / cache_bandwidth(gpu)
        return Estimate(path, plan.kernel, plan.seconds(gpu), fetched, _memory(gpu, once))
    if path == "depthwise":
        share = DEPTHWISE_SHARE
        if depthwise_slides(problem, direction == "backward_data"):
            instructions = depthwise_instructions(problem, direction == "backward_data", channels_last)
            share = problem.R * problem.S / instructions
        return Estimate(path, "", problem.flops / (share * plain_rate(gpu, dtype)), 0.0, _memory(gpu, once))
    if path == "dilated":
        whole = Sizes(sizes.channels, problem.N * problem.H * problem.W, problem.groups)
        depth = float(problem.K // problem.groups * problem.R * problem.S)
        tile = implicit_tile(gpu, dtype, *whole.covered, depth)
        made = _product(path, tile, whole, depth, plain_rate(gpu, dtype), item, once, gpu)
        workspace = 2.0 * item * problem.N * problem.K * problem.H * problem.W
        return replace(made, launches=3, passes=_memory(gpu, workspace))
    if path in ("im2col", "col2im", "scatter"):
        return _by_columns(path, problem, dtype, gpu)
    raise ValueError(f"no estimate of a path '{path}' for {direction}")


def _product(
    path: str, tile: Tile, sizes: Sizes, depth: float, rate: float, item: int, moved: float, gpu: Gpu
) -> Estimate:
    """Of an implicit matrix product of sums of ``depth`` terms."""
    arithmetic, cache = tiled(gpu, tile, *sizes.covered, depth, rate, item)
    arithmetic += around(gpu, tile, tile.blocks(*sizes.covered))
    return Estimate(path, tile.name, arithmetic, cache, _memory(gpu, moved))


def _by_columns(path: str, problem: Conv2dProblem, dtype: str, gpu: Gpu) -> Estimate:
    """Columns in memory (unless they are the image itself) and cuBLAS's product, a matrix for each image."""
    item = itemsize(dtype)
    pointwise = (problem.R, problem.S, problem.stride, problem.padding) == (1, 1, (1, 1), (0, 0, 0, 0))
    outputs, depth = problem.K // problem.groups, problem.C // problem.groups * problem.R * problem.S
    positions = problem.P * problem.Q
    # Forward sums over the columns' rows; the input gradient makes them, in at least float32.
    rows, summed, wide_item = (outputs, depth, item) if path == "im2col" else (depth, outputs, max(item, 4))
    arithmetic, cache = _by_cublas(gpu, dtype, rows, positions, problem.N * problem.groups, summed)
    made = Estimate(path, "cuBLAS", arithmetic, cache, _memory(gpu, _arrays(problem, item)))
    if pointwise:
        return replace(made, launches=problem.groups)
    columns = float(wide_item) * problem.N * problem.groups * depth * positions
    image, result = (item * math.prod(shape) for shape in (problem.input_shape, problem.output_shape))
    turns = max(1, min(problem.N, math.ceil(columns / COLUMN_BYTES)))
    return replace(
        made,
        memory=_memory(gpu, columns + result),
        passes=_memory(gpu, columns + image),
        launches=turns * (problem.groups + 1),
    )


def _by_cublas(gpu: Gpu, dtype: str, rows: int, columns: int, units: int, summed: int) -> tuple[float, float]:
    """(arithmetic, cache) seconds of cuBLAS's product, a batch of ``units``, by the better of its tiles."""
    plain = dtype in ("float32", "float64")
    rate, made = gpu.rate(dtype if plain else "16-bit"), []
    for tile in CUBLAS_TILES if plain else CUBLAS_TENSOR_TILES:
        arithmetic, cache = tiled(gpu, tile, rows, columns, units, summed, rate, itemsize(dtype))
        made.append((arithmetic + around(gpu, tile, tile.blocks(rows, columns, units)), cache))
    return min(made)


def _filter_gradient(
    path: str, problem: Conv2dProblem, dtype: str, gpu: Gpu, precision: str | None, channels_last: bool
) -> Estimate:
    """Sums over all positions, which are split into parts until there are blocks enough for any GPU."""
    item = itemsize(dtype)
    outputs, columns = problem.K // problem.groups, problem.C // problem.groups * problem.R * problem.S
    positions = problem.N * problem.P * problem.Q
    once = _arrays(problem, item)
    if path == "depthwise":
        share = FILTER_DEPTHWISE_SHARE
        if conv2d_filter_depthwise.takes(problem):
            share = problem.R * problem.S / conv2d_filter_depthwise.instructions(problem, channels_last)
        return Estimate(path, "", problem.flops / (share * plain_rate(gpu, dtype)), 0.0, _memory(gpu, once), 2)
    if path == "im2col":
        # A product for each image, one after the other, each adding to the same sums: few blocks at a time.
        made = _by_columns("im2col", problem, dtype, gpu)
        of_an_image = _by_cublas(gpu, dtype, outputs, columns, problem.groups, problem.P * problem.Q)
        arithmetic, cache = (problem.N * part for part in of_an_image)
        return replace(made, arithmetic=arithmetic, cache=cache, launches=made.launches + problem.N + 1)
    if path == "direct":
        arithmetic, sums = conv2d_filter_direct.seconds(problem, dtype, gpu)
        return Estimate(
            path, "filter_gradient_direct", arithmetic, 0.0, _memory(gpu, once + sums), 2, _memory(gpu, sums)
        )
    if path == "tensor" and conv2d_first_layer_filter.takes(problem, dtype):
        first = conv2d_first_layer_filter.plan(problem, dtype, gpu)
        sums = 4.0 * first.parts(gpu) * problem.K * columns
        arithmetic, memory = first.seconds(gpu, dtype), _memory(gpu, once + sums)
        return Estimate(path, first.kernel.name, arithmetic, 0.0, memory, 2, _memory(gpu, sums))
    sizes = outputs, columns, problem.groups, positions
    if path == "tensor":
        chunk = 16 // item  # channels of either factor are filled up to pieces of 16 bytes
        filled = -(-(problem.C // problem.groups) // chunk) * chunk * problem.R * problem.S
        sizes = -(-outputs // chunk) * chunk, filled, problem.groups, positions
        tile, rate = tensor_filter_tile(gpu, dtype, precision, *sizes), tensor_rate(gpu, dtype, precision)
        parts = filter_parts(tile, *sizes)
        packed, packs = _packing(problem, item, channels_last, "backward_filter")
    elif path == "implicit_gemm":
        tile, rate = filter_tile(gpu, dtype, *sizes), plain_rate(gpu, dtype)
        parts = even_filter_parts(gpu, tile, *sizes)
        packed, packs = 0.0, 0
    else:
        raise ValueError(f"no estimate of a path '{path}' for backward_filter")
    arithmetic, cache = filter_seconds(gpu, tile, *sizes, parts, rate, item)
    arithmetic += around(gpu, tile, tile.blocks(sizes[0], sizes[1], problem.groups * parts))
    sums = 4.0 * parts * problem.K * columns
    passes = _memory(gpu, packed + sums)
    return Estimate(path, tile.name, arithmetic, cache, _memory(gpu, once + sums), 2 + packs, passes)


def _packing(problem: Conv2dProblem, item: int, channels_last: bool, direction: str) -> tuple[float, int]:
    """(bytes, launches) of bringing what tensor cores read into pieces of 16 bytes, channels side by side."""
    chunk, moved, launches = 16 // item, 0.0, 0
    shapes = {"forward": [problem.input_shape], "backward_data": [problem.output_shape]}.get(
        direction, [problem.input_shape, problem.output_shape]
    )
    for shape in shapes:
        depth = shape[1] // problem.groups
        if not channels_last or depth % chunk:
            moved += item * math.prod(shape) * (1 + -(-depth // chunk) * chunk / depth)
            launches += 1
    # The weights of an input gradient always, and forward those that do not lie so; a filter's has none.
    whole = channels_last and problem.C // problem.groups % chunk == 0
    weights = direction == "backward_data" or (direction == "forward" and not whole)
    return moved, launches + weights


def _arrays(problem: Conv2dProblem, item: int) -> float:
    """Bytes of input, filter and output, each once."""
    return float(item) * sum(
        math.prod(shape) for shape in (problem.input_shape, problem.weight_shape, problem.output_shape)
    )


def _memory(gpu: Gpu, moved: float) -> float:
    return moved / (REACHED_BANDWIDTH * gpu.bandwidth)


# ---------------------------------------------------------------- choosing


def choose(
    usual: str,
    candidates: Iterable[str],
    direction: str,
    problem: Conv2dProblem,
    dtype: str,
    gpu: Gpu,
    *,
    precision: str | None = None,
    channels_last: bool = False,
) -> str:
    """``usual``, unless one of the ``candidates`` is estimated to be MARGIN times as fast; then the fastest.

    ``usual`` is what is known to be good for such a problem without reckoning.
    """
    options = {"precision": precision, "channels_last": channels_last}

    def seconds(path: str) -> float:
        return estimate(path, direction, problem, dtype, gpu, **options).seconds  # type: ignore[arg-type]

    best = min(candidates, key=seconds, default=usual)
    return best if seconds(best) * MARGIN < seconds(usual) else usual
