"""The order in which images (N, C, H, W) lie on a GPU: contiguous, or channels-last, whose memory runs N, H, W, C.

Kernels take both, and lay out what they make as what they read. So a network is computed in one format from end to
end where two things are seen to: its convolutions begin it, and where an array has a single pixel an image, and
lies in both formats at once, the gradient that grows out of it is told which of them its input had. That is what
these functions are for; NumPy's arrays they leave alone, for there the operations choose by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import gpucnn_kernels as kernels
from gpucnn.device import is_device_array
from gpucnn.device import module_of as array_module
from gpucnn.ops.contract import Array

_CHANNELS_LAST = (0, 2, 3, 1)


def is_channels_last(image: Array) -> bool:
    """Whether a device's image lies channels-last, and not contiguous as well."""
    return bool(
        image.ndim == 4
        and not image.flags.c_contiguous
        and is_device_array(image)
        and image.transpose(_CHANNELS_LAST).flags.c_contiguous
    )


def empty_image(shape: Sequence[int], model: Array, channels_last: bool) -> Array:
    """A new image of ``shape`` (N, C, H, W), its values undefined, on the device of ``model`` and of its dtype."""
    from gpucnn_kernels.runtime import current

    n, c, h, w = shape
    if not channels_last:
        return current().empty((n, c, h, w), str(model.dtype), model)
    return current().empty((n, h, w, c), str(model.dtype), model).transpose(0, 3, 1, 2)


def result_for(shape: Sequence[int], source: Array, channels_last: bool) -> Array | None:
    """An image for an operation's ``out``, or None where its result will lie so by itself.

    Args:
        shape: of the result, (N, C, H, W).
        source: the image that the operation reads, and by which it would lay out its result.
        channels_last: how the result is to lie.
    """
    if not is_device_array(source) or is_channels_last(source) == channels_last:
        return None
    return empty_image(shape, source, channels_last)


def to_channels_last(image: Array) -> Array:
    """A device's image with memory that runs N, H, W, C: itself where it lies so, or one pass over it."""
    converted: Array = kernels.to_channels_last(image)
    return converted


def to_contiguous(image: Array) -> Array:
    """A device's image in C order: itself where it lies so, or one pass over it."""
    converted: Array = kernels.to_contiguous(image)
    return converted


def add(first: Array, second: Array) -> Array:
    """``first`` + ``second``, of one shape, laid out as ``first``: CuPy's own sum would be contiguous."""
    if not is_device_array(first):
        return first + second
    module = array_module(first)
    total: Array = module.add(first, second, out=module.empty_like(first))
    return total
