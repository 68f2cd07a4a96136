"""The model's running statistics as they were before a step that has to be undone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gpucnn.device import device_of, is_device_array, on_device
from gpucnn.layers import Layer
from gpucnn.ops import Array, array_module


class BufferCopy:
    """Room for one copy of a model's buffers, and the buffers laid so that copying them is one operation.

    The buffers of one dtype and device become views of one flat array, as an optimizer does with parameters.

    Args:
        model: its buffers are copied; their arrays must stay those that they are then.

    Attributes:
        flat: (flat array, its views in their order), one for each dtype and device.
    """

    def __init__(self, model: Layer) -> None:
        by_kind: dict[Any, list[tuple[Layer, str]]] = {}
        for _, layer in model.named_layers():
            for name in layer.buffer_names:
                if (array := getattr(layer, name)) is not None:
                    by_kind.setdefault((array.dtype, device_of(array)), []).append((layer, name))
        self.flat: list[tuple[Array, list[Array]]] = []
        for (_, device), places in by_kind.items():
            with on_device(device):
                self.flat.append(_lay(places))
        self._copies = [flat.copy() for flat, _ in self.flat]

    def take(self) -> None:
        """Copy what the buffers hold now, over the copy before."""
        for (flat, _), copy in zip(self.flat, self._copies, strict=True):
            copy[...] = flat

    def take_on_host(self) -> None:
        """The same for those on the CPU, where a graph sees to those of the GPU."""
        for (flat, _), copy in zip(self.flat, self._copies, strict=True):
            if not is_device_array(flat):
                copy[...] = flat

    def on_host(self) -> list[Array]:
        """Copies of the flat arrays on the CPU: counters, which stay there when a model moves to a GPU."""
        return [flat.copy() for flat, _ in self.flat if not is_device_array(flat)]

    def add_on_host(self, differences: Iterable[Array]) -> None:
        """Add to the flat arrays on the CPU, in the order of :meth:`on_host`."""
        flats = [flat for flat, _ in self.flat if not is_device_array(flat)]
        for flat, difference in zip(flats, differences, strict=True):
            flat += difference

    def arrays(self) -> list[Array]:
        """The flat arrays and the copies of them."""
        return [*(flat for flat, _ in self.flat), *self._copies]

    def put_back(self) -> None:
        """Give the buffers the values of the last copy."""
        for (flat, _), copy in zip(self.flat, self._copies, strict=True):
            flat[...] = copy


def _lay(places: list[tuple[Layer, str]]) -> tuple[Array, list[Array]]:
    """The buffers at ``places`` laid end to end, each then a view: (flat array, views)."""
    arrays = [getattr(layer, name) for layer, name in places]
    flat = array_module(arrays[0]).empty(sum(array.size for array in arrays), arrays[0].dtype)
    views, start = [], 0
    for (layer, name), array in zip(places, arrays, strict=True):
        view = flat[start : start + array.size].reshape(array.shape)
        view[...] = array
        setattr(layer, name, view)
        views.append(view)
        start += array.size
    return flat, views
