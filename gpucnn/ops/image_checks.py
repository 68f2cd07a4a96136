"""What the backends check of an augmentation; each message says what came and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpucnn.errors import ArgumentError, DtypeError, ShapeError
from gpucnn.ops.checks import check_images, require_array, require_dimensions, require_shape

Tables = tuple[Any, Any]
"""(first (M, target) integers, weights (M, taps, target) float32), M tables of taps along an axis: 1 or N."""

_KINDS = {"b": "booleans", "i": "integers", "f": "floating-point numbers"}


def augmented_size(images: Any, rows: Tables | None, columns: Tables | None) -> tuple[int, int]:
    """(h, w) of images (N, H, W, C) after resampling."""
    height = images.shape[1] if rows is None else rows[0].shape[1]
    width = images.shape[2] if columns is None else columns[0].shape[1]
    return int(height), int(width)


def check_augmentation(
    images: Any,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    index: Any,
    flip: Any,
    rows: Tables | None,
    columns: Tables | None,
    rotation: Any,
    shift: Any,
    colour: Any,
    cutout: Any,
    cutout_size: int,
) -> None:
    """Raise unless the arguments of ``augment_images`` fit each other."""
    check_images(images, mean, std, None, None)
    n = images.shape[0]
    if index is not None:
        require_array(index, "index")
        require_dimensions(index, 1, "(N,)", "index")
        n = index.shape[0]
        _check_rows(index, "index", (n,), "i")
    for name, tables in (("rows", rows), ("columns", columns)):
        _check_tables(tables, name, n)
    _check_rows(flip, "flip", (n,), "b")
    _check_rows(rotation, "rotation", (n, 2), "f")
    _check_rows(shift, "shift", (n, 2), "i")
    _check_rows(colour, "colour", (n, 3), "f")
    _check_rows(cutout, "cutout", (n, 2), "i")
    h, w = augmented_size(images, rows, columns)
    if rotation is not None and min(h, w) < 2:
        raise ArgumentError(f"rotation needs images of at least 2x2 pixels, got {h}x{w}")
    if cutout_size < 0:
        raise ArgumentError(f"cutout_size must be 0 or more, got {cutout_size}")


def _check_rows(array: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
    if array is None:
        return
    require_array(array, name)
    require_shape(array, shape, name)
    if array.dtype.kind not in (kind, "u" if kind == "i" else kind):
        raise DtypeError(f"{name} must hold {_KINDS[kind]}, got dtype {array.dtype}")


def _check_tables(tables: Tables | None, name: str, n: int) -> None:
    if tables is None:
        return
    if not isinstance(tables, (tuple, list)) or len(tables) != 2:
        raise ArgumentError(f"{name} must be a pair of arrays, (first, weights), got {type(tables).__name__}")
    first, weights = tables
    require_array(first, f"first of {name}")
    require_dimensions(first, 2, "(1 or N, length of the result)", f"first of {name}")
    if first.shape[0] not in (1, n):
        raise ShapeError(f"{name} must have 1 table or one for each of {n} images, got {first.shape[0]}")
    _check_rows(first, f"first of {name}", first.shape, "i")
    require_array(weights, f"weights of {name}")
    require_dimensions(weights, 3, "(1 or N, taps, length of the result)", f"weights of {name}")
    if weights.shape[1] < 1:
        raise ShapeError(f"weights of {name} must have at least one tap, got shape {tuple(weights.shape)}")
    _check_rows(weights, f"weights of {name}", (first.shape[0], weights.shape[1], first.shape[1]), "f")
