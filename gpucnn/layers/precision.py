"""The precision that a model computes in: float32, float64, tf32 products, or 16 bits beside float32 weights.

In "tf32" everything is stored in float32, and convolutions of one group multiply, on a GPU's tensor cores, numbers
rounded to 10 fraction bits, adding up in float32.

In "bfloat16" and "float16" (Micikevicius et al., "Mixed precision training", 2018) images, activations and their
gradients are stored in 16 bits, and convolutions and linear layers read copies of their weights in 16 bits. All
that adds up over a training stays float32: the weights themselves, the gradients for them, the optimizer, batch
norm's parameters and statistics, and the loss. Inside an operation sums run in float32.

They are a GPU's, where they save time and memory. On the CPU they save nothing: the same numbers are rounded at
the same places, so that what is trained on a GPU can be tried, tested and compared without one.

There are two borders, and both are in this file: :func:`forward_pass` brings the copies up to date, converts the
images and gives float32 logits; :func:`backward_pass` converts the gradient for the logits. Between them an array
is what the layer before made it, and ``parameter.add_gradient`` adds what comes in 16 bits to a float32 array.

Tensor cores read channels-last arrays where they lie, and a copy of others. So in tf32 and 16 bits convolutions
write their outputs channels-last, whatever their inputs are, and what follows keeps that to the layer that
flattens images to vectors, whose features are in the same order as ever: see :mod:`gpucnn.ops.memory_format`.
Their weights lie so, too, and with them gradients, copies in 16 bits and an optimizer's statistics.
"""

from __future__ import annotations

from typing import Any

import numpy

from gpucnn.device import on_device
from gpucnn.errors import ArgumentError
from gpucnn.layers.convolution import Conv2d, ConvTranspose2d
from gpucnn.layers.layer import Layer
from gpucnn.names import look_up
from gpucnn.ops import Array
from gpucnn.parameters import drop_narrow_copies, refresh_narrow_copies
from gpucnn_kernels.runtime import ITEM_SIZES

WIDE = ("float32", "float64")
NARROW = ("bfloat16", "float16")
PRECISIONS = (*WIDE, "tf32", *NARROW)
"""The names that :func:`set_precision` knows."""

TF32 = "tensor_tf32"
"""What the backends call the algorithm."""


def check_precision(name: str) -> None:
    """Raise ArgumentError unless ``name`` is a precision, and what it needs is installed."""
    look_up("precision", name, dict.fromkeys(PRECISIONS))
    if name == "bfloat16":
        try:
            import ml_dtypes  # noqa: F401  # it registers the name
        except ImportError:
            raise ArgumentError(
                "precision 'bfloat16' needs the package ml_dtypes: pip install ml_dtypes, or choose float16"
            ) from None


def usable_precisions() -> tuple[str, ...]:
    """The names of those whose dtypes are installed."""

    def usable(name: str) -> bool:
        try:
            check_precision(name)
        except ArgumentError:
            return False
        return True

    return tuple(filter(usable, PRECISIONS))


def set_precision(model: Layer, name: str, *, channels_last: bool | None = None) -> None:
    """Let ``model`` compute in the precision ``name`` from now on, in training and in evaluation.

    Its parameters become float32 (float64 for "float64"); what is saved of it are these. Make its optimizer
    afterwards, and move it to its device before.

    ``channels_last`` says whether images between its layers, and weights of convolutions, lie so in a GPU's
    memory; by default they do in the precisions of tensor cores. Results differ by rounding alone, and what is
    saved is the same.

    Raises ArgumentError for an unknown precision, or one whose dtype is not installed.
    """
    check_precision(name)
    parameters = model.parameters()
    with on_device(model.device):
        drop_narrow_copies(parameters)
        model.to(dtype="float64" if name == "float64" else "float32")
        model.narrow_dtype = name if name in NARROW else None
        _multiply_in_tf32(model, name == "tf32")
        _lay_channels_last(model, name, name not in WIDE if channels_last is None else channels_last)
        if model.narrow_dtype is not None:
            refresh_narrow_copies(parameters, name)  # so that a layer called by itself knows its dtype, too


def precision_of(model: Layer) -> str:
    """The name of the precision that ``model`` computes in: by default its parameters' dtype."""
    if model.narrow_dtype is not None:
        return model.narrow_dtype
    if any(isinstance(layer, Conv2d) and TF32 in layer.algorithm.values() for _, layer in model.named_layers()):
        return "tf32"
    return str(next((parameter.dtype for parameter in model.parameters()), numpy.dtype("float32")))


def _multiply_in_tf32(model: Layer, wanted: bool) -> None:
    """Give convolutions that leave the choice of algorithm to us the one in tf32, or back to that choice."""
    before, after = ("auto", TF32) if wanted else (TF32, "auto")
    for _, layer in model.named_layers():
        if isinstance(layer, Conv2d) and layer.groups == 1:
            layer.algorithm = {
                direction: after if algorithm == before else algorithm
                for direction, algorithm in layer.algorithm.items()
            }


def _lay_channels_last(model: Layer, name: str, wanted: bool) -> None:
    """Have convolutions lay out what they make channels-last, or as their inputs lie, and lay their weights so.

    Weights whose channels do not fill pieces of 16 bytes stay contiguous: kernels fill them up in a copy anyway.
    """
    channels = 16 // ITEM_SIZES[name if name in NARROW else "float32"]
    for _, layer in model.named_layers():
        if isinstance(layer, (Conv2d, ConvTranspose2d)):
            layer.channels_last = wanted
            layer.weight.lay(wanted and layer.weight.shape[1] % channels == 0)


def forward_pass(model: Layer, images: Array) -> Array:
    """The logits of ``images``, which have the dtype of the parameters, as have the logits."""
    logits: Any = narrow_forward_pass(model, images)
    return logits if model.narrow_dtype is None else logits.astype("float32")


def narrow_forward_pass(model: Layer, images: Array) -> Array:
    """:func:`forward_pass` without its border: logits as the model makes them, in 16 bits where it computes so."""
    if model.narrow_dtype is None:
        return model(images)
    refresh_narrow_copies(model.parameters(), model.narrow_dtype)
    return model(_converted(images, model.narrow_dtype))


def backward_pass(model: Layer, gradient: Array) -> None:
    """Add to the gradients of all parameters, given the gradient for the logits of the last forward pass."""
    model.backward(gradient if model.narrow_dtype is None else _converted(gradient, model.narrow_dtype))


def _converted(array: Array, dtype: str) -> Array:
    """``array`` in 16 bits. What is too large becomes infinite, which the loss or the gradient then shows."""
    if str(array.dtype) == dtype:
        return array
    with numpy.errstate(over="ignore"):
        return array.astype(dtype)
