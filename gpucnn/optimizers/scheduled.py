"""An optimizer's step that can be captured in a graph: what changes from step to step is in device memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from gpucnn.ops import Array
from gpucnn.optimizers.base import Optimizer


class ScheduledStep:
    """One step of ``optimizer`` over the parameters that it trains now, on a GPU.

    :meth:`start` launches it; :meth:`numbers` are what it must then find in its schedule, and :meth:`count` says
    that it was taken. Its updates have the bits of :meth:`Optimizer.step`'s. Where parameters are frozen or
    thawed, or some have taken more steps than others, the runs of the buffers are others: make a new one where
    :func:`layout_of` says so.

    Attributes:
        size: how many numbers the schedule has.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        optimizer.follow()
        self._optimizer = optimizer
        self._runs = [(slab, *run) for slab in optimizer.slabs for run in slab.runs()]
        ends = list(accumulate(len(numbers) for numbers in self._numbers()))
        self._places = [slice(first, end) for first, end in zip([0, *ends], ends, strict=False)]
        self.size = ends[-1] if ends else 0

    def _numbers(self) -> Iterator[tuple[float, ...]]:
        optimizer = self._optimizer
        for slab, parameters, _ in self._runs:
            lr, step = optimizer.lr * slab.group.lr_factor, int(slab.steps[parameters.start]) + 1
            yield optimizer._schedule(slab.group.options, lr, step)

    def numbers(self) -> list[float]:
        """The schedule of the next step, by the learning rate and the steps taken so far."""
        return [number for numbers in self._numbers() for number in numbers]

    def gradients(self) -> list[Array]:
        """The gradients that it uses, in flat pieces."""
        return [slab.buffer.gradient[elements] for slab, _, elements in self._runs]

    def start(self, schedule: Array, proceed: Array) -> None:
        """Launch the updates; they read ``schedule`` (float64, of :attr:`size`) and ``proceed`` when they run."""
        from gpucnn.ops.cuda import scheduled

        for (slab, parameters, elements), place in zip(self._runs, self._places, strict=True):
            self._optimizer._update(
                scheduled,
                slab.buffer.data[elements],
                slab.buffer.gradient[elements],
                {name: array[elements] for name, array in slab.state.items()},
                slab.group.options,
                self._optimizer.lr * slab.group.lr_factor,
                int(slab.steps[parameters.start]) + 1,
                schedule=schedule[place],
                proceed=proceed,
            )

    def count(self) -> None:
        """The step was taken."""
        for slab, parameters, _ in self._runs:
            slab.steps[parameters] += 1

    def arrays(self) -> list[Array]:
        """All arrays that it reads and writes."""
        found = []
        for slab in self._optimizer.slabs:
            found += [slab.buffer.data, slab.buffer.gradient, *slab.state.values()]
        return found


def layout_of(optimizer: Optimizer) -> tuple[tuple[int, int, int], ...]:
    """(buffer, first element, end) of each run that the next step goes over."""
    return tuple(
        (slab.buffer.number, elements.start, elements.stop)
        for slab in optimizer.slabs
        for _, elements in slab.runs()
    )
