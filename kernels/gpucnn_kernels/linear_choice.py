"""Where a fully connected layer is made in one launch, and where its products are cuBLAS's: a page of arithmetic.

    one launch = max(arithmetic, cache, latency) + LAUNCH_SECONDS
    cuBLAS     = operations / (its rate) + launches * LAUNCH_SECONDS

Arithmetic and cache are those of a grid of tiles, as :mod:`gpucnn_kernels.conv2d_tiles` reckons them; latency is
that of the stages that a tile goes through one after the other. cuBLAS is reckoned with nothing of the kind, and
with the rate that it reaches in large products: what it loses here are launches, for the bias, for the activation
and for each product. Constants marked [E] are estimates until they are measured on a GPU.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from gpucnn_kernels.conv2d_cost import LAUNCH_SECONDS
from gpucnn_kernels.conv2d_tiles import (
    BUSY_WARPS,
    CUBLAS_TENSOR_TILES,
    CUBLAS_TILES,
    Tile,
    cache_bandwidth,
    plain_rate,
)
from gpucnn_kernels.gpu import Gpu
from gpucnn_kernels.runtime import itemsize

# Shares of FFMA by the instructions of a stage: 128 of some 300 are multiply-adds, and 512 of some 800 [E].
TILES = (Tile("small", 16, 16, 8, 2, 0.35), Tile("large", 32, 32, 4, 3, 0.50))
DEPTHS = {"small": 128, "large": 64}
"""Numbers of a sum in a stage of each tile."""

STAGE_SECONDS = 0.35e-6  # [E] of fetching a stage where little else is under way


@dataclass(frozen=True, slots=True)
class Product:
    """A result of ``rows`` x ``columns``, each number a sum of ``depth`` terms."""

    rows: int
    columns: int
    depth: int


def tile_seconds(gpu: Gpu, tile: Tile, dtype: str, products: tuple[Product, ...]) -> float:
    """The time of one launch that makes all ``products`` in these tiles."""
    work = [(tile.blocks(product.rows, product.columns, 1), product.depth) for product in products]
    resident = -(-sum(blocks for blocks, _ in work) // gpu.multiprocessors)
    warps = max(1, min(resident, tile.resident)) * tile.warps
    rate = tile.share * plain_rate(gpu, dtype) / gpu.multiprocessors * min(1.0, warps / BUSY_WARPS)
    area, edges = tile.channels * tile.positions, tile.channels + tile.positions
    terms, deepest = sum(blocks * depth for blocks, depth in work), max(depth for _, depth in work)
    arithmetic = 2 * area * max(terms / gpu.multiprocessors, deepest) / rate
    cache = terms * edges * itemsize(dtype) / cache_bandwidth(gpu)
    latency = math.ceil(deepest / DEPTHS[tile.name]) * STAGE_SECONDS
    return max(arithmetic, cache, latency) + LAUNCH_SECONDS


def cublas_seconds(gpu: Gpu, dtype: str, products: tuple[Product, ...], launches: int) -> float:
    """The time of cuBLAS's products and of what is launched around them, ``launches`` in all."""
    plain = dtype in ("float32", "float64")
    tiles = CUBLAS_TILES if plain else CUBLAS_TENSOR_TILES
    rate = tiles[0].share * gpu.rate(dtype if plain else "16-bit")
    operations = sum(2.0 * product.rows * product.columns * product.depth for product in products)
    return operations / (rate or math.inf) + launches * LAUNCH_SECONDS


@functools.lru_cache(maxsize=1024)
def choose(gpu: Gpu, dtype: str, products: tuple[Product, ...], launches: int) -> str:
    """The tile of one launch for all ``products``, or "cublas" where that is faster in ``launches`` launches."""
    seconds = {tile.name: tile_seconds(gpu, tile, dtype, products) for tile in TILES}
    seconds["cublas"] = cublas_seconds(gpu, dtype, products, launches)
    return min(seconds, key=lambda name: seconds[name])
