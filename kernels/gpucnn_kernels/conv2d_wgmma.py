"""Convolutions by products of warpgroups (wgmma), which compute capability 9.0 has: algorithm "wgmma".

Forward and input gradient of float16 and bfloat16 arrays, summed in float32, on H100 and H200. It is
:mod:`gpucnn_kernels.conv2d_tensor`'s product with another instruction at its heart, which reads its factors from
shared memory by itself and reaches the rate of the datasheet; layouts and copies are the same. "auto" does not
take it until it was measured on a GPU, nor does the autotuner.
"""

from __future__ import annotations

from typing import Any

from gpucnn_kernels.arrays import DeviceArray
from gpucnn_kernels.conv2d_forward_paths import (
    Epilogue,
    channel_counts,
    product_arguments,
    stride_phases,
    strides,
    terms,
)
from gpucnn_kernels.conv2d_pieces import chunk_of, in_pieces, packed_filter, packed_image
from gpucnn_kernels.conv2d_tiles import WGMMA_TILES, wgmma_tile
from gpucnn_kernels.errors import DeviceError, DtypeError
from gpucnn_kernels.launch import Call
from gpucnn_kernels.problem import Conv2dProblem

DTYPES = ("float16", "bfloat16")
CAPABILITY = (9, 0)
"""The one compute capability that has the instruction."""

SOURCES: dict[str, tuple[dict[str, Any], ...]] = {
    "conv2d_wgmma": tuple(
        {"SCALAR": dtype, "CAPABILITY": CAPABILITY, "ARCHITECTURE": "sm_90a"} for dtype in DTYPES
    )
}

_THREADS = 256
_LINE = 128  # bytes that a stage holds of each row
_STAGES = 4
_MOST_UNITS = 65535  # blocks along z

SHARED_BYTES = {tile.name: _STAGES * (tile.positions + tile.channels) * _LINE for tile in WGMMA_TILES}
"""Dynamic shared memory of a block, in bytes."""


def check(call: Call, dtype: str) -> None:
    """Raise unless the call's device has the instruction, and for arrays of ``dtype``."""
    if dtype not in DTYPES:
        raise DtypeError(f"algorithm 'wgmma' takes arrays of {', '.join(DTYPES)}, got {dtype}; choose auto")
    if call.capability != CAPABILITY:
        has, needs = (".".join(map(str, capability)) for capability in (call.capability, CAPABILITY))
        raise DeviceError(
            f"algorithm 'wgmma' needs a GPU of compute capability {needs}, such as an H100 or H200, this one's is "
            f"{has}; choose auto or tensor"
        )


def convolve(
    call: Call,
    problem: Conv2dProblem,
    source: DeviceArray,
    weight: DeviceArray,
    output: DeviceArray,
    epilogue: Epilogue,
    *,
    transposed: bool = False,
) -> None:
    """Fill ``output``, y from x or (``transposed``) dx from dy."""
    check(call, source.dtype)
    channels = channel_counts(problem, transposed)
    phases, positions = stride_phases(problem, transposed)
    units = phases * problem.groups
    depth = terms(problem, transposed, chunk_of(source.dtype))
    tile = wgmma_tile(call.gpu, source.dtype, channels["output"], positions, units, depth)
    image = packed_image(call, source, problem.groups)
    filters, filter_strides = packed_filter(call, problem, weight, transposed)
    chunk = chunk_of(source.dtype)
    call.launch(
        "conv2d_wgmma",
        tile.name,
        (-(-positions // tile.positions), -(-channels["output"] // tile.channels), min(units, _MOST_UNITS)),
        _THREADS,
        scalar=source.dtype,
        definitions={"ARCHITECTURE": "sm_90a"},
        shared_bytes=SHARED_BYTES[tile.name],
        input=image,
        input_strides=strides(image),
        filter=filters,
        filter_strides=filter_strides,
        **product_arguments(problem, output, epilogue, transposed, chunk),
        vectors=int(channels["output"] % chunk == 0 and in_pieces(output) and in_pieces(epilogue.residual)),
        units=units,
    )
