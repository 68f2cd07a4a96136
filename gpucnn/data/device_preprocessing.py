"""Preprocessing where the model is: bytes go to the device, and one launch makes the model's inputs of them."""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.data.transfer import Work
from gpucnn.data.transforms import Preprocessing
from gpucnn.ops import backend_of


def to_send(
    images: NDArray[numpy.uint8], preprocessing: Preprocessing, changes: dict[str, Any], dtype: str
) -> tuple[list[NDArray[Any]], Work]:
    """The arrays to copy to the device, and the work there that makes of them what ``preprocessing`` makes.

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
    arrays: list[NDArray[Any]] = [planes if in_planes else images]
    places: dict[str, Any] = {}  # of each array among those that travel, a pair of them for tables

    def place(array: NDArray[Any]) -> int:
        arrays.append(array)
        return len(arrays) - 1

    numbers = {}
    for name, value in changes.items():
        if isinstance(value, tuple):
            places[name] = tuple(place(array) for array in value)
        elif isinstance(value, numpy.ndarray):
            places[name] = place(value)
        else:
            numbers[name] = value

    def run(sent: list[Any], out: Any) -> None:
        arguments: dict[str, Any] = {
            name: tuple(sent[number] for number in where) if isinstance(where, tuple) else sent[where]
            for name, where in places.items()
        }
        pixels = sent[0].transpose(0, 2, 3, 1) if in_planes else sent[0]
        backend_of(pixels).augment_images(
            pixels,
            mean=preprocessing.mean,
            std=preprocessing.std,
            dtype=dtype,
            out=out,
            **arguments,
            **numbers,
        )

    shape = (len(images), images.shape[3], *preprocessing.image_size)
    return arrays, Work(shape, dtype, run)
