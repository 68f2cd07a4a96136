"""Stochastic gradient descent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gpucnn.errors import ArgumentError
from gpucnn.ops import Array
from gpucnn.optimizers.base import Optimizer, check_range
from gpucnn.parameter_groups import ParameterGroup, ParametersOrGroups


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum (Sutskever et al., ICML 2013) and Nesterov's variant.

    g = gradient + weight_decay * p; b = momentum * b + (1 - dampening) * g (at first b = g); p -= lr * b, or with
    ``nesterov`` p -= lr * (g + momentum * b).
    """

    name = "sgd"
    option_names = ("momentum", "dampening", "weight_decay", "nesterov")

    def __init__(
        self,
        parameters: ParametersOrGroups,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(
            parameters,
            lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
        )

    def _check_options(self, options: Mapping[str, Any]) -> None:
        check_range("momentum", options["momentum"])
        check_range("weight_decay", options["weight_decay"])
        check_range("dampening", options["dampening"], low=-math.inf)
        if options["nesterov"] and (options["momentum"] == 0 or options["dampening"] != 0):
            raise ArgumentError(
                "nesterov needs a momentum above 0 and no dampening, got "
                f"momentum={options['momentum']!r}, dampening={options['dampening']!r}"
            )

    def _state_names(self, group: ParameterGroup) -> tuple[str, ...]:
        return ("momentum",) if group.options["momentum"] else ()

    def _update(
        self,
        ops: Any,
        parameter: Array,
        gradient: Array,
        state: Mapping[str, Array],
        options: Mapping[str, Any],
        lr: float,
        step: int,
        **memory: Array,
    ) -> None:
        ops.sgd_step(
            parameter,
            gradient,
            state.get("momentum"),
            lr=lr,
            momentum=options["momentum"],
            dampening=options["dampening"],
            weight_decay=options["weight_decay"],
            nesterov=options["nesterov"],
            first_step=step == 1,
            **memory,
        )

    def _schedule(self, options: Mapping[str, Any], lr: float, step: int) -> tuple[float, ...]:
        from gpucnn_kernels.optimizer_step import sgd_schedule

        return sgd_schedule(lr, step == 1)
