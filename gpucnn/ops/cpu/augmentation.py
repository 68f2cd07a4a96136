"""Random changes to pictures and their normalization: from bytes N, H, W, C to floats N, C, h, w.

A few images at a time, so that they stay in the cache from one change to the next. By the thread that calls: a
loader has threads of its own. Rounded as the CUDA kernel rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy
from numpy.typing import DTypeLike, NDArray

from gpucnn.ops.cpu.memory import result_array
from gpucnn.ops.cpu.resampling import Taps, resize, rotate, window
from gpucnn.ops.cpu.threads import scratch
from gpucnn.ops.image_checks import Tables, augmented_size, check_augmentation

_GREY = numpy.array([0.299, 0.587, 0.114], numpy.float32)  # luma of ITU-R BT.601
_VALUES_AT_A_TIME = 1 << 18  # a part of the batch that stays in the second-level cache from step to step


def augment_images(
    images: NDArray[Any],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    index: NDArray[Any] | None = None,
    flip: NDArray[Any] | None = None,
    rows: Tables | None = None,
    columns: Tables | None = None,
    rotation: NDArray[Any] | None = None,
    shift: NDArray[Any] | None = None,
    colour: NDArray[Any] | None = None,
    cutout: NDArray[Any] | None = None,
    cutout_size: int = 0,
    dtype: DTypeLike = "float32",
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """uint8 images (N, H, W, C) resampled, mirrored, turned, moved, recoloured, normalized, cut out: (N, C, h, w).

    See :meth:`gpucnn.ops.contract.Operations.augment_images`.
    Raises DtypeError, ShapeError or ArgumentError for arrays and sequences that do not fit.
    """
    check_augmentation(
        images,
        mean=mean,
        std=std,
        index=index,
        flip=flip,
        rows=rows,
        columns=columns,
        rotation=rotation,
        shift=shift,
        colour=colour,
        cutout=cutout,
        cutout_size=cutout_size,
    )
    h, w = augmented_size(images, rows, columns)
    count = len(images if index is None else index)
    result = result_array(out, (count, images.shape[3], h, w), dtype)
    factor, offset = _factor_and_offset(tuple(mean), tuple(std))
    if not result.size:
        return result
    step = max(1, _VALUES_AT_A_TIME // result[0].size)
    for start in range(0, count, step):
        part = slice(start, start + step)
        pixels = images[part] if index is None else images[index[part]]
        target = result[part]
        # Whatever the dtype, the numbers are those of float32.
        values = target if result.dtype == numpy.float32 else scratch("augment", target.shape, numpy.float32)
        planar, flipped = _resampled(pixels, _of(rows, part), _of(columns, part), flip, part, (h, w))
        if flip is not None and not flipped and flip[part].any():
            planar = _mirrored(planar, flip[part])
        if rotation is not None:
            planar = rotate(planar, rotation[part].astype(numpy.float32, copy=False))
        if shift is not None:
            planar = _shifted(planar, shift[part])
        if colour is None:
            _normalize(planar, factor, offset, values)
        else:
            _recolour_and_normalize(planar, colour[part], factor, offset, values)
        if cutout is not None:
            _cut_out(values, cutout[part], cutout_size)
        if values is not target:
            with numpy.errstate(over="ignore"):  # what float16 cannot hold is infinite in it
                target[...] = values
    return result


@lru_cache(maxsize=64)
def _factor_and_offset(
    mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[NDArray[numpy.float32], NDArray[numpy.float32]]:
    """Of each channel: value * factor + offset is (value / 255 - mean) / std."""
    deviation = numpy.array(std, numpy.float64)
    factor, offset = 1 / (255 * deviation), -numpy.array(mean, numpy.float64) / deviation
    return factor.astype(numpy.float32), offset.astype(numpy.float32)


def _of(tables: Tables | None, part: slice) -> Tables | None:
    """The tables of a part of the images; one for all is that of each part."""
    if tables is None or len(tables[0]) == 1:
        return tables
    return tables[0][part], tables[1][part]


def _resampled(
    images: NDArray[numpy.uint8],
    rows: Tables | None,
    columns: Tables | None,
    flip: NDArray[Any] | None,
    part: slice,
    size: tuple[int, int],
) -> tuple[NDArray[Any], bool]:
    """The images as planes, resampled, and whether they have been mirrored on the way, which costs nothing."""
    planar = images.transpose(0, 3, 1, 2)
    if rows is None and columns is None:
        return planar, False
    resampled = scratch("augment resampled", (*planar.shape[:2], *size), numpy.float32)
    several = max(len(tables[0]) for tables in (rows, columns) if tables is not None) > 1
    if not several:
        _resample(planar, _table(rows, 0), _table(columns, 0), resampled)
        return resampled, False
    mirror = None if flip is None or columns is None else flip[part].tolist()
    for number, (image, target) in enumerate(zip(planar, resampled, strict=True)):
        across = _table(columns, number)
        if mirror is not None and mirror[number] and across is not None:
            across = across[0][::-1], across[1][:, ::-1]
        _resample(image, _table(rows, number), across, target)
    return resampled, mirror is not None


def _table(tables: Tables | None, number: int) -> Taps | None:
    if tables is None:
        return None
    number = 0 if len(tables[0]) == 1 else number
    return tables[0][number], tables[1][number]


def _resample(planar: NDArray[Any], rows: Taps | None, columns: Taps | None, out: NDArray[numpy.float32]) -> None:
    down, rows = window(rows, planar.shape[-2])
    across, columns = window(columns, planar.shape[-1])
    box = planar[..., down, across]
    if rows is None and columns is None:
        out[...] = box
    else:
        resize(box, rows, columns, out)


def _mirrored(planar: NDArray[Any], flip: NDArray[Any]) -> NDArray[Any]:
    """The images, those where ``flip`` is true mirrored left to right."""
    result = scratch("augment mirrored", planar.shape, planar.dtype)
    for image, target, backwards in zip(planar, result, flip.tolist(), strict=True):
        target[:] = image[:, :, ::-1] if backwards else image
    return result


def _shifted(planar: NDArray[Any], shift: NDArray[Any]) -> NDArray[Any]:
    """Each image moved down and right by its ``shift`` over zeros."""
    height, width = planar.shape[2:]
    moved = scratch("augment moved", planar.shape, planar.dtype)
    moved[:] = 0
    for image, target, (y, x) in zip(planar, moved, shift.tolist(), strict=True):
        if abs(y) >= height or abs(x) >= width:
            continue
        part = image[:, max(0, -y) : height - max(0, y), max(0, -x) : width - max(0, x)]
        target[:, max(0, y) : height - max(0, -y), max(0, x) : width - max(0, -x)] = part
    return moved


def _normalize(
    planar: NDArray[Any],
    factor: NDArray[numpy.float32],
    offset: NDArray[numpy.float32],
    out: NDArray[numpy.float32],
) -> None:
    out[...] = planar  # by itself: a product of bytes and floats converts them in small pieces
    out *= factor[:, None, None]
    out += offset[:, None, None]


def _recolour_and_normalize(
    planar: NDArray[Any],
    colour: NDArray[Any],
    factor: NDArray[numpy.float32],
    offset: NDArray[numpy.float32],
    out: NDArray[numpy.float32],
) -> None:
    """Brightness, contrast, saturation and normalization as one linear map an image."""
    has_colour = planar.shape[1] == 3
    size = planar.shape[2:]
    for image, target, (brightness, contrast, saturation) in zip(planar, out, colour.tolist(), strict=True):
        grey, term = scratch("augment grey", size, numpy.float32), scratch("augment term", size, numpy.float32)
        if has_colour:
            numpy.multiply(image[0], _GREY[0], out=grey)
            for channel in (1, 2):
                grey += numpy.multiply(image[channel], _GREY[channel], out=term)
        else:
            grey[:], saturation = image[0], 1.0
        # Each image's mean by itself: a sum over a batch would depend on who else is in it.
        middle = float(grey.mean(dtype=numpy.float64))
        added = offset + factor * numpy.float32(brightness * (1 - contrast) * middle)
        own = factor * numpy.float32(brightness * contrast * saturation)
        numpy.multiply(image, own[:, None, None], out=target)
        target += added[:, None, None]
        if saturation != 1.0:
            grey *= numpy.float32(brightness * contrast * (1 - saturation))
            for channel, plane in enumerate(target):
                plane += numpy.multiply(grey, factor[channel], out=term)


def _cut_out(out: NDArray[numpy.float32], corners: NDArray[Any], side: int) -> None:
    """Set a square of each normalized image to 0, which is the mean colour."""
    for image, (top, left) in zip(out, corners.tolist(), strict=True):
        image[:, max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = 0
