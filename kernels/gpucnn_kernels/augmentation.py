"""Random changes to pictures for training, fused with their normalization: bytes in, floats out, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpucnn_kernels.arrays import DeviceArray
from gpucnn_kernels.errors import ArgumentError, LayoutError
from gpucnn_kernels.images import PIXEL_BLOCK, dtype_name, normalization_factors, pixel_blocks
from gpucnn_kernels.launch import Call
from gpucnn_kernels.layout import image_output
from gpucnn_kernels.overlap import require_apart

SOURCE = "augmentation"
SOURCES: dict[str, tuple[dict[str, str], ...]] = {SOURCE: ({"INTERPOLATED": "0"}, {"INTERPOLATED": "1"})}

_CHANNELS_A_LAUNCH = 4  # as many as the kernel takes factors and shifts for
_MEAN_BLOCK = (32, 16)  # one block works on all of a picture


def augment_images(
    images: Any,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    index: Any = None,
    flip: Any = None,
    rows: tuple[Any, Any] | None = None,
    columns: tuple[Any, Any] | None = None,
    rotation: Any = None,
    shift: Any = None,
    colour: Any = None,
    cutout: Any = None,
    cutout_size: int = 0,
    dtype: Any = "float32",
    channels_last: bool = False,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """uint8 images (N, H, W, C) changed one after the other as asked, and normalized: floats (N, C, h, w).

    1. ``columns`` and ``rows``, each (first, weights), resample: first (M, w) int32 and weights (M, taps, w)
       float32, where pixel x of a row is the sum over k of weights[k, x] times pixel first[x] + k; likewise rows
       (M, h), (M, taps, h), along the height. M is 1, for all images, or N. Where first + k is beyond the last
       pixel, that one is taken, so tables can be filled up with weights of 0. first is 0 or more.
    2. ``flip`` (N,) bool mirrors left to right.
    3. ``rotation`` (N, 2) float32, cosine and sine, turns counter-clockwise about the centre: bilinear, repeating
       the edge. h and w are at least 2.
    4. ``shift`` (N, 2) int32 moves down and right, over zeros.
    5. ``colour`` (N, 3) float64, brightness b, contrast c, saturation s: a value v becomes
       b c s v + b c (1 - s) g + b (1 - c) m, with the pixel's grey g (ITU-R BT.601) and m, the image's mean of it.
       Of images that are not of three channels, g is the first one, and s is 1.
    6. Normalization, (v / 255 - mean[c]) / std[c].
    7. ``cutout`` (N, 2) int32, row and column of the upper left corner of a square of ``cutout_size`` pixels,
       which may reach outside: there the result is 0, the mean colour.

    With ``index`` (N,) int64 the images are (M, H, W, C), and each is made of the one of that number, 0 .. M - 1,
    so that a data set in memory need not be cut into batches first. Numbers out of range are not noticed.

    The images' memory may run N, H, W, C or N, C, H, W. ``dtype`` (float32, float16, bfloat16 or float64) is the
    result's, worked out in float32 and rounded once; it is contiguous, or with ``channels_last`` channels-last.
    One launch for every four channels, and one more for ``colour``.
    Raises DtypeError, LayoutError or ArgumentError for arrays and sequences that do not fit.
    """
    row_first, row_weights = _pair(rows, "rows")
    column_first, column_weights = _pair(columns, "columns")
    with Call(
        stream,
        images=images,
        index=index,
        flip=flip,
        row_first=row_first,
        row_weights=row_weights,
        column_first=column_first,
        column_weights=column_weights,
        rotation=rotation,
        shift=shift,
        colour=colour,
        cutout=cutout,
        out=out,
    ) as call:
        call.require("images", "uint8")
        picture = call["images"]
        if len(picture.shape) != 4:
            raise ArgumentError(f"images must have 4 dimensions (N, H, W, C), got shape {picture.shape}")
        n, height, width, channels = picture.shape
        if (chosen := call.get("index")) is not None:
            if len(chosen.shape) != 1:
                raise ArgumentError(f"index must have 1 dimension (N,), got shape {chosen.shape}")
            call.require("index", "int64")
            n = chosen.shape[0]
        factors, shifts = normalization_factors(mean, std, channels)
        _require_dense_images(picture)
        call.contiguous("index", "flip", "row_first", "row_weights", "column_first", "column_weights")
        call.contiguous("rotation", "shift", "colour", "cutout")
        h, row_taps, row_tables = _tables(call, "row", n, height)
        w, column_taps, column_tables = _tables(call, "column", n, width)
        call.require("flip", "bool", (n,))
        call.require("rotation", "float32", (n, 2))
        if rotation is not None and min(h, w) < 2:
            raise ArgumentError(f"rotation needs images of at least 2x2 pixels, got {h}x{w}")
        call.require("shift", "int32", (n, 2))
        call.require("colour", "float64", (n, 3))
        call.require("cutout", "int32", (n, 2))
        if cutout_size < 0:
            raise ArgumentError(f"cutout_size must be 0 or more, got {cutout_size}")
        name = dtype_name(dtype)
        y = image_output(
            call, picture, (n, channels, h, w), name, "channels_last" if channels_last else "contiguous"
        )
        inputs = (
            "index",
            "flip",
            "row_first",
            "row_weights",
            "column_first",
            "column_weights",
            "rotation",
            "shift",
        )
        require_apart(y, picture, *(call.get(each) for each in (*inputs, "colour", "cutout")))
        interpolated = any(tables is not None for tables in (rows, columns, rotation))
        given: dict[str, Any] = {each: call.get(each) for each in inputs}
        given["definitions"] = {"INTERPOLATED": str(int(interpolated))}
        pictures: dict[str, int] = {"count": n, "height": height, "width": width, "channels": channels}
        pictures |= dict(zip(("stride_n", "stride_h", "stride_w", "stride_c"), picture.strides, strict=True))
        taps = {"rows": row_taps, "columns": column_taps}
        taps |= {"row_tables": row_tables, "column_tables": column_tables}
        result: dict[str, int] = {"h": h, "w": w, "cutout": cutout_size}
        result |= dict(zip(("stride_n", "stride_c", "stride_h", "stride_w"), y.strides, strict=True))
        if y.size == 0:
            return call.give(y)
        coefficients: DeviceArray | None = None
        if colour is not None:
            coefficients = call.scratch(3 * n, "float32")
            call.launch(
                SOURCE,
                "colour_coefficients",
                (min(n, 2**31 - 1), 1, 1),
                _MEAN_BLOCK,
                scalar=name,
                images=picture,
                **given,
                colour=call["colour"],
                coefficients=coefficients,
                pictures=pictures | {"first_channel": 0, "channels_here": 3 if channels == 3 else 1},
                taps=taps,
                result=result,
            )
        for first in range(0, channels, _CHANNELS_A_LAUNCH):
            here = min(_CHANNELS_A_LAUNCH, channels - first)
            normalization = {}
            for number in range(_CHANNELS_A_LAUNCH):
                normalization[f"factor_{number}"] = factors[first + number] if number < here else 0.0
                normalization[f"shift_{number}"] = shifts[first + number] if number < here else 0.0
            call.launch(
                SOURCE,
                "augment_images",
                pixel_blocks(n, h, w),
                PIXEL_BLOCK,
                scalar=name,
                images=picture,
                **given,
                coefficients=coefficients,
                cutout=call.get("cutout"),
                y=y,
                pictures=pictures | {"first_channel": first, "channels_here": here},
                taps=taps,
                result=result,
                normalization=normalization,
            )
        return call.give(y)


def _pair(tables: tuple[Any, Any] | None, name: str) -> tuple[Any, Any]:
    if tables is None:
        return None, None
    if not isinstance(tables, (tuple, list)) or len(tables) != 2 or any(table is None for table in tables):
        raise ArgumentError(f"{name} must be a pair of arrays, (first, weights), got {type(tables).__name__}")
    return tables[0], tables[1]


def _tables(call: Call, axis: str, n: int, length: int) -> tuple[int, int, int]:
    """(length of the result along the axis, taps, number of tables) of ``<axis>_first`` and ``<axis>_weights``.

    Without them (length, 1, 1). Raises DtypeError or ArgumentError where they do not fit each other or N images.
    """
    first = call.get(f"{axis}_first")
    if first is None:
        return length, 1, 1
    call.require(f"{axis}_first", "int32")
    if len(first.shape) != 2 or first.shape[0] not in (1, n):
        raise ArgumentError(f"{axis}_first must have shape (1 or {n}, length of the result), got {first.shape}")
    tables, target = first.shape
    weights = call[f"{axis}_weights"]
    taps = weights.shape[1] if len(weights.shape) == 3 else 0
    call.require(f"{axis}_weights", "float32", (tables, max(taps, 1), target))
    return target, taps, tables


def _require_dense_images(images: DeviceArray) -> None:
    """Raise LayoutError unless the memory of (N, H, W, C) runs N, H, W, C or N, C, H, W without gaps."""
    _, height, width, channels = images.shape
    planes = (channels * height * width, width, 1, height * width)
    axes = zip(images.shape, images.strides, planes, strict=True)
    in_planes = 0 in images.shape or all(length < 2 or stride == plane for length, stride, plane in axes)
    if not images.contiguous and not in_planes:
        raise LayoutError(
            f"images of shape {images.shape} has strides {images.strides} (in elements), neither pixel by pixel "
            "nor plane by plane without gaps; copy it first with ascontiguousarray"
        )
