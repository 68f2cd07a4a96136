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
from typing import TYPE_CHECKING, Any, NoReturn, Self

from gpucnn import initializers
from gpucnn.device import on_device
from gpucnn.errors import ArgumentError, StateError
from gpucnn.layers import (
    BatchNorm1d,
    BatchNorm2d,
    Conv2d,
    Dropout,
    Identity,
    Layer,
    Linear,
    MaxPool2d,
    Sequential,
)
from gpucnn.models.folded import ACTIVATIONS, NO_TRAINING, FoldedConv2d, FoldedMaxPool2d, FoldedResidual, fold
from gpucnn.models.model import Model
from gpucnn.ops import Array
from gpucnn.parameters import flatten, refresh_narrow_copies

if TYPE_CHECKING:
    from gpucnn.models.inference_plan import InferencePlan


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
        raise StateError(NO_TRAINING)

    def compute_in(self, precision: str, *, channels_last: bool | None = None) -> Self:
        """As :meth:`Model.compute_in`."""
        super().compute_in(precision, channels_last=channels_last)
        with on_device(self.device):
            _gather(self)  # weights that are laid out otherwise have left their buffers
        return self

    def fit(self, *data: Any, **options: Any) -> NoReturn:
        """Raise StateError."""
        raise StateError(NO_TRAINING)

    def save(self, path: Any) -> NoReturn:
        """Raise ArgumentError: the registry cannot build a folded network again, and folding takes no time."""
        raise ArgumentError(f"{NO_TRAINING} to save, load that and compile it again")

    def load(self, path: Any, strict: bool = True) -> NoReturn:
        """Raise ArgumentError, as :meth:`save` does."""
        raise ArgumentError(f"{NO_TRAINING} to load, and compile it again")

    def compile_for_inference(self) -> Model:
        """Itself."""
        return self

    def plan(self, shape: Sequence[int]) -> InferencePlan:
        """Forward passes of inputs of this ``shape``, (N, C, H, W), in memory that is planned once, on a GPU.

        Raises ArgumentError where the model is on the CPU, ShapeError for a shape that it does not take.
        """
        from gpucnn.models.inference_plan import InferencePlan

        return InferencePlan(self, shape)


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
        _gather(network)
    return InferenceModel(network).eval()


def _gather(network: Layer) -> None:
    """Lay the parameters into flat buffers: a conversion to 16 bits is then one operation."""
    if network.parameters():
        flatten(network.parameters())
        if network.narrow_dtype is not None:
            refresh_narrow_copies(network.parameters(), network.narrow_dtype)


def _fold_chain(container: Layer, names: tuple[str, ...]) -> None:
    """Put a folded layer in the place of each foldable run of layers, and Identity in those of its others."""
    children = dict(container.children())
    for run in _runs([(name, children[name]) for name in names]):
        (name, first), norm, activation = run[0], _of_kind(run, BatchNorm2d, BatchNorm1d), None
        if isinstance(first, Conv2d):
            activation, pool = _of_kind(run, *ACTIVATIONS), _of_kind(run, MaxPool2d)
            assert norm is None or isinstance(norm, BatchNorm2d), "_runs joins these alone"
            folded = FoldedConv2d(first, norm, activation)
            if pool is not None:
                folded = FoldedMaxPool2d(first, norm, activation, pool)
            setattr(container, name, folded)
        elif isinstance(first, Linear):
            with initializers.skipped():
                linear = Linear(first.in_features, first.out_features)
            fold(first, norm, linear)
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
    return type(layer) in ACTIVATIONS and type(last) not in ACTIVATIONS


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
    if type(activation) in ACTIVATIONS:
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
