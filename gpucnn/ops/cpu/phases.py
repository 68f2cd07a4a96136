"""An image dealt out by stride, so that overlapping windows become shifts of flat arrays.

With stride s, pixel i * s + a goes to place i of phase a (along each axis). A place in the pooling window is then
one phase at one fixed shift for all windows at once, and a pass over it walks contiguous memory from end to end,
at full vector width, where slices of the image itself come in rows of a dozen numbers. The rows of a phase are as
long as the largest shift needs; what a shift carries over a row's end lands beside the windows, where nobody
looks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray

from gpucnn.ops.cpu.selection import keep
from gpucnn.ops.cpu.threads import scratch
from gpucnn.ops.cpu.windows import Reach, reach
from gpucnn_kernels.problem import Pool2dProblem


class Place(NamedTuple):
    """A place in the window: its number r * S + s, its phase (row, column), its shift in a flat phase."""

    number: int
    phase: tuple[int, int]
    shift: int


class Phases:
    """How the images of a pooling problem are dealt out."""

    def __init__(self, problem: Pool2dProblem) -> None:
        self.problem = problem
        (stride_h, stride_w), (dilation_h, dilation_w) = problem.stride, problem.dilation
        self.height = problem.P + (problem.R - 1) * dilation_h // stride_h
        self.width = problem.Q + (problem.S - 1) * dilation_w // stride_w
        self.rows = self._reaches(stride_h, problem.padding[0], problem.H, self.height)
        self.columns = self._reaches(stride_w, problem.padding[1], problem.W, self.width)
        self.places = [
            Place(
                r * problem.S + s,
                (r * dilation_h % stride_h, s * dilation_w % stride_w),
                r * dilation_h // stride_h * self.width + s * dilation_w // stride_w,
            )
            for r in range(problem.R)
            for s in range(problem.S)
        ]
        self.used = sorted({place.phase for place in self.places})

    @staticmethod
    def _reaches(stride: int, padding: int, size: int, count: int) -> list[Reach]:
        return [reach(phase - padding, stride, size, count) for phase in range(stride)]

    def empty(self, name: str, images: tuple[int, int], dtype: Any) -> dict[tuple[int, int], NDArray[Any]]:
        """Uninitialized scratch for the phases in use, each (n, c, height, width)."""
        grid = scratch(name, (len(self.used), *images, self.height, self.width), dtype)
        return dict(zip(self.used, grid, strict=True))

    def split(self, image: NDArray[Any], fill: float, dtype: Any) -> dict[tuple[int, int], NDArray[Any]]:
        """The phases of images (n, c, H, W), flat in scratch memory; ``fill`` where one reaches over the edge."""
        phases = self.empty("phases", (image.shape[0], image.shape[1]), dtype)
        for (row, column), phase in phases.items():
            rows, columns = self.rows[row], self.columns[column]
            inside = phase[:, :, rows.windows, columns.windows]
            if inside.size < phase.size:
                phase[...] = fill
            inside[...] = image[:, :, rows.pixels, columns.pixels]
        return {key: phase.reshape(-1) for key, phase in phases.items()}

    def merge(self, phases: dict[tuple[int, int], NDArray[Any]], image: NDArray[Any]) -> None:
        """The phases back into images (n, c, H, W); pixels that no window reaches become 0."""
        reached = 0
        for row, column in phases:
            reached += self._length(self.rows[row]) * self._length(self.columns[column])
        if reached < self.problem.H * self.problem.W:
            image[...] = 0
        for (row, column), phase in phases.items():
            rows, columns = self.rows[row], self.columns[column]
            image[:, :, rows.pixels, columns.pixels] = phase[:, :, rows.windows, columns.windows]

    @staticmethod
    def _length(places: Reach) -> int:
        return int(places.windows.stop - places.windows.start)

    def windows(self, flat: NDArray[Any], images: tuple[int, int]) -> NDArray[Any]:
        """The (n, c, P, Q) part of a flat array with a number for each place of a phase."""
        return flat.reshape(*images, self.height, self.width)[:, :, : self.problem.P, : self.problem.Q]


def max_of_phases(phases: Phases, image: NDArray[Any], best: NDArray[Any], argmax: NDArray[Any]) -> None:
    """The maximum of each window of ``image`` and its place, into ``best`` and ``argmax`` (n, c, P, Q).

    For windows that hold a number above minus infinity and no NaN.
    """
    images = image.shape[0], image.shape[1]
    flat = phases.split(image, -numpy.inf, image.dtype)
    size = images[0] * images[1] * phases.height * phases.width
    top, at = scratch("phases_top", (size,), image.dtype), scratch("phases_at", (size,), argmax.dtype)
    better, number = scratch("phases_better", (size,), numpy.bool_), scratch("phases_number", (size,), at.dtype)
    numpy.copyto(top, flat[phases.places[0].phase])
    at[...] = 0
    for place in phases.places[1:]:
        value = flat[place.phase][place.shift :]
        count = value.size
        numpy.greater(value, top[:count], out=better[:count])
        # Places only grow, so the larger of the old place and better * new place is the winner's.
        numpy.multiply(better[:count].view(numpy.uint8), at.dtype.type(place.number), out=number[:count])
        numpy.maximum(at[:count], number[:count], out=at[:count])
        numpy.maximum(top[:count], value, out=top[:count])
    best[...] = phases.windows(top, images)
    argmax[...] = phases.windows(at, images)


def add_by_phases(phases: Phases, gradient: NDArray[Any], argmax: NDArray[Any], total: NDArray[Any]) -> None:
    """Each ``gradient`` (n, c, P, Q) added at its window's place ``argmax``, into ``total`` (n, c, H, W)."""
    images = total.shape[0], total.shape[1]
    size = images[0] * images[1] * phases.height * phases.width
    spread, at = scratch("phases_top", (size,), total.dtype), scratch("phases_at", (size,), argmax.dtype)
    share = scratch("phases_share", (size,), total.dtype)
    spread[...] = 0
    phases.windows(spread, images)[...] = gradient
    phases.windows(at, images)[...] = argmax
    sums = phases.empty("phases", images, total.dtype)
    for phase in sums.values():
        phase[...] = 0
    for place in phases.places:
        target = sums[place.phase].reshape(-1)[place.shift :]
        count = target.size
        keep(spread[:count], at[:count] == place.number, share[:count])
        target += share[:count]
    phases.merge(sums, total)
