"""Neighbouring layers that train as one on a GPU: fewer launches, and fewer passes through memory.

A batch norm adds the shortcut of a residual block and applies ReLU, leaky ReLU or ReLU6 as it stores what it has
normalized; back, it takes the gradient through the activation by comparing the result. A fully connected layer
does so, too, with ReLU, leaky ReLU, sigmoid and tanh, whose slopes their results say, and a convolution forward.
Where :func:`gpucnn_kernels.conv2d_max_pool2d_pays` says so a convolution also pools: its own result, several times
larger, is then stored nowhere, and the gradient goes back through pooling and activation at once.

Where branches have read the same input, as a residual block's body and shortcut have, the one that goes back last
adds the others' gradient to its own as its first convolution makes that: the sum takes no pass of its own, and in
16 bits it is rounded once and not twice.

What the layers are stays as it is: each has its own parameters and modes, and saves what its own ``backward``
needs, which may be called by itself. That is the result also where leaky ReLU by itself would keep its input, and
a pooling none of both: nobody is to overwrite what such layers gave before they have gone back. In float32 the
results are the bits of the layers one by one, but where the order of a sum is another: of a convolution that
pools, and of a fully connected layer that another way is faster for with its activation. In 16 bits there are
fewer roundings.

It is done in training, on a GPU, by containers that call layers one after another, where these are of this
package's own types and nobody has given one of them another ``forward`` or ``backward``. ``layer.fuse(False)``
turns it off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gpucnn_kernels as kernels
from gpucnn.device import is_device_array
from gpucnn.layers.activations import LeakyReLU, ReLU, ReLU6, Sigmoid, Tanh
from gpucnn.layers.convolution import Conv2d
from gpucnn.layers.layer import Layer
from gpucnn.layers.linear import Linear
from gpucnn.layers.normalization import BatchNorm1d, BatchNorm2d
from gpucnn.layers.pooling import MaxPool2d
from gpucnn.ops import Array, array_module
from gpucnn.ops.checks import own_precision
from gpucnn.ops.memory_format import add, empty_image, is_channels_last
from gpucnn_kernels.problem import Pool2dProblem, ProblemError

_OWN: dict[type[Layer], Any] = {
    kind: (kind.forward, kind.backward)
    for kind in (BatchNorm1d, BatchNorm2d, Conv2d, LeakyReLU, Linear, MaxPool2d, ReLU, ReLU6, Sigmoid, Tanh)
}


def forward_through(owner: Layer, layers: Sequence[Layer], x: Array) -> Array:
    """x through each of the layers in turn, those of them together that can be; ``owner`` has them called."""
    if not _may_fuse(owner, x):
        for layer in layers:
            x = layer(x)
        return x
    position = 0
    while position < len(layers):
        layer, *after = layers[position : position + 3]
        if after and _may_end(layer, after[0]):
            x = _ended(layer, x, after[0])
            position += 2
        elif after and _is_own(layer, Conv2d):
            x, done = _convolved(layer, after, x)
            position += done
        else:
            x = layer(x)
            position += 1
    return x


def backward_through(owner: Layer, layers: Sequence[Layer], dy: Array, residual: Array | None = None) -> Array:
    """dy through each layer's backward, last to first, those of them together that can be.

    To what comes out of the first ``residual`` is added, the gradient that another branch has for the same input.
    """
    if residual is None:
        return _backward_through(owner, layers, dy)
    if not layers:
        return add(dy, residual)
    first: Any = layers[0]
    after = layers[1:]
    inside = first.steps()
    if inside[0] is not first:
        return backward_through(first, inside, _backward_through(owner, after, dy), residual)
    if not _is_own(first, Conv2d):
        return add(_backward_through(owner, layers, dy), residual)
    dy = _backward_through(owner, after, dy)
    if _may_fuse(owner, dy) and _may_add(first, dy, residual):
        added: Array = first.backward_adding(dy, residual)
        return added
    dx: Array = first.backward(dy)
    dx += residual  # in place: a convolution's result is nobody else's
    return dx


def _backward_through(owner: Layer, layers: Sequence[Layer], dy: Array) -> Array:
    position = len(layers)
    while position > 0:
        layer = layers[position - 1]
        before = layers[position - 2] if position > 1 else None
        if before is not None and _may_go_back(owner, before, layer, dy):
            (y,) = layer._take_saved()
            dy = _back_through(before, dy, y, layer)
            position -= 2
        elif before is not None and _may_unpool(owner, before, layer, dy):
            dy = _unpooled(layer, before, dy)
            position -= 2
        else:
            dy = layer.backward(dy)
            position -= 1
    return dy


def forward_sum(owner: Layer, norm: Layer, x: Array, residual: Array, activation: Layer | None) -> Array | None:
    """activation(norm(x) + residual) in one operation, or None where that cannot be: each by itself then."""
    if not _may_fuse(owner, x) or not _is_norm(norm) or x.shape != residual.shape:
        return None
    if activation is not None and _of_norm(activation) is None:
        return None
    return _ended(norm, x, activation, residual=residual)


def backward_sum(owner: Layer, norm: Layer, activation: Layer | None, dy: Array) -> tuple[Array, Array] | None:
    """(the gradient for x, that for the residual) of such a sum, or None where one operation cannot make them."""
    if activation is None or not _is_norm(norm) or not _may_go_back(owner, norm, activation, dy):
        return None
    (y,) = activation._take_saved()
    residual = empty_image(y.shape, y, is_channels_last(y)) if y.ndim == 4 else array_module(y).empty_like(y)
    return _back_through(norm, dy, y, activation, out_residual=residual), residual


def _may_end(layer: Layer, activation: Layer) -> bool:
    """Whether a batch norm, or a fully connected layer, takes the activation after it."""
    return (_is_norm(layer) or _is_own(layer, Linear)) and _ending(layer, activation) is not None


def _ending(layer: Layer, activation: Layer) -> dict[str, Any] | None:
    """What the layer's operation takes for the activation after it; None where it does not take that."""
    return _of_norm(activation) if _is_norm(layer) else _by_result(activation)


def _ended(layer: Any, x: Array, activation: Layer | None, **more: Any) -> Array:
    """What the layer and the activation make of x; each saves what it would by itself."""
    ending = {} if activation is None else _ending(layer, activation) or {}
    y: Array = layer._located(layer.forward_ending, x, **ending, **more)
    if activation is not None:
        activation._save(y)
    return y


def _may_add(convolution: Any, dy: Array, residual: Array) -> bool:
    """Whether the convolution makes a gradient for its input that can have ``residual`` added to it."""
    if convolution._saved is None or not convolution.input_needs_gradient:
        return False
    return bool(residual.shape == convolution._saved[0].shape and residual.dtype == dy.dtype)


def _may_go_back(owner: Layer, layer: Layer, activation: Layer, dy: Array) -> bool:
    if not _may_fuse(owner, dy) or not _may_end(layer, activation):
        return False
    if isinstance(layer, Linear) and not layer.trains_all:
        return False
    return layer._saved is not None and activation._saved is not None


def _back_through(layer: Any, dy: Array, y: Array, activation: Layer, **more: Any) -> Array:
    dx: Array = layer.backward_ending(dy, y=y, **(_ending(layer, activation) or {}), **more)
    return dx


def _convolved(convolution: Any, after: Sequence[Layer], x: Array) -> tuple[Array, int]:
    """What a convolution makes of x together with the layers after it, and how many layers have had their turn."""
    ending = _by_result(after[0])
    activation, rest = (None, after) if ending is None else (after[0], after[1:])
    if rest and _is_own(rest[0], MaxPool2d):
        pool = _paying_pool(convolution, rest[0], x)
        if pool is not None:
            return _convolved_and_pooled(convolution, activation, rest[0], pool, x), len(after) - len(rest) + 2
    if activation is None or ending is None:
        return convolution(x), 1
    return _ended(convolution, x, activation), 2


def _paying_pool(convolution: Any, pool: Any, x: Array) -> Pool2dProblem | None:
    """The pooling of what the convolution makes of x, where one kernel for both pays."""
    if convolution.algorithm["forward"] != "auto" or x.ndim != 4 or x.shape[1] != convolution.in_channels:
        return None
    try:
        problem = convolution._problem(x)
        pooling: Pool2dProblem = pool.problem(problem.output_shape)
    except ProblemError:  # the layer whose error it is will say it
        return None
    options = {"precision": own_precision(x.dtype), "channels_last": is_channels_last(x)}
    return pooling if kernels.conv2d_max_pool2d_pays(problem, pooling, x.dtype, **options) else None


def _convolved_and_pooled(
    convolution: Any, activation: Layer | None, pool: Layer, problem: Pool2dProblem, x: Array
) -> Array:
    """The convolution's result is stored nowhere: the activation has what its winners give, to go back with."""
    ending = {} if activation is None else _by_result(activation) or {}
    y, argmax = convolution._located(convolution.forward_pooled, x, problem, **ending)
    if activation is not None:
        vars(activation)["_saved"] = PooledResult(y, convolution, x, ending)
    several = problem.C > 1 and problem.H * problem.W > 1
    pool._save(argmax, problem.input_shape, several and (convolution.channels_last or is_channels_last(x)))
    return y


class PooledResult:
    """What an activation saves whose result was pooled before it was stored.

    Where its backward is called by itself, the result is computed then.

    Attributes:
        y: the pooled result.
    """

    def __init__(self, y: Array, convolution: Conv2d, x: Array, ending: dict[str, Any]) -> None:
        self.y = y
        self._convolution, self._x, self._ending = convolution, x, ending

    def __call__(self) -> tuple[Array]:
        """What the activation saves when it is called by itself."""
        convolution, saved = self._convolution, self._convolution._saved
        y = convolution.forward_ending(self._x, **self._ending)
        vars(convolution)["_saved"] = saved
        return (y,)


def _may_unpool(owner: Layer, activation: Layer, pool: Layer, dy: Array) -> bool:
    if not _may_fuse(owner, dy) or not _is_own(pool, MaxPool2d) or pool._saved is None:
        return False
    return isinstance(activation._saved, PooledResult) and _by_result(activation) is not None


def _unpooled(pool: Any, activation: Layer, dy: Array) -> Array:
    y = activation._saved.y
    vars(activation)["_saved"] = None
    dx: Array = pool.backward_beginning(dy, y=y, **(_by_result(activation) or {}))
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


def _by_sign(layer: Layer) -> dict[str, Any] | None:
    """What operations take for an activation whose input has the sign of its result; None for other layers."""
    if _is_own(layer, ReLU):
        return {"activation": "relu"}
    if isinstance(layer, LeakyReLU) and _is_own(layer, LeakyReLU) and layer.negative_slope > 0:
        return {"activation": "leaky_relu", "negative_slope": layer.negative_slope}
    return None


def _of_norm(layer: Layer) -> dict[str, Any] | None:
    """What a batch norm takes for an activation whose slope a comparison of its result says; None for others."""
    return {"activation": "relu6"} if _is_own(layer, ReLU6) else _by_sign(layer)


def _by_result(layer: Layer) -> dict[str, Any] | None:
    """What operations take for an activation whose slope its result says; None for other layers."""
    if _is_own(layer, Sigmoid):
        return {"activation": "sigmoid"}
    if _is_own(layer, Tanh):
        return {"activation": "tanh"}
    return _by_sign(layer)
