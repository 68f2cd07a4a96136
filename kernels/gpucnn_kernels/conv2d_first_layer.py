"""The first convolution of a network on tensor cores: forward, at most four input channels, one group.

cuda/conv2d_first_layer.cu says how. :mod:`gpucnn_kernels.conv2d_tensor` takes it for what it :func:`takes`. Here
is planned which positions a block makes at a time, and of how many channels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gpucnn_kernels.arrays import DeviceArray
from gpucnn_kernels.conv2d_forward_paths import Epilogue, axes, channel_counts, filter_strides, strides
from gpucnn_kernels.conv2d_tiles import products, tensor_rate
from gpucnn_kernels.gpu import Gpu
from gpucnn_kernels.launch import Call
from gpucnn_kernels.problem import Conv2dProblem
from gpucnn_kernels.runtime import itemsize

FIRST_LAYER_CHANNELS = 4
"""The most input channels that the kernels are made for: what a pixel has in shared memory."""

MOST_BYTES = 96 << 10
"""Of dynamic shared memory a block: with the static, what GPUs from compute capability 8.0 on have."""

SOURCES: dict[str, tuple[dict[str, Any], ...]] = {
    "conv2d_first_layer": tuple(
        {"SCALAR": dtype, "PRODUCTS": "1", "CAPABILITY": (8, 0)} for dtype in ("float32", "float16", "bfloat16")
    )
}
SHARED_BYTES = {f"conv2d_first_layer_{name}": MOST_BYTES for name in ("wide", "medium", "narrow")}

_THREADS, _RUNS, _RUN = 128, 16, 16  # of a block: threads, runs of positions, and a run's positions
_STEP = 32  # bytes of the sum that a product takes
_TOGETHER = 8  # pixels of a thread that are on their way at a time
_OUTPUT_PART, _OUTPUT_PADDING = 64, 8  # positions whose sums are in shared memory at a time, numbers between them
_MORE_BYTES = 3072  # of shared memory a block: its positions' places, and what the system takes
_SHARED_KIB = {(8, 0): 164, (8, 6): 100, (8, 9): 100, (9, 0): 228, (12, 0): 100}

# Instructions of a warp, counted in the code for sm_90.
_OF_A_STEP = 57  # beside its products: both factors, masks, the loop
_OF_A_PIXEL = 39  # that is brought to shared memory, of each thread, eight together
_OF_A_SUM = 9  # of each thread, on its way out
_OF_A_TILE = 300
_OF_A_WEIGHT = 39
PRODUCT_SHARE = 0.63  # of the datasheet's rate, what mma.sync is known to reach
OVERLAP = 0.8  # [E] of the busier of tensor cores and schedulers, with few warps


@dataclass(frozen=True, slots=True)
class Kernel:
    """How many channels a block of a kernel makes, and how many blocks a multiprocessor's registers hold."""

    name: str
    outputs: int
    resident: int


KERNELS = (
    Kernel("conv2d_first_layer_wide", 64, 2),
    Kernel("conv2d_first_layer_medium", 32, 3),
    Kernel("conv2d_first_layer_narrow", 16, 4),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """The kernel's struct Patch, a block's shared memory, the grid, and what it takes."""

    kernel: Kernel
    patch: dict[str, int]
    shared_bytes: int
    tiles: int
    channel_tiles: int
    resident: int  # blocks of a multiprocessor
    products: float  # of 16 x 8 sums, of a warp for a tile
    instructions: float  # of a warp for a tile
    beginning: float  # the same for the filter, once a block

    def blocks(self, gpu: Gpu) -> int:
        """Along x: as many as there are at a time, which go through all tiles."""
        return max(1, min(self.tiles, self.resident * gpu.multiprocessors // self.channel_tiles or 1))

    def seconds(self, gpu: Gpu, dtype: str) -> float:
        """Of the tensor cores or of the schedulers, whichever are busier."""
        clocks = 2 * 16 * 8 * (_STEP // itemsize(dtype)) / self._operations_a_clock(gpu, dtype)
        blocks = self.blocks(gpu)
        turns = -(-self.tiles // blocks)
        warps = -(
            -blocks * self.channel_tiles // gpu.multiprocessors
        )  # of each scheduler: a block has one for each
        busy = max(self.products * clocks, self.instructions) * turns * warps / OVERLAP
        return (busy + self.beginning * warps) / gpu.clock

    def _operations_a_clock(self, gpu: Gpu, dtype: str) -> float:
        """Of one scheduler's tensor core."""
        return PRODUCT_SHARE * tensor_rate(gpu, dtype, "tf32") / (4 * gpu.multiprocessors * gpu.clock)


def takes(problem: Conv2dProblem, dtype: str, precision: str | None) -> bool:
    """Whether the kernels are for this: a row's taps are neighbours, and numbers are not split in two."""
    return (
        problem.groups == 1
        and problem.C <= FIRST_LAYER_CHANNELS
        and (problem.dilation[1] == 1 or problem.S == 1)
        and products(dtype, precision) == 1
        and fits_in_integers(problem)
        and _fitting(problem, itemsize(dtype)) is not None
    )


def fits_in_integers(problem: Conv2dProblem) -> bool:
    """Whether places inside of an image, and positions, are numbers of 32 bits."""
    return max(problem.N * problem.P * problem.Q, problem.C * problem.H * problem.W) < 1 << 31


def resident_blocks(kernel: Kernel, shared_bytes: int, gpu: Gpu | None) -> int:
    """Of a multiprocessor, which has registers and shared memory for them; without a GPU, registers alone."""
    if gpu is None:
        return kernel.resident
    most = max((size for size in _SHARED_KIB if size <= gpu.capability), default=(8, 6))
    return max(1, min(kernel.resident, (_SHARED_KIB[most] << 10) // (shared_bytes + _MORE_BYTES)))


def patch_of(
    problem: Conv2dProblem, rows: int, runs: int, step_pixels: int, *, even: bool = False
) -> dict[str, int]:
    """The kernels' struct Patch; ``even``: of rows of an even number of pixels."""
    steps = -(-problem.S // step_pixels)
    width = (runs * _RUN - 1) * problem.stride[1] + steps * step_pixels
    width += width % 2 if even else 0
    return {
        "rows": rows,
        "runs": runs,
        "height": (rows - 1) * problem.stride[0] + (problem.R - 1) * problem.dilation[0] + 1,
        "width": width,
        "down_by": _THREADS // width,
        "across_by": _THREADS % width,
        "down": -(-problem.P // rows),
        "across": -(-problem.Q // (runs * _RUN)),
        "steps": steps,
    }


@functools.lru_cache(maxsize=1024)
def plan(problem: Conv2dProblem, dtype: str, gpu: Gpu, kernels: tuple[Kernel, ...] = KERNELS) -> Plan:
    """The plan that is reckoned to take the least time."""
    found = [made for made in _plans(problem, itemsize(dtype), gpu, kernels) if made is not None]
    return min(found, key=lambda made: made.seconds(gpu, dtype))


@functools.lru_cache(maxsize=1024)
def _fitting(problem: Conv2dProblem, item: int) -> Plan | None:
    return next((made for made in _plans(problem, item, None, KERNELS[::-1]) if made is not None), None)


def _plans(
    problem: Conv2dProblem, item: int, gpu: Gpu | None, kernels: tuple[Kernel, ...]
) -> Iterator[Plan | None]:
    whole = -(-problem.Q // _RUN)
    for kernel in kernels:
        for runs in range(1, min(whole, _RUNS) + 1):
            yield _made(kernel, problem, min(_RUNS // runs, problem.P), runs, item, gpu)


def _made(kernel: Kernel, problem: Conv2dProblem, rows: int, runs: int, item: int, gpu: Gpu | None) -> Plan | None:
    pixel = FIRST_LAYER_CHANNELS * item
    patch = patch_of(problem, rows, runs, _STEP // pixel)
    steps, area = patch["steps"], patch["height"] * patch["width"]
    sums = 4 * max(_OUTPUT_PART * (kernel.outputs + _OUTPUT_PADDING), kernel.outputs * (_OUTPUT_PART + 4))
    weights = problem.R * steps * kernel.outputs * _STEP
    shared_bytes = weights + max(area * pixel, sums)
    if shared_bytes > MOST_BYTES:
        return None
    products_of_a_warp = problem.R * steps * 4 * kernel.outputs / 8
    pixels = -(-area // (_TOGETHER * _THREADS)) * _TOGETHER
    return Plan(
        kernel,
        patch,
        shared_bytes,
        max(1, problem.N) * patch["down"] * patch["across"],
        -(-problem.K // kernel.outputs),
        resident_blocks(kernel, shared_bytes, gpu),
        products_of_a_warp,
        products_of_a_warp
        + problem.R * steps * _OF_A_STEP
        + pixels * _OF_A_PIXEL
        + _RUNS * _RUN * kernel.outputs / _THREADS * _OF_A_SUM
        + _OF_A_TILE,
        weights / item / _THREADS * _OF_A_WEIGHT,
    )


def convolve(
    call: Call,
    problem: Conv2dProblem,
    x: DeviceArray,
    weight: DeviceArray,
    y: DeviceArray,
    epilogue: Epilogue,
) -> None:
    """Fill y in one launch."""
    made = plan(problem, x.dtype, call.gpu)
    vertical, horizontal = axes(problem, False)
    call.launch(
        "conv2d_first_layer",
        made.kernel.name,
        (made.blocks(call.gpu) if problem.N else 0, made.channel_tiles),
        _THREADS,
        scalar=x.dtype,
        definitions={"PRODUCTS": "1"},
        shared_bytes=made.shared_bytes,
        input=x,
        input_strides=strides(x),
        filter=weight,
        filter_strides=filter_strides(weight, problem, False),
        **epilogue.terms,
        output=y,
        output_strides=strides(y),
        channels=channel_counts(problem, False),
        vertical=vertical,
        horizontal=horizontal,
        epilogue=epilogue.fields,
        vectors=int(in_vectors(y, epilogue.residual)),
        patch=made.patch,
        tiles=made.tiles,
    )


def in_vectors(y: DeviceArray, residual: DeviceArray | None = None) -> bool:
    """Whether an image's neighbours, channels or a row's positions, are in pieces of 16 bytes."""
    steps, (_, channels, _, width) = strides(y), y.shape
    whole = (channels if steps["c"] < steps["w"] else width) % (16 // itemsize(y.dtype)) == 0
    return whole and all(image is None or image.address % 16 == 0 for image in (y, residual))
