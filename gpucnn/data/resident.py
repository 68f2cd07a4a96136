"""Data sets that lie whole on a GPU: what then travels of a batch is the numbers of its images."""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray

from gpucnn.data.dataset import Dataset
from gpucnn.device import Device, is_host_runtime, on_device, split_name, to_device

_SHARE = 8  # one data set takes an eighth of the GPU's free memory at most

_lock = threading.Lock()
_kept: dict[tuple[int, int, bool], Any] = {}  # by the array's id, the device and the runtime; None: too large


class Resident(NamedTuple):
    """Images on a device, and which of them a data set's are."""

    images: Any
    """uint8 (M, H, W, C)"""
    numbers: NDArray[numpy.int64]
    """of each image of the data set among them"""

    def form_of(self, count: int) -> NDArray[numpy.uint8]:
        """An array of the form of ``count`` of the images, which takes no memory and holds none of them."""
        return numpy.broadcast_to(numpy.uint8(0), (count, *self.images.shape[1:]))


def resident(dataset: Dataset, device: str | Device) -> Resident | None:
    """The images of ``dataset`` on ``device``, copied there when first asked for, as long as their array lives.

    Parts of one data set share its copy. None where they do not lie in one array in memory, or it is larger than
    an eighth of the free memory that the device had when it was first asked for.
    """
    found = dataset.in_memory()
    if found is None:
        return None
    images, numbers = found
    key = id(images), split_name(device)[1], is_host_runtime()
    with _lock:
        if key not in _kept:
            _kept[key] = to_device(numpy.ascontiguousarray(images), device) if _fits(images, device) else None
            weakref.finalize(images, _kept.pop, key, None)
        copy = _kept[key]
    return None if copy is None else Resident(copy, numbers)


def _fits(images: NDArray[numpy.uint8], device: str | Device) -> bool:
    if is_host_runtime():
        return True  # where it is already
    import cupy

    with on_device(device):
        free = cupy.cuda.Device(split_name(device)[1]).mem_info[0] + cupy.get_default_memory_pool().free_bytes()
    return bool(images.nbytes * _SHARE <= free)
