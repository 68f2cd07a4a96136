"""A table of a model's layers: output shapes, parameters and work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from gpucnn.device import on_device, to_device
from gpucnn.errors import ArgumentError
from gpucnn.layers import Conv2d, ConvTranspose2d, Layer, Linear
from gpucnn.layers.precision import forward_pass
from gpucnn.ops import Array


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """One layer without layers inside.

    Attributes:
        path: its place in the model ("features.0").
        kind: its class.
        output_shape: for a batch of one; None where the model's forward does not use the layer.
        parameter_count: its trainable values.
        flops: floating-point operations for one image, a multiplication and its addition counted as two;
            convolutions and linear layers only, next to which the others are small.
    """

    path: str
    kind: str
    output_shape: tuple[int, ...] | None
    parameter_count: int
    flops: int


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """What :func:`summary` returns; ``str()`` of it is the table."""

    name: str
    input_shape: tuple[int, ...]
    layers: tuple[LayerSummary, ...]
    parameter_count: int

    @property
    def flops(self) -> int:
        """Floating-point operations of a forward pass for one image; see :class:`LayerSummary`."""
        return sum(layer.flops for layer in self.layers)

    def __str__(self) -> str:
        rows = [("layer", "kind", "output", "parameters", "FLOPs")]
        for layer in self.layers:
            shape = "not used" if layer.output_shape is None else " x ".join(map(str, layer.output_shape[1:]))
            rows.append((layer.path, layer.kind, shape, f"{layer.parameter_count:,}", f"{layer.flops:,}"))
        rows.append(("total", "", "", f"{self.parameter_count:,}", f"{self.flops:,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
        rule = "-" * max(len(line) for line in lines)
        title = f"{self.name}, input {' x '.join(map(str, self.input_shape))}"
        return "\n".join([title, rule, lines[0], rule, *lines[1:-1], rule, lines[-1]])


def summary(model: Layer, input_shape: Sequence[int] | None = None) -> ModelSummary:
    """The layers of ``model`` with their output shapes, parameters and FLOPs: ``print(summary(model))``.

    One black image goes through the model in evaluation mode; the model is left as it was, except that a
    backward then needs a new forward.

    Args:
        model: a model, or any layer.
        input_shape: (C, H, W) of one image (or (features,)); by default ``model.input_shape``.

    Raises ArgumentError where neither says the input shape, ShapeError where it does not fit the model.
    """
    from gpucnn.training.evaluation import evaluation_mode  # loads training, which making a model does not need

    shape = input_shape if input_shape is not None else getattr(model, "input_shape", None)
    if shape is None:
        raise ArgumentError("this model does not say its input shape; pass input_shape=(channels, height, width)")
    shape = tuple(int(size) for size in shape)
    parameters = model.parameters()
    dtype = parameters[0].dtype if parameters else numpy.dtype(numpy.float32)
    layers = list(model.named_layers())
    leaves = {path: layer for path, layer in layers if not any(True for _ in layer.children())}
    calls: dict[str, list[tuple[tuple[int, ...], int]]] = {path: [] for path in leaves}
    try:
        for path, layer in leaves.items():
            vars(layer)["forward"] = _observed(layer, layer.forward, calls[path])
        with on_device(model.device), evaluation_mode(model):
            forward_pass(model, to_device(numpy.zeros((1, *shape), dtype), model.device))
    finally:
        for layer in leaves.values():
            vars(layer).pop("forward", None)
    return ModelSummary(
        getattr(model, "name", "") or type(model).__name__,
        shape,
        tuple(
            LayerSummary(
                path or "(itself)",
                type(layer).__name__,
                calls[path][-1][0] if calls[path] else None,
                layer.parameter_count,
                sum(flops for _, flops in calls[path]),
            )
            for path, layer in leaves.items()
        ),
        model.parameter_count,
    )


def _observed(
    layer: Layer, forward: Callable[[Array], Array], calls: list[tuple[tuple[int, ...], int]]
) -> Callable[[Array], Array]:
    def observed_forward(x: Array) -> Array:
        y = forward(x)
        calls.append((tuple(y.shape), _flops(layer, tuple(x.shape), tuple(y.shape))))
        return y

    return observed_forward


def _flops(layer: Layer, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> int:
    if isinstance(layer, (Conv2d, Linear)):  # each output value takes one row of the weight
        return 2 * math.prod(output_shape) * math.prod(layer.weight.shape[1:])
    if isinstance(layer, ConvTranspose2d):  # each input value is spread through one row of the weight
        return 2 * math.prod(input_shape) * math.prod(layer.weight.shape[1:])
    return 0


def _aligned(row: tuple[Any, ...], widths: list[int]) -> list[str]:
    return [
        cell.ljust(width) if column < 3 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
