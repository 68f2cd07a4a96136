"""Neighbouring layers that train as one on a GPU: fewer launches, and fewer passes through memory.

A batch norm adds the shortcut of a residual block and applies ReLU, or leaky ReLU, as it stores what it has
normalized; back, it takes the gradient through the activation by the sign of the result. What the layers are stays
as it is: each has its own parameters and modes, and saves what its own ``backward`` needs, which may be called by
itself. In float32 the results are the bits of the layers one by one; in 16 bits there are fewer roundings.

It is done in training, on a GPU, by containers that call layers one after another, where these are of this
package's own types and nobody has given one of them another ``forward`` or ``backward``. ``layer.fuse(False)``
turns it off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpucnn.device import is_device_array
from gpucnn.layers.activations import LeakyReLU, ReLU
from gpucnn.layers.layer import Layer
from gpucnn.layers.normalization import BatchNorm1d, BatchNorm2d
from gpucnn.ops import Array, array_module

_OWN: dict[type[Layer], Any] = {
    kind: (kind.forward, kind.backward) for kind in (BatchNorm1d, BatchNorm2d, LeakyReLU, ReLU)
}


def forward_through(owner: Layer, layers: Sequence[Layer], x: Array) -> Array:
    """x through each of the layers in turn, those of them together that can be; ``owner`` has them called."""
    if not _may_fuse(owner, x):
        for layer in layers:
            x = layer(x)
        return x
    position = 0
    while position < len(layers):
        layer = layers[position]
        activation = layers[position + 1] if position + 1 < len(layers) else None
        ending = _ending(activation)
        if activation is not None and ending is not None and _is_norm(layer):
            x = _normalized(layer, x, None, activation, ending)
            position += 2
        else:
            x = layer(x)
            position += 1
    return x


def backward_through(owner: Layer, layers: Sequence[Layer], dy: Array) -> Array:
    """dy through each layer's backward, last to first, those of them together that can be."""
    position = len(layers)
    while position > 0:
        layer = layers[position - 1]
        norm = layers[position - 2] if position > 1 else None
        if norm is not None and _may_go_back(owner, norm, layer, dy):
            (y,) = layer._take_saved()
            dy = _denormalized(norm, dy, y, layer)
            position -= 2
        else:
            dy = layer.backward(dy)
            position -= 1
    return dy


def forward_sum(owner: Layer, norm: Layer, x: Array, residual: Array, activation: Layer | None) -> Array | None:
    """activation(norm(x) + residual) in one operation, or None where that cannot be: each by itself then."""
    ending = _ending(activation)
    if not _may_fuse(owner, x) or not _is_norm(norm) or ending is None or x.shape != residual.shape:
        return None
    return _normalized(norm, x, residual, activation, ending)


def backward_sum(owner: Layer, norm: Layer, activation: Layer | None, dy: Array) -> tuple[Array, Array] | None:
    """(the gradient for x, that for the residual) of such a sum, or None where one operation cannot make them."""
    if activation is None or not _may_go_back(owner, norm, activation, dy):
        return None
    (y,) = activation._take_saved()
    residual = array_module(y).empty_like(y)
    return _denormalized(norm, dy, y, activation, out_residual=residual), residual


def _normalized(
    norm: Any, x: Array, residual: Array | None, activation: Layer | None, ending: dict[str, Any]
) -> Array:
    y: Array = norm._located(norm.forward_ending, x, residual, **ending)
    if activation is not None:
        activation._save(y)
    return y


def _may_go_back(owner: Layer, norm: Layer, activation: Layer, dy: Array) -> bool:
    if not _may_fuse(owner, dy) or not _is_norm(norm) or _ending(activation) is None:
        return False
    return norm._saved is not None and activation._saved is not None


def _denormalized(norm: Any, dy: Array, y: Array, activation: Layer, **more: Any) -> Array:
    dx: Array = norm.backward_ending(dy, y=y, **(_ending(activation) or {}), **more)
    return dx


def _may_fuse(owner: Layer, array: Array) -> bool:
    return owner.fuses_children and owner.training and is_device_array(array)


def _is_own(layer: Layer, *kinds: type[Layer]) -> bool:
    """Whether it is exactly one of these layers, in training, and computes as this package has it compute."""
    kind, given = type(layer), vars(layer)
    if kind not in kinds or not layer.training or "forward" in given or "backward" in given:
        return False
    return bool((kind.forward, kind.backward) == _OWN[kind])


def _is_norm(layer: Layer) -> bool:
    return _is_own(layer, BatchNorm2d, BatchNorm1d)


def _ending(layer: Layer | None) -> dict[str, Any] | None:
    """What operations take for an activation whose input has its result's sign, or for none; None for others."""
    if layer is None:
        return {}
    if _is_own(layer, ReLU):
        return {"activation": "relu"}
    if isinstance(layer, LeakyReLU) and _is_own(layer, LeakyReLU) and layer.negative_slope > 0:
        return {"activation": "leaky_relu", "negative_slope": layer.negative_slope}
    return None
