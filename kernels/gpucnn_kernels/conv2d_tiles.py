"""What a block of a convolution kernel makes, and how long a grid of such blocks takes: which tile is taken.

    arithmetic = b * (a block's operations) / (a multiprocessor's rate * share * busy)
    busy       = min(1, resident warps / BUSY_WARPS)
    around     = (a block's instructions before its loop, but for the first ones resident, and behind it)
                 / (a multiprocessor's instructions a second * busy)
    cache      = (what all blocks fetch) / (the second-level cache's bandwidth)

b is how many blocks the busiest of the multiprocessors works off: blocks / multiprocessors, rounded up, which is
where a grid that is a little too large for a last full round shows. A block's operations are those of a whole
tile: edges are multiplied like what is inside.

Constants marked [E] are estimates until they are measured on a GPU; [P] follow from published figures.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from gpucnn_kernels.gpu import Gpu
from gpucnn_kernels.runtime import itemsize

CACHE_BYTES_A_CLOCK = 21.0  # [E] for each multiprocessor: 5.5 TB/s of an H200
ISSUED = 0.9  # [E] of the clocks that a scheduler issues in
BUSY_WARPS = 8  # [E] of a multiprocessor, two for each scheduler: fewer do not hide their own latencies


@dataclass(frozen=True, slots=True)
class Tile:
    """What a block makes and how many of a multiprocessor's warps it is: as in the tables of docs/kernels."""

    name: str
    channels: int
    positions: int
    warps: int
    resident: int  # blocks of a multiprocessor of an H200, by registers and shared memory
    share: float  # of its unit's peak rate that its inner product reaches when nothing else is in the way
    beginning: int = 0  # instructions of a warp before its loop
    result: int = 0  # and of each number that its threads have made behind it

    def blocks(self, channels: int, positions: int, units: int) -> int:
        """How many cover ``channels`` x ``positions`` of each unit (a group of a stride phase)."""
        return -(-channels // self.channels) * -(-positions // self.positions) * units

    def operations_a_byte(self, item: int) -> float:
        """2 * channels * positions on (channels + positions) fetched numbers, for each step of the sum."""
        return 2 * self.channels * self.positions / ((self.channels + self.positions) * item)


# What a warp does before its loop is counted in the code for sm_90: the shortest way there and one turn of each
# loop on it, to the nearest hundred; behind it, what a result takes on the shortest way that stores all. Those of
# cuBLAS and of the tiles for warpgroups are guesses [E].
#
# Of the instructions that a step of the compiled loop takes on sm_90, FFMA are 78 to 85 % in the large tile, 73 to
# 80 % in the medium and 57 to 66 % in the small one, by how the arrays lie. Nine tenths of the least are reckoned
# with, and somewhat less in the smaller tiles, which fetch and read more for each product [E]. In float64 a
# multiply-add takes two clocks, which hides as many others.
IMPLICIT_TILES = (
    Tile("conv2d_implicit_gemm_large", 128, 128, 8, 2, 0.70, 900, 4),
    Tile("conv2d_implicit_gemm_medium", 64, 128, 4, 4, 0.62, 900, 4),
    Tile("conv2d_implicit_gemm_small", 32, 64, 4, 6, 0.50, 900, 4),
)
IMPLICIT_TILES_FLOAT64 = (
    Tile("conv2d_implicit_gemm_large", 64, 128, 8, 1, 0.60, 900, 4),
    Tile("conv2d_implicit_gemm_medium", 64, 64, 4, 3, 0.62, 900, 4),
    Tile("conv2d_implicit_gemm_small", 32, 64, 4, 4, 0.50, 900, 4),
)
# Nine tenths [E] of the share of multiply-adds in the compiled loops for sm_90, which load and look up as well.
FILTER_TILES = (
    Tile("filter_gradient_large", 128, 128, 8, 2, 0.63, 900, 6),  # 512 of 732 instructions
    Tile("filter_gradient_wide", 64, 128, 4, 3, 0.63, 900, 6),  # 1024 of 1450
    Tile("filter_gradient_narrow", 32, 64, 2, 8, 0.54, 900, 6),  # 512 of 850
)
FILTER_TILES_FLOAT64 = (
    Tile("filter_gradient_large", 64, 64, 8, 2, 0.50, 900, 6),  # 16 for 8 numbers from shared memory
    Tile("filter_gradient_wide", 32, 64, 4, 3, 0.50, 900, 6),
    Tile("filter_gradient_narrow", 32, 32, 2, 8, 0.45, 900, 6),
)
# cuBLAS's: the shares are 47 to 52 of 67 TFLOP/s and 720 to 798 of 1070 [P], the tiles a guess [E].
CUBLAS_TILES = tuple(Tile("cuBLAS", high, wide, 8, 2, 0.75, 500, 4) for high, wide in ((128, 64), (64, 128)))
CUBLAS_TENSOR_TILES = tuple(
    Tile("cuBLAS", high, wide, 8, 2, 0.70, 500, 4) for high, wide in ((128, 64), (64, 128))
)
# Shares of the tensor cores: the least of three. mma.sync tops out at 63 % of the datasheet's rate, which is for
# 1.83 of an H200's 1.98 GHz [P]. A product of 16 x 8 by two chunks takes 4 clocks at the peak, and as many as it
# has instructions, counted in the main loop compiled for sm_90: 2.1 to 5.1, less than the 6.9 at 63 %, but for the
# small tile's 9 (8 of three products). And fragments come from shared memory at 128 bytes a clock, which it is
# filled by, too: that is 22 % of the peak in the small tile, and 49, 44 and 33 % in the filter's broad, medium and
# small.
TENSOR_TILES = (
    Tile("conv2d_tensor_wide", 128, 256, 8, 1, 0.58, 1000, 4),
    Tile("conv2d_tensor_large", 128, 128, 4, 2, 0.58, 1000, 4),
    Tile("conv2d_tensor_medium", 64, 256, 4, 2, 0.58, 1000, 4),
    Tile("conv2d_tensor_small", 32, 64, 4, 5, 0.22, 1000, 4),
)
# CUTLASS's matrix products with this instruction are published to reach 0.7 to 0.8 of the datasheet's rate [P];
# narrower tiles read more of shared memory, and fetch more, for a product [E].
WGMMA_TILES = (
    Tile("conv2d_wgmma_wide", 256, 128, 8, 1, 0.75, 1000, 4),
    Tile("conv2d_wgmma_medium", 128, 128, 8, 1, 0.70, 1000, 4),
    Tile("conv2d_wgmma_narrow", 64, 128, 8, 2, 0.55, 1000, 4),
)
THREE_PRODUCT_TILES = (
    Tile("conv2d_tensor_wide", 64, 256, 8, 1, 0.58, 1000, 4),
    Tile("conv2d_tensor_large", 64, 128, 4, 2, 0.58, 1000, 4),
    Tile("conv2d_tensor_medium", 32, 256, 4, 2, 0.58, 1000, 4),
    Tile("conv2d_tensor_small", 32, 64, 4, 4, 0.49, 1000, 4),
)
TENSOR_FILTER_TILES = (
    Tile("filter_gradient_tensor_large", 128, 128, 4, 2, 0.58, 600, 13),
    Tile("filter_gradient_tensor_broad", 64, 192, 4, 2, 0.49, 700, 13),
    Tile("filter_gradient_tensor_medium", 64, 128, 4, 3, 0.44, 600, 13),
    Tile("filter_gradient_tensor_small", 64, 64, 4, 5, 0.33, 600, 13),
)
THREE_PRODUCT_FILTER_TILES = (
    Tile("filter_gradient_tensor_large", 128, 64, 4, 2, 0.58, 600, 13),
    Tile("filter_gradient_tensor_broad", 64, 96, 4, 2, 0.58, 700, 13),
    Tile("filter_gradient_tensor_medium", 64, 128, 4, 2, 0.58, 600, 13),
    Tile("filter_gradient_tensor_small", 64, 64, 4, 5, 0.58, 600, 13),
)


FILTER_BLOCKS = 512  # that the positions of a filter gradient are split for: a few for each multiprocessor
FILTER_POSITIONS = 256  # of a part at least: below, adding up the parts costs more than the parts save


# ---------------------------------------------------------------- a grid of tiles


_forced: ContextVar[str] = ContextVar("forced_tile", default="")


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """Inside, kernels that have a tile of this name take it; "" is none."""
    before = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(before)


def tiled(
    gpu: Gpu, tile: Tile, channels: int, positions: int, units: int, depth: float, rate: float, item: int
) -> tuple[float, float]:
    """(arithmetic, cache) seconds of ``units`` products of channels x positions, each number ``depth`` terms.

    ``rate`` is the peak of all multiprocessors together, in FLOP/s.
    """
    blocks = tile.blocks(channels, positions, units)
    busiest = max(1, -(-blocks // gpu.multiprocessors))
    warps = min(busiest, tile.resident) * tile.warps
    reached = tile.share * rate / gpu.multiprocessors * min(1.0, warps / BUSY_WARPS)
    operations = 2.0 * tile.channels * tile.positions * depth
    fetched = blocks * (tile.channels + tile.positions) * depth * item
    return busiest * operations / reached, fetched / cache_bandwidth(gpu)


def around(gpu: Gpu, tile: Tile, blocks: int) -> float:
    """Seconds of what ``blocks`` do before and behind their loops; a launch's has the beginnings of the first."""
    busiest = -(-blocks // gpu.multiprocessors)
    resident = min(busiest, tile.resident)
    results = tile.channels * tile.positions / (32 * tile.warps)
    instructions = (busiest - resident) * tile.beginning + busiest * tile.result * results
    busy = min(1.0, resident * tile.warps / BUSY_WARPS)
    return instructions * tile.warps / (4 * gpu.clock * ISSUED * busy) if blocks else 0.0


def cache_bandwidth(gpu: Gpu) -> float:
    """Bytes a second of the second-level cache."""
    return CACHE_BYTES_A_CLOCK * gpu.multiprocessors * gpu.clock


def faster_tile(
    gpu: Gpu,
    tiles: Iterable[Tile],
    channels: int,
    positions: int,
    units: int,
    depth: float,
    rate: float,
    item: int,
) -> Tile:
    """The tile that takes the least time: for few terms a large one, which begins and ends less often."""

    def parts(tile: Tile) -> tuple[float, float]:
        arithmetic, cache = tiled(gpu, tile, channels, positions, units, depth, rate, item)
        return arithmetic + around(gpu, tile, tile.blocks(channels, positions, units)), cache

    return _fastest(tiles, parts)


def _fastest(tiles: Iterable[Tile], parts: Callable[[Tile], tuple[float, float]]) -> Tile:
    """The tile whose longer part is the shortest; then whose other part is; of equals the first.

    Where :func:`forced` names one of them it is that.
    """
    name = _forced.get()
    if name:
        tiles = [tile for tile in tiles if tile.name == name] or list(tiles)
    return min(tiles, key=lambda tile: sorted(parts(tile), reverse=True))


def implicit_tile(gpu: Gpu, dtype: str, channels: int, positions: int, units: int, depth: float) -> Tile:
    """That of the implicit matrix product with FFMA, of sums of ``depth`` terms."""
    tiles = IMPLICIT_TILES_FLOAT64 if dtype == "float64" else IMPLICIT_TILES
    return faster_tile(gpu, tiles, channels, positions, units, depth, plain_rate(gpu, dtype), itemsize(dtype))


def tensor_tile(
    gpu: Gpu, dtype: str, precision: str | None, channels: int, positions: int, units: int, depth: float
) -> Tile:
    """That of the implicit matrix product on tensor cores, of sums of ``depth`` terms."""
    tiles = THREE_PRODUCT_TILES if products(dtype, precision) == 3 else TENSOR_TILES
    rate = tensor_rate(gpu, dtype, precision)
    return faster_tile(gpu, tiles, channels, positions, units, depth, rate, itemsize(dtype))


def wgmma_tile(gpu: Gpu, dtype: str, channels: int, positions: int, units: int, depth: float) -> Tile:
    """That of the implicit matrix product by products of warpgroups, of sums of ``depth`` terms."""
    rate = tensor_rate(gpu, dtype, None)
    return faster_tile(gpu, WGMMA_TILES, channels, positions, units, depth, rate, itemsize(dtype))


def filter_parts(tile: Tile, outputs: int, columns: int, groups: int, positions: int) -> int:
    """How many parts the positions that a filter's gradient sums over are split into, to have blocks enough."""
    blocks = tile.blocks(outputs, columns, groups)
    return max(1, min(-(-FILTER_BLOCKS // blocks), -(-positions // FILTER_POSITIONS)))


@functools.lru_cache(maxsize=4096)
def even_filter_parts(
    gpu: Gpu, tile: Tile, outputs: int, columns: int, groups: int, positions: int, least: int = FILTER_POSITIONS
) -> int:
    """As :func:`filter_parts`, but so many that the blocks come out even on the multiprocessors.

    ``least`` are the positions of a part at least.
    """
    blocks, most = tile.blocks(outputs, columns, groups), -(-positions // least)
    rounds = range(1, 2 * FILTER_BLOCKS // gpu.multiprocessors + 2)
    found = {max(1, min(number * gpu.multiprocessors // blocks, most)) for number in rounds}

    def seconds(parts: int) -> float:
        made = tiled(gpu, tile, outputs, columns, groups * parts, positions / parts, gpu.rate("float32"), 4)
        return max(made) + 8.0 * parts * groups * outputs * columns / gpu.bandwidth

    return min(sorted(found), key=seconds)


def filter_seconds(
    gpu: Gpu,
    tile: Tile,
    outputs: int,
    columns: int,
    groups: int,
    positions: int,
    parts: int,
    rate: float,
    item: int,
) -> tuple[float, float]:
    """(arithmetic, cache) seconds of a filter's gradient, ``outputs`` x ``columns`` sums a group."""
    return tiled(gpu, tile, outputs, columns, groups * parts, positions / parts, rate, item)


def filter_tile(gpu: Gpu, dtype: str, outputs: int, columns: int, groups: int, positions: int) -> Tile:
    """That of the filter's gradient without tensor cores."""
    tiles = FILTER_TILES_FLOAT64 if dtype == "float64" else FILTER_TILES
    sizes, rate, item = (outputs, columns, groups, positions), plain_rate(gpu, dtype), itemsize(dtype)
    return _fastest(
        tiles,
        lambda tile: filter_seconds(gpu, tile, *sizes, even_filter_parts(gpu, tile, *sizes), rate, item),
    )


def tensor_filter_tile(
    gpu: Gpu, dtype: str, precision: str | None, outputs: int, columns: int, groups: int, positions: int
) -> Tile:
    """That of the filter's gradient on tensor cores."""
    tiles = THREE_PRODUCT_FILTER_TILES if products(dtype, precision) == 3 else TENSOR_FILTER_TILES
    rate, sizes = tensor_rate(gpu, dtype, precision), (outputs, columns, groups, positions)
    return _fastest(
        tiles,
        lambda tile: filter_seconds(gpu, tile, *sizes, filter_parts(tile, *sizes), rate, itemsize(dtype)),
    )


def products(dtype: str, precision: str | None) -> int:
    """Tensor-core products for each product of numbers: three of tf32 are as exact as float32."""
    return 3 if dtype == "float32" and precision != "tf32" else 1


def plain_rate(gpu: Gpu, dtype: str) -> float:
    """Peak FLOP/s of products of such arrays without tensor cores."""
    return gpu.rate("float64" if dtype == "float64" else "float32")


def tensor_rate(gpu: Gpu, dtype: str, precision: str | None) -> float:
    """The same with them."""
    return gpu.rate("tf32" if dtype == "float32" else "16-bit") / products(dtype, precision)
