"""Networks that run channels-last: their numbers those of contiguous ones, and every image between layers so.

On a GPU alone does it show in which order CuPy lays out what layers make beside the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy

from gpucnn import layers, manual_seed
from gpucnn.device import to_device
from gpucnn.layers.precision import backward_pass, forward_pass, set_precision
from gpucnn.ops.memory_format import is_channels_last
from scripts.gpu_validation.bench import Bench

_ROUNDINGS = {"tf32": 2.0**-7, "float16": 2.0**-7, "bfloat16": 2.0**-4}
"""How far logits and gradients may be from the contiguous network's, as a share of the largest of them all."""


def network() -> layers.Sequential:
    """Of every kind of layer that keeps or begins the format, but none in which a rounding decides anything."""
    body = layers.Sequential(layers.Conv2d(16, 16, 3, padding=1, bias=False), layers.BatchNorm2d(16))
    return layers.Sequential(
        layers.Conv2d(3, 16, 3, padding=1),
        layers.BatchNorm2d(16),
        layers.SiLU(),
        layers.Residual(body, activation=layers.Tanh()),
        layers.AvgPool2d(2),
        layers.Concatenate(layers.Conv2d(16, 8, 3), layers.Conv2d(16, 24, 3)),
        layers.ConvTranspose2d(32, 16, 2, stride=2),
        layers.Dropout(0.2),
        layers.AdaptiveAvgPool2d(2),
        layers.Flatten(),
        layers.Linear(64, 10),
    )


def check_networks(bench: Bench) -> None:
    """A step's logits and gradients, in every precision of tensor cores that is wanted."""
    for precision in _ROUNDINGS:
        if precision not in bench.dtypes and not (precision == "tf32" and "float32" in bench.dtypes):
            continue
        expected = [bench.get(array).astype("f8") for array in _step(bench, precision, False)]
        bound = _ROUNDINGS[precision] * max(float(numpy.abs(array).max()) for array in expected)
        bench.check(
            "training step, channels-last", "network", "float32" if precision == "tf32" else precision,
            lambda precision=precision: _step(bench, precision, True), expected, [bound] * len(expected),
            algorithm=precision if precision == "tf32" else "",
        )  # fmt: skip


def _step(bench: Bench, precision: str, channels_last: bool) -> tuple[Any, ...]:
    """(logits, every gradient). Raises RuntimeError where an image between layers does not lie as it should."""
    manual_seed(bench.seed)
    model = network().to("cuda")
    set_precision(model, precision, channels_last=channels_last)
    model.skip_input_gradient()
    wrong: list[str] = []
    if channels_last:
        for path, layer in model.named_layers():
            _watch(path, layer, wrong)
    numbers = numpy.random.default_rng([bench.seed, 6])
    logits = forward_pass(model, to_device(numbers.standard_normal((4, 3, 12, 12)).astype("float32"), "cuda"))
    backward_pass(model, to_device(numbers.standard_normal(logits.shape).astype("float32"), "cuda"))
    if wrong:
        raise RuntimeError(f"not channels-last: {', '.join(wrong)}")
    return logits, *(parameter.gradient for parameter in model.parameters())


def _watch(path: str, layer: layers.Layer, wrong: list[str]) -> None:
    """Have the layer note, in ``wrong``, the images that it gives and that lie otherwise."""
    for direction in ("forward", "backward"):
        name = f"{direction} of layer '{path}' ({type(layer).__name__})"
        vars(layer)[direction] = _watched(getattr(layer, direction), name, wrong)


def _watched(made_by: Callable[[Any], Any], name: str, wrong: list[str]) -> Callable[[Any], Any]:
    def watched(array: Any) -> Any:
        made = made_by(array)
        if made is not None and made.ndim == 4 and not is_channels_last(made):
            wrong.append(name)
        return made

    return watched


CHECKS = {"channels-last networks": check_networks}
