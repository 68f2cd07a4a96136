"""The forms of the depthwise kernels: what a thread of them takes, by how the images lie.

Columns side by side in memory come in packs of four (float64: two), channels in pairs; the third form takes images
of any strides. See cuda/depthwise_window.cuh.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpucnn_kernels.arrays import DeviceArray
from gpucnn_kernels.problem import Conv2dProblem
from gpucnn_kernels.runtime import itemsize


@dataclass(frozen=True, slots=True)
class Form:
    """What a thread takes, ``columns`` beside each other of ``channels``; kernels' names end with ``suffix``."""

    suffix: str
    columns: int
    channels: int


COLUMNS, CHANNELS, ANY = "_columns", "_channels", ""


def form_of(problem: Conv2dProblem, left: int, *images: DeviceArray | None) -> Form:
    """The form for images of which each that is not None is read or written; ``left`` is the padding."""
    given = [image for image in images if image is not None]
    packed = min(4, 16 // itemsize(given[0].dtype))
    if left == problem.S // 2 and all(_in_packs(image, packed, axis=3) for image in given):
        return Form(COLUMNS, packed, 1)
    if problem.S == 3 and all(_in_packs(image, 2, axis=1) for image in given):
        return Form(CHANNELS, 2, 2)
    return Form(ANY, 4 if (problem.S, problem.stride) == (5, (1, 1)) else 2, 1)


def usual_suffix(problem: Conv2dProblem, left: int, channels_last: bool) -> str:
    """The suffix of :func:`form_of` for images that begin on boundaries of packs."""
    if channels_last:
        return CHANNELS if problem.S == 3 and problem.C % 2 == 0 else ANY
    return COLUMNS if left == problem.S // 2 and problem.Q % 4 == problem.W % 4 == 0 else ANY


def _in_packs(image: DeviceArray, width: int, axis: int) -> bool:
    """Whether packs of so many numbers along an axis can be loaded, wherever they begin in multiples of it."""
    others = [stride for number, stride in enumerate(image.strides) if number != axis]
    return (
        image.strides[axis] == 1
        and image.shape[axis] % width == 0
        and all(stride % width == 0 for stride in others)
        and image.address % (width * itemsize(image.dtype)) == 0
    )
