"""Adam, and AdamW, which decays the weights apart from the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from gpucnn.errors import ArgumentError
from gpucnn.ops import Array
from gpucnn.optimizers.base import Optimizer, check_range
from gpucnn.parameter_groups import ParameterGroup, ParametersOrGroups


class Adam(Optimizer):
    """Adam (Kingma and Ba, 2015).

    g = gradient + weight_decay * p; m and v are running means of g and g * g by ``betas``, corrected for their
    start at zero; p -= lr * m / (sqrt(v) + eps).
    """

    name = "adam"
    option_names = ("betas", "eps", "weight_decay")
    decoupled: ClassVar[bool] = False

    def __init__(
        self,
        parameters: ParametersOrGroups,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        betas = options["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ArgumentError(f"betas must be two numbers from 0 to below 1, got {betas!r}")
        for number, beta in enumerate(betas, start=1):
            check_range(f"beta{number}", beta, below=1.0)
        check_range("eps", options["eps"])
        check_range("weight_decay", options["weight_decay"])

    def _state_names(self, group: ParameterGroup) -> tuple[str, ...]:
        return "first_moment", "second_moment"

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
        beta1, beta2 = options["betas"]
        ops.adam_step(
            parameter,
            gradient,
            state["first_moment"],
            state["second_moment"],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            epsilon=options["eps"],
            weight_decay=options["weight_decay"],
            decoupled=self.decoupled,
            step=step,
            **memory,
        )

    def _schedule(self, options: Mapping[str, Any], lr: float, step: int) -> tuple[float, ...]:
        from gpucnn_kernels.optimizer_step import adam_schedule

        beta1, beta2 = options["betas"]
        return adam_schedule(lr, beta1, beta2, options["weight_decay"], self.decoupled, step)


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019): p *= 1 - lr * weight_decay comes first."""

    name = "adamw"
    decoupled = True

    def __init__(
        self,
        parameters: ParametersOrGroups,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(parameters, lr, betas, eps, weight_decay)
