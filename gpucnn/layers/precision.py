"""The precision that a model computes in: float32 and float64 throughout, or 16 bits beside float32 weights.

In "bfloat16" and "float16" (Micikevicius et al., "Mixed precision training", 2018) images, activations and their
gradients are stored in 16 bits, and convolutions and linear layers read copies of their weights in 16 bits. All
that adds up over a training stays float32: the weights themselves, the gradients for them, the optimizer, batch
norm's parameters and statistics, and the loss. Inside an operation sums run in float32.

There are two borders, and both are in this file: :func:`forward_pass` brings the copies up to date, converts the
images and gives float32 logits; :func:`backward_pass` converts the gradient for the logits. Between them an array
is what the layer before made it, and ``parameter.add_gradient`` adds what comes in 16 bits to a float32 array.
"""

from __future__ import annotations

from typing import Any

import numpy

from gpucnn.device import on_device, split_name
from gpucnn.errors import ArgumentError
from gpucnn.layers.layer import Layer
from gpucnn.names import look_up
from gpucnn.ops import Array
from gpucnn.parameters import drop_narrow_copies, refresh_narrow_copies

WIDE = ("float32", "float64")
NARROW = ("bfloat16", "float16")
PRECISIONS = (*WIDE, "tf32", *NARROW)
"""The names that :func:`set_precision` knows."""


def check_precision(name: str, device: str, reason: str = "") -> None:
    """Raise ArgumentError, with the reason, unless a model on ``device`` ("cuda:0") computes in ``name``."""
    look_up("precision", name, dict.fromkeys(PRECISIONS))
    if name in WIDE:
        return
    known = " or ".join(WIDE)
    if split_name(device)[0] != "cuda":
        raise ArgumentError(
            f"precision '{name}' is arithmetic of a GPU's tensor cores, and the device is '{device}'"
            f"{f' ({reason})' if reason else ''}, which computes in {known}; choose one of these with "
            "--precision, or precision=..."
        )
    if name == "tf32":
        raise ArgumentError(
            "this version of gpucnn has no convolutions in TF32; choose float32, bfloat16 or float16 with "
            "--precision, or precision=..."
        )


def set_precision(model: Layer, name: str) -> None:
    """Let ``model`` compute in the precision ``name`` from now on, in training and in evaluation.

    Its parameters become float32 (float64 for "float64"); what is saved of it are these. Make its optimizer
    afterwards, and move it to its device before.

    Raises ArgumentError for an unknown precision, or one that the model's device does not compute in.
    """
    check_precision(name, model.device)
    parameters = model.parameters()
    with on_device(model.device):
        drop_narrow_copies(parameters)
        model.to(dtype="float64" if name == "float64" else "float32")
        model.narrow_dtype = name if name in NARROW else None
        if model.narrow_dtype is not None:
            _require_dtype(name)
            refresh_narrow_copies(parameters, name)  # so that a layer called by itself knows its dtype, too


def precision_of(model: Layer) -> str:
    """The name of the precision that ``model`` computes in: by default its parameters' dtype."""
    if model.narrow_dtype is not None:
        return model.narrow_dtype
    return str(next((parameter.dtype for parameter in model.parameters()), numpy.dtype("float32")))


def forward_pass(model: Layer, images: Array) -> Array:
    """The logits of ``images``, which have the dtype of the parameters, as have the logits."""
    if model.narrow_dtype is None:
        return model(images)
    check_precision(model.narrow_dtype, model.device)  # it may have been moved to the CPU
    refresh_narrow_copies(model.parameters(), model.narrow_dtype)
    logits: Any = model(_converted(images, model.narrow_dtype))
    return logits.astype("float32")


def backward_pass(model: Layer, gradient: Array) -> None:
    """Add to the gradients of all parameters, given the gradient for the logits of the last forward pass."""
    model.backward(gradient if model.narrow_dtype is None else _converted(gradient, model.narrow_dtype))


def _converted(array: Array, dtype: str) -> Array:
    """``array`` in 16 bits. What is too large becomes infinite, which the loss or the gradient then shows."""
    with numpy.errstate(over="ignore"):
        return array.astype(dtype)


def _require_dtype(name: str) -> None:
    """Raise ArgumentError unless NumPy knows the dtype: bfloat16 comes with the package ml_dtypes."""
    if name == "bfloat16":
        try:
            import ml_dtypes  # noqa: F401  # it registers the name
        except ImportError:
            raise ArgumentError(
                "precision 'bfloat16' needs the package ml_dtypes: pip install ml_dtypes, or choose float16"
            ) from None
