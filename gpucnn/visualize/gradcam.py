"""Grad-CAM: where in the image the evidence for a class is.

Selvaraju et al., "Grad-CAM: visual explanations from deep networks via gradient-based localization", ICCV 2017:
the channels of a layer's output, each weighed by the mean of the class score's gradient over it, added up, and
what is positive of that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.device import on_device, to_cpu, to_device
from gpucnn.errors import ArgumentError, ShapeError
from gpucnn.layers import Layer
from gpucnn.layers.precision import backward_pass, forward_pass
from gpucnn.ops import Array, array_module
from gpucnn.training.evaluation import modes_kept
from gpucnn.visualize.figure import new_figure, save_figure


class _ReachedError(Exception):
    """Ends the backward pass at the layer looked at: nothing before it is needed."""


def grad_cam(
    model: Layer, image: Any, class_index: int | None = None, layer_path: str | None = None
) -> NDArray[numpy.float32]:
    """The heat map of a class over an image, (H, W), 0 .. 1, a NumPy array wherever the model computes.

    Args:
        model: gives logits (N, classes). It computes as in evaluation and is left as it was, gradients included.
        image: one input as the model takes it (preprocessed), (C, H, W) or (1, C, H, W).
        class_index: whose evidence; the predicted class unless given.
        layer_path: the layer whose output is looked at; by default the last whose output is still larger than
            1 x 1. ``model.named_layers()`` lists the paths.

    Raises ArgumentError for a class or path that does not exist, ShapeError where the image is none or the
    layer's output is no image.
    """
    inputs = to_cpu(image)
    if inputs.ndim == 3:
        inputs = inputs[None]
    if inputs.ndim != 4 or len(inputs) != 1:
        raise ShapeError(f"Grad-CAM looks at one image, (C, H, W) or (1, C, H, W); got shape {numpy.shape(image)}")
    layers = dict(model.named_layers())
    if layer_path is not None and layer_path not in layers:
        raise ArgumentError(f"the model has no layer '{layer_path}'; it has {', '.join(filter(None, layers))}")
    outputs: dict[str, Array] = {}
    with on_device(model.device), _evaluation_with_backward(model), _outputs_recorded(layers, outputs):
        logits = forward_pass(model, to_device(inputs, model.device))
        target = layer_path if layer_path is not None else _last_with_extent(layers, outputs)
        if outputs[target].ndim != 4:
            raise ShapeError(
                f"layer '{target}' gives an output of shape {outputs[target].shape}, not an image (1, C, H, W); "
                "choose an earlier layer"
            )
        if class_index is None:
            class_index = int(logits.argmax())
        if not 0 <= class_index < logits.shape[1]:
            raise ArgumentError(f"class {class_index} does not exist: classes go from 0 to {logits.shape[1] - 1}")
        score_gradient = array_module(logits).zeros_like(logits)
        score_gradient[0, class_index] = 1
        gradient = to_cpu(_gradient_at(model, layers[target], score_gradient))
    weights = _not_narrow(gradient).mean(axis=(2, 3))[0]
    heat = numpy.maximum(numpy.tensordot(weights, _not_narrow(to_cpu(outputs[target]))[0], axes=1), 0)
    enlarged = enlarge(heat, inputs.shape[2:])
    peak = float(numpy.max(enlarged))
    return (enlarged / peak if peak > 0 else enlarged).astype(numpy.float32)


def draw_grad_cam(
    image: NDArray[Any], heat: NDArray[Any], path: str | Path, title: str = "", strength: float = 0.5
) -> None:
    """Draw the image beside the image under its heat map, as a PNG.

    Args:
        image: (height, width), (height, width, 1) or (height, width, 3), uint8.
        heat: what :func:`grad_cam` gives; brought to the image's size.
        path: the file to write.
        title: a heading.
        strength: how much of the picture the heat map covers, 0 .. 1.
    """
    picture: NDArray[Any] = to_cpu(image)
    if picture.ndim == 3 and picture.shape[2] == 1:
        picture = picture[..., 0]
    if picture.ndim not in (2, 3) or (picture.ndim == 3 and picture.shape[2] != 3):
        raise ShapeError(f"an image to draw is (height, width) or (height, width, 3), got shape {picture.shape}")
    if not 0 <= strength <= 1:
        raise ArgumentError(f"strength must be from 0 to 1, got {strength!r}")
    figure = new_figure(8, 4 * picture.shape[0] / picture.shape[1] + (0.8 if title else 0.4))
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
        axes.set_axis_off()
    right.imshow(enlarge(heat, picture.shape[:2]), cmap="turbo", vmin=0, vmax=1, alpha=strength)
    left.set_title("image", fontsize=10)
    right.set_title("evidence", fontsize=10)
    if title:
        figure.suptitle(title)
    save_figure(figure, path)


def enlarge(values: NDArray[Any], size: tuple[int, ...]) -> NDArray[numpy.float64]:
    """Values (h, w) interpolated linearly to ``size`` (H, W), by pixel centres (align_corners=False)."""
    rows, columns = (_interpolation(source, target) for source, target in zip(values.shape, size, strict=True))
    result: NDArray[numpy.float64] = rows @ to_cpu(values).astype(numpy.float64) @ columns.T
    return result


def _interpolation(source: int, target: int) -> NDArray[numpy.float64]:
    """The (target, source) matrix of linear interpolation along one axis."""
    place = numpy.clip((numpy.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    lower = numpy.floor(place).astype(int)
    upper = numpy.minimum(lower + 1, source - 1)
    matrix = numpy.zeros((target, source))
    numpy.add.at(matrix, (numpy.arange(target), lower), 1 - (place - lower))
    numpy.add.at(matrix, (numpy.arange(target), upper), place - lower)
    return matrix


def _last_with_extent(layers: dict[str, Layer], outputs: dict[str, Array]) -> str:
    """The path of the layer, not a container, that was last to give an image larger than 1 x 1."""
    for path in reversed(outputs):
        output = outputs[path]
        if output.ndim == 4 and output.shape[2] * output.shape[3] > 1 and not any(layers[path].children()):
            return path
    raise ArgumentError("no layer of the model gives an image larger than 1 x 1; Grad-CAM has nothing to show")


def _not_narrow(array: NDArray[Any]) -> NDArray[Any]:
    """``array``, one of 16 bits as float32."""
    return array.astype(numpy.float32) if array.dtype.itemsize == 2 else array


def _gradient_at(model: Layer, layer: Layer, score_gradient: Array) -> Array:
    """The gradient for the output of ``layer``."""
    seen: list[Array] = []

    def reached(dy: Array) -> Array:
        seen.append(dy)
        raise _ReachedError

    own = vars(layer).get("backward")
    object.__setattr__(layer, "backward", reached)
    try:
        backward_pass(model, score_gradient)
    except _ReachedError:
        pass
    finally:
        del vars(layer)["backward"]
        if own is not None:
            object.__setattr__(layer, "backward", own)
    if not seen:
        raise ArgumentError(f"the class score does not depend on layer '{layer.path}'; choose another layer")
    return seen[0]


@contextlib.contextmanager
def _outputs_recorded(layers: dict[str, Layer], outputs: dict[str, Array]) -> Iterator[None]:
    """Inside the block, ``outputs`` gets what each layer gave last, in the order in which they finished."""

    def recorded(path: str, layer: Layer) -> Any:
        forward = layer.forward

        def forward_and_record(x: Array) -> Array:
            y = forward(x)
            outputs.pop(path, None)
            outputs[path] = y.copy()  # a layer that works in place may change it later
            return y

        return forward_and_record

    for path, layer in layers.items():
        object.__setattr__(layer, "forward", recorded(path, layer))
    try:
        yield
    finally:
        for layer in layers.values():
            vars(layer).pop("forward", None)


@contextlib.contextmanager
def _evaluation_with_backward(model: Layer) -> Iterator[None]:
    """Inside the block ``model`` computes as in evaluation and yet can go backward; then all is as before.

    Parameters are frozen, so that their gradients stay what they are.
    """
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with modes_kept(model):
        model.eval()
        model.requires_grad_(False)
        for _, layer in model.named_layers():
            layer.keeps_for_backward = True
        try:
            yield
        finally:
            for _, layer in model.named_layers():
                layer._saved = None
            for parameter, requires_grad in parameters:
                parameter.requires_grad = requires_grad
