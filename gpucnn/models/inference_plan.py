"""Forward passes of a compiled model that take no memory: every array has its place before the first of them.

:class:`gpucnn_kernels.arena.Arena` plans it. What a plan reads and writes stays where it is, and its :meth:`~
InferencePlan.run` does nothing but start kernels, so it can be captured as a graph::

    plan = model.compile_for_inference().plan((64, 3, 224, 224))
    graph, _ = gpucnn_kernels.runtime.current().capture(plan.run, plan.arrays(), 0)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gpucnn.device import is_device_array, on_device, split_name
from gpucnn.errors import ArgumentError, ShapeError, StateError
from gpucnn.ops import Array, array_module
from gpucnn.parameters import refresh_narrow_copies
from gpucnn_kernels.arena import Arena

if TYPE_CHECKING:
    from gpucnn.models.inference import InferenceModel


class InferencePlan:
    """Forward passes of ``model`` for inputs of one ``shape``, (N, C, H, W), in memory that is planned once.

    Two passes are made here: one compiles kernels and readies libraries, in the other it is noted which arrays are
    made and when they are dropped. Later ones start the same kernels on the arrays' places. It is for the weights
    that the model has now, where they are now.

    What operations make lies in the plan, their workspaces too. On the host runtime, which is for tests, arrays
    that are made by arithmetic between operations take memory of their own.

    Attributes:
        input: the images that :meth:`run` reads, in the dtype that the model computes in.
        output: the logits that it writes, in the dtype of the parameters.
        size: bytes of all arrays between them.
        separate_size: bytes that they would take if none reused another's.
    """

    def __init__(self, model: InferenceModel, shape: Sequence[int]) -> None:
        self.model, self._place = model, model.device
        if split_name(self._place)[0] != "cuda":
            raise ArgumentError(
                "a plan is of a GPU's memory, and the model is on the CPU, where operations keep their workspaces "
                "themselves; move it first: model.to('cuda')"
            )
        self._parameters = model.parameters()
        self._weights = [parameter.data for parameter in self._parameters]
        numbers = self._weights[0] if self._weights else next(array for _, array in model.named_buffers())
        with on_device(self._place):
            if model.narrow_dtype is not None:
                refresh_narrow_copies(self._parameters, model.narrow_dtype)
            module = array_module(numbers)
            self.input = module.zeros(tuple(shape), model.narrow_dtype or numbers.dtype)
            logits = model(self.input)
            self.output = module.zeros(logits.shape, numbers.dtype)
            del logits
            self._arena = Arena(split_name(self._place)[1])
            with self._arena.recorded():
                self._compute()
        self.size = self._arena.size
        self.separate_size = sum(lifetime.size for lifetime in self._arena.lifetimes)

    def run(self) -> None:
        """The logits of ``input`` into ``output``: the same kernels on the same memory every time, nothing else.

        Raises StateError where the model's weights are no longer those that the plan was made for.
        """
        if any(
            parameter.data is not weights
            for parameter, weights in zip(self._parameters, self._weights, strict=True)
        ):
            raise StateError(
                "the model's weights were moved since this plan was made; make another: model.plan(...)"
            )
        with on_device(self._place), self._arena.in_use():
            self._compute()

    def _compute(self) -> None:
        self.output[...] = self.model(self.input)

    def __call__(self, x: Array) -> Array:
        """The logits of x, which are ``output`` and overwritten by the next pass.

        Raises ShapeError for another shape than the plan's.
        """
        if tuple(x.shape) != tuple(self.input.shape):
            raise ShapeError(f"this plan takes inputs of shape {tuple(self.input.shape)}, got {tuple(x.shape)}")
        with on_device(self._place):
            self.input[...] = x
        self.run()
        return self.output

    def arrays(self) -> list[Any]:
        """All memory that :meth:`run` reads and writes: what a captured graph of it must keep."""
        found: list[Any] = [self.input, self.output, self._arena.memory, *self._weights]
        found += [array for _, array in self.model.named_buffers() if is_device_array(array)]
        return found + [parameter.working for parameter in self._parameters]
