"""The direct path of a convolution with few input channels a group, forward and input gradient.

cuda/conv2d_direct.cuh says how. Which positions a block makes, of how many channels, and how much of the sum lies
in shared memory at a time is planned here, by counting instructions: the fewest that the busiest multiprocessor
issues.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from gpucnn_kernels.arrays import DeviceArray
from gpucnn_kernels.conv2d_forward_paths import Epilogue, axes, channel_counts, filter_strides, strides
from gpucnn_kernels.conv2d_tiles import ISSUED, plain_rate
from gpucnn_kernels.errors import ArgumentError
from gpucnn_kernels.gpu import Gpu
from gpucnn_kernels.launch import Call
from gpucnn_kernels.problem import Conv2dProblem

SOURCES: dict[str, tuple[dict[str, str], ...]] = {"conv2d_direct": ({},)}

DIRECT_CHANNELS = 8
"""The most input channels a group that the direct kernels are made for."""

MOST_BYTES = 48 << 10
"""Of shared memory a block: what every GPU has without being asked."""

SHARED_BYTES = {"conv2d_direct_wide": MOST_BYTES, "conv2d_direct_narrow": MOST_BYTES}

_QUAD = 4  # neighbouring positions of a row that a thread makes
_WARP = 32
_SHARED_KIB = {(7, 5): 64, (8, 0): 164, (8, 6): 100, (8, 9): 100, (9, 0): 228, (10, 0): 228, (12, 0): 100}

# Instructions of a warp, counted in the code for sm_90 (float32).
_OF_A_TAP = 4  # beside its multiply-adds: reading weights, the next tap
_OF_A_WINDOW = 14  # up to four taps of a row: reading positions, and the loop
_OF_A_PLANE = 55
_OF_A_CHANNEL = 50
_OF_COPIED_LINES = 47  # of up to four numbers for each thread
_OF_COPIED_TAPS = 130
_OF_A_WEIGHT = 13
_OF_WINDOWS = 150
_OF_A_RESULT = 4
_OF_A_BLOCK = 500
_BUSY_WARPS = 5  # [E] of a multiprocessor: a tap's multiply-adds do not wait for each other


@dataclass(frozen=True, slots=True)
class Kernel:
    """How many quads of how many channels a thread of a kernel makes; float64 has half as many quads."""

    name: str
    quads: int
    outputs: int
    most_threads: int
    resident_threads: int  # of a multiprocessor, by registers


KERNELS = (Kernel("conv2d_direct_wide", 2, 8, 256, 512), Kernel("conv2d_direct_narrow", 4, 4, 192, 384))


@dataclass(frozen=True, slots=True)
class Side:
    """One axis of the largest stride phase: ``outputs`` positions, of which each meets ``taps`` of the source.

    From one position to the next the source moves by ``advance``, from one tap to the next by ``step``.
    """

    outputs: int
    taps: int
    advance: int
    step: int
    phases: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The kernel's struct Patch, a block's threads and shared memory, and what they cost."""

    kernel: str
    resident_threads: int  # of a multiprocessor, by registers
    patch: dict[str, int]
    threads: int
    blocks: int
    shared_bytes: int
    instructions: float  # that the warps of a block issue, beside
    beginning: float  # what they issue before anything else: a launch's time has that of the first blocks
    copied: int  # numbers that a block reads from the source and the filter

    def seconds(self, gpu: Gpu) -> float:
        """Of the busiest multiprocessor, which issues four instructions a clock where it has warps enough."""
        busiest, resident = self._busiest(gpu), self._resident(gpu)
        rate = 4 * gpu.clock * ISSUED * min(1.0, self.warps(gpu) / _BUSY_WARPS)
        return (busiest * self.instructions + (busiest - resident) * self.beginning) / rate

    def warps(self, gpu: Gpu) -> int:
        """That are at work at a time on the busiest multiprocessor."""
        return self._resident(gpu) * self.threads // _WARP

    def hides_latencies(self, gpu: Gpu) -> bool:
        """Whether these are enough for its schedulers to find one that can go on."""
        return self.warps(gpu) >= _BUSY_WARPS

    def _busiest(self, gpu: Gpu) -> int:
        return max(1, -(-self.blocks // gpu.multiprocessors))

    def _resident(self, gpu: Gpu) -> int:
        shared = max((size for size in _SHARED_KIB if size <= gpu.capability), default=(7, 5))
        fitting = (_SHARED_KIB[shared] << 10) // (self.shared_bytes + 1024)
        return max(1, min(self._busiest(gpu), self.resident_threads // self.threads, fitting))


def sides(problem: Conv2dProblem, transposed: bool) -> tuple[Side, Side]:
    """The vertical and the horizontal one."""
    made = []
    for axis in (0, 1):
        kernel, size = (problem.R, problem.S)[axis], (problem.H, problem.W)[axis]
        stride, dilation = problem.stride[axis], problem.dilation[axis]
        if transposed:
            common = math.gcd(stride, dilation)
            taps = -(-kernel // (stride // common))
            made.append(Side(-(-size // stride), taps, 1, dilation // common, min(stride, size)))
        else:
            made.append(Side((problem.P, problem.Q)[axis], kernel, stride, dilation, 1))
    return made[0], made[1]


# ---------------------------------------------------------------- plans


@functools.lru_cache(maxsize=4096)
def plan(
    problem: Conv2dProblem,
    transposed: bool,
    dtype: str,
    gpu: Gpu,
    kernels: tuple[Kernel, ...] = KERNELS,
    most_bytes: int = MOST_BYTES,
) -> Plan:
    """The plan that takes the least time; of equals the first."""
    item = 8 if dtype == "float64" else 4
    outputs, summed = problem.K // problem.groups, problem.C // problem.groups
    if transposed:
        outputs, summed = summed, outputs
    down, across = sides(problem, transposed)
    given = outputs, summed, down, across, item, multiply_add_clocks(gpu, dtype), most_bytes
    plans = [
        made_of(kernel, problem, tile, *given)
        for kernel in kernels
        for tile in _tiles(kernel, max(1, problem.N), outputs, down, across, item)
    ]
    fitting = [made for made in plans if made is not None]
    # A quad alone fits in any memory.
    fitting = fitting or [
        made for kernel in kernels if (made := made_of(kernel, problem, (32, 1, 1, 1, 1), *given))
    ]
    return min(fitting, key=lambda made: made.seconds(gpu))


def multiply_add_clocks(gpu: Gpu, dtype: str) -> float:
    """Of a scheduler, for a warp: two of float64 on an H200, 64 elsewhere."""
    return 4 / (plain_rate(gpu, dtype) / (64 * gpu.multiprocessors * gpu.clock))


def _tiles(
    kernel: Kernel, images: int, outputs: int, down: Side, across: Side, item: int
) -> Iterator[tuple[int, int, int, int, int]]:
    """(threads of a team, teams, images, rows, quads): what blocks may make."""
    quads_of_thread = kernel.quads * 4 // item
    whole = -(-across.outputs // _QUAD)
    for teams in (1, 2, 4, 8):
        if teams > 1 and (teams - 1) * kernel.outputs >= outputs:
            break
        for threads in (32, 64, 128, 192, 256):
            if threads * teams > kernel.most_threads:
                continue
            room = threads * quads_of_thread
            for parts in range(-(-whole // room), -(-whole // room) + 6):
                quads = -(-whole // parts)
                rows = min(down.outputs, room // quads)
                rows = -(-down.outputs // -(-down.outputs // rows))
                together = min(images, room // (quads * rows)) if rows == down.outputs else 1
                together = -(-images // -(-images // together))
                yield threads, teams, together, rows, quads
                if quads == 1:
                    break


def made_of(
    kernel: Kernel,
    problem: Conv2dProblem,
    tile: tuple[int, int, int, int, int],
    outputs: int,
    summed: int,
    down: Side,
    across: Side,
    item: int,
    clocks: float,
    most_bytes: int,
) -> Plan | None:
    """The plan of a ``tile`` of (threads of a team, teams, images, rows, quads), or None where it does not fit.

    ``outputs`` and ``summed`` are a group's channels, ``item`` an accumulated number's bytes, ``clocks`` a
    multiply-add's of a scheduler.
    """
    threads, teams, images, rows, quads = tile
    warps, width = threads * teams // _WARP, teams * kernel.outputs
    writing = warps * _WARP * _QUAD
    slices = _slices(most_bytes // item, images, rows, quads, summed, down, across, width, 8 // item)
    if slices is None or writing * item > most_bytes:
        return None
    channels, taps_down, taps_across = slices
    planes, height, pitch = _shape(taps_down, taps_across, rows, quads, down, across)
    blocks_across, blocks_down = -(-across.outputs // (quads * _QUAD)), -(-down.outputs // rows)
    parts = -(-outputs // width)
    blocks = parts * blocks_across * blocks_down * -(-problem.N // images) * problem.groups
    # What one slice takes, times how many there are.
    count = -(-summed // channels) * -(-down.taps // taps_down) * -(-across.taps // taps_across)
    share = down.phases * across.phases
    lines, taps = images * channels * height, channels * taps_down * taps_across
    words = max(writing, lines * planes * pitch + taps * (width + 4 + 8 // item))
    quads_of_thread = kernel.quads * 4 // item
    windows = (
        channels
        * taps_down
        * sum(-(-(taps_across // planes + (plane < taps_across % planes)) // _QUAD) for plane in range(planes))
    )
    multiplying = taps * (clocks * quads_of_thread * kernel.outputs * _QUAD + _OF_A_TAP) + windows * (
        _OF_A_WINDOW + 2 * quads_of_thread
    )
    copying, lanes = min(
        (_copying(lanes, warps, images * channels, height, planes, pitch), lanes) for lanes in (8, 16, 32)
    )
    weights = -(-taps // _WARP) * (warps * _OF_COPIED_TAPS + _OF_A_WEIGHT * width)
    tables = -(-windows // _WARP) * _OF_WINDOWS
    results = _OF_A_RESULT * quads_of_thread * kernel.outputs * _QUAD
    patch = {
        "images": images,
        "rows": rows,
        "quads": quads,
        "threads": threads,
        "channels": channels,
        "taps_down": taps_down,
        "taps_across": taps_across,
        "planes": planes,
        "height": height,
        "pitch": pitch,
        "lanes": lanes,
        "blocks_down": blocks_down,
        "blocks_across": blocks_across,
        "parts": parts,
    }
    return Plan(
        kernel.name,
        kernel.resident_threads,
        patch,
        threads * teams,
        blocks * share,
        words * item,
        count * (warps * multiplying + copying + weights) + tables + warps * results,
        warps * _OF_A_BLOCK,
        count * (lines * planes * pitch + taps * width),
    )


def _copying(lanes: int, warps: int, channels: int, height: int, planes: int, pitch: int) -> float:
    """Instructions of all warps for copying so many images' channels, so many neighbouring threads a line."""
    turns = planes * -(-pitch // (4 * lanes))  # of four numbers a thread
    lines = -(-height * lanes // _WARP)
    return turns * (warps * _OF_A_PLANE + channels * (warps * _OF_A_CHANNEL + lines * _OF_COPIED_LINES))


def _shape(
    taps_down: int, taps_across: int, rows: int, quads: int, down: Side, across: Side
) -> tuple[int, int, int]:
    """(planes of a row, rows, numbers of a plane's row) of what a slice reads of a channel."""
    planes = min(across.advance, taps_across) if across.step == 1 else taps_across
    height = (rows - 1) * down.advance + (taps_down - 1) * down.step + 1
    longest = -(-taps_across // planes)
    return planes, height, _QUAD * (quads + -(-longest // _QUAD))


def _slices(
    words: int, images: int, rows: int, quads: int, summed: int, down: Side, across: Side, width: int, window: int
) -> tuple[int, int, int] | None:
    """(source channels, filter rows, filter columns) at a time: as many as fit, in parts of about equal size.

    ``words`` is the shared memory, and ``window`` what a tap's window takes of it.
    """

    def needed(channels: int, taps_down: int, taps_across: int) -> int:
        planes, height, pitch = _shape(taps_down, taps_across, rows, quads, down, across)
        of_a_tap = width + 4 + window
        return channels * (images * height * planes * pitch + taps_down * taps_across * of_a_tap)

    one = needed(1, down.taps, across.taps)
    if one <= words:
        most = min(summed, words // one)
        return -(-summed // -(-summed // most)), down.taps, across.taps
    for taps_down in _parts_of(down.taps):
        if needed(1, taps_down, across.taps) <= words:
            return 1, taps_down, across.taps
    for taps_across in _parts_of(across.taps):
        if needed(1, 1, taps_across) <= words:
            return 1, 1, taps_across
    return None


def _parts_of(count: int) -> Iterator[int]:
    """``count`` in one part, in two, in three...: how long the longest is, down to 1."""
    before = 0
    for parts in range(1, count + 1):
        if -(-count // parts) != before:
            before = -(-count // parts)
            yield before


# ---------------------------------------------------------------- the paths


def direct(
    call: Call,
    problem: Conv2dProblem,
    source: DeviceArray,
    weight: DeviceArray,
    output: DeviceArray,
    epilogue: Epilogue,
    *,
    transposed: bool = False,
) -> None:
    """Fill ``output``, y from x or (``transposed``) dx from dy, for few input channels a group: one launch."""
    if problem.N and source.shape[3] * source.strides[3] >= 1 << 31:
        raise ArgumentError(
            f"algorithm 'direct' is for images whose rows span less than 2^31 numbers, got {source.shape[3]} "
            f"columns that are {source.strides[3]} apart; choose auto or another algorithm"
        )
    made = plan(problem, transposed, source.dtype, call.gpu)
    vertical, horizontal = axes(problem, transposed)
    call.launch(
        "conv2d_direct",
        made.kernel,
        made.blocks,
        made.threads,
        scalar=source.dtype,
        shared_bytes=made.shared_bytes,
        input=source,
        input_strides=strides(source),
        filter=weight,
        filter_strides=filter_strides(weight, problem, transposed),
        **epilogue.terms,
        output=output,
        output_strides=strides(output),
        channels=channel_counts(problem, transposed),
        vertical=vertical,
        horizontal=horizontal,
        transposed=int(transposed),
        epilogue=epilogue.fields,
        patch=made.patch,
    )
