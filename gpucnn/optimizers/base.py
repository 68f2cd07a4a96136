"""What every optimizer is: groups of parameters in flat buffers, gradients and their norm, steps, state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy
from numpy.typing import NDArray

from gpucnn.device import copy_into, on_device, to_cpu, to_device
from gpucnn.errors import ArgumentError, CheckpointError, StateError
from gpucnn.names import unknown
from gpucnn.ops import Array, array_module, backend_of
from gpucnn.parameter_groups import ParameterGroup, ParametersOrGroups, Slab, as_groups, check_distinct
from gpucnn.parameters import FlatBuffer, Parameter, flatten


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
        check_range("lr", lr)
        self._lr = float(lr)
        self.groups = [self._make_group(entry, options) for entry in as_groups(parameters)]
        everything = [parameter for group in self.groups for parameter in group.parameters]
        if not everything:
            raise ArgumentError(f"{type(self).__name__} got no parameters; pass model.parameters()")
        check_distinct(everything)
        self.slabs = [
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
            check_range("lr", entry["lr"])
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
        ops: Any,
        parameter: Array,
        gradient: Array,
        state: Mapping[str, Array],
        options: Mapping[str, Any],
        lr: float,
        step: int,
        **memory: Array,
    ) -> None:
        """Move ``parameter`` (1-d) in place, by a function of ``ops``; ``step`` counts from 1.

        ``ops`` is the backend, or :mod:`gpucnn.ops.cuda.scheduled`, whose functions take ``memory`` too: what
        changes from step to step, in place of ``lr`` and ``step``, and whether to go on.
        """

    @abstractmethod
    def _schedule(self, options: Mapping[str, Any], lr: float, step: int) -> tuple[float, ...]:
        """What changes from step to step, for a step whose kernels read it from memory."""

    # ------------------------------------------------------------ learning rate

    @property
    def lr(self) -> float:
        """The learning rate; setting it scales the learning rate of every group in proportion.

        A group made with its own ``lr`` keeps its ratio to the optimizer's, so one schedule drives them all.
        """
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        check_range("lr", value)
        self._lr = float(value)

    # ------------------------------------------------------------ steps

    def step(self) -> None:
        """Update all parameters that are not frozen by their gradients.

        Parameters that ``model.to(device)`` moved are followed, with the optimizer's own arrays. Raises StateError
        where another optimizer took them, where they have another dtype or where they are on several devices.
        """
        self.follow()
        for slab in self.slabs:
            for parameters, elements in slab.runs():
                step = int(slab.steps[parameters.start]) + 1
                self._update(
                    backend_of(slab.buffer.data),
                    slab.buffer.data[elements],
                    slab.buffer.gradient[elements],
                    {name: array[elements] for name, array in slab.state.items()},
                    slab.group.options,
                    self._lr * slab.group.lr_factor,
                    step,
                )
                slab.steps[parameters] = step

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        self.follow()
        for slab in self.slabs:
            slab.buffer.zero_grad()

    def gradient_norm(self) -> float:
        """The Euclidean norm of all gradients that the next step would use, as one vector."""
        self.follow()
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
        self.follow()
        for part in self._gradients():
            backend_of(part).scale(part, factor)

    def _gradients(self) -> Iterator[Array]:
        for slab in self.slabs:
            for _, elements in slab.runs():
                yield slab.buffer.gradient[elements]

    def follow(self) -> None:
        """Lay parameters that were moved to another device into new buffers there, as every step does first."""
        strays = [slab for slab in self.slabs if not slab.buffer.holds()]
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
            before = slab.buffer
            slab.buffer = FlatBuffer(before.parameters)
            for name, array in slab.state.items():
                moved = to_device(before.in_c_order(array), slab.buffer.device)
                slab.state[name] = slab.buffer.in_own_order(moved)

    # ------------------------------------------------------------ state

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Copies of what continuing needs, as NumPy arrays (wherever the parameters are) under flat keys.

        "lr" is the learning rate (0-d); "step.i" the steps taken by each parameter of buffer i; the rest, such
        as "momentum.i", the optimizer's own arrays. Buffers are numbered over groups, then dtypes.
        """
        state = {"lr": numpy.array(self._lr)}
        for key, array, buffer in self._arrays():
            state[key] = numpy.array(to_cpu(array if buffer is None else buffer.in_c_order(array)))
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict` of an optimizer of the same class over the same model.

        Its arrays may be on any device; they are copied to where the parameters are.

        Raises CheckpointError that lists the keys missing, left over or of another shape; nothing is then changed.
        """
        self.follow()
        own = {"lr": ()} | {key: tuple(array.shape) for key, array, _ in self._arrays()}
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
        for key, array, buffer in self._arrays():
            copy_into(array, state[key])
            if buffer is not None and (ordered := buffer.in_own_order(array)) is not array:
                array[...] = ordered

    def _arrays(self) -> Iterator[tuple[str, Array, FlatBuffer | None]]:
        """(key, the array itself, the buffer that it is laid out as) of all that the state holds, in its order."""
        for number, slab in enumerate(self.slabs):
            yield f"step.{number}", slab.steps, None
            for name, array in slab.state.items():
                yield f"{name}.{number}", array, slab.buffer

    def __repr__(self) -> str:
        count = sum(parameter.size for group in self.groups for parameter in group.parameters)
        return f"{type(self).__name__}(lr={self._lr:g}, groups={len(self.groups)}, values={count})"


def _zeros_like(buffer: FlatBuffer) -> Array:
    with on_device(buffer.device):
        return array_module(buffer.data).zeros_like(buffer.data)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if hasattr(value, "shape") else numpy.shape(value)


def check_range(name: str, value: float, low: float = 0.0, below: float = math.inf) -> None:
    """Raise ArgumentError unless ``value`` is a number from ``low`` to below ``below``."""
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__") or not low <= value < below:
        upper = "" if below == math.inf else f" and below {below:g}"
        lower = "finite" if low == -math.inf else f"{low:g} or more{upper or ' and finite'}"
        raise ArgumentError(f"{name} must be a number, {lower}, got {value!r}")
