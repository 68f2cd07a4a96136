"""Checks a layer's backward against central differences of its forward, in float64.

Chainer's directional form: for random directions v of the input and all parameters together, and a random
weighting g of the output, <g, (f(x + e v) - f(x - e v)) / (2 e)> must equal <backward(g), v>. One direction
costs two forward passes, whatever the number of parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy

from gpucnn.device import device_of, to_device
from gpucnn.layers.layer import Layer


def directional_errors(
    layer: Layer,
    x: Any,
    *,
    directions: int = 4,
    step: float = 1e-6,
    seed: int = 0,
    before_forward: Callable[[], None] | None = None,
) -> list[float]:
    """The relative error of the directional derivative, for each of some random directions.

    Args:
        layer: converted to float64 in place; its buffers (running statistics) move as forward moves them.
        x: the input, any strides, on the layer's device; converted to float64 with its strides kept.
        directions: how many random directions to try.
        step: the difference e.
        seed: of the random directions and weighting.
        before_forward: called before every forward, for instance to rewind a dropout's generator.

    Returns:
        |numeric - analytic| / max(1, |numeric|, |analytic|) for each direction. A correct backward stays near
        1e-9 for smooth layers; a wrong one is of order 1.
    """
    layer.to(dtype=numpy.float64)
    x = x.astype(numpy.float64, order="K")
    place = device_of(x)
    generator = numpy.random.default_rng(seed)
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]

    def forward(value: Any) -> Any:
        if before_forward is not None:
            before_forward()
        return layer.forward(value.copy(order="K"))

    def random(shape: tuple[int, ...]) -> Any:
        return to_device(generator.standard_normal(shape), place)

    weighting = random(forward(x).shape)
    layer.zero_grad()
    forward(x)
    dx = layer.backward(weighting.copy())
    errors = []
    for _ in range(directions):
        v = random(x.shape)
        parameter_directions = [random(parameter.shape) for parameter in parameters]
        analytic = float((dx * v).sum())
        for parameter, direction in zip(parameters, parameter_directions, strict=True):
            analytic += float((parameter.gradient * direction).sum())
        values = []
        originals = [parameter.data.copy() for parameter in parameters]
        for sign in (step, -step):
            for parameter, original, direction in zip(parameters, originals, parameter_directions, strict=True):
                parameter.data[...] = original + sign * direction
            values.append(forward(x + sign * v))
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.data[...] = original
        numeric = float((weighting * (values[0] - values[1])).sum()) / (2 * step)
        errors.append(abs(numeric - analytic) / max(1.0, abs(numeric), abs(analytic)))
    return errors


def check_gradients(layer: Layer, x: Any, *, tolerance: float = 1e-6, **options: Any) -> None:
    """Raise AssertionError unless every directional error of ``layer`` at ``x`` is within ``tolerance``.

    Takes the options of :func:`directional_errors`.
    """
    errors = directional_errors(layer, x, **options)
    if not all(error <= tolerance for error in errors):
        raise AssertionError(
            f"backward of {layer} disagrees with central differences: relative errors "
            f"{[f'{error:.2e}' for error in errors]}, tolerance {tolerance:.0e}"
        )
