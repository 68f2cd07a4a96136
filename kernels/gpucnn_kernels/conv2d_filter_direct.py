"""The way "direct" of a filter's gradient, for few input channels a group: how its kernel's work is laid out.

A block makes some columns (kernel positions of the input channels) of some output channels, from tiles of
positions of which it stages dy and what the windows look at. How large all of these are is searched for each
problem: what takes the fewest instructions on the busiest multiprocessor, counted in the compiled loops.

Constants marked [C] are counted in the code compiled for sm_90, [E] are estimates until they are measured.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from gpucnn_kernels.arrays import DeviceArray, image_layout
from gpucnn_kernels.errors import ArgumentError
from gpucnn_kernels.gpu import Gpu
from gpucnn_kernels.launch import Call
from gpucnn_kernels.problem import Conv2dProblem
from gpucnn_kernels.runtime import itemsize
from gpucnn_kernels.source import SCALARS

SOURCE = "conv2d_filter_direct"
SOURCES: dict[str, tuple[dict[str, str], ...]] = {SOURCE: ({},)}

CHANNELS = 8  # input channels of a group at most: with more the windows of x no longer are what takes the time
TAPS = 7  # columns of a thread; with the other constants of the source
_OUTPUTS = {4: 8, 8: 2}  # output channels of a thread, by the bytes of a number
_TOGETHER = 2
_MOST_THREADS = 256
_SHARED_BYTES = 48 << 10  # of a block at most: what every GPU gives without being asked
SHARED_BYTES = {"filter_gradient_direct": _SHARED_BYTES}
"""Dynamic shared memory of a block at most, in bytes."""

_REGISTERS = 128  # [C] of a thread
_MULTIPROCESSOR = (65536, 2048, 100 << 10)  # registers, threads and shared memory that its blocks share
_QUAD = (262, 290)  # [C] instructions for a quad of positions: where quads fill the rows, and where they do not
_DY_QUAD = (22, 52)  # [C] of a warp to stage 32 quads of dy: 16 bytes at a time, and number by number
_X_NUMBER, _X_COPY = 18, 4  # [C] of a warp to stage 32 numbers of x, and each copy
_TILE = 120  # [C] of a warp for each tile beside
_END = 1800  # [C] of a warp to add up what the threads have
_ISSUED = 0.8  # [E] of the instructions that a multiprocessor could issue, when blocks stage in turns
_MOST_PARTIAL_BYTES = 64 << 20  # of the workspace for the parts' sums
_IMAGE = 1 << 31  # elements of an image that 32 bits address


@dataclass(frozen=True, slots=True)
class Plan:
    """How the work is laid out: see FilterPatch of the source for the fields."""

    threads: int
    blocks: int  # of each part
    parts: int
    part: int  # tiles of a part
    tiles: int
    shared_bytes: int
    output_blocks: int
    output_units: int
    column_blocks: int
    column_units: int
    splits: int
    rows: int
    row_quads: int
    tiles_down: int
    tiles_across: int
    x_rows: int
    x_indices: int
    x_pitch: int
    copies: int
    dy_pitch: int
    instructions: float  # of a scheduler of the busiest multiprocessor

    def seconds(self, gpu: Gpu) -> float:
        """What the arithmetic and the staging take."""
        return self.instructions / (_ISSUED * gpu.clock)


def takes(problem: Conv2dProblem, dtype: str) -> bool:
    """Whether there is a way "direct" of the gradient of this problem's filter."""
    depth = problem.C // problem.groups
    images = problem.C * problem.H * problem.W, problem.K * problem.P * problem.Q
    return depth <= CHANNELS and max(images) < _IMAGE and any(_tiles(problem, itemsize(SCALARS[dtype][1])))


def check(problem: Conv2dProblem, dtype: str) -> None:
    """Raise ArgumentError where :func:`takes` says no."""
    depth = problem.C // problem.groups
    if depth > CHANNELS:
        raise ArgumentError(
            f"algorithm 'direct' of a filter gradient takes at most {CHANNELS} input channels a group, got "
            f"{depth}; use 'implicit_gemm'"
        )
    if not takes(problem, dtype):
        raise ArgumentError(
            f"algorithm 'direct' of a filter gradient stages what its windows look at, and for {problem} that "
            "does not fit; use 'implicit_gemm'"
        )


# ---------------------------------------------------------------- the layout


@dataclass(frozen=True, slots=True)
class _Tile:
    rows: int
    row_quads: int
    x_rows: int
    x_indices: int
    x_pitch: int
    copies: int
    x_numbers: int  # in shared memory


def _tiles(problem: Conv2dProblem, item: int) -> Iterator[_Tile]:
    """Those whose x, and dy for one thread's output channels, fit into shared memory."""
    reach = (problem.S - 1) * problem.dilation[1] // problem.stride[1]
    quads = -(-problem.Q // 4)
    for across in _shares(quads):
        indices = 4 * across + reach
        pitch = indices + -indices % 4
        for rows in _shares(problem.P):
            x_rows = (rows - 1) * problem.stride[0] + problem.extent[0]
            copies = min(4, reach + 1)
            numbers = copies * problem.C // problem.groups * x_rows * problem.stride[1] * pitch
            tile = _Tile(rows, across, x_rows, indices, pitch, copies, numbers)
            if item * (4 + numbers + _dy_pitch(tile, item)) <= _SHARED_BYTES:
                yield tile


def _shares(count: int) -> list[int]:
    """``count`` divided by 1, 2, 3... and rounded up, each result once."""
    return sorted({-(-count // divisor) for divisor in range(1, count + 1)}, reverse=True)


def _dy_pitch(tile: _Tile, item: int) -> int:
    """Numbers from a thread's output channels to the next one's: half the banks further on."""
    words = tile.rows * tile.row_quads * (4 * _OUTPUTS[item] + 4)
    return words + (16 - words) % 32


@functools.lru_cache(maxsize=1024)
def plan(problem: Conv2dProblem, dtype: str, gpu: Gpu, *, quads: bool = False, bias: bool = False) -> Plan:
    """The layout that takes the fewest instructions; ``quads``: dy can be read four numbers at a time.

    ``bias``: with the gradient of a bias. For a problem that :func:`takes` says yes to, and a batch.
    """
    item = itemsize(SCALARS[dtype][1])
    outputs, columns = problem.K // problem.groups, problem.C // problem.groups * problem.R * problem.S
    output_units, column_units = -(-outputs // _OUTPUTS[item]), -(-(columns + bias) // TAPS)
    plans = (
        made
        for tile in _tiles(problem, item)
        for output_share in _shares(output_units)
        if output_share <= 8
        for column_share in _shares(column_units)
        if output_share * column_share <= _MOST_THREADS
        for made in _plans(
            problem, item, gpu, tile, (output_units, output_share), (column_units, column_share), quads
        )
    )
    return min(plans, key=lambda made: made.instructions)


def _plans(
    problem: Conv2dProblem,
    item: int,
    gpu: Gpu,
    tile: _Tile,
    outputs: tuple[int, int],
    columns: tuple[int, int],
    quads: bool,
) -> Iterator[Plan]:
    output_blocks, column_blocks = -(-outputs[0] // outputs[1]), -(-columns[0] // columns[1])
    units, work = outputs[1] * columns[1], tile.rows * tile.row_quads
    down, across = -(-problem.P // tile.rows), -(-problem.Q // (4 * tile.row_quads))
    tiles = max(1, problem.N * down * across)
    pitch = _dy_pitch(tile, item)
    turns = -(-work // (_MOST_THREADS // units))
    for splits in {-(-work // turns), min(work, _MOST_THREADS // units)}:
        threads = units * splits + -units * splits % 32
        shared = item * max(4 + tile.x_numbers + outputs[1] * pitch, TAPS * _TOGETHER * units * splits)
        if shared > _SHARED_BYTES:
            continue
        room = (_REGISTERS * threads, threads, shared)
        resident = min(has // takes for has, takes in zip(_MULTIPROCESSOR, room, strict=True))
        blocks = output_blocks * column_blocks * problem.groups
        most = max(1, _MOST_PARTIAL_BYTES // (item * problem.K * (columns[0] * TAPS)))
        parts = max(1, min(tiles, resident * gpu.multiprocessors // blocks, most))
        part = -(-tiles // parts)
        parts = -(-tiles // part)
        of_a_tile = _instructions(problem, item, tile, -(-work // splits), threads // 32, outputs[1], quads)
        busiest = -(-blocks * parts // gpu.multiprocessors)
        instructions = busiest * (part * of_a_tile + _END * threads // 32) / 4
        yield Plan(
            threads, blocks, parts, part, tiles, shared, output_blocks, outputs[1], column_blocks, columns[1],
            splits, tile.rows, tile.row_quads, down, across, tile.x_rows, tile.x_indices, tile.x_pitch,
            tile.copies, pitch, instructions,
        )  # fmt: skip


def _instructions(
    problem: Conv2dProblem, item: int, tile: _Tile, turns: int, warps: int, output_units: int, quads: bool
) -> float:
    """Of all warps of a block for one tile."""
    ragged = problem.Q % (4 * tile.row_quads) > 0
    channels = min(output_units * _OUTPUTS[item], problem.K // problem.groups)
    dy = channels * -(-tile.rows * tile.row_quads // 32) * _DY_QUAD[not quads]
    numbers = problem.C // problem.groups * tile.x_rows * -(-tile.x_indices * problem.stride[1] // 32)
    return warps * (turns * _QUAD[ragged] + _TILE) + dy + numbers * (_X_NUMBER + _X_COPY * tile.copies)


# ---------------------------------------------------------------- the launch


def filter_sums(
    call: Call, problem: Conv2dProblem, dy: DeviceArray, x: DeviceArray, channels_fastest: bool, bias: bool
) -> tuple[DeviceArray, DeviceArray | None, int]:
    """(rows of the weight's sums for every part of the positions, of the bias's where asked for, their number)."""
    check(problem, x.dtype)
    quads = _in_quads(dy)
    made = plan(problem, x.dtype, call.gpu, quads=quads, bias=bias)  # not by dy's address: it sets the sums' order
    accumulated = SCALARS[x.dtype][1]
    columns = problem.C // problem.groups * problem.R * problem.S
    partial = call.scratch(made.parts * problem.K * columns, accumulated)
    bias_partial = call.scratch(made.parts * problem.K, accumulated) if bias else None
    units = made.output_units * made.column_units
    dy_steps, x_steps = _steps(dy), _steps(x)
    lanes = max(lanes for lanes in (1, 2, 4, 8, 16, 32) if lanes == 1 or _fills(lanes, units, made))
    call.launch(
        SOURCE,
        "filter_gradient_direct",
        made.blocks * made.parts,
        made.threads,
        scalar=x.dtype,
        shared_bytes=made.shared_bytes,
        x=x,
        dy=dy,
        partial=partial,
        bias_partial=bias_partial,
        patch={
            **dict(zip(("x_n", "x_c", "x_h", "x_w"), x_steps, strict=True)),
            **dict(zip(("dy_n", "dy_k", "dy_p", "dy_q"), dy_steps, strict=True)),
            "groups": problem.groups,
            "K": problem.K // problem.groups,
            "C": problem.C // problem.groups,
            "columns": columns,
            **{letter: getattr(problem, letter) for letter in "HWRSPQ"},
            "stride_h": problem.stride[0],
            "stride_w": problem.stride[1],
            "top": problem.padding[0],
            "left": problem.padding[2],
            "dilation_h": problem.dilation[0],
            "dilation_w": problem.dilation[1],
            **{name: getattr(made, name) for name in _FROM_PLAN},
            "neighbours": _neighbours(made.splits),
            "bias_slot": made.column_blocks * made.column_units * TAPS - 1 if bias else -1,
            "lanes": lanes,
            "by_stride": _reciprocal(problem.stride[1]),
            "by_x_rows": _reciprocal(made.x_rows),
            "by_row_quads": _reciprocal(made.row_quads),
            "channels_fastest": channels_fastest,
            "dy_across": image_layout(dy) == "channels_last",
            "dy_quads": quads and dy.address % (4 * itemsize(dy.dtype)) == 0,
        },
    )
    return partial, bias_partial, made.parts


_FROM_PLAN = (
    "tiles", "part", "output_blocks", "output_units", "column_blocks", "column_units", "splits", "rows",
    "row_quads", "tiles_down", "tiles_across", "x_rows", "x_indices", "x_pitch", "copies", "dy_pitch",
)  # fmt: skip


def _steps(image: DeviceArray) -> list[int]:
    """Strides in elements, 0 where there is nowhere to step."""
    return [stride if length > 1 else 0 for length, stride in zip(image.shape, image.strides, strict=True)]


def _in_quads(dy: DeviceArray) -> bool:
    """Whether a multiple of four positions starts a multiple of four numbers behind dy's first."""
    n, k, p, q = _steps(dy)
    return dy.shape[3] % 4 == 0 and q == 1 and all(step % 4 == 0 for step in (n, k, p))


def _neighbours(splits: int) -> int:
    """How many lanes with neighbouring quads lie side by side: about four, and a divisor."""
    return next(count for count in (4, 5, 3, 6, 7, 8, 2, splits) if splits % count == 0)


def _fills(lanes: int, units: int, made: Plan) -> bool:
    """Whether so many threads for each sum are neither more than there are threads, nor more than it has terms."""
    return lanes <= made.splits and lanes * units * TAPS * _TOGETHER <= made.threads


def _reciprocal(divisor: int) -> int:
    """2^32 divided by it, rounded up, and 0 for 1: the source's ``divided`` multiplies by it."""
    return -(-(1 << 32) // divisor) if divisor > 1 else 0


def seconds(problem: Conv2dProblem, dtype: str, gpu: Gpu) -> tuple[float, float]:
    """(of arithmetic and staging, bytes of the parts' sums), contiguous arrays taken for granted."""
    made = plan(problem, dtype, gpu, quads=problem.Q % 4 == 0)
    sums = (
        itemsize(SCALARS[dtype][1]) * made.parts * problem.K * problem.C // problem.groups * problem.R * problem.S
    )
    return made.seconds(gpu), float(sums)
