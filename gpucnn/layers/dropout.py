"""Dropout (Srivastava et al. 2014), of single values and of whole channels."""

from __future__ import annotations

from typing import Any, ClassVar

from gpucnn.errors import ArgumentError
from gpucnn.layers.layer import Layer, check_gradient, check_input
from gpucnn.ops import Array, backend_of
from gpucnn.random import Generator, default_generator


class Dropout(Layer):
    """Zeroes values with probability ``p`` while training, divides the rest by 1 - p; nothing in evaluation.

    Args:
        p: the probability to zero a value, 0 <= p <= 1.
        generator: the Philox stream to draw from; the default generator unless given.
    """

    per_channel: ClassVar[bool] = False

    def __init__(self, p: float = 0.5, *, generator: Generator | None = None) -> None:
        if not 0 <= p <= 1:
            raise ArgumentError(f"the dropout probability must be between 0 and 1, got {p}")
        self.p, self.generator = p, generator

    def _mask_size(self, x: Array) -> int:
        return int(x.size)

    def forward(self, x: Array) -> Array:
        """Drop values of x while training."""
        if self.per_channel:
            check_input(x, 4, "(N, C, H, W)")
        if not self.training or self.p == 0:
            self._save(None, x.shape)
            return x
        generator = self.generator or default_generator
        offset, start = generator.place(self._mask_size(x))
        options: dict[str, Any] = {"probability": self.p, "seed": generator.seed, "per_channel": self.per_channel}
        if start is None:
            y, mask = backend_of(x).dropout_forward(x, offset=offset, **options)
        else:  # in a step that is captured
            from gpucnn.ops.cuda import scheduled

            y, mask = scheduled.dropout_forward(x, offset=offset, start=start, **options)
        self._save(mask, x.shape)
        return y

    def backward(self, dy: Array) -> Array:
        """The gradient for x: zero where forward dropped."""
        mask, shape = self._take_saved()
        check_gradient(dy, shape, mask)
        return dy if mask is None else backend_of(dy).dropout_backward(dy, mask, probability=self.p)

    def extra_repr(self) -> str:
        """The probability."""
        return f"p={self.p}"


class Dropout2d(Dropout):
    """Dropout of whole channels of (N, C, H, W) (Tompson et al. 2015), as ``torch.nn.Dropout2d``."""

    per_channel: ClassVar[bool] = True

    def _mask_size(self, x: Array) -> int:
        return int(x.shape[0] * x.shape[1])
