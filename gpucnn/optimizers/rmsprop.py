"""RMSprop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpucnn.ops import Array
from gpucnn.optimizers.base import Optimizer, check_range
from gpucnn.parameter_groups import ParameterGroup, ParametersOrGroups


class RMSprop(Optimizer):
    """RMSprop (Tieleman and Hinton, 2012), as PyTorch has it.

    v is the running mean of g * g by ``alpha``; ``centered`` takes the square of g's running mean off it;
    p -= lr * g / (sqrt(v) + eps), through a momentum buffer where ``momentum`` is above 0.
    """

    name = "rmsprop"
    option_names = ("alpha", "eps", "weight_decay", "momentum", "centered")

    def __init__(
        self,
        parameters: ParametersOrGroups,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
    ) -> None:
        super().__init__(
            parameters, lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum, centered=centered
        )

    def _check_options(self, options: Mapping[str, Any]) -> None:
        for name in ("alpha", "eps", "weight_decay", "momentum"):
            check_range(name, options[name])

    def _state_names(self, group: ParameterGroup) -> tuple[str, ...]:
        names = ["square_average"]
        if group.options["momentum"]:
            names.append("momentum")
        if group.options["centered"]:
            names.append("gradient_average")
        return tuple(names)

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
        ops.rmsprop_step(
            parameter,
            gradient,
            state["square_average"],
            state.get("momentum"),
            state.get("gradient_average"),
            lr=lr,
            alpha=options["alpha"],
            epsilon=options["eps"],
            weight_decay=options["weight_decay"],
            momentum=options["momentum"],
            **memory,
        )

    def _schedule(self, options: Mapping[str, Any], lr: float, step: int) -> tuple[float, ...]:
        from gpucnn_kernels.optimizer_step import rmsprop_schedule

        return rmsprop_schedule(lr)
