"""How a model does on a data set: loss, accuracy, and what it takes for what."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.data.dataset import Dataset
from gpucnn.data.loader import Loader
from gpucnn.data.transforms import Preprocessing
from gpucnn.device import on_device, to_cpu
from gpucnn.errors import ArgumentError, DataError, ShapeError
from gpucnn.layers import Layer
from gpucnn.layers.precision import forward_pass
from gpucnn.metrics import confusion_matrix, f1, per_class_accuracy, precision
from gpucnn.ops import Array, backend_of
from gpucnn.training.forward_passes import LEAST_BATCHES, ForwardPass


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationResult:
    """What :func:`evaluate` found.

    Attributes:
        loss: the mean cross-entropy over the images, without label smoothing or class weights.
        accuracy: the share of images classified rightly, 0 .. 1.
        confusion: int64 (classes, classes): rows the true class, columns the predicted one.
        per_class_accuracy: (classes,); NaN for a class without images.
        labels: the true class of each image, in the data set's order.
        predictions: the class with the largest probability of each image.
        probabilities: (images, classes), float32.
        classes: the names of the classes.
    """

    loss: float
    accuracy: float
    confusion: NDArray[numpy.int64]
    per_class_accuracy: NDArray[numpy.float64]
    labels: NDArray[numpy.int64]
    predictions: NDArray[numpy.int64]
    probabilities: NDArray[numpy.float32]
    classes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the single images, fit for JSON; what is not known is None."""
        columns = (
            self.confusion.sum(axis=1).tolist(),
            _known(self.per_class_accuracy),
            _known(precision(self.confusion)),
            _known(f1(self.confusion)),
        )
        return {
            "images": len(self.labels),
            "loss": self.loss,
            "accuracy": self.accuracy,
            "per_class": [
                {"class": name, "images": images, "accuracy": recall, "precision": share, "f1": mean}
                for name, images, recall, share, mean in zip(self.classes, *columns, strict=True)
            ],
            "confusion": self.confusion.tolist(),
        }


def evaluate(
    model: Layer,
    dataset: Dataset,
    preprocessing: Preprocessing | None = None,
    batch_size: int = 64,
    *,
    workers: int = 2,
    after_batch: Callable[[int], None] | None = None,
    capture: str = "auto",
    measurement: ForwardPass | None = None,
) -> EvaluationResult:
    """Run ``model`` in evaluation mode over all of ``dataset``; the model's modes are as before afterwards.

    Args:
        model: gives logits (N, classes); the images are brought to its device, and the result is NumPy's.
        dataset: its labels are class numbers.
        preprocessing: how its images become the model's input; needed unless the data set is preprocessed.
        batch_size: images at a time; it changes the speed and, in the last digits, the sums.
        workers: threads that prepare batches.
        after_batch: called with the number of images done after each batch; what it raises ends the evaluation.
        capture: whether full batches are launched as one CUDA graph, as the option of that name of
            :class:`~gpucnn.training.TrainingOptions`; the result is the same.
        measurement: what :func:`make_measurement` gives, to be used again in later evaluations.

    Raises DataError for labels that are no classes of the model, ArgumentError where the preprocessing is missing.
    """
    check_class_labels(dataset)
    if preprocessing is None and not dataset.preprocessed:
        raise ArgumentError(
            f"the images of '{dataset.name}' need preprocessing; pass the one that the model was trained with"
        )
    loader = Loader(
        dataset,
        batch_size,
        preprocessing=preprocessing,
        workers=workers,
        dtype=input_dtype(model),
        device=model.device,
    )
    often = measurement is not None or len(dataset) // batch_size >= LEAST_BATCHES
    measure = make_measurement(model, dataset, capture) if measurement is None else measurement
    loss_sum, done = 0.0, 0
    predictions: list[NDArray[numpy.int64]] = []
    probabilities: list[NDArray[numpy.float32]] = []
    with on_device(model.device), evaluation_mode(model), contextlib.closing(loader.epoch(0)) as batches:
        measure.begin()
        for batch in batches:
            full = often and len(batch.labels) == batch_size
            batch_loss, predicted, shares = measure(batch.images, batch.labels, full=full)
            loss_sum += float(batch_loss)
            predictions.append(to_cpu(predicted))
            probabilities.append(to_cpu(shares))
            done += len(batch.labels)
            if after_batch is not None:
                after_batch(done)
    all_probabilities, all_predictions = numpy.concatenate(probabilities), numpy.concatenate(predictions)
    confusion = confusion_matrix(dataset.labels, all_predictions, all_probabilities.shape[1])
    return EvaluationResult(
        loss=loss_sum / done,
        accuracy=float(confusion.trace()) / done,
        confusion=confusion,
        per_class_accuracy=per_class_accuracy(confusion),
        labels=dataset.labels,
        predictions=all_predictions,
        probabilities=all_probabilities,
        classes=list(dataset.classes),
    )


def make_measurement(
    model: Layer, dataset: Dataset, capture: str = "auto", say: Callable[[str], None] | None = None
) -> ForwardPass:
    """What :func:`evaluate` makes of a batch: (sum of its losses, predicted classes, probabilities), as arrays."""

    def measure(images: Array, labels: Array) -> tuple[Array, Array, Array]:
        logits = forward_pass(model, images)
        check_logits(
            logits, dataset
        )  # as wide as there are classes, and all labels are classes: nothing to look at
        loss, probabilities = backend_of(logits).softmax_cross_entropy_forward(
            logits, labels, reduction="sum", check_targets=False
        )
        return loss, logits.argmax(axis=1), probabilities

    return ForwardPass(model, measure, capture, say)


@contextlib.contextmanager
def evaluation_mode(model: Layer) -> Iterator[None]:
    """Inside the block ``model`` is in evaluation mode; afterwards each layer is in the mode that it was in."""
    with modes_kept(model):
        model.eval()
        for _, layer in model.named_layers():  # also of a part of a model, which is in training
            layer.keeps_for_backward = False
        yield


@contextlib.contextmanager
def modes_kept(model: Layer) -> Iterator[None]:
    """After the block each layer is in the mode that it was in."""
    modes = [(layer, layer.training, layer.keeps_for_backward) for _, layer in model.named_layers()]
    try:
        yield
    finally:
        for layer, training, keeps in modes:
            layer.training, layer.keeps_for_backward = training, keeps


def input_dtype(model: Layer) -> str:
    """What ``model`` takes its inputs in: "float64" where its parameters are, "float32" otherwise."""
    return "float64" if any(parameter.dtype == numpy.float64 for parameter in model.parameters()) else "float32"


def check_class_labels(dataset: Dataset) -> None:
    """Raise DataError unless the labels of ``dataset`` are class numbers, each with a name."""
    labels, count = dataset.labels, len(dataset.classes)
    if len(labels) == 0:
        raise DataError(f"data set '{dataset.name}' has no images")
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError(
            f"the labels of '{dataset.name}' are {labels.dtype} of shape {labels.shape}; training and evaluation "
            "here classify: labels must be one integer an image"
        )
    outside = numpy.flatnonzero((labels < 0) | (labels >= count))
    if len(outside):
        raise DataError(
            f"label {labels[outside[0]]} of image {outside[0]} of '{dataset.name}' is out of range: the data set "
            f"has {count} classes, so labels go from 0 to {count - 1}"
        )


def check_logits(logits: Any, dataset: Dataset) -> None:
    """Raise ShapeError unless ``logits`` are (N, number of classes)."""
    count = len(dataset.classes)
    if logits.ndim != 2 or logits.shape[1] != count:
        shown = ", ".join(dataset.classes[:5]) + (", ..." if count > 5 else "")
        raise ShapeError(
            f"the model gives an output of shape {tuple(logits.shape)}, but '{dataset.name}' has {count} classes "
            f"({shown}), which takes (N, {count}); make the model with num_classes={count}"
        )


def _known(values: NDArray[numpy.float64]) -> list[float | None]:
    return [None if numpy.isnan(value) else float(value) for value in values]
