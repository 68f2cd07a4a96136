"""An exponential moving average of the weights (Polyak and Juditsky 1992; Izmailov et al. 2018)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from gpucnn.device import copy_into
from gpucnn.layers import Layer
from gpucnn.ops import Array


class WeightAverage:
    """average = decay * average + (1 - decay) * weights, after every step.

    The decay starts low, min(decay, (1 + step) / (10 + step)), so that the random initial weights are soon
    forgotten. Running statistics are averaged like weights; counters are copied.

    Args:
        model: its parameters and buffers are followed; their arrays must stay the same ones.
        decay: how slowly the average moves, 0 .. below 1.
    """

    def __init__(self, model: Layer, decay: float) -> None:
        self.model, self.decay = model, decay
        self._live: dict[str, Array] = {
            name: parameter.data for name, parameter in model.named_parameters()
        } | dict(model.named_buffers())
        self.average: dict[str, Array] = {name: array.copy() for name, array in self._live.items()}

    def update(self, step: int) -> None:
        """Move towards the model's present weights; ``step`` counts from 1."""
        share = 1.0 - min(self.decay, (1.0 + step) / (10.0 + step))
        for name, live in self._live.items():
            average = self.average[name]
            if live.dtype.kind != "f":
                average[...] = live
                continue
            difference = live - average
            difference *= share
            average += difference

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside the block the model computes with the average."""
        own = {name: array.copy() for name, array in self._live.items()}
        self._set(self.average)
        try:
            yield
        finally:
            self._set(own)

    def apply(self) -> None:
        """Give the model the average for good."""
        self._set(self.average)

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from an earlier :attr:`average`, whose arrays may be on any device."""
        for name, array in self.average.items():
            copy_into(array, state[name])

    def _set(self, values: Mapping[str, Array]) -> None:
        for name, array in self._live.items():
            array[...] = values[name]
