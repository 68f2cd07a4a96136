"""Optimizers: SGD, Adam, AdamW and RMSprop over flat parameter buffers.

An optimizer lays the parameters of each group end to end in one array a dtype (the parameters become views of
it), and their gradients in another. A step is then one operation on a buffer, and so is clearing or measuring
the gradients. Formulas, argument names and defaults are PyTorch's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy
from numpy.typing import NDArray

from gpucnn.device import copy_into, on_device, to_cpu, to_device
from gpucnn.errors import ArgumentError, CheckpointError, StateError
from gpucnn.names import look_up, unknown
from gpucnn.ops import Array, array_module, backend_of
from gpucnn.parameter_groups import (
    ParameterGroup,
    ParametersOrGroups,
    Slab,
    as_groups,
    check_distinct,
    parameter_groups,
)
from gpucnn.parameters import FlatBuffer, Parameter, flatten

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


class Optimizer(ABC):
    """Base of the optimizers.

    Args:
        parameters: ``model.parameters()``, or groups of them, each a mapping with "params" and any of the
            optimizer's hyperparameters that should differ for the group; see :func:`parameter_groups`.
        lr: the learning rate.
        **options: the hyperparameters of groups that do not say otherwise.

    Raises ArgumentError for hyperparameters out of range or unknown, for a parameter given twice, and where
    there are no parameters. Frozen parameters (``requires_grad`` False) are left as they are; thawed ones join
    in at the next step, with statistics of their own.
    """

    name: ClassVar[str] = ""
    option_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, parameters: ParametersOrGroups, lr: float, **options: Any) -> None:
        _check_range("lr", lr)
        self._lr = float(lr)
        self.groups = [self._make_group(entry, options) for entry in as_groups(parameters)]
        everything = [parameter for group in self.groups for parameter in group.parameters]
        if not everything:
            raise ArgumentError(f"{type(self).__name__} got no parameters; pass model.parameters()")
        check_distinct(everything)
        self._slabs = [
            Slab(
                group,
                buffer,
                {name: _zeros_like(buffer) for name in self._state_names(group)},
                numpy.zeros(len(buffer.parameters), numpy.int64),
            )
            for group in self.groups
            for buffer in flatten(group.parameters)
        ]

    def _make_group(self, entry: Mapping[str, Any], defaults: Mapping[str, Any]) -> ParameterGroup:
        for key in entry:
            if key not in ("params", "lr", *self.option_names):
                known = ("params", "lr", *self.option_names)
                raise ArgumentError(unknown(f"entry of a {type(self).__name__} parameter group", key, known))
        options = {name: entry.get(name, defaults[name]) for name in self.option_names}
        self._check_options(options)
        lr_factor = 1.0
        if "lr" in entry:
            _check_range("lr", entry["lr"])
            if self._lr == 0:
                raise ArgumentError("a group's own lr needs an optimizer lr above 0, to be in proportion to it")
            lr_factor = entry["lr"] / self._lr
        parameters = list(entry["params"])
        for parameter in parameters:
            if not isinstance(parameter, Parameter):
                raise ArgumentError(
                    f"expected parameters, got {type(parameter).__name__}; pass model.parameters()"
                )
        return ParameterGroup(parameters, options, lr_factor)

    @abstractmethod
    def _check_options(self, options: Mapping[str, Any]) -> None:
        """Raise ArgumentError for a hyperparameter out of its range."""

    @abstractmethod
    def _state_names(self, group: ParameterGroup) -> tuple[str, ...]:
        """Names of the arrays that the group's update keeps."""

    @abstractmethod
    def _update(
        self,
        parameter: Array,
        gradient: Array,
        state: Mapping[str, Array],
        options: Mapping[str, Any],
        lr: float,
        step: int,
    ) -> None:
        """Move ``parameter`` (1-d) in place; ``step`` counts from 1."""

    # ------------------------------------------------------------ learning rate

    @property
    def lr(self) -> float:
        """The learning rate; setting it scales the learning rate of every group in proportion.

        A group made with its own ``lr`` keeps its ratio to the optimizer's, so one schedule drives them all.
        """
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        _check_range("lr", value)
        self._lr = float(value)

    # ------------------------------------------------------------ steps

    def step(self) -> None:
        """Update all parameters that are not frozen by their gradients.

        Parameters that ``model.to(device)`` moved are followed, with the optimizer's own arrays. Raises StateError
        where another optimizer took them, where they have another dtype or where they are on several devices.
        """
        self._follow()
        for slab in self._slabs:
            for parameters, elements in slab.runs():
                step = int(slab.steps[parameters.start]) + 1
                self._update(
                    slab.buffer.data[elements],
                    slab.buffer.gradient[elements],
                    {name: array[elements] for name, array in slab.state.items()},
                    slab.group.options,
                    self._lr * slab.group.lr_factor,
                    step,
                )
                slab.steps[parameters] = step

    def zero_grad(self) -> None:
        """Set all gradients to zero, one fill a buffer."""
        self._follow()
        for slab in self._slabs:
            slab.buffer.gradient.fill(0)

    def gradient_norm(self) -> float:
        """The Euclidean norm of all gradients that the next step would use, as one vector."""
        self._follow()
        return math.sqrt(math.fsum(backend_of(part).sum_of_squares(part) for part in self._gradients()))

    def clip_gradient_norm(self, max_norm: float) -> float:
        """Scale all gradients so that their norm is at most ``max_norm``; returns the norm before.

        The factor is min(1, max_norm / (norm + 1e-6)), as PyTorch's. Gradients with an infinite or undefined
        norm are left as they are: look at the norm returned before taking the step.
        """
        if not max_norm > 0:
            raise ArgumentError(f"max_norm must be above 0, got {max_norm!r}")
        norm = self.gradient_norm()
        factor = max_norm / (norm + 1e-6)
        if math.isfinite(norm) and factor < 1:
            for part in self._gradients():
                backend_of(part).scale(part, factor)
        return norm

    def scale_gradients(self, factor: float) -> None:
        """Multiply all gradients that the next step would use."""
        self._follow()
        for part in self._gradients():
            backend_of(part).scale(part, factor)

    def _gradients(self) -> Iterator[Array]:
        for slab in self._slabs:
            for _, elements in slab.runs():
                yield slab.buffer.gradient[elements]

    def _follow(self) -> None:
        """Lay parameters that were moved to another device into new buffers there."""
        strays = [slab for slab in self._slabs if not slab.buffer.holds()]
        for slab in strays:
            parameters = slab.buffer.parameters
            devices = sorted({parameter.device for parameter in parameters})
            if len(devices) > 1:
                raise StateError(
                    f"the parameters of this {type(self).__name__} are on several devices "
                    f"({', '.join(devices)}); move the whole model to one"
                )
            dtype, free = slab.buffer.data.dtype, (0, slab.buffer.number)
            if any(parameter.buffer_number not in free or parameter.dtype != dtype for parameter in parameters):
                raise StateError(
                    f"the parameters have moved out of this {type(self).__name__}'s buffers (model.to(dtype=...) "
                    "or another optimizer took them); make the optimizer after that"
                )
        for slab in strays:
            slab.buffer = FlatBuffer(slab.buffer.parameters)
            slab.state = {name: to_device(array, slab.buffer.device) for name, array in slab.state.items()}

    # ------------------------------------------------------------ state

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Copies of what continuing needs, as NumPy arrays (wherever the parameters are) under flat keys.

        "lr" is the learning rate (0-d); "step.i" the steps taken by each parameter of buffer i; the rest, such
        as "momentum.i", the optimizer's own arrays. Buffers are numbered over groups, then dtypes.
        """
        return {"lr": numpy.array(self._lr)} | {
            key: numpy.array(to_cpu(array)) for key, array in self._arrays().items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict` of an optimizer of the same class over the same model.

        Its arrays may be on any device; they are copied to where the parameters are.

        Raises CheckpointError that lists the keys missing, left over or of another shape; nothing is then changed.
        """
        self._follow()
        own = {"lr": ()} | {key: tuple(array.shape) for key, array in self._arrays().items()}
        problems = []
        if missing := [key for key in own if key not in state]:
            problems.append("missing: " + ", ".join(missing))
        if unexpected := [key for key in state if key not in own]:
            problems.append("left over: " + ", ".join(unexpected))
        problems += [
            f"{key} has shape {_shape(state[key])}, expected {shape}"
            for key, shape in own.items()
            if key in state and _shape(state[key]) != shape
        ]
        if problems:
            raise CheckpointError(
                f"the state does not fit this {type(self).__name__}; {'; '.join(problems)}; use the same "
                "optimizer, options and model as when it was saved"
            )
        self.lr = float(state["lr"])
        for key, array in self._arrays().items():
            copy_into(array, state[key])

    def _arrays(self) -> dict[str, Array]:
        """The arrays themselves that the state holds, in its order."""
        arrays: dict[str, Array] = {}
        for number, slab in enumerate(self._slabs):
            arrays[f"step.{number}"] = slab.steps
            arrays |= {f"{name}.{number}": array for name, array in slab.state.items()}
        return arrays

    def __repr__(self) -> str:
        count = sum(parameter.size for group in self.groups for parameter in group.parameters)
        return f"{type(self).__name__}(lr={self._lr:g}, groups={len(self.groups)}, values={count})"


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
        _check_range("momentum", options["momentum"])
        _check_range("weight_decay", options["weight_decay"])
        _check_range("dampening", options["dampening"], low=-math.inf)
        if options["nesterov"] and (options["momentum"] == 0 or options["dampening"] != 0):
            raise ArgumentError(
                "nesterov needs a momentum above 0 and no dampening, got "
                f"momentum={options['momentum']!r}, dampening={options['dampening']!r}"
            )

    def _state_names(self, group: ParameterGroup) -> tuple[str, ...]:
        return ("momentum",) if group.options["momentum"] else ()

    def _update(
        self,
        parameter: Array,
        gradient: Array,
        state: Mapping[str, Array],
        options: Mapping[str, Any],
        lr: float,
        step: int,
    ) -> None:
        backend_of(parameter).sgd_step(
            parameter,
            gradient,
            state.get("momentum"),
            lr=lr,
            momentum=options["momentum"],
            dampening=options["dampening"],
            weight_decay=options["weight_decay"],
            nesterov=options["nesterov"],
            first_step=step == 1,
        )


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
            _check_range(f"beta{number}", beta, below=1.0)
        _check_range("eps", options["eps"])
        _check_range("weight_decay", options["weight_decay"])

    def _state_names(self, group: ParameterGroup) -> tuple[str, ...]:
        return "first_moment", "second_moment"

    def _update(
        self,
        parameter: Array,
        gradient: Array,
        state: Mapping[str, Array],
        options: Mapping[str, Any],
        lr: float,
        step: int,
    ) -> None:
        beta1, beta2 = options["betas"]
        backend_of(parameter).adam_step(
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
        )


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
            _check_range(name, options[name])

    def _state_names(self, group: ParameterGroup) -> tuple[str, ...]:
        names = ["square_average"]
        if group.options["momentum"]:
            names.append("momentum")
        if group.options["centered"]:
            names.append("gradient_average")
        return tuple(names)

    def _update(
        self,
        parameter: Array,
        gradient: Array,
        state: Mapping[str, Array],
        options: Mapping[str, Any],
        lr: float,
        step: int,
    ) -> None:
        backend_of(parameter).rmsprop_step(
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
        )


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


def _zeros_like(buffer: FlatBuffer) -> Array:
    with on_device(buffer.device):
        return array_module(buffer.data).zeros_like(buffer.data)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if hasattr(value, "shape") else numpy.shape(value)


def _check_range(name: str, value: float, low: float = 0.0, below: float = math.inf) -> None:
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__") or not low <= value < below:
        upper = "" if below == math.inf else f" and below {below:g}"
        lower = "finite" if low == -math.inf else f"{low:g} or more{upper or ' and finite'}"
        raise ArgumentError(f"{name} must be a number, {lower}, got {value!r}")
