"""Random changes to pictures, fused with their normalization: from bytes to floats in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

import gpucnn_kernels as kernels
from gpucnn.ops.contract import Array
from gpucnn.ops.cuda.arrays import call, check_devices, contiguous, finish, is_image, usable
from gpucnn.ops.image_checks import Tables, augmented_size, check_augmentation


def augment_images(
    images: Array,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    index: Array | None = None,
    flip: Array | None = None,
    rows: Tables | None = None,
    columns: Tables | None = None,
    rotation: Array | None = None,
    shift: Array | None = None,
    colour: Array | None = None,
    cutout: Array | None = None,
    cutout_size: int = 0,
    dtype: Any = "float32",
    out: Array | None = None,
) -> Array:
    """uint8 images (N, H, W, C) resampled, mirrored, turned, moved, recoloured, normalized, cut out."""
    check_devices(
        images=images,
        index=index,
        flip=flip,
        rotation=rotation,
        shift=shift,
        colour=colour,
        cutout=cutout,
        out=out,
    )
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
    tables = [array for pair in (rows, columns) if pair is not None for array in pair]
    check_devices(images=images, **{f"table_{number}": array for number, array in enumerate(tables)})
    n, channels = len(images if index is None else index), images.shape[3]
    wanted = numpy.dtype(dtype)
    pixels = images if images.transpose(0, 3, 1, 2).flags.c_contiguous else contiguous(images)
    reads = (pixels, index, flip, rotation, shift, colour, cutout, *tables)
    shape = (n, channels, *augmented_size(images, rows, columns))
    target = usable(out, shape, wanted, wanted, *reads, layout=is_image)
    result = call(
        kernels.augment_images,
        pixels,
        mean=mean,
        std=std,
        index=_as(index, "int64"),
        flip=_as(flip, "bool"),
        rows=None if rows is None else (_as(rows[0], "int32"), _as(rows[1], "float32")),
        columns=None if columns is None else (_as(columns[0], "int32"), _as(columns[1], "float32")),
        rotation=_as(rotation, "float32"),
        shift=_as(shift, "int32"),
        colour=_as(colour, "float64"),
        cutout=_as(cutout, "int32"),
        cutout_size=cutout_size,
        dtype=wanted.name,
        out=target,
    )
    return finish(result, out, wanted)


def _as(array: Array | None, dtype: str) -> Array | None:
    return None if array is None else contiguous(array, dtype)
