"""Networks that only predict: what training needs apart is folded together.

In evaluation a batch norm is y = (x - mean) * s + beta with s = gamma / sqrt(variance + eps), fixed numbers for
each channel. After a convolution or a linear layer, whose rows of the weight each make one channel, it is the same
layer with weight * s and (bias - mean) * s + beta (Jacob et al. 2018, section 3.2), computed here in float64. An
activation after a convolution is applied to each sum before it is stored, and so is the shortcut of a residual
block added; small convolutions end with the max pooling after them. On a GPU each of these saves passes through
memory and a launch. Dropout is nothing.

What follows what is said by the containers (:meth:`gpucnn.layers.Layer.chains` and ``shortcut_sum``): all of a
Sequential and of Residual, and the residual blocks of the registry's models. A network of one's own whose
``forward`` calls layers itself says it likewise, or stays unfolded there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy
from numpy.typing import NDArray

from gpucnn import initializers
from gpucnn.device import on_device, to_cpu, to_device
from gpucnn.errors import ArgumentError, ShapeError, StateError
from gpucnn.layers import (
    GELU,
    BatchNorm1d,
    BatchNorm2d,
    Conv2d,
    Dropout,
    Identity,
    Layer,
    LeakyReLU,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
    Sigmoid,
    SiLU,
    Tanh,
)
from gpucnn.layers.layer import check_input
from gpucnn.models.model import Model
from gpucnn.ops import Array, backend_of
from gpucnn.parameters import Parameter, flatten

if TYPE_CHECKING:
    from gpucnn.models.inference_plan import InferencePlan

_ACTIVATIONS: dict[type[Layer], str] = {
    ReLU: "relu",
    LeakyReLU: "leaky_relu",
    Sigmoid: "sigmoid",
    Tanh: "tanh",
    GELU: "gelu",
    SiLU: "silu",
}
"""The layers that a convolution can end with, and what the operations call them."""

_NO_TRAINING = "a model compiled for inference only predicts; use the model that it was compiled from"


class InferenceModel(Model):
    """What :func:`compile_for_inference` makes: predicts and evaluates like its original, and nothing else.

    Attributes:
        network: the folded copy of the original.
    """

    def __init__(self, network: Model) -> None:
        super().__init__(
            name=network.name,
            input_shape=network.input_shape,
            num_classes=network.num_classes,
            options=network.options,
        )
        self.network = network
        self.preprocessing, self.classes = network.preprocessing, list(network.classes)
        self.narrow_dtype = network.narrow_dtype

    def forward(self, x: Array) -> Array:
        """The original's output for ``x``."""
        return self.network(x)

    def backward(self, dy: Array) -> Array:
        """There is none: raises StateError."""
        raise StateError(_NO_TRAINING)

    def fit(self, *data: Any, **options: Any) -> NoReturn:
        """Raise StateError."""
        raise StateError(_NO_TRAINING)

    def save(self, path: Any) -> NoReturn:
        """Raise ArgumentError: the registry cannot build a folded network again, and folding takes no time."""
        raise ArgumentError(f"{_NO_TRAINING} to save, load that and compile it again")

    def load(self, path: Any, strict: bool = True) -> NoReturn:
        """Raise ArgumentError, as :meth:`save` does."""
        raise ArgumentError(f"{_NO_TRAINING} to load, and compile it again")

    def compile_for_inference(self) -> Model:
        """Itself."""
        return self

    def plan(self, shape: Sequence[int]) -> InferencePlan:
        """Forward passes of inputs of this ``shape``, (N, C, H, W), in memory that is planned once, on a GPU.

        Raises ArgumentError where the model is on the CPU, ShapeError for a shape that it does not take.
        """
        from gpucnn.models.inference_plan import InferencePlan

        return InferencePlan(self, shape)


class FoldedConv2d(Conv2d):
    """A convolution that has taken in the batch norm and the activation after it."""

    def __init__(
        self, convolution: Conv2d, norm: BatchNorm2d | None = None, activation: Layer | None = None
    ) -> None:
        with initializers.skipped():
            super().__init__(
                convolution.in_channels,
                convolution.out_channels,
                convolution.kernel_size,
                convolution.stride,
                convolution.padding,
                convolution.dilation,
                convolution.groups,
                algorithm=convolution.algorithm,
            )
        self.activation = activation
        _fold(convolution, norm, self)

    def forward(self, x: Array) -> Array:
        """activation(convolution of x (N, in_channels, H, W))."""
        return self.with_shortcut(x, None)

    def with_shortcut(self, x: Array, shortcut: Array | None) -> Array:
        """activation(convolution of x + shortcut), the shortcut of the result's shape or None."""
        self._check(x)
        assert self.bias is not None, "folding gives it one"
        return backend_of(x).conv2d_inference(
            x,
            self.weight.working,
            self.bias.working,
            shortcut,
            algorithm=self.algorithm["forward"],
            **self._options(),
        )

    def _check(self, x: Array) -> None:
        check_input(x, 4, f"(N, {self.in_channels}, H, W)", self.weight.working)
        if x.shape[1] != self.in_channels:
            raise ShapeError(f"expected {self.in_channels} input channels, got {x.shape[1]} (shape {x.shape})")

    def _options(self) -> dict[str, Any]:
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "activation": _operation_name(self.activation),
            "negative_slope": getattr(self.activation, "negative_slope", 0.01),
        }

    def backward(self, dy: Array) -> Array:
        """There is none: raises StateError."""
        raise StateError(_NO_TRAINING)

    def extra_repr(self) -> str:
        """The convolution's arguments, and the activation."""
        return super().extra_repr() + ("" if self.activation is None else f", activation={self.activation}")


class FoldedMaxPool2d(FoldedConv2d):
    """A convolution that has also taken in the max pooling after its activation.

    On a GPU it is one kernel where :func:`gpucnn_kernels.conv2d_max_pool2d_pays` says so. On the CPU what rises
    with its input, as ReLU does, is applied to what the pooling leaves.
    """

    def __init__(
        self, convolution: Conv2d, norm: BatchNorm2d | None, activation: Layer | None, pool: MaxPool2d
    ) -> None:
        super().__init__(convolution, norm, activation)
        self.pool = pool

    def forward(self, x: Array) -> Array:
        """The largest values of windows of activation(convolution of x (N, in_channels, H, W))."""
        self._check(x)
        assert self.bias is not None, "folding gives it one"
        return backend_of(x).conv2d_max_pool2d_inference(
            x,
            self.weight.working,
            self.bias.working,
            pool_size=self.pool.kernel_size,
            pool_stride=self.pool.stride,
            pool_padding=self.pool.padding,
            pool_dilation=self.pool.dilation,
            ceil_mode=self.pool.ceil_mode,
            **self._options(),
        )

    def extra_repr(self) -> str:
        """The convolution's arguments, the activation and the pooling."""
        return f"{super().extra_repr()}, pool={self.pool}"


class FoldedResidual(Layer):
    """A residual block whose last convolution adds the shortcut and applies the activation as it stores its sums.

    Args:
        body: what comes before the last convolution.
        last: the last convolution of the body, with the activation if that is one it can apply.
        shortcut: what the input goes through on the other way; None adds the input itself.
        activation: what is still to be applied to the sum, if anything.
    """

    def __init__(
        self, body: Sequence[Layer], last: FoldedConv2d, shortcut: Layer | None, activation: Layer | None
    ) -> None:
        self.body, self.last = Sequential(*body), last
        self.shortcut, self.activation = shortcut, activation

    def forward(self, x: Array) -> Array:
        """The block's output for x."""
        y = self.body(x)
        other = x if self.shortcut is None else self.shortcut(x)
        y = self.last.with_shortcut(y, other)
        return y if self.activation is None else self.activation(y)

    def backward(self, dy: Array) -> Array:
        """There is none: raises StateError."""
        raise StateError(_NO_TRAINING)


def compile_for_inference(model: Model) -> InferenceModel:
    """A copy of ``model`` that gives the same outputs within rounding, with fewer passes through memory.

    It is in evaluation mode, on the model's device and in its precision, and shares no array with the model.
    It is not saved: save the model, and compile what is loaded.
    """
    with on_device(model.device):
        network = copy.deepcopy(model).eval()
        for _, container in list(network.named_layers()):
            for names in container.chains():
                _fold_chain(container, names)
        for _, container in list(network.named_layers()):
            for name, layer in list(container.children()):
                if isinstance(layer, Dropout):
                    setattr(container, name, Identity())
                elif (folded := _folded_sum(layer)) is not None:
                    setattr(container, name, folded)
        network.requires_grad_(False)
        if network.parameters():
            flatten(network.parameters())  # a conversion to 16 bits is then one operation
    return InferenceModel(network).eval()


def _fold_chain(container: Layer, names: tuple[str, ...]) -> None:
    """Put a folded layer in the place of each foldable run of layers, and Identity in those of its others."""
    children = dict(container.children())
    for run in _runs([(name, children[name]) for name in names]):
        (name, first), norm, activation = run[0], _of_kind(run, BatchNorm2d, BatchNorm1d), None
        if isinstance(first, Conv2d):
            activation, pool = _of_kind(run, *_ACTIVATIONS), _of_kind(run, MaxPool2d)
            assert norm is None or isinstance(norm, BatchNorm2d), "_runs joins these alone"
            folded = FoldedConv2d(first, norm, activation)
            if pool is not None:
                folded = FoldedMaxPool2d(first, norm, activation, pool)
            setattr(container, name, folded)
        elif isinstance(first, Linear):
            with initializers.skipped():
                linear = Linear(first.in_features, first.out_features)
            _fold(first, norm, linear)
            setattr(container, name, linear)
        for other, _ in run[1:]:
            setattr(container, other, Identity())


def _runs(chain: list[tuple[str, Layer]]) -> Iterator[list[tuple[str, Layer]]]:
    """Runs of a convolution (or linear layer), and perhaps its batch norm, an activation and a max pooling.

    They have two layers at least. Dropout and Identity, which do nothing, may lie between. Activation and pooling
    are taken by convolutions alone, the pooling by those that leave the choice of their algorithm to us.
    """
    run: list[tuple[str, Layer]] = []
    for name, layer in chain:
        if isinstance(layer, (Identity, Dropout)):
            continue
        if run and _continues(run, layer):
            run.append((name, layer))
            continue
        if len(run) > 1:
            yield run
        run = [(name, layer)] if type(layer) in (Conv2d, Linear) else []
    if len(run) > 1:
        yield run


def _continues(run: list[tuple[str, Layer]], layer: Layer) -> bool:
    first, last = run[0][1], run[-1][1]
    if isinstance(layer, (BatchNorm2d, BatchNorm1d)):
        fits = isinstance(first, Conv2d) == isinstance(layer, BatchNorm2d)
        return last is first and fits and layer.track_running_stats
    if not isinstance(first, Conv2d) or type(last) is MaxPool2d:
        return False
    if type(layer) is MaxPool2d:
        return first.algorithm["forward"] == "auto"
    return type(layer) in _ACTIVATIONS and type(last) not in _ACTIVATIONS


def _folded_sum(block: Layer) -> FoldedResidual | None:
    """``block`` with its sum in its last convolution, or None where it is no such block or does not end in one."""
    form = block.shortcut_sum()
    if form is None:
        return None
    children = dict(block.children())
    body = [layer for name in form.body for layer in _one_after_another(children[name])]
    last = body.pop() if body else None
    if type(last) is Conv2d:
        last = FoldedConv2d(last)
    if type(last) is not FoldedConv2d or last.activation is not None:
        return None
    activation = None if form.activation is None else children[form.activation]
    if type(activation) in _ACTIVATIONS:
        last.activation, activation = activation, None
    return FoldedResidual(body, last, None if form.shortcut is None else children[form.shortcut], activation)


def _one_after_another(layer: Layer) -> Iterator[Layer]:
    """The layers that ``layer`` calls in turn, if it is a Sequential, or itself; without those that do nothing."""
    if type(layer) is Sequential:
        for child in layer:
            yield from _one_after_another(child)
    elif not isinstance(layer, (Identity, Dropout)):
        yield layer


def _of_kind(run: list[tuple[str, Layer]], *kinds: type[Layer]) -> Any:
    return next((layer for _, layer in run if isinstance(layer, kinds)), None)


def _fold(layer: Conv2d | Linear, norm: BatchNorm2d | BatchNorm1d | None, into: Conv2d | Linear) -> None:
    """Give ``into`` the weight and bias of ``layer`` followed by ``norm``."""
    weight = _float64(layer.weight)
    bias = numpy.zeros(len(weight)) if layer.bias is None else _float64(layer.bias)
    if norm is not None:
        variance, mean = to_cpu(norm.running_var).astype("f8"), to_cpu(norm.running_mean).astype("f8")
        gamma = numpy.ones(len(weight)) if norm.weight is None else _float64(norm.weight)
        beta = numpy.zeros(len(weight)) if norm.bias is None else _float64(norm.bias)
        share = gamma / numpy.sqrt(variance + norm.eps)
        weight = weight * share.reshape(-1, *[1] * (weight.ndim - 1))
        bias = (bias - mean) * share + beta
    dtype, device = layer.weight.dtype, layer.weight.device
    into.weight = Parameter(to_device(weight.astype(dtype), device))
    into.bias = Parameter(to_device(bias.astype(dtype), device))


def _float64(parameter: Parameter) -> NDArray[numpy.float64]:
    return numpy.asarray(to_cpu(parameter.data), numpy.float64)


def _operation_name(activation: Layer | None) -> str:
    if activation is None:
        return "identity"
    approximate = isinstance(activation, GELU) and activation.approximate == "tanh"
    return "gelu_tanh" if approximate else _ACTIVATIONS[type(activation)]
