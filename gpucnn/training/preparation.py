"""What is settled before the first step: preprocessing, class weights, and whether model and data fit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import numpy

from gpucnn.data.dataset import Dataset
from gpucnn.data.loader import Loader
from gpucnn.data.transforms import Preprocessing
from gpucnn.device import Device, choose_device, on_device, split_name
from gpucnn.errors import ArgumentError, DataError, ShapeError
from gpucnn.layers import BatchNorm1d, BatchNorm2d, Layer
from gpucnn.layers.precision import forward_pass, set_precision
from gpucnn.training.evaluation import check_class_labels, check_logits, evaluation_mode, input_dtype


def place_model(model: Layer, device: str | Device | None, precision: str | None = None) -> None:
    """Move ``model`` to ``device`` ("auto" chooses) and let it compute in ``precision``; None leaves it as it is.

    Raises DeviceError, with the reason, where the device cannot be used, ArgumentError where it does not compute
    in the precision.
    """
    if device is not None:
        model.to(choose_device(device) if isinstance(device, str) else device)
    if precision is not None:
        set_precision(model, precision)


def autotuned(model: Layer, wanted: bool, say: Callable[[str], None]) -> contextlib.AbstractContextManager[None]:
    """A context in which the ways of convolutions are measured, where that is ``wanted`` and ``model`` on a GPU.

    ``say`` shows the user what it does, or that there is nothing to measure.
    """
    if not wanted:
        return contextlib.nullcontext()  # which leaves what the environment asks for as it is
    if split_name(model.device)[0] != "cuda":
        say("autotune: there is nothing to measure on the CPU, and it has no effect")
        return contextlib.nullcontext()
    from gpucnn_kernels.tuning import autotune

    say("autotune: the first step measures the ways of each convolution that this GPU has not measured before")
    return autotune()


def default_preprocessing(model: Layer, dataset: Dataset) -> Preprocessing | None:
    """Resizing to the model's ``input_shape`` and normalization by ``dataset``.

    The inputs have the dtype of the model's parameters. None for data sets that are preprocessed.
    """
    if dataset.preprocessed:
        return None
    shape = getattr(model, "input_shape", None)
    size = None if shape is None else (shape[1], shape[2])
    return Preprocessing.for_dataset(dataset, size, input_dtype(model))


def class_weights(weights: str | Sequence[float] | None, dataset: Dataset) -> list[float] | None:
    """The loss's weight for each class of ``dataset``.

    "balanced" is images / (classes * images of the class), so that every class weighs alike in an epoch and the
    mean weight of an image is 1; a class without images weighs nothing. Raises ArgumentError where there is not
    one weight a class, or it is zero for a class that has images: the mean loss of a batch of those is 0 / 0.
    """
    count = len(dataset.classes)
    if weights is None:
        return None
    images = numpy.bincount(dataset.labels, minlength=count)
    if isinstance(weights, str):
        return [len(dataset) / (count * int(number)) if number else 0.0 for number in images]
    if len(weights) != count:
        raise ArgumentError(
            f"class_weights has {len(weights)} numbers, but '{dataset.name}' has {count} classes; give one a class"
        )
    for name, weight, number in zip(dataset.classes, weights, images.tolist(), strict=True):
        if number and weight < numpy.finfo(numpy.float32).tiny:
            raise ArgumentError(
                f"class_weights gives class '{name}' weight {weight:g}, but '{dataset.name}' has {number} images "
                "of it; give it a positive weight, or leave its images out"
            )
    return [float(weight) for weight in weights]


def check_data(train: Dataset, validation: Dataset | None) -> None:
    """Raise DataError unless all labels are classes, and both sets have the same ones."""
    check_class_labels(train)
    if validation is None:
        return
    check_class_labels(validation)
    if list(validation.classes) != list(train.classes):
        raise DataError(
            f"the validation set has classes {_shown(validation.classes)}, the training set "
            f"{_shown(train.classes)}; they must be the same, in the same order"
        )
    if validation.preprocessed != train.preprocessed:
        raise DataError("training and validation set must both be preprocessed, or neither")


def check_model(model: Layer, dataset: Dataset, preprocessing: Preprocessing | None) -> None:
    """Run one image through ``model``, so that what does not fit is said now and not after a minute.

    Raises ShapeError where the image has the wrong number of channels or size, or the output is not
    (1, number of classes).
    """
    loader = Loader(
        dataset, 1, preprocessing=preprocessing, workers=0, dtype=input_dtype(model), device=model.device
    )
    with on_device(model.device), loader.epoch(0) as batches:
        images = next(batches).images
    expected = getattr(model, "input_shape", None)
    if expected is not None and images.shape[1] != expected[0]:
        raise ShapeError(
            f"the model takes images of {expected[0]} channels, but those of '{dataset.name}' have "
            f"{images.shape[1]}; make the model with in_channels={images.shape[1]}"
        )
    with on_device(model.device), evaluation_mode(model):
        check_logits(forward_pass(model, images), dataset)


def leaves_single_image(model: Layer, images: int, batch_size: int) -> bool:
    """Whether the last batch of an epoch is a single image and the model has batch norm that is trained with."""
    if not (images > batch_size > 1 and images % batch_size == 1):
        return False
    return any(
        isinstance(layer, (BatchNorm1d, BatchNorm2d)) and (layer.training or not model.training)
        for _, layer in model.named_layers()
    )


def _shown(names: Sequence[str]) -> str:
    return f"[{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}] ({len(names)})"
