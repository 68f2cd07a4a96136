"""Whether a checkpoint belongs to the run that wants to go on from it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy

from gpucnn.data.dataset import Dataset
from gpucnn.data.transforms import Augmentation, Preprocessing
from gpucnn.errors import CheckpointError
from gpucnn.layers import Layer
from gpucnn.layers.precision import WIDE, precision_of
from gpucnn.training.checkpoint import Checkpoint
from gpucnn.training.options import TrainingOptions

_ABSENT_BEFORE = ("source_size",)  # what checkpoints of earlier versions do not say


def describe_data(
    model: Layer, train: Dataset, preprocessing: Preprocessing | None, augmentation: Augmentation | None
) -> dict[str, Any]:
    """What a checkpoint keeps of its data: enough to know them again, and to prepare an image for the model.

    ``source_size`` is the (height, width) of the training images before the preprocessing.
    """
    labels = numpy.ascontiguousarray(train.labels, numpy.int64)
    return {
        "dataset": train.name,
        "classes": [str(name) for name in train.classes],
        "source_size": [int(side) for side in train.image_shape[:2]],
        "train_images": len(train),
        "label_checksum": zlib.crc32(labels.data),
        "dtype": ", ".join(sorted({str(parameter.dtype) for parameter in model.parameters()})),
        "precision": None if precision_of(model) in WIDE else precision_of(model),  # else "dtype" says it
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
        "augmentation": None if augmentation is None else augmentation.to_text(),
    }


def check_same_run(
    checkpoint: Checkpoint,
    path: Path,
    *,
    architecture: Mapping[str, Any] | None,
    options: TrainingOptions,
    data: Mapping[str, Any],
) -> None:
    """Raise CheckpointError unless model, recipe and data are those that the checkpoint at ``path`` was made with.

    The message lists what differs. The name of the data set may: it is the images that count.
    """
    if checkpoint.architecture != json.loads(json.dumps(architecture)):  # as JSON has it: tuples are lists there
        raise CheckpointError(
            f"{path} is a checkpoint of {_described(checkpoint.architecture)}, but the model is "
            f"{_described(architecture)}; resume with the model of the run"
        )
    saved = TrainingOptions.from_dict(checkpoint.options)
    changed = [
        f"{name} (was {getattr(saved, name)!r}, now {getattr(options, name)!r})"
        for name in saved.differences(options)
    ]
    changed += [
        f"{name} (was {checkpoint.data.get(name)!r}, now {value!r})"
        for name, value in data.items()
        if name != "dataset"
        and checkpoint.data.get(name) != value
        and not (name in _ABSENT_BEFORE and name not in checkpoint.data)
    ]
    if changed:
        raise CheckpointError(
            f"the run in {path.parent} was started differently: {'; '.join(changed)}; resume it as it was "
            "started, or start a new run"
        )


def _described(architecture: Mapping[str, Any] | None) -> str:
    if architecture is None:
        return "a model without a name"
    arguments = [f"{name}={value}" for name, value in architecture.items() if name != "name" and value is not None]
    return f"'{architecture.get('name')}'" + (f" ({', '.join(arguments)})" if arguments else "")
