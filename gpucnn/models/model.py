"""What makes a layer a model: a name that rebuilds it, and fit, evaluate, predict, save and load."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy
from numpy.typing import NDArray

from gpucnn import layers
from gpucnn.device import Device, on_device, to_cpu, to_device
from gpucnn.errors import ArgumentError, CheckpointError, DtypeError, ShapeError
from gpucnn.layers import Layer
from gpucnn.layers.precision import forward_pass, set_precision

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gpucnn.data import Augmentation, Dataset, DataSplits, Preprocessing
    from gpucnn.training import Callback, EvaluationResult, History

    Data = Dataset | DataSplits | tuple[Any, Any]


class Model(Layer):
    """A network that is trained as a whole.

    Derive from it, assign layers to attributes, write ``forward`` and ``backward``; or use
    :class:`Sequential`, or one of the registry (:func:`gpucnn.models.create`).

    Attributes:
        name: its name in the registry, or its class's.
        input_shape: (C, H, W) of one input image, or None where any will do.
        num_classes: the width of its output, or None where unknown.
        options: what else the registry needs to build it again.
        preprocessing: how ``fit`` made inputs of images, for ``evaluate`` and ``predict``; None before.
        classes: the names of the classes that it was trained on; empty before.
    """

    name: str = ""
    input_shape: tuple[int, int, int] | None = None
    num_classes: int | None = None
    options: Mapping[str, Any] = {}
    preprocessing: Preprocessing | None = None
    classes: Sequence[str] = ()

    def __init__(
        self,
        *,
        name: str = "",
        input_shape: tuple[int, int, int] | None = None,
        num_classes: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name or type(self).__name__
        # Plain Python numbers, whatever came: they go into JSON.
        self.input_shape = None
        if input_shape is not None:
            channels, height, width = (operator.index(size) for size in input_shape)
            self.input_shape = channels, height, width
        self.num_classes = None if num_classes is None else operator.index(num_classes)
        self.options = {
            key: value.item() if hasattr(value, "item") else value for key, value in (options or {}).items()
        }

    @property
    def architecture(self) -> dict[str, Any]:
        """What ``gpucnn.models.create(**architecture)`` takes to build this model again, fit for JSON."""
        channels, size = None, None
        if self.input_shape is not None:
            channels, size = self.input_shape[0], self.input_shape[1]
        return {
            "name": self.name,
            "num_classes": self.num_classes,
            "in_channels": channels,
            "image_size": size,
            **self.options,
        }

    def _dtype(self) -> Any:
        """The dtype that this model computes in."""
        return next((parameter.dtype for parameter in self.parameters()), numpy.dtype(numpy.float32))

    def _class_names(self) -> Sequence[str]:
        """The names of the classes; numbers where there are no names yet, so that a class may have no image."""
        return self.classes or [str(number) for number in range(self.num_classes or 0)]

    def compute_in(self, precision: str, *, channels_last: bool | None = None) -> Self:
        """Train, evaluate and predict in ``precision`` from now on; returns itself.

        "tf32" multiplies with fewer digits in convolutions, "bfloat16" and "float16" store activations and
        compute in 16 bits beside float32 weights, see :mod:`gpucnn.layers.precision`. These three are for GPUs,
        and run channels-last there; ``channels_last`` decides otherwise. The CPU rounds as they do, and is slower
        in them. Move the model to its device first. Raises ArgumentError for a precision that cannot be used.
        """
        set_precision(self, precision, channels_last=channels_last)
        return self

    # ------------------------------------------------------------ training

    def fit(
        self,
        train: Data,
        validation: Data | None = None,
        *,
        epochs: int = 10,
        batch_size: int = 64,
        augmentation: Augmentation | str | None = None,
        preprocessing: Preprocessing | None = None,
        output: str | Path | None = None,
        resume: bool = False,
        verbose: bool = True,
        callbacks: Sequence[Callback] = (),
        device: str | Device | None = None,
        precision: str | None = None,
        **options: Any,
    ) -> History:
        """Train on labelled images; returns the history, one record an epoch.

        Args:
            train: a data set, splits as ``gpucnn.data.load`` gives them (validation included), or a pair of
                arrays: uint8 images (N, H, W, C) or (N, H, W), or ready float inputs (N, C, H, W); and integer
                labels (N,).
            validation: likewise; what the best epoch is chosen by.
            epochs: passes over the training set.
            batch_size: images in a step.
            augmentation: random changes of the images, as an Augmentation or its text ("flip,shift=2").
            preprocessing: size and normalization of uint8 images; by the training set's own mean and standard
                deviation, at the model's input size, unless given.
            output: a folder for checkpoints and history; nothing is written without it.
            resume: go on from the last checkpoint in ``output``.
            verbose: show progress.
            callbacks: called as the training goes.
            device: "auto", "cpu", "cuda" or "cuda:1", where the model is moved and stays; where it is by default.
            precision: what to compute in, see :meth:`compute_in`; what it does already by default.
            options: the other fields of :class:`gpucnn.training.TrainingOptions`: optimizer="adamw", lr=...,
                schedule="one-cycle", label_smoothing=..., seed=...

        Raises ArgumentError, DataError, ShapeError or DtypeError for what does not fit, before anything is
        trained; NonFiniteError where the loss is no number, naming the layer that went first.
        """
        from gpucnn.data import DataSplits, Preprocessing, parse_augmentation
        from gpucnn.training import RunFolder, Trainer, TrainingOptions, make_progress

        if isinstance(train, DataSplits):
            validation = train.validation if validation is None else validation
            train = train.train
        train_set = as_dataset(train, self._class_names())
        validation_set = None if validation is None else as_dataset(validation, train_set.classes)
        if preprocessing is None and not train_set.preprocessed:
            size = None if self.input_shape is None else self.input_shape[1:]
            preprocessing = Preprocessing.for_dataset(train_set, size, str(self._dtype()))
        if isinstance(augmentation, str):
            augmentation = parse_augmentation(augmentation, train_set.image_shape)
        if resume and output is None:
            raise ArgumentError("resume=True needs output=..., the folder of the run to go on with")
        trainer = Trainer(
            self,
            train_set,
            validation_set,
            options=TrainingOptions.from_dict({"epochs": epochs, "batch_size": batch_size, **options}),
            preprocessing=preprocessing,
            augmentation=augmentation,
            run=None if output is None else RunFolder(output),
            callbacks=callbacks,
            progress=make_progress(quiet=not verbose),
            device=device,
            precision=precision,
        )
        # Before the training, so that a callback, or a run that was interrupted, can predict.
        self.preprocessing, self.classes = preprocessing, list(train_set.classes)
        return trainer.fit(resume=resume)

    def evaluate(self, data: Data, *, batch_size: int = 64, capture: str = "auto") -> EvaluationResult:
        """Loss, accuracy and confusion matrix on labelled images, given as to :meth:`fit`; all NumPy's.

        ``capture``: as for :meth:`predict`.
        """
        from gpucnn.data import DataSplits
        from gpucnn.training import evaluate

        if isinstance(data, DataSplits):
            data = data.test or data.validation or data.train
        dataset = as_dataset(data, self._class_names())
        return evaluate(self, dataset, self.preprocessing, batch_size, capture=capture)

    def predict(self, images: Any, *, batch_size: int = 64, capture: str = "auto") -> NDArray[numpy.floating[Any]]:
        """Class probabilities (N, classes), a NumPy array; computed where the model is.

        Args:
            images: uint8 (N, H, W, C), (N, H, W) or one image (H, W, C), prepared as in training; or ready float
                inputs (N, C, H, W).
            batch_size: images at a time.
            capture: whether full batches are launched as one CUDA graph, where there are several: as the option of
                that name of :class:`gpucnn.training.TrainingOptions`. The result is the same.
        """
        from gpucnn.data.loader import whole_number
        from gpucnn.ops import backend_of
        from gpucnn.training.evaluation import evaluation_mode
        from gpucnn.training.forward_passes import LEAST_BATCHES, ForwardPass

        batch_size = whole_number("batch_size", batch_size, 1)
        inputs = to_cpu(images)
        if inputs.dtype == numpy.uint8:
            if self.preprocessing is None:
                raise ArgumentError(
                    "this model does not know how its images are normalized; train it with fit, load it from a "
                    "run, set model.preprocessing, or pass float inputs (N, C, H, W)"
                )
            if inputs.ndim == 3 and inputs.shape[-1] in (1, 3):
                inputs = inputs[None]
            if inputs.ndim == 3:
                inputs = inputs[..., None]
        elif inputs.dtype.kind != "f":
            raise DtypeError(f"predict takes uint8 images or float inputs, got dtype {inputs.dtype}")
        if inputs.ndim != 4:
            raise ShapeError(f"predict takes (N, H, W, C) images or (N, C, H, W) inputs, got shape {inputs.shape}")
        if len(inputs) == 0:
            raise ShapeError(f"predict was given no images (shape {inputs.shape})")

        def shares(x: Any) -> Any:
            logits = forward_pass(self, x)
            return backend_of(logits).softmax_forward(logits, axis=1)

        probabilities = []
        forward, often = ForwardPass(self, shares, capture), len(inputs) // batch_size >= LEAST_BATCHES
        with on_device(self.device), evaluation_mode(self):
            for start in range(0, len(inputs), batch_size):
                batch = inputs[start : start + batch_size]
                if self.preprocessing is not None and batch.dtype == numpy.uint8:
                    batch = self.preprocessing.apply(batch)
                given = to_device(batch.astype(self._dtype(), copy=False), self.device)
                probabilities.append(to_cpu(forward(given, full=often and len(batch) == batch_size)))
        return numpy.concatenate(probabilities)

    def compile_for_inference(self) -> Model:
        """A copy that only predicts, faster: batch norms and activations folded into the layers before them.

        It is on this model's device and computes in its precision; this model stays as it is. See
        :mod:`gpucnn.models.inference`.
        """
        from gpucnn.models.inference import compile_for_inference

        return compile_for_inference(self)

    # ------------------------------------------------------------ files

    def save(self, path: str | Path) -> None:
        """Write the weights, and what rebuilds the model, to a safetensors file that ``gpucnn.models.load`` reads.

        The tensors are named "model." and PyTorch's keys. Raises StorageError where the file cannot be written.
        """
        from gpucnn.training import Checkpoint, write_checkpoint

        data: dict[str, Any] = {"classes": list(self.classes)}
        if self.preprocessing is not None:
            data["preprocessing"] = self.preprocessing.to_dict()
        write_checkpoint(Path(path), Checkpoint(self.state_dict(), architecture=self.architecture, data=data))

    def load(self, path: str | Path, strict: bool = True) -> None:
        """Read the weights of a checkpoint or a run folder into this model.

        Raises CheckpointError where the file is missing, damaged or of another model.
        """
        from gpucnn.models.saved import read_model_checkpoint

        checkpoint = read_model_checkpoint(path)
        try:
            self.load_state_dict(checkpoint.evaluation_state, strict=strict)
        except CheckpointError as error:
            name = (checkpoint.architecture or {}).get("name", "an unnamed model")
            raise CheckpointError(
                f"{path} is a checkpoint of {name}, this model is {self.name}: {error}"
            ) from error
        self.adopt(checkpoint.data)

    def adopt(self, data: Mapping[str, Any]) -> None:
        """Take classes and preprocessing from a checkpoint's data."""
        from gpucnn.data import Preprocessing

        self.classes = list(data.get("classes", []))
        if data.get("preprocessing") is not None:
            self.preprocessing = Preprocessing(**data["preprocessing"])


class Sequential(Model, layers.Sequential):
    """Layers one after another (see :class:`gpucnn.layers.Sequential`), as a model that can be fitted.

    Example:
        >>> model = Sequential(layers.Flatten(), layers.Linear(64, 10))
        >>> model.fit((images, labels), epochs=3)  # doctest: +SKIP
    """

    def __init__(self, *parts: Layer | Mapping[str, Layer]) -> None:
        Model.__init__(self)
        layers.Sequential.__init__(self, *parts)


def as_dataset(data: Any, classes: Sequence[str] = ()) -> Dataset:
    """``data`` as a data set: one already, or a pair (images, labels) of arrays."""
    from gpucnn.data import ArrayDataset, Dataset, TensorDataset

    if isinstance(data, Dataset):
        return data
    if not (isinstance(data, (tuple, list)) and len(data) == 2):
        raise DtypeError(f"expected a data set or a pair (images, labels), got {type(data).__name__}")
    images, labels = to_cpu(data[0]), to_cpu(data[1])
    names = list(classes) or None
    if images.dtype.kind == "f":
        return TensorDataset(images, labels, classes=names)
    return ArrayDataset(images, labels, classes=names)
