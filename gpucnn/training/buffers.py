"""The model's running statistics as they were before a step that has to be undone."""

from __future__ import annotations

from gpucnn.layers import Layer
from gpucnn.ops import Array


class BufferCopy:
    """Room for one copy of a model's buffers, made once so that a copy each step costs microseconds.

    Args:
        model: its buffers are copied; their arrays must stay the same ones.
    """

    def __init__(self, model: Layer) -> None:
        self._pairs: list[tuple[Array, Array]] = [(array, array.copy()) for _, array in model.named_buffers()]

    def take(self) -> None:
        """Copy what the buffers hold now, over the copy before."""
        for live, copy in self._pairs:
            copy[...] = live

    def put_back(self) -> None:
        """Give the buffers the values of the last copy."""
        for live, copy in self._pairs:
            live[...] = copy
