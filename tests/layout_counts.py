"""What brings arrays from one order in memory to another, counted: for tests of the memory format of networks."""

from __future__ import annotations

import dataclasses

from gpucnn_kernels import conv2d_choice, conv2d_tensor
from gpucnn_kernels.launch import Call
from gpucnn_kernels.runtime import ITEM_SIZES
from gpucnn_kernels.runtime.host_array import HostArrays


@dataclasses.dataclass
class Counts:
    """What brings arrays from one order in memory to another, launched since it was cleared."""

    transposes: int = 0
    images: list = dataclasses.field(default_factory=list)  # channels of those packed for tensor cores
    filters: list = dataclasses.field(default_factory=list)  # (channels, for the gradient of the input)
    copies: list = dataclasses.field(default_factory=list)  # shapes of images that an operation copied
    bytes: int = 0  # read and written to pack


def watched_counts(monkeypatch):
    """Counts from now on, of tensor cores' convolutions, whatever so small problems are reckoned to take."""
    monkeypatch.setattr(conv2d_choice, "_chosen", lambda *given: conv2d_choice.usual(*given[:4], given[5]))
    found = Counts()
    launch, image, weight = Call.launch, conv2d_tensor.packed_image, conv2d_tensor.packed_filter
    copied = HostArrays.ascontiguousarray

    def launched(self, source, *rest, **more):
        found.transposes += source == "layout"
        return launch(self, source, *rest, **more)

    def packed_image(call, given, groups):
        packed = image(call, given, groups)
        if packed is not given:
            found.images.append(given.shape[1])
            found.bytes += (given.size + packed.size) * ITEM_SIZES[given.dtype]
        return packed

    def packed_filter(call, problem, given, transposed):
        packed = weight(call, problem, given, transposed)
        if packed[0] is not given:
            found.filters.append((given.shape[1], transposed))
            found.bytes += (given.size + packed[0].size) * ITEM_SIZES[given.dtype]
        return packed

    def contiguous(self, values, dtype=None):
        result = copied(self, values, dtype)
        if result is not values and result.ndim == 4:
            found.copies.append(result.shape)
        return result

    monkeypatch.setattr(Call, "launch", launched)
    monkeypatch.setattr(conv2d_tensor, "packed_image", packed_image)
    monkeypatch.setattr(conv2d_tensor, "packed_filter", packed_filter)
    monkeypatch.setattr(HostArrays, "ascontiguousarray", contiguous)
    return found
