"""Pictures as a network wants them, from bytes (N, H, W, C) to normalized floats (N, C, h, w), in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpucnn_kernels.arrays import image_layout
from gpucnn_kernels.errors import ArgumentError, DtypeError
from gpucnn_kernels.launch import Call
from gpucnn_kernels.layout import image_output
from gpucnn_kernels.overlap import require_apart
from gpucnn_kernels.problem import pair
from gpucnn_kernels.source import SCALARS

SOURCE = "images"
SOURCES: dict[str, tuple[dict[str, str], ...]] = {SOURCE: ({},)}

_CHANNELS_A_LAUNCH = 4  # as many as the kernel takes factors and shifts for
PIXEL_BLOCK = (32, 8)
"""A thread for each pixel of a result: neighbours in a row write neighbours in memory."""

_MOST_BLOCKS = 65535  # along the grid's second and third axes; what is beyond is done in turns
_ENOUGH_BLOCKS = 1024  # eight for every multiprocessor of the largest GPUs
_MOST_ROWS = 4  # of a thread, for which it works out once what its picture and its column are


def images_to_float(
    images: Any,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    flip: Any = None,
    crop_offset: Any = None,
    crop_size: Sequence[int] | None = None,
    dtype: Any = "float32",
    channels_last: bool = False,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """uint8 images (N, H, W, C) as normalized floats (N, C, h, w): (pixel / 255 - mean[c]) / std[c].

    ``flip`` (N,) booleans mirrors left to right; ``crop_offset`` (N, 2) int32 or int64 (row, column; may be
    negative) and ``crop_size`` (h, w) cut a window first, whose places outside the image are 0 *after*
    normalization (the mean colour). Without an offset the window is the top left corner. ``dtype`` (float32,
    float16, bfloat16 or float64) is the result's, and it is contiguous, or with ``channels_last`` channels-last;
    ``out`` may have either layout. The arithmetic is that of the dtype, for 16-bit ones float32.
    Raises DtypeError, LayoutError or ArgumentError for arrays and sequences that do not fit.
    """
    with Call(stream, images=images, flip=flip, crop_offset=crop_offset, out=out) as call:
        call.require("images", "uint8")
        shape = call["images"].shape
        if len(shape) != 4:
            raise ArgumentError(f"images must have 4 dimensions (N, H, W, C), got shape {shape}")
        n, height, width, channels = shape
        factors, shifts = normalization_factors(mean, std, channels)
        call.contiguous("images", "flip", "crop_offset")
        call.require("flip", "bool", (n,))
        call.require("crop_offset", shape=(n, 2))
        offset = call.get("crop_offset")
        if offset is not None and offset.dtype not in ("int32", "int64"):
            raise DtypeError(f"crop_offset must be int32 or int64, got {offset.dtype}")
        h, w = (height, width) if crop_size is None else pair(tuple(crop_size), "crop_size", 0)
        name = dtype_name(dtype)
        layout = "channels_last" if channels_last else "contiguous"
        y = image_output(call, call["images"], (n, channels, h, w), name, layout)
        require_apart(y, call["images"], call.get("flip"), offset)
        image_layout(y)
        for first in range(0, channels, _CHANNELS_A_LAUNCH):
            count = min(_CHANNELS_A_LAUNCH, channels - first)
            normalization: dict[str, float] = {"first_channel": first, "count": count}
            for number in range(_CHANNELS_A_LAUNCH):
                given = number < count
                normalization[f"factor_{number}"] = factors[first + number] if given else 0.0
                normalization[f"shift_{number}"] = shifts[first + number] if given else 0.0
            call.launch(
                SOURCE,
                "images_to_float",
                pixel_blocks(n, h, w),
                PIXEL_BLOCK,
                scalar=name,
                images=call["images"],
                flip=call.get("flip"),
                offset_32=offset if offset is not None and offset.dtype == "int32" else None,
                offset_64=offset if offset is not None and offset.dtype == "int64" else None,
                y=y,
                count=n,
                crop={"height": height, "width": width, "channels": channels, "h": h, "w": w},
                normalization=normalization,
                strides=dict(zip("nchw", y.strides, strict=True)),
            )
        return call.give(y)


def pixel_blocks(n: int, h: int, w: int) -> tuple[int, int, int]:
    """The grid of PIXEL_BLOCKs for n pictures of h x w pixels: several rows a thread where blocks are enough."""
    across, down = -(-w // PIXEL_BLOCK[0]), -(-h // PIXEL_BLOCK[1])
    rows = max(1, min(_MOST_ROWS, across * down * n // _ENOUGH_BLOCKS))
    return across, min(-(-down // rows), _MOST_BLOCKS), min(n, _MOST_BLOCKS)


def normalization_factors(
    mean: Sequence[float], std: Sequence[float], channels: int
) -> tuple[list[float], list[float]]:
    """(1 / (255 std), -mean / std) by channel."""
    if len(mean) != channels or len(std) != channels:
        raise ArgumentError(f"images have {channels} channels, but mean has {len(mean)} values and std {len(std)}")
    if not all(value > 0 for value in std):
        raise ArgumentError(f"std must be positive, got {tuple(std)}")
    return (
        [1 / (255 * float(value)) for value in std],
        [-float(m) / float(s) for m, s in zip(mean, std, strict=True)],
    )


def dtype_name(dtype: Any) -> str:
    """The name of a floating dtype: given as that, as NumPy's (or ml_dtypes') type or as PyTorch's."""
    if isinstance(dtype, str):
        name = dtype
    elif type(dtype).__module__.split(".")[0] == "torch":
        name = str(dtype).removeprefix("torch.")
    else:
        import numpy

        try:
            name = numpy.dtype(dtype).name
        except TypeError:
            name = repr(dtype)
    if name not in SCALARS:
        raise DtypeError(f"dtype must be one of {', '.join(SCALARS)}, got {name}")
    return name
