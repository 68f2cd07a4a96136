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
_NEIGHBOURS = {4: (4, 2, 1), 8: (2, 1)}  # of the splits of a tile that lie side by side, by the same
_MOST_THREADS = 256
_SHARED_BYTES = (48 << 10) - 128  # of a block at most: what every GPU gives without being asked, less its own
SHARED_BYTES = {"filter_gradient_direct": _SHARED_BYTES}
"""Dynamic shared memory of a block at most, in bytes."""

_REGISTERS = 128  # [C] of a thread
_MULTIPROCESSOR = (65536, 2048, 100 << 10)  # registers, threads and shared memory that its blocks share
_QUAD = (267, 302)  # [C] instructions for a quad of positions: where quads fill the rows, and where they do not
_DY_QUAD = (21, 36)  # [C] of a warp to stage 32 quads of dy: 16 bytes at a time, and number by number
_X_QUADS = (81, 114)  # [C] of a warp to stage 32 quads of x: with up to two copies, and with up to four
_TILE = 140  # [C] of a warp for each tile beside
_SHARED_OUT = {1: 0, 2: 120, 4: 180}  # [C] of a warp to add up what neighbours have, by their number
_WRITTEN = 2  # [C] of a warp to write a number that each of its threads has
_ADDED_UP, _ADDED = 150, 5  # [C] of a warp to add up 32 numbers of several threads, and each of those
_BEGINNING = 690  # [C] of a warp, before anything else: a launch's time has that of the first blocks
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
    neighbours: int
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
    for neighbours, splits in _splits(work, _MOST_THREADS // units, item):
        threads = units * splits + -units * splits % 32
        summed = units * splits * (TAPS * _OUTPUTS[item] // neighbours) if splits > neighbours else 0
        shared = item * max(4 + tile.x_numbers + outputs[1] * pitch, summed)
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
        of_a_block = part * of_a_tile + threads // 32 * _ending(item, neighbours, splits, units, threads)
        beginnings = max(0, busiest - resident) * (_BEGINNING * threads // 32)
        instructions = (busiest * of_a_block + beginnings) / 4
        yield Plan(
            threads, blocks, parts, part, tiles, shared, output_blocks, outputs[1], column_blocks, columns[1],
            splits, neighbours, tile.rows, tile.row_quads, down, across, tile.x_rows, tile.x_indices, tile.x_pitch,
            tile.copies, pitch, instructions,
        )  # fmt: skip


def _splits(work: int, most: int, item: int) -> Iterator[tuple[int, int]]:
    """(neighbours, splits) that ``work`` quads may be shared out to; no more splits than ``most``."""
    for neighbours in _NEIGHBOURS[item]:
        if room := most // neighbours * neighbours:
            turns = -(-work // room)
            even = -(-work // turns)
            yield neighbours, even + -even % neighbours


def _instructions(
    problem: Conv2dProblem, item: int, tile: _Tile, turns: int, warps: int, output_units: int, quads: bool
) -> float:
    """Of all warps of a block for one tile."""
    ragged = problem.Q % (4 * tile.row_quads) > 0
    channels = min(output_units * _OUTPUTS[item], problem.K // problem.groups)
    dy = channels * -(-tile.rows * tile.row_quads // 32) * _DY_QUAD[not quads]
    x = -(-tile.x_numbers // tile.copies // (4 * 32 * warps)) * _X_QUADS[tile.copies > 2]
    return warps * (turns * _QUAD[ragged] + x + _TILE) + dy


def _ending(item: int, neighbours: int, splits: int, units: int, threads: int) -> float:
    """Of a warp that adds up and writes what its threads, and others', have."""
    kept = TAPS * _OUTPUTS[item] // neighbours
    if splits == neighbours:
        return _SHARED_OUT[neighbours] + _WRITTEN * kept
    sums = -(-TAPS * _OUTPUTS[item] * units // threads)
    return _SHARED_OUT[neighbours] + kept + sums * (_ADDED_UP + _ADDED * splits // neighbours)


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
    dy_steps, x_steps = _steps(dy), _steps(x)
    x_copy = problem.C // problem.groups * made.x_rows * problem.stride[1] * made.x_pitch
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
            "x_copy": x_copy,
            "dy_begin": 4 + made.copies * x_copy,
            "bias_slot": made.column_blocks * made.column_units * TAPS - 1 if bias else -1,
            "by_stride": _reciprocal(problem.stride[1]),
            "by_x_rows": _reciprocal(made.x_rows),
            "by_row_quads": _reciprocal(made.row_quads),
            "by_x_quads": _reciprocal(problem.stride[1] * made.x_pitch // 4),
            "by_x_pitch": _reciprocal(made.x_pitch // 4),
            "channels_fastest": channels_fastest,
            "dy_across": image_layout(dy) == "channels_last",
            "dy_quads": quads and dy.address % (4 * itemsize(dy.dtype)) == 0,
        },
    )
    return partial, bias_partial, made.parts


_FROM_PLAN = (
    "tiles", "part", "output_blocks", "output_units", "column_blocks", "column_units", "splits", "neighbours",
    "rows", "row_quads", "tiles_down", "tiles_across", "x_rows", "x_indices", "x_pitch", "copies", "dy_pitch",
)  # fmt: skip


def _steps(image: DeviceArray) -> list[int]:
    """Strides in elements, 0 where there is nowhere to step."""
    return [stride if length > 1 else 0 for length, stride in zip(image.shape, image.strides, strict=True)]


def _in_quads(dy: DeviceArray) -> bool:
    """Whether a multiple of four positions starts a multiple of four numbers behind dy's first."""
    n, k, p, q = _steps(dy)
    return dy.shape[3] % 4 == 0 and q == 1 and all(step % 4 == 0 for step in (n, k, p))


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
