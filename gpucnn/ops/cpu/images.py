"""Pictures as the network wants them: from bytes N, H, W, C to normalized floats N, C, H, W in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import DTypeLike, NDArray

from gpucnn.ops.checks import check_images
from gpucnn.ops.cpu import compiled
from gpucnn.ops.cpu.compiled import images as loops
from gpucnn.ops.cpu.memory import result_array
from gpucnn.ops.cpu.threads import parallel_for

_SMALL = 1 << 17


def images_to_float(
    images: NDArray[Any],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    flip: NDArray[Any] | None = None,
    crop_offset: NDArray[Any] | None = None,
    crop_size: Sequence[int] | None = None,
    dtype: DTypeLike = "float32",
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """uint8 images (N, H, W, C) as normalized floats (N, C, h, w): (pixel / 255 - mean[c]) / std[c].

    ``flip`` (N,) booleans mirrors left to right; ``crop_offset`` (N, 2) integers (row, column; may be negative)
    and ``crop_size`` (h, w) cut a window first, whose places outside the image are 0 *after* normalization (the
    mean colour). Without an offset the window is the top left corner.
    Raises DtypeError, ShapeError or ArgumentError for arrays and sequences that do not fit.
    """
    check_images(images, mean, std, flip, crop_offset)
    n, height, width, channels = images.shape
    h, w = (height, width) if crop_size is None else (int(crop_size[0]), int(crop_size[1]))
    result = result_array(out, (n, channels, h, w), dtype)
    factor = [1 / (255 * float(value)) for value in std]
    shift = [-float(m) / float(s) for m, s in zip(mean, std, strict=True)]
    if compiled.usable(result) and images.flags.c_contiguous:
        mirror = None if flip is None else numpy.ascontiguousarray(flip, numpy.bool_)
        offsets = None if crop_offset is None else numpy.require(crop_offset, numpy.int64, ("C", "A"))
        factors, shifts = numpy.asarray(factor, numpy.float32), numpy.asarray(shift, numpy.float32)
        loops.images_to_float(*images.shape, h, w, images, factors, shifts, mirror, offsets, result)
        return result

    def convert(target: NDArray[Any], source: NDArray[Any]) -> None:
        for channel in range(channels):
            plane = target[:, channel]
            numpy.multiply(source[..., channel], factor[channel], out=plane, dtype=plane.dtype, casting="unsafe")
            plane += plane.dtype.type(shift[channel])

    def convert_one(number: int) -> None:
        top, left = (0, 0) if crop_offset is None else (int(value) for value in crop_offset[number])
        rows = slice(max(top, 0), max(0, min(top + h, height)))
        columns = slice(max(left, 0), max(0, min(left + w, width)))
        window = images[number : number + 1, rows, columns]
        target = result[number : number + 1]
        if window.shape[1:3] != (h, w):
            target[...] = 0
        if not window.size:
            return
        row, column = rows.start - top, columns.start - left
        place = target[..., row : row + window.shape[1], column : column + window.shape[2]]
        convert(place, window)
        if flip is not None and flip[number]:
            target[...] = target[..., ::-1].copy()

    if flip is None and crop_offset is None and (h, w) == (height, width):
        step = max(1, _SMALL // max(1, images[:1].size))
        count = -(-n // step)
        parallel_for(
            count,
            lambda i: convert(result[i * step : (i + 1) * step], images[i * step : (i + 1) * step]),
            small=images.size < _SMALL,
        )
    else:
        parallel_for(n, convert_one, small=images.size < _SMALL)
    return result
