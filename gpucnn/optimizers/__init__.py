"""Optimizers: SGD, Adam, AdamW and RMSprop over flat parameter buffers.

An optimizer lays the parameters of each group end to end in one array a dtype (the parameters become views of
it), and their gradients in another. A step is then one operation on a buffer, and so is clearing or measuring
the gradients. Formulas, argument names and defaults are PyTorch's.
"""

from __future__ import annotations

from typing import Any

from gpucnn.errors import ArgumentError
from gpucnn.names import look_up, unknown
from gpucnn.optimizers.adam import Adam, AdamW
from gpucnn.optimizers.base import Optimizer
from gpucnn.optimizers.rmsprop import RMSprop
from gpucnn.optimizers.sgd import SGD
from gpucnn.parameter_groups import ParametersOrGroups, parameter_groups

__all__ = [
    "OPTIMIZERS",
    "SGD",
    "Adam",
    "AdamW",
    "Optimizer",
    "RMSprop",
    "make_optimizer",
    "parameter_groups",
]

_CLASSES: dict[str, type[SGD] | type[Adam] | type[RMSprop]] = {
    kind.name: kind for kind in (SGD, Adam, AdamW, RMSprop)
}

OPTIMIZERS = tuple(_CLASSES)
"""The names that :func:`make_optimizer` takes."""


def make_optimizer(
    name: str, parameters: ParametersOrGroups, lr: float | None = None, **options: Any
) -> Optimizer:
    """The optimizer called ``name`` ("sgd", "adam", "adamw" or "rmsprop").

    ``lr`` None stands for the class's default; ``options`` are the class's other arguments. Raises ArgumentError
    for an unknown name or option, with the nearest match.
    """
    kind = look_up("optimizer", name, _CLASSES)
    for option in options:
        if option not in kind.option_names:
            raise ArgumentError(unknown(f"option of the {name} optimizer", option, kind.option_names))
    if lr is not None:
        options["lr"] = lr
    return kind(parameters, **options)
