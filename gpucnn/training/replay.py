"""Functions of device arrays, captured as a graph where inputs of one form come again: one launch does it all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from gpucnn.device import device_of, is_device_array, is_host_runtime, on_device, split_name
from gpucnn.layers import BatchNorm1d, BatchNorm2d, Layer
from gpucnn.losses import Loss
from gpucnn.ops import Array, array_module
from gpucnn.parameters import Parameter
from gpucnn.random import Generator

CAPTURE = ("auto", "on", "off")
"""auto: on a GPU, for networks of this package's layers; on: wherever device cuda is, for any; off: never."""

_LAYER_STATE = ("_saved", "path")  # what changes without changing what is computed


class Replay:
    """A function of arrays on a GPU, and the graph of it for inputs of one form: their shapes, strides and dtypes.

    The inputs of a launch are copied to arrays of its own, from which the graph reads; its results are in the same
    arrays each time, until the next launch.

    Args:
        function: does all its work on the device; what it computes depends on its inputs' values, and on those of
            the arrays that ``keep`` names, alone.
        keep: gives these arrays: what it reads and writes and does not make.
    """

    def __init__(self, function: Callable[..., Any], keep: Callable[[], Iterable[Any]]) -> None:
        self._function, self._keep = function, keep
        self._seen: set[Any] = set()
        self.forget()

    def forget(self) -> None:
        """Give up the graph and its memory, and what was seen: the function has changed."""
        self._drop()
        self._form: Any = None
        self._inputs: list[Array] = []
        self._seen.clear()

    def _drop(self) -> None:
        self._result: Any = None  # first: what lies beside it in memory can only go back when it is gone
        self._graph: Any = None

    def is_captured(self, *inputs: Array) -> bool:
        """Whether a launch would do for such inputs."""
        return self._graph is not None and _form(inputs) == self._form

    def has_run(self, *inputs: Array) -> bool:
        """Whether such inputs came before: every kernel for them is then compiled, and they can be captured."""
        return _form(inputs) in self._seen

    def run(self, *inputs: Array) -> Any:
        """The function itself."""
        result = self._function(*inputs)
        self._seen.add(_form(inputs))
        return result

    def capture(self, *inputs: Array) -> None:
        """Make the graph for such inputs, in place of the one before; computes nothing.

        Raises what the function raises, RuntimeError or one of CUDA's errors where it cannot be captured.
        """
        from gpucnn_kernels.runtime import current

        self._drop()  # its memory may be needed
        place = device_of(inputs[0])
        with on_device(place):
            self._inputs = [array_module(array).empty_like(array) for array in inputs]
            keep = [array for array in (*self._inputs, *self._keep()) if is_device_array(array)]
            self._graph, self._result = current().capture(
                lambda: self._function(*self._inputs), keep, split_name(place)[1]
            )
        self._form = _form(inputs)

    def launch(self, *inputs: Array) -> Any:
        """What the function gives, by the graph."""
        for ours, given in zip(self._inputs, inputs, strict=True):
            ours[...] = given
        self._graph.launch()
        return self._result

    def __call__(self, *inputs: Array) -> Any:
        """The result: the first time by the function, the second by a graph that is made then, and so on."""
        if not self.is_captured(*inputs):
            if not self.has_run(*inputs):
                return self.run(*inputs)
            self.capture(*inputs)
        return self.launch(*inputs)


def _form(inputs: tuple[Array, ...]) -> Any:
    return tuple((array.shape, array.strides, array.dtype) for array in inputs)


# ---------------------------------------------------------------- what can be captured


def reason_against(model: Layer, capture: str, training: bool) -> str | None:
    """Why passes of ``model`` are not captured under the option ``capture``, in words; None where they are.

    An empty reason needs no saying: nobody asked for it.
    """
    if capture == "off" or split_name(model.device)[0] != "cuda":
        return "" if capture != "on" else "graphs are a GPU's, and the model is on the CPU; train on device cuda"
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        return f"the model is on several devices ({', '.join(sorted(devices))})"
    for path, layer in model.named_layers():
        averages = isinstance(layer, (BatchNorm1d, BatchNorm2d)) and layer.momentum is None
        if averages and training and layer.training:
            return (
                f"batch norm '{path}' averages its statistics by a factor that changes from step to step "
                "(momentum=None); give it a momentum"
            )
    if capture == "on":
        return None
    if is_host_runtime():
        return ""
    for path, layer in model.named_layers():
        if type(layer).__module__.partition(".")[0] != "gpucnn":
            return (
                f"{type(layer).__name__}{f' ({path!r})' if path else ''} is not gpucnn's own, and a graph would "
                "repeat what its Python did once; where that is the same in every step, say capture='on' "
                "(--capture on)"
            )
    return None


class _Same:
    """An object that equals itself alone, kept so that nothing else gets its identity."""

    def __init__(self, thing: Any) -> None:
        self._thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._thing is other._thing

    def __hash__(self) -> int:
        return id(self._thing)


def _described(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(map(_described, value))
    if isinstance(value, dict):
        return tuple((key, _described(entry)) for key, entry in value.items())
    if isinstance(value, Parameter):
        # Not its copy in 16 bits: the first pass makes it, and whether there is one the model's precision says.
        return _Same(value.data), _Same(value.gradient), value.requires_grad
    if isinstance(value, Generator):
        return _Same(value), value.seed
    return _Same(value)


def signature(model: Layer, *others: Any) -> Any:
    """What a captured pass of ``model`` has taken for granted; another one means that it must be captured again.

    That is every attribute of every layer, and of ``others``: which arrays and parameters it has, which of them
    are frozen, each number and each mode.
    """
    parts: list[Any] = []
    for path, layer in model.named_layers():
        entries = tuple((key, _described(value)) for key, value in vars(layer).items() if key not in _LAYER_STATE)
        parts.append((path, type(layer), entries))
    for other in others:
        if isinstance(other, Loss):
            values = {key: value for key, value in vars(other).items() if key != "_saved"}
            parts.append((_Same(other), _described(values)))
        else:
            parts.append(_described(other))
    return parts


def model_arrays(model: Layer) -> list[Array]:
    """The arrays of a model that a pass reads and writes: parameters, gradients, 16-bit copies, buffers."""
    found: list[Any] = [array for _, array in model.named_buffers()]
    for parameter in model.parameters():
        found += [parameter.data, parameter.gradient]
        if parameter.buffer is not None and parameter.buffer.narrow is not None:
            found.append(parameter.buffer.narrow)
    return found
