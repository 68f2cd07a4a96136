"""Pictures as the network wants them: from bytes N, H, W, C to normalized floats N, C, H, W in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

import gpucnn_kernels as kernels
from gpucnn.ops.checks import check_images
from gpucnn.ops.contract import Array
from gpucnn.ops.cuda.arrays import call, check_devices, contiguous, finish, is_image, usable


def images_to_float(
    images: Array,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    flip: Array | None = None,
    crop_offset: Array | None = None,
    crop_size: Sequence[int] | None = None,
    dtype: Any = "float32",
    out: Array | None = None,
) -> Array:
    """uint8 images (N, H, W, C) as normalized floats (N, C, h, w): (pixel / 255 - mean[c]) / std[c]."""
    check_devices(images=images, flip=flip, crop_offset=crop_offset, out=out)
    check_images(images, mean, std, flip, crop_offset)
    n, height, width, channels = images.shape
    h, w = (height, width) if crop_size is None else (int(crop_size[0]), int(crop_size[1]))
    wanted = numpy.dtype(dtype)
    pixels = contiguous(images)
    target = usable(out, (n, channels, h, w), wanted, wanted, pixels, flip, crop_offset, layout=is_image)
    result = call(
        kernels.images_to_float,
        pixels,
        mean=mean,
        std=std,
        flip=None if flip is None else contiguous(flip, "bool"),
        crop_offset=None if crop_offset is None else contiguous(crop_offset, "int64"),
        crop_size=(h, w),
        dtype=wanted.name,
        out=target,
    )
    return finish(result, out, wanted)
