"""The base of every layer: parameters, buffers, children, modes, state.

A layer implements ``forward(x)``, which saves what backward needs while training and nothing in evaluation, and
``backward(dy)``, which adds to its parameters' gradients and returns the gradient for its input. There is no
tape: a container's backward calls its children's backward in reverse, and a reader can follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import numpy
from numpy.typing import NDArray

from gpucnn.device import (
    Device,
    copy_into,
    device_of,
    is_device_array,
    on_device,
    require_same_device,
    split_name,
    to_cpu,
    to_device,
)
from gpucnn.errors import CheckpointError, DeviceError, DtypeError, ShapeError, StateError, locate
from gpucnn.ops import Array
from gpucnn.parameters import Parameter
from gpucnn_kernels.problem import ProblemError


class ShortcutSum(NamedTuple):
    """The form activation(body(x) + shortcut(x)) of a layer's forward, by the names of its children.

    Attributes:
        body: children that are called one after another.
        shortcut: the child that x goes through on the other way; None adds x itself.
        activation: the child that the sum goes through, if any.
    """

    body: tuple[str, ...]
    shortcut: str | None = None
    activation: str | None = None


class Layer:
    """Base class of layers, containers and models.

    Assign a :class:`Parameter` or a Layer to an attribute and it is found, named and saved by that attribute's
    name. Arrays named in ``buffer_names`` are saved too, but not trained; those that ``cpu_buffer_names`` names as
    well stay on the CPU wherever the layer goes: counters that Python looks at.

    Attributes:
        narrow_dtype: "bfloat16" or "float16" where it computes in these, its weights staying float32; see
            :mod:`gpucnn.layers.precision`. None computes in the parameters' dtype.
        training: whether ``forward`` saves for backward and dropout and batch norm behave as in training.
        keeps_for_backward: whether ``forward`` saves for backward even in evaluation, as layers do that were put
            in evaluation by themselves, inside a model in training; see :meth:`eval`.
        path: the layer's name inside its model ("features.3"), empty for the model itself.
        input_needs_gradient: whether ``backward`` computes the gradient for the input, or returns None.
        fuses_children: whether children that follow one another may train as one; see :meth:`fuse`.
    """

    buffer_names: ClassVar[tuple[str, ...]] = ()
    cpu_buffer_names: ClassVar[tuple[str, ...]] = ()

    narrow_dtype: str | None = None
    training: bool = True
    keeps_for_backward: bool = True
    path: str = ""
    input_needs_gradient: bool = True
    fuses_children: bool = True
    _saved: Any = None

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(vars(self).get(name), Parameter) and not (value is None or isinstance(value, Parameter)):
            raise DtypeError(
                f"'{name}' of {type(self).__name__} is a parameter and cannot become {type(value).__name__}; set "
                f"its values with layer.{name}.data[...] = ..., or give a Parameter"
            )
        object.__setattr__(self, name, value)
        if isinstance(value, Layer):
            value._set_path(f"{self.path}.{name}" if self.path else name)
        elif isinstance(value, Parameter):
            value.path = f"{self.path}.{name}" if self.path else name

    def _set_path(self, path: str) -> None:
        object.__setattr__(self, "path", path)
        for name, parameter in self._own_parameters():
            parameter.path = f"{path}.{name}" if path else name
        for name, child in self.children():
            child._set_path(f"{path}.{name}" if path else name)

    # ------------------------------------------------------------ computing

    def forward(self, x: Array) -> Array:
        """The layer's output for ``x``."""
        raise TypeError(f"{type(self).__name__} does not define forward(x)")

    def backward(self, dy: Array) -> Array:
        """The gradient for the last forward's input; adds to the parameters' gradients."""
        raise TypeError(f"{type(self).__name__} does not define backward(dy)")

    def __call__(self, x: Array) -> Array:
        """``forward(x)``; errors are raised again with this layer's path in front."""
        return self._located(self.forward, x)

    def _located(self, function: Callable[..., Array], *arguments: Any, **options: Any) -> Array:
        """``function(*arguments, **options)``; errors are raised again with this layer's path in front."""
        try:
            return function(*arguments, **options)
        except ProblemError as error:
            raise locate(ShapeError(str(error)), self.path, self) from error
        except (ShapeError, DtypeError, DeviceError) as error:
            located = locate(error, self.path, self)
            if located is error:
                raise
            raise located from error

    def _save(self, *values: Any) -> None:
        """Keep ``values`` for backward while training; forget them in evaluation."""
        keep = self.training or self.keeps_for_backward
        vars(self)["_saved"] = values if keep else None  # no parameter and no layer: past __setattr__

    def _take_saved(self) -> Any:
        """What forward saved, once: the arrays are free to go as soon as backward is done with them."""
        saved = self._saved
        if saved is None:
            raise StateError(
                f"layer '{self.path}' ({self}): backward needs a forward before it, in training mode (call "
                "train() first); each forward serves one backward, so a layer can stand in one place only"
            )
        vars(self)["_saved"] = None
        return saved() if callable(saved) else saved  # what a fused forward left to be made where it is asked for

    # ------------------------------------------------------------ structure

    def _own_parameters(self) -> Iterator[tuple[str, Parameter]]:
        for name, value in vars(self).items():
            if isinstance(value, Parameter):
                yield name, value

    def children(self) -> Iterator[tuple[str, Layer]]:
        """(name, layer) of the layers directly inside this one."""
        for name, value in vars(self).items():
            if isinstance(value, Layer):
                yield name, value

    def shortcut_sum(self) -> ShortcutSum | None:
        """What ``forward`` is made of, where it is a residual block's sum; None, the default, where it is not.

        Inference lets the body's last convolution add the shortcut and apply the activation as it stores its sums.
        """
        return None

    def chains(self) -> tuple[tuple[str, ...], ...]:
        """Names of children that ``forward`` calls one after another, each on nothing but the output before.

        Inference folds a batch norm and an activation into the convolution before them along such a chain; what
        is in none stays as it is.
        """
        return ()

    def steps(self) -> list[Layer]:
        """The layers that ``forward`` calls one after another, if it does nothing else; itself alone otherwise."""
        return [self]

    def named_layers(self, prefix: str = "") -> Iterator[tuple[str, Layer]]:
        """(path, layer) of this layer and all below it, outermost first."""
        yield prefix, self
        for name, child in self.children():
            yield from child.named_layers(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """(path, parameter), in the order of ``state_dict``; a shared one is given once."""
        seen: set[int] = set()
        for path, layer in self.named_layers():
            for name, parameter in layer._own_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{path}.{name}" if path else name, parameter

    def parameters(self) -> list[Parameter]:
        """All parameters, for an optimizer."""
        return [parameter for _, parameter in self.named_parameters()]

    def named_buffers(self) -> Iterator[tuple[str, Array]]:
        """(path, array) of saved arrays that are not trained, such as running statistics."""
        for path, layer in self.named_layers():
            for name in layer.buffer_names:
                value = getattr(layer, name)
                if value is not None:
                    yield f"{path}.{name}" if path else name, value

    @property
    def parameter_count(self) -> int:
        """The number of trainable values."""
        return sum(parameter.size for parameter in self.parameters())

    # ------------------------------------------------------------ modes

    def train(self, mode: bool = True) -> Self:
        """Switch this layer and all below it to training (or evaluation, as :meth:`eval`) and return it."""
        keeps = mode or (bool(self.path) and self.keeps_for_backward)
        for _, layer in self.named_layers():
            layer.training, layer.keeps_for_backward = mode, keeps
            if not mode:
                layer._saved = None
        return self

    def eval(self) -> Self:
        """Switch to evaluation: running statistics, no dropout, nothing saved.

        Of a layer inside a model, as ``model[1].eval()``, only if the model is: where that is in training, the
        layer computes as in evaluation and saves for backward, so that the rest is trained through it.
        """
        return self.train(False)

    def skip_input_gradient(self, skip: bool = True) -> None:
        """Let backward return None instead of the input's gradient, where that saves work.

        Nobody needs the gradient for the images that a network is trained on, and for a first convolution it
        costs as much as the forward pass. Layers that gain by it set ``input_needs_gradient``; a container hands
        the call to the child that reads its input, if it is one alone; all others ignore it.
        """

    def fuse(self, fused: bool = True) -> Self:
        """Let this layer and all below it have neighbouring layers train as one on a GPU (or not); returns itself.

        They do by default, see :mod:`gpucnn.layers.fusion`: with the same results but for rounding.
        """
        for _, layer in self.named_layers():
            layer.fuses_children = fused
        return self

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        for parameter in self.parameters():
            parameter.zero_grad()

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze (False) or thaw all parameters."""
        for parameter in self.parameters():
            parameter.requires_grad = requires_grad
        return self

    @property
    def device(self) -> str:
        """Where this layer computes, by its first parameter or buffer: "cpu", "cuda:0", ...; "cpu" without any."""
        for _, parameter in self.named_parameters():
            return parameter.device
        for _, layer in self.named_layers():
            for name in layer.buffer_names:
                if name not in layer.cpu_buffer_names and getattr(layer, name) is not None:
                    return device_of(getattr(layer, name))
        return "cpu"

    def to(self, device: str | Device | None = None, *, dtype: Any = None) -> Self:
        """Move parameters, gradients and buffers to ``device``, and convert them to ``dtype``; returns itself.

        ``device`` is "cpu", "cuda" or "cuda:1"; buffers of integers keep their dtype. What a forward saved for its
        backward is dropped where anything moves. An optimizer follows to another device by itself; for another
        dtype make it afterwards.

        Raises DeviceError, with the reason, where the device cannot be used.
        """
        place = None
        if device is not None:
            _check_is_device(device)
            name, index = split_name(device)
            place = f"{name}:{index}" if name == "cuda" else name
        if dtype is not None and numpy.dtype(dtype).kind != "f":
            raise DtypeError(f"a layer's dtype must be floating point, got {numpy.dtype(dtype)}")
        moved = False
        for _, layer in self.named_layers():
            for _, parameter in layer._own_parameters():
                before = parameter.data
                with on_device(parameter.device):
                    parameter.move(place, dtype)
                moved = moved or parameter.data is not before
            for name in layer.buffer_names:
                value = getattr(layer, name)
                if value is None:
                    continue
                if dtype is not None and value.dtype.kind == "f" and value.dtype != dtype:
                    value = value.astype(dtype)
                if place is not None and name not in layer.cpu_buffer_names:
                    value = to_device(value, place)
                if value is not getattr(layer, name):
                    setattr(layer, name, value)
                    moved = True
        if moved:
            for layer in [layer for _, layer in self.named_layers()]:
                layer._saved = None
        return self

    def cuda(self, index: int = 0) -> Self:
        """Move to the GPU of that number, as :meth:`to`."""
        return self.to(f"cuda:{index}")

    def cpu(self) -> Self:
        """Move to the CPU, as :meth:`to`."""
        return self.to("cpu")

    # ------------------------------------------------------------ state

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Copies of all parameters and buffers by path: PyTorch's keys, in PyTorch's order.

        They are NumPy arrays wherever the layer is, so that what one device saved loads on any other.
        """
        return {key: numpy.array(to_cpu(array), order="C") for key, array in self._state().items()}

    def _state(self) -> dict[str, Array]:
        """The arrays themselves of all parameters and buffers, by path."""
        state: dict[str, Array] = {}
        for path, layer in self.named_layers():
            for name, parameter in layer._own_parameters():
                state[f"{path}.{name}" if path else name] = parameter.data
            for name in layer.buffer_names:
                if getattr(layer, name) is not None:
                    state[f"{path}.{name}" if path else name] = getattr(layer, name)
        return state

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> tuple[list[str], list[str]]:
        """Copy ``state`` into the parameters and buffers; returns (missing keys, unexpected keys).

        The arrays may be on any device; they are copied to where the parameters are.

        Raises CheckpointError that lists every missing key, every one left over (both only with ``strict``)
        and every one of another shape. Nothing is changed unless all is well.
        """
        if not isinstance(state, Mapping):
            raise DtypeError(
                f"load_state_dict takes a mapping of names to arrays, got {type(state).__name__}; a file is read "
                "by gpucnn.models.load or gpucnn.training.read_tensors"
            )
        targets = self._state()
        missing = [key for key in targets if key not in state]
        unexpected = [key for key in state if key not in targets]
        arrays = {key: _as_array(state[key]) for key in targets if key in state}
        reshaped = [
            f"{key}: {tuple(array.shape)}, expected {tuple(targets[key].shape)}"
            for key, array in arrays.items()
            if tuple(array.shape) != tuple(targets[key].shape)
        ]
        problems = []
        if strict and missing:
            problems.append("missing: " + ", ".join(missing))
        if strict and unexpected:
            problems.append("left over: " + ", ".join(unexpected))
        if reshaped:
            problems.append("of another shape: " + "; ".join(reshaped))
        if problems:
            raise CheckpointError(
                f"the state does not fit {type(self).__name__}; "
                + "; ".join(problems)
                + ("" if reshaped or not strict else " (strict=False loads what fits)")
            )
        for key, array in arrays.items():
            copy_into(targets[key], array)
        return missing, unexpected

    # ------------------------------------------------------------ showing

    def extra_repr(self) -> str:
        """The arguments to show inside this layer's parentheses."""
        return ""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def _check_is_device(device: Any) -> None:
    """Raise DtypeError where ``device`` is a dtype: PyTorch's ``to`` takes either."""
    if not isinstance(device, Device) and device not in ("cpu", "cuda"):
        try:
            dtype = numpy.dtype(device)
        except TypeError:
            return
        raise DtypeError(f"to(...) takes a device first; for a dtype write to(dtype='{dtype}')")


def _as_array(value: Any) -> Any:
    """An array of a saved value; PyTorch tensors come in through ``__array__``."""
    if is_device_array(value):
        return value
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    return numpy.asarray(value)


def check_input(
    x: Any, dimensions: int | None, meaning: str, weight: Array | None = None, *, narrow_too: bool = False
) -> None:
    """Raise DtypeError or ShapeError unless x is a floating-point array of that many dimensions (None: of any).

    With ``weight``, x must have its dtype and be on its device: DtypeError and DeviceError otherwise. With
    ``narrow_too``, x may be in 16 bits where the weight is float32.
    """
    shape, kind = getattr(x, "shape", None), getattr(getattr(x, "dtype", None), "kind", "")
    if shape is None or not kind:
        raise DtypeError(
            f"expected an array of shape {meaning}, got {type(x).__name__}; use numpy.asarray(..., numpy.float32)"
        )
    if kind != "f" and str(x.dtype) != "bfloat16":
        raise DtypeError(
            f"expected floating-point numbers, got dtype {x.dtype}; convert with x.astype(numpy.float32)"
        )
    if dimensions is None and len(shape) == 0:
        raise ShapeError(f"expected an array of shape {meaning}, got a single number")
    if dimensions is not None and len(shape) != dimensions:
        raise ShapeError(f"expected {dimensions} dimensions {meaning}, got shape {tuple(shape)}")
    if weight is None:
        return
    narrow = narrow_too and x.dtype.itemsize == 2 and weight.dtype == numpy.float32
    if x.dtype != weight.dtype and not narrow:
        raise DtypeError(
            f"the input is {x.dtype} but the parameters are {weight.dtype}; convert the input with "
            f"x.astype('{weight.dtype}') or the model with model.to(dtype='{x.dtype}')"
        )
    check_device(x, weight)


def check_device(x: Array, weight: Array) -> None:
    """Raise DeviceError unless the input is where the layer is."""
    require_same_device(
        x,
        weight,
        "the input is on {array} but the layer on {other}; move the input with "
        "gpucnn.device.to_device(x, '{other}') or the model with model.to('{array}')",
    )


def check_gradient(dy: Any, shape: tuple[int, ...], saved: Array | None = None) -> None:
    """Raise ShapeError unless ``dy`` has the shape of the forward's output.

    With ``saved``, an array that forward kept, raise DeviceError unless the gradient is on its device.
    """
    if tuple(dy.shape) != tuple(shape):
        raise ShapeError(f"the gradient has shape {tuple(dy.shape)}, but the output had {tuple(shape)}")
    if saved is not None:
        require_same_device(
            dy,
            saved,
            "the gradient is on {array} but the forward was on {other}; move it with "
            "gpucnn.device.to_device(dy, '{other}')",
        )


__all__ = ["Layer", "ShortcutSum", "check_device", "check_gradient", "check_input"]
