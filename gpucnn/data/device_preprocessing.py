"""Preprocessing where the model is: bytes go to the device, and one launch makes the model's inputs of them."""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.data.resident import Resident
from gpucnn.data.transfer import Work
from gpucnn.data.transforms import Preprocessing
from gpucnn.ops import backend_of

Sent = tuple[list[NDArray[Any]], Work]
"""The arrays to copy to the device, and the work there that makes inputs of them."""


def to_send(
    images: NDArray[numpy.uint8], preprocessing: Preprocessing, changes: dict[str, Any], dtype: str
) -> Sent:
    """What makes of ``images`` on the device what ``preprocessing`` makes.

    Args:
        images: uint8 (N, H, W, C). They travel as their memory lies, by pixels or by planes.
        preprocessing: how images become inputs.
        changes: what each image goes through, from its method ``changes``; numbers and arrays.
        dtype: of the inputs.

    Images are a quarter of the bytes that their inputs are, where their size stays; what is drawn for each is a
    few numbers, and with a resized crop its tables of taps, some kilobytes.
    """
    planes = images.transpose(0, 3, 1, 2)
    in_planes = planes.flags.c_contiguous
    arrays, places, numbers = _taken_apart([planes if in_planes else images], changes)

    def run(sent: list[Any], out: Any) -> None:
        pixels = sent[0].transpose(0, 2, 3, 1) if in_planes else sent[0]
        _augment(pixels, preprocessing, dtype, out, _put_together(places, sent) | numbers)

    return arrays, _work(len(images), preprocessing, dtype, run)


def to_pick(
    images: Resident,
    chosen: NDArray[numpy.int64],
    preprocessing: Preprocessing,
    changes: dict[str, Any],
    dtype: str,
) -> Sent:
    """The same of the images with the numbers ``chosen`` in their data set, which are on the device: they stay."""
    arrays, places, numbers = _taken_apart([], {"index": images.numbers[chosen], **changes})

    def run(sent: list[Any], out: Any) -> None:
        _augment(images.images, preprocessing, dtype, out, _put_together(places, sent) | numbers)

    return arrays, _work(len(chosen), preprocessing, dtype, run)


def _work(count: int, preprocessing: Preprocessing, dtype: str, run: Any) -> Work:
    return Work((count, len(preprocessing.mean), *preprocessing.image_size), dtype, run)


def _augment(pixels: Any, preprocessing: Preprocessing, dtype: str, out: Any, changes: dict[str, Any]) -> None:
    backend_of(pixels).augment_images(
        pixels, mean=preprocessing.mean, std=preprocessing.std, dtype=dtype, out=out, **changes
    )


def _taken_apart(
    arrays: list[NDArray[Any]], changes: dict[str, Any]
) -> tuple[list[NDArray[Any]], dict[str, Any], dict[str, Any]]:
    """``arrays`` with those in ``changes`` behind them, the place of each by its name, and what is no array."""
    arrays = list(arrays)
    places: dict[str, Any] = {}
    numbers: dict[str, Any] = {}

    def place(array: NDArray[Any]) -> int:
        arrays.append(array)
        return len(arrays) - 1

    for name, value in changes.items():
        if isinstance(value, tuple):  # tables of taps
            places[name] = tuple(map(place, value))
        elif isinstance(value, numpy.ndarray):
            places[name] = place(value)
        else:
            numbers[name] = value
    return arrays, places, numbers


def _put_together(places: dict[str, Any], sent: list[Any]) -> dict[str, Any]:
    return {
        name: tuple(sent[number] for number in where) if isinstance(where, tuple) else sent[where]
        for name, where in places.items()
    }
