"""Where a number that is not finite came from: the batch is run again with every layer watched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy

from gpucnn.data.loader import Batch
from gpucnn.layers import Layer
from gpucnn.layers.precision import backward_pass, forward_pass
from gpucnn.losses import CrossEntropyLoss
from gpucnn.ops import Array, array_module


class _FoundError(Exception):
    """Carries the answer out of the layers."""


def find_first_non_finite(model: Layer, loss: CrossEntropyLoss, images: Array, labels: Array) -> str:
    """What went infinite or NaN first when ``model`` sees this batch, in words that name the layer.

    Goes forward through the model, the loss, and back, as a training step does, and stops at the first layer whose
    output or gradient is not finite. To see what the step saw, put the random generator back to where it was.
    Running statistics are left as they were; gradients are not.
    """
    if not _is_finite(images):
        return f"the images of the batch are not finite already ({_count(images)})"
    buffers = [(array, array.copy()) for _, array in model.named_buffers()]
    try:
        with _observed(model):
            logits = forward_pass(model, images)
            value = loss(logits, labels)
            if not numpy.isfinite(value):
                return f"every layer's output is finite, but their loss is {value}"
            gradient = loss.backward()
            if not _is_finite(gradient):
                return f"the loss's gradient is the first that is not finite ({_count(gradient)})"
            backward_pass(model, gradient)
    except _FoundError as found:
        return str(found)
    finally:
        for array, values in buffers:
            array[...] = values
        for _, layer in model.named_layers():
            layer._saved = None
    return "run again, every output and gradient of this batch was finite"


def advice_on(batch: Batch, name: str) -> str:
    """What to do about a step that went infinite or NaN on this batch of the data set ``name``."""
    bad = [
        str(number)
        for number, image in zip(batch.indices.tolist(), batch.images, strict=True)
        if not _is_finite(image)
    ]
    if not bad:
        return "lower the learning rate, warm up, or set clip_norm"
    shown = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
    return f"repair or leave out {'image' if len(bad) == 1 else 'images'} {shown} of '{name}'"


def find_non_finite_weight(state: Mapping[str, Array]) -> str | None:
    """The first weight or running statistic of a ``state_dict`` that is not finite, in words; None if all are."""
    for name, array in state.items():
        if array.dtype.kind == "f" and not _is_finite(array):
            return f"'{name}' is not finite ({_count(array)})"
    return None


@contextlib.contextmanager
def _observed(model: Layer) -> Iterator[None]:
    """Inside the block, the first layer that gives something that is not finite raises _FoundError.

    A layer's own ``forward`` and ``backward`` are shadowed by attributes of the object. Layers finish before the
    containers around them, so the innermost layer is the one named.
    """
    watched = {id(layer): (path, layer) for path, layer in model.named_layers()}
    for path, layer in watched.values():
        name = f"layer '{path}' ({_one_line(layer)})" if path else f"the model {type(layer).__name__}"
        object.__setattr__(layer, "forward", _watch_forward(name, layer, layer.forward))
        object.__setattr__(layer, "backward", _watch_backward(name, layer, layer.backward))
    try:
        yield
    finally:
        for _, layer in watched.values():
            object.__delattr__(layer, "forward")
            object.__delattr__(layer, "backward")


def _watch_forward(name: str, layer: Layer, forward: Callable[[Array], Array]) -> Callable[[Array], Array]:
    def watched(x: Array) -> Array:
        largest = float(abs(x.astype("float32")).max()) if x.size else 0.0
        y = forward(x)
        if not _is_finite(y):
            raise _FoundError(
                f"{name} gave the first output that is not finite ({_count(y)}), from inputs of at most "
                f"{largest:.3g}{_parameters_in_words(layer)}"
            )
        return y

    return watched


def _watch_backward(name: str, layer: Layer, backward: Callable[[Array], Array]) -> Callable[[Array], Array]:
    def watched(dy: Array) -> Array:
        dx = backward(dy)
        for key, parameter in layer._own_parameters():
            if not _is_finite(parameter.gradient):
                raise _FoundError(
                    f"{name} gave the first gradient that is not finite: that of its {key} "
                    f"({_count(parameter.gradient)})"
                )
        if dx is not None and not _is_finite(dx):
            raise _FoundError(
                f"{name} gave the first gradient that is not finite: that of its input ({_count(dx)})"
                f"{_parameters_in_words(layer)}"
            )
        return dx

    return watched


def _one_line(layer: Layer) -> str:
    return repr(layer).split("\n", 1)[0] + (" ...)" if "\n" in repr(layer) else "")


def _is_finite(array: Any) -> bool:
    return bool(array_module(array).isfinite(array).all())


def _count(array: Any) -> str:
    return f"{int((~array_module(array).isfinite(array)).sum())} of {array.size} values"


def _parameters_in_words(layer: Layer) -> str:
    sizes = [
        f"{name} of at most {float(abs(parameter.data).max()):.3g}"
        for name, parameter in layer._own_parameters()
        if parameter.size
    ]
    return f" and {', '.join(sizes)}" if sizes else ""
