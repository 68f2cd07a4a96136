"""Parameter groups: which parameters share hyperparameters, and where an optimizer keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy
from numpy.typing import NDArray

from gpucnn.errors import ArgumentError
from gpucnn.ops import Array
from gpucnn.parameters import FlatBuffer, Parameter

ParametersOrGroups = Iterable[Parameter] | Iterable[Mapping[str, Any]]
"""Parameters, or groups ``{"params": [...], "weight_decay": ...}`` whose entries override the defaults."""


@dataclass(slots=True)
class ParameterGroup:
    """Parameters that share hyperparameters.

    Attributes:
        parameters: in the order given.
        options: the group's hyperparameters by name, without "lr".
        lr_factor: the group's learning rate over the optimizer's.
    """

    parameters: list[Parameter]
    options: dict[str, Any]
    lr_factor: float


@dataclass(slots=True)
class Slab:
    """A flat buffer of one group and dtype, with the optimizer's own arrays for it."""

    group: ParameterGroup
    buffer: FlatBuffer
    state: dict[str, Array]
    steps: NDArray[numpy.int64]  # taken so far by each parameter; they differ once one has been frozen

    def runs(self) -> Iterator[tuple[slice, slice]]:
        """(parameters, elements) of neighbours that are trained and have taken equally many steps.

        With nothing frozen that is the whole buffer in one piece.
        """
        parameters, first = self.buffer.parameters, 0
        while first < len(parameters):
            stop = first + 1
            if parameters[first].requires_grad:
                while (
                    stop < len(parameters)
                    and parameters[stop].requires_grad
                    and self.steps[stop] == self.steps[first]
                ):
                    stop += 1
                end = self.buffer.offsets[stop] if stop < len(parameters) else self.buffer.data.size
                yield slice(first, stop), slice(self.buffer.offsets[first], end)
            first = stop


class HasParameters(Protocol):
    """Anything that lists its parameters: a layer or a model."""

    def parameters(self) -> list[Parameter]:
        """The parameters."""


def parameter_groups(model: HasParameters, weight_decay: float) -> list[dict[str, Any]]:
    """``model``'s parameters in two groups for an optimizer: weights with ``weight_decay``, 1-d ones without.

    Biases and the scales and shifts of batch norm are 1-d; leaving them undecayed is one of the tricks that
    He et al., "Bag of Tricks for Image Classification", 2019, section 3.1, recommend.
    """
    parameters = model.parameters()
    weights = [parameter for parameter in parameters if len(parameter.shape) > 1]
    others = [parameter for parameter in parameters if len(parameter.shape) <= 1]
    groups = [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def as_groups(parameters: ParametersOrGroups) -> list[Mapping[str, Any]]:
    """The groups that were given, or one group of the parameters that were; checks the form, not the entries."""
    if not isinstance(parameters, Iterable):
        raise ArgumentError(f"expected parameters, got {type(parameters).__name__}; pass model.parameters()")
    entries: list[Any] = list(parameters)
    if not any(isinstance(entry, Mapping) for entry in entries):
        return [{"params": entries}]
    for entry in entries:
        if not isinstance(entry, Mapping) or "params" not in entry:
            raise ArgumentError(
                'parameter groups are mappings with the key "params", each of them; got '
                + (f"the keys {sorted(entry)}" if isinstance(entry, Mapping) else type(entry).__name__)
            )
    return entries


def check_distinct(parameters: list[Parameter]) -> None:
    """Raise ArgumentError where a parameter is listed twice."""
    seen: set[int] = set()
    for parameter in parameters:
        if id(parameter) in seen:
            raise ArgumentError(f"parameter '{parameter.path}' is given twice; each belongs to one group, once")
        seen.add(id(parameter))
