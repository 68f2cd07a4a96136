"""An exponential moving average of the weights (Polyak and Juditsky 1992; Izmailov et al. 2018)."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from gpucnn.device import copy_into, is_device_array
from gpucnn.errors import DeviceError, StateError
from gpucnn.layers import Layer
from gpucnn.ops import Array
from gpucnn.parameters import shaped_like
from gpucnn.training.buffers import BufferCopy


class WeightAverage:
    """average = decay * average + (1 - decay) * weights, after every step.

    The decay starts low, min(decay, (1 + step) / (10 + step)), so that the random initial weights are soon
    forgotten. Running statistics are averaged like weights; counters are copied. What lies end to end in one flat
    array is averaged in one operation.

    Args:
        model: its parameters and buffers are followed; their arrays must stay the same ones.
        decay: how slowly the average moves, 0 .. below 1.
        buffers: how the model's buffers lie, where they lie in flat arrays.

    Attributes:
        average: the average of each parameter and buffer, by path.
    """

    def __init__(self, model: Layer, decay: float, buffers: BufferCopy | None = None) -> None:
        self.model, self.decay = model, decay
        self._followed = live = _live(model)
        self.average: dict[str, Array] = dict.fromkeys(live)
        names = {id(array): name for name, array in live.items()}
        self._pairs: list[tuple[Array, Array]] = []
        for whole, parts in (*_parameter_arrays(model), *_buffer_arrays(model, buffers)):
            average = whole.copy("K")
            self._pairs.append((whole, average))
            for start, part in parts:
                alone = part is whole
                view = average if alone else shaped_like(part, average[start : start + part.size])
                self.average[names[id(part)]] = view

    def require_followed(self) -> None:
        """Raise StateError where the model's arrays are others than those that are averaged."""
        live = _live(self.model)
        for name, array in self._followed.items():
            if live.get(name) is not array:
                raise StateError(
                    f"'{name}' was moved while its average is taken, which knows the array from before: move the "
                    "model, or choose its precision, before it is trained"
                )

    def share(self, step: int) -> float:
        """How much of the way to the weights the average moves after ``step``, which counts from 1."""
        return 1.0 - min(self.decay, (1.0 + step) / (10.0 + step))

    def update(self, step: int) -> None:
        """Move towards the model's present weights; ``step`` counts from 1."""
        share = self.share(step)
        for live, average in self._pairs:
            if live.dtype.kind != "f":
                average[...] = live
                continue
            difference = live - average
            difference *= share
            average += difference

    def start(self, share: Array, proceed: Array) -> None:
        """:meth:`update` of what is on a GPU, unless ``proceed``, an array there, is 0; ``share`` is one, too.

        Raises DeviceError for integers there: those of this package's layers stay on the CPU.
        """
        from gpucnn.ops.cuda import scheduled

        for live, average in self._pairs:
            if not is_device_array(live):
                continue
            if live.dtype.kind != "f":
                raise DeviceError(f"a buffer of {live.dtype} on the GPU is not averaged inside a graph")
            scheduled.average_step(live, average, share, proceed)

    def update_on_host(self) -> None:
        """:meth:`update` of what is on the CPU beside a model on a GPU: counters."""
        for live, average in self._pairs:
            if not is_device_array(live):
                average[...] = live

    def arrays(self) -> list[Array]:
        """The arrays of the average, and those that it follows."""
        return [array for pair in self._pairs for array in pair]

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside the block the model computes with the average."""
        own = [live.copy() for live, _ in self._pairs]
        self.apply()
        try:
            yield
        finally:
            for (live, _), values in zip(self._pairs, own, strict=True):
                live[...] = values

    def apply(self) -> None:
        """Give the model the average for good."""
        for live, average in self._pairs:
            live[...] = average

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from an earlier :attr:`average`, whose arrays may be on any device."""
        for name, array in self.average.items():
            copy_into(array, state[name])


def _live(model: Layer) -> dict[str, Array]:
    return {name: parameter.data for name, parameter in model.named_parameters()} | dict(model.named_buffers())


def _parameter_arrays(model: Layer) -> Iterator[tuple[Array, list[tuple[int, Array]]]]:
    """(array, its parts, each with its first element): flat buffers of the parameters, and what lies in none."""
    seen: set[int] = set()
    own = set(map(id, model.parameters()))
    for parameter in model.parameters():
        buffer = parameter.buffer
        if buffer is None or not (buffer.holds() and own.issuperset(map(id, buffer.parameters))):
            yield parameter.data, [(0, parameter.data)]
        elif buffer.number not in seen:
            seen.add(buffer.number)
            parts = [part.data for part in buffer.parameters]
            yield buffer.data, list(zip(buffer.offsets, parts, strict=True))


def _buffer_arrays(model: Layer, buffers: BufferCopy | None) -> Iterator[tuple[Array, list[tuple[int, Array]]]]:
    """The same of the model's buffers."""
    if buffers is None:
        yield from ((array, [(0, array)]) for _, array in model.named_buffers())
        return
    for flat, views in buffers.flat:
        ends = itertools.accumulate(view.size for view in views)
        yield flat, [(end - view.size, view) for end, view in zip(ends, views, strict=True)]
