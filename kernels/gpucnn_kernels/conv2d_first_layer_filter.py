"""The gradient of a first layer's filter on tensor cores, in 16 bits: at most four input channels, one group.

cuda/conv2d_first_layer_filter.cu says how. :mod:`gpucnn_kernels.conv2d_tensor` takes it for what it :func:`takes`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from gpucnn_kernels.arrays import DeviceArray
from gpucnn_kernels.conv2d_first_layer import (
    FIRST_LAYER_CHANNELS,
    MOST_BYTES,
    OVERLAP,
    PRODUCT_SHARE,
    Kernel,
    fits_in_integers,
    in_vectors,
    patch_of,
    resident_blocks,
)
from gpucnn_kernels.conv2d_forward_paths import axes, strides
from gpucnn_kernels.conv2d_tiles import tensor_rate
from gpucnn_kernels.gpu import Gpu
from gpucnn_kernels.launch import Call
from gpucnn_kernels.problem import Conv2dProblem

DTYPES = ("float16", "bfloat16")

SOURCES: dict[str, tuple[dict[str, Any], ...]] = {
    "conv2d_first_layer_filter": tuple(
        {"SCALAR": dtype, "PRODUCTS": "1", "CAPABILITY": (8, 0)} for dtype in DTYPES
    )
}
SHARED_BYTES = {f"first_layer_filter_{name}": MOST_BYTES for name in ("wide", "narrow")}

_THREADS, _POSITIONS, _RUN = 128, 256, 16
_PIXEL, _STEP_PIXELS = 8, 4  # bytes of a pixel in shared memory, and pixels of a column of the filter
_COLUMNS = 4  # of a warp
_PADDING = 8  # numbers between the rows of dy
_PARTIAL_BYTES = 64 << 20  # of the workspace for the parts' sums

# Instructions of a warp, counted in the code for sm_90.
_OF_A_RUN = 90  # beside its products
_OF_A_PIXEL = 40  # of each thread
_OF_A_PACK = 40  # of dy, of each thread
_OF_A_TILE = 500


KERNELS = (Kernel("first_layer_filter_wide", 64, 2), Kernel("first_layer_filter_narrow", 16, 3))


@dataclass(frozen=True, slots=True)
class Plan:
    """The kernel's struct Patch, how the work is shared out, and what it takes."""

    kernel: Kernel
    patch: dict[str, int]
    shared_bytes: int
    tiles: int
    here: int  # warps of a block with columns of their own; the others share out the runs
    groups: int  # blocks along y: of the filter's columns
    channel_tiles: int
    resident: int
    most_parts: int
    products: float  # of 16 x 8 sums, of a warp for a tile
    instructions: float  # of a warp for a tile

    def blocks(self, gpu: Gpu) -> int:
        """Along x: as many as there are at a time, which go through all tiles."""
        together = self.resident * gpu.multiprocessors // (self.groups * self.channel_tiles)
        return max(1, min(self.tiles, together, self.most_parts * self.here // 4))

    def parts(self, gpu: Gpu) -> int:
        """Sums of the whole filter, each of a share of the positions."""
        return self.blocks(gpu) * 4 // self.here

    def seconds(self, gpu: Gpu, dtype: str) -> float:
        """Of the tensor cores or of the schedulers, whichever are busier."""
        rate = PRODUCT_SHARE * tensor_rate(gpu, dtype, None) / (4 * gpu.multiprocessors * gpu.clock)
        blocks = self.blocks(gpu)
        warps = -(-blocks * self.groups * self.channel_tiles // gpu.multiprocessors)  # of each scheduler
        busy = max(self.products * 2 * 16 * 8 * 16 / rate, self.instructions)
        return busy * -(-self.tiles // blocks) * warps / OVERLAP / gpu.clock


@functools.lru_cache(maxsize=1024)
def takes(problem: Conv2dProblem, dtype: str) -> bool:
    """Whether the kernels are for this: 16 bits, and a row's taps are neighbours."""
    return (
        dtype in DTYPES
        and problem.groups == 1
        and problem.C <= FIRST_LAYER_CHANNELS
        and (problem.dilation[1] == 1 or problem.S == 1)
        and fits_in_integers(problem)
        and any(_made(KERNELS[-1], problem, runs, None) is not None for runs in _runs(problem))
    )


@functools.lru_cache(maxsize=1024)
def plan(problem: Conv2dProblem, dtype: str, gpu: Gpu, kernels: tuple[Kernel, ...] = KERNELS) -> Plan:
    """The plan that is reckoned to take the least time."""
    plans = [_made(kernel, problem, runs, gpu) for kernel in kernels for runs in _runs(problem)]
    return min((made for made in plans if made is not None), key=lambda made: made.seconds(gpu, dtype))


def _runs(problem: Conv2dProblem) -> range:
    return range(1, min(-(-problem.Q // _RUN), _POSITIONS // _RUN) + 1)


def _made(kernel: Kernel, problem: Conv2dProblem, runs: int, gpu: Gpu | None) -> Plan | None:
    rows = max(1, min(_POSITIONS // _RUN // runs, problem.P))
    patch = patch_of(problem, rows, runs, _STEP_PIXELS, even=True)
    area = patch["height"] * patch["width"]
    if problem.stride[1] % 2:
        area = 2 * area + 15  # the patch a second time, a pixel further on
    slopes = max(kernel.outputs * (_POSITIONS + _PADDING), _POSITIONS * (kernel.outputs + _PADDING))
    shared_bytes = 2 * slopes + area * _PIXEL
    if shared_bytes > MOST_BYTES:
        return None
    resident = resident_blocks(kernel, shared_bytes, gpu)
    columns = problem.R * patch["steps"]
    warps = -(-columns // _COLUMNS)
    here = 4 if warps > 2 else warps
    runs_of_a_warp = rows * runs * here / 4
    products = runs_of_a_warp * kernel.outputs / 16 * 2 * _COLUMNS
    return Plan(
        kernel,
        patch,
        shared_bytes,
        max(1, problem.N) * patch["down"] * patch["across"],
        here,
        -(-warps // here),
        -(-problem.K // kernel.outputs),
        resident,
        max(4, _PARTIAL_BYTES // (4 * problem.K * problem.R * problem.S * problem.C)),
        products,
        products
        + runs_of_a_warp * _OF_A_RUN
        + -(-area // _THREADS) * _OF_A_PIXEL
        + _POSITIONS * kernel.outputs / 8 / _THREADS * _OF_A_PACK
        + _OF_A_TILE,
    )


def filter_sums(call: Call, problem: Conv2dProblem, dy: DeviceArray, x: DeviceArray) -> tuple[DeviceArray, int]:
    """(a row of the weight's sums, ordered K, R, S, C, for every part of the positions, their number)."""
    made = plan(problem, x.dtype, call.gpu)
    blocks, parts = made.blocks(call.gpu), made.parts(call.gpu)
    vertical, horizontal = axes(problem, False)
    partial = call.scratch(parts * problem.K * problem.R * problem.S * problem.C, "float32")
    call.launch(
        "conv2d_first_layer_filter",
        made.kernel.name,
        (blocks, made.groups, made.channel_tiles),
        _THREADS,
        scalar=x.dtype,
        definitions={"PRODUCTS": "1"},
        shared_bytes=made.shared_bytes,
        x=x,
        x_strides=strides(x),
        dy=dy,
        dy_strides=strides(dy),
        partial=partial,
        filter={**{letter: getattr(problem, letter) for letter in "KRSC"}, "here": made.here},
        vertical=vertical,
        horizontal=horizontal,
        vectors=int(in_vectors(dy)),
        patch=made.patch,
        tiles=made.tiles if problem.N else 0,
    )
    return partial, parts
