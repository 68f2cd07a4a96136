"""Sums of channels over images and pixels, or of columns over rows: the gradients of biases."""

from __future__ import annotations

from typing import Any

from gpucnn_kernels.arrays import DeviceArray
from gpucnn_kernels.launch import Call
from gpucnn_kernels.source import SCALARS

SOURCE = "channel_sums"
SOURCES: dict[str, tuple[dict[str, str], ...]] = {SOURCE: ({},)}

_THREADS = 256
_BLOCKS = 1024  # that a large sum is spread over: several for each multiprocessor of any GPU
_LEAST = 16  # positions a thread: shorter sums are not worth a second launch
_MOST_PARTS = 1024

Axis = tuple[int, int]
"""(length, stride in elements)."""


def launch_channel_sums(
    call: Call, values: DeviceArray, sums: DeviceArray, *, images: Axis, pixels: Axis, channels: Axis
) -> None:
    """Sum ``values`` over images and pixels into ``sums`` (channels,), of their dtype or the accumulating one.

    16-bit values are added up in float32 and rounded once. Nothing to sum gives zeros. The order of the additions
    depends on the shape and the layout alone.
    """
    if images[0] * pixels[0] == 0:
        images, pixels = (0, 0), (1, 0)
    # Where images follow one another as pixels do, they are one image: a single one, or channels-last ones.
    elif images[0] == 1 or images[1] == pixels[0] * pixels[1]:
        images, pixels = (1, 0), (images[0] * pixels[0], pixels[1])
    positions = images[0] * pixels[0]
    width = _width(channels)
    blocks = -(-channels[0] // width)
    parts = max(1, min(_BLOCKS // blocks, -(-positions // (_LEAST * _THREADS // width)), _MOST_PARTS))
    part = max(1, -(-positions // parts))
    parts = max(1, -(-positions // part))
    scalar, (_, wide) = values.dtype, SCALARS[values.dtype]
    partial = None if parts == 1 else call.scratch(parts * channels[0], wide)
    # The kernel's ``partial`` has the accumulating dtype: sums of that dtype are stored as the only part's.
    result: dict[str, Any] = (
        {"partial": None, "sums": sums} if sums.dtype == scalar else {"partial": sums, "sums": None}
    )
    call.launch(
        SOURCE,
        "channel_sums",
        (blocks, parts),
        (width, _THREADS // width),
        scalar=scalar,
        values=values,
        wide=None,
        **({"partial": partial, "sums": None} if partial is not None else result),
        shape=_shape(images, pixels, channels, part),
    )
    if partial is not None:
        channels = (channels[0], 1)
        width = _width(channels)
        call.launch(
            SOURCE,
            "channel_sums",
            -(-channels[0] // width),
            (width, _THREADS // width),
            scalar=scalar,
            values=None,
            wide=partial,
            **result,
            shape=_shape((1, 0), (parts, channels[0]), channels, parts),
        )


def _width(channels: Axis) -> int:
    """How many channels a block takes: more than one where they are neighbours in memory."""
    return min(32, 1 << (channels[0] - 1).bit_length()) if channels[1] == 1 else 1


def _shape(images: Axis, pixels: Axis, channels: Axis, part: int) -> dict[str, int]:
    return {
        "images": images[0],
        "pixels": pixels[0],
        "channels": channels[0],
        "n": images[1],
        "pixel": pixels[1],
        "c": channels[1],
        "part": part,
    }
