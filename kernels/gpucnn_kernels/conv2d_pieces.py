"""What tensor cores read: channels side by side, in pieces of 16 bytes, and copies of what does not lie so.

For :mod:`gpucnn_kernels.conv2d_tensor` and :mod:`gpucnn_kernels.conv2d_wgmma`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from gpucnn_kernels.arrays import DeviceArray, image_layout
from gpucnn_kernels.launch import Call
from gpucnn_kernels.problem import Conv2dProblem
from gpucnn_kernels.runtime import itemsize

DTYPES = ("float32", "float16", "bfloat16")
"""Those that tensor cores multiply, float32 as tf32."""

SOURCES: dict[str, tuple[dict[str, Any], ...]] = {
    "conv2d_tensor_pack": tuple({"SCALAR": dtype} for dtype in DTYPES),
}

_PACK_TILES = {"narrow": (256, 16), "wide": (64, 64)}  # pixels and channels that a block packs


def chunk_of(dtype: str) -> int:
    """Elements of 16 bytes."""
    return 16 // itemsize(dtype)


def in_pieces(image: DeviceArray | None) -> bool:
    """Whether channels lie side by side from a multiple of 16 bytes on; of no image, yes."""
    return image is None or (image.channels_last and image.address % 16 == 0)


def packed_image(call: Call, image: DeviceArray, groups: int) -> DeviceArray:
    """The image itself where the kernels can read it, or a workspace with each group's channels filled up."""
    n, c, h, w = image.shape
    depth, chunk = c // groups, chunk_of(image.dtype)
    padded = -(-depth // chunk) * chunk
    if padded == depth and in_pieces(image):
        return image
    last = image_layout(image) == "channels_last"
    wide = groups * padded
    workspace = dataclasses.replace(
        call.scratch(n * h * w * wide, image.dtype),
        shape=(n, wide, h, w),
        strides=(h * w * wide, 1, w * wide, wide),
    )
    _pack(
        call,
        image,
        workspace,
        group=depth * (1 if last else h * w),
        image=c * h * w,
        pixel=c if last else 1,
        channel=1 if last else h * w,
        to_group=padded,
        to_image=h * w * wide,
        to_pixel=wide,
        groups=groups,
        images=n,
        pixels=h * w,
        channels=depth,
        padded=padded,
    )
    return workspace


def packed_filter(
    call: Call, problem: Conv2dProblem, weight: DeviceArray, transposed: bool
) -> tuple[DeviceArray, dict[str, int]]:
    """(the filter with the channels that are summed over side by side, FilterStrides): itself where it lies so."""
    groups, taps = problem.groups, problem.R * problem.S
    outputs, depth, chunk = problem.K // groups, problem.C // groups, chunk_of(weight.dtype)
    rows, summed = (depth, outputs) if transposed else (outputs, depth)
    padded = -(-summed // chunk) * chunk
    steps = {
        "output": taps * padded,
        "source": 1,
        "r": problem.S * padded,
        "s": padded,
        "group": rows * taps * padded,
    }
    if not transposed and weight.channels_last and padded == depth and weight.address % 16 == 0:
        return weight, steps
    last = image_layout(weight) == "channels_last"
    k, c, tap = depth * taps, 1 if last else taps, depth if last else 1
    workspace = call.scratch(groups * steps["group"], weight.dtype)
    _pack(
        call,
        weight,
        workspace,
        group=outputs * k,
        image=c if transposed else k,
        pixel=tap,
        channel=k if transposed else c,
        to_group=steps["group"],
        to_image=steps["output"],
        to_pixel=padded,
        groups=groups,
        images=rows,
        pixels=taps,
        channels=summed,
        padded=padded,
    )
    return workspace, steps


def _pack(call: Call, source: DeviceArray, packed: DeviceArray, **pack: int) -> None:
    tile = "narrow" if pack["padded"] <= 16 else "wide"
    pixels, channels = _PACK_TILES[tile]
    tiles = -(-pack["pixels"] // pixels) * pack["images"] * pack["groups"]
    call.launch(
        "conv2d_tensor_pack",
        f"conv2d_pack_{tile}",
        (tiles, -(-pack["padded"] // channels)),
        256,
        scalar=source.dtype,
        given=source,
        packed=packed,
        pack=pack,
    )
