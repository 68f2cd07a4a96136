"""Forward passes over many batches, those of full batches captured as a CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from gpucnn.errors import ArgumentError
from gpucnn.layers import Layer
from gpucnn.ops import Array
from gpucnn.training.replay import Replay, model_arrays, reason_against, signature

LEAST_BATCHES = 4
"""From so many full batches on a graph is made for one pass over them: the first runs, the second is captured."""

GIVEN_UP = "forward passes are not captured as a CUDA graph, and go on kernel by kernel: {reason}"


class ForwardPass:
    """A function of batches that evaluates ``model``, captured where that is asked for and can be.

    It may serve several passes over a data set, those after each epoch, say, and then captures once.

    Args:
        model: in evaluation mode when it is called.
        function: of arrays on the model's device, without a look at their values.
        capture: one of CAPTURE.
        say: shows a line to the user; a warning unless given.

    Raises ArgumentError, with the reason, where ``capture`` is "on" and cannot be.
    """

    def __init__(
        self,
        model: Layer,
        function: Callable[..., Any],
        capture: str = "auto",
        say: Callable[[str], None] | None = None,
    ) -> None:
        reason = reason_against(model, capture, training=False)
        if reason and capture == "on":
            raise ArgumentError(f"capture='on': {reason}")
        self._model, self._function, self._say = model, function, say
        self._replay = Replay(function, lambda: model_arrays(model)) if reason is None else None
        self._signature: Any = None

    def begin(self) -> None:
        """Before a pass over a data set: what has changed since the last one is captured anew."""
        if self._replay is not None and (signed := signature(self._model)) != self._signature:
            self._replay.forget()
            self._signature = signed

    def __call__(self, *inputs: Array, full: bool = True) -> Any:
        """The function's results, which hold until the next call; ``full``: more inputs of this form will come."""
        if self._replay is None or not full:
            return self._function(*inputs)
        if not self._replay.is_captured(*inputs):
            if not self._replay.has_run(*inputs):
                return self._replay.run(*inputs)
            try:
                self._replay.capture(*inputs)
            except Exception as error:  # CUDA, CuPy and a layer's own code raise many kinds; the pass goes on
                self._replay = None
                self._tell(GIVEN_UP.format(reason=(str(error).strip().splitlines() or [type(error).__name__])[0]))
                return self._function(*inputs)
        return self._replay.launch(*inputs)

    def _tell(self, text: str) -> None:
        if self._say is None:
            warnings.warn(text, RuntimeWarning, stacklevel=3)
        else:
            self._say(text)
