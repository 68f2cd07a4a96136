"""Models from files: what ``Model.save`` and training runs wrote."""

from __future__ import annotations

from pathlib import Path

import numpy

from gpucnn import initializers
from gpucnn.device import Device
from gpucnn.errors import ArgumentError, CheckpointError
from gpucnn.models.model import Model
from gpucnn.models.registry import create
from gpucnn.training import Checkpoint, RunFolder, read_checkpoint


def load(path: str | Path, device: str | Device = "cpu") -> Model:
    """The model in a checkpoint, or in a run folder (its best), on ``device``, ready to evaluate and predict.

    A file does not depend on the device that it was written from. Raises CheckpointError where it is missing,
    damaged, or of a model that the registry does not have: build such a network yourself and call its ``load``.
    """
    return model_of(read_model_checkpoint(path), path).to(device)


def model_of(checkpoint: Checkpoint, path: str | Path) -> Model:
    """The model that ``checkpoint``, read from ``path``, holds: structure, weights, classes, preprocessing.

    Raises CheckpointError where the registry cannot build it or the weights do not fit it.
    """
    architecture = checkpoint.architecture or {"name": None}
    try:
        with initializers.skipped():
            model = create(**architecture)
    except (ArgumentError, TypeError) as error:
        raise CheckpointError(
            f"the checkpoint in {path} is of a model that gpucnn has not: {error}; if the network is your own, "
            "build it and call its load(path)"
        ) from error
    state = checkpoint.evaluation_state
    floats = [array.dtype for array in state.values() if array.dtype.kind == "f"]
    model.to(dtype=numpy.result_type(numpy.float32, *floats))
    try:
        model.load_state_dict(state)
    except CheckpointError as error:
        raise CheckpointError(f"the checkpoint in {path} is of another model: {error}") from error
    model.adopt(checkpoint.data)
    return model


def read_model_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint that ``path`` means: the file itself, or the best (else the last) of a run folder."""
    if not Path(path).is_dir():
        return read_checkpoint(Path(path))
    run = RunFolder(path)
    if not (run.best_path.exists() or run.last_path.exists()):
        raise CheckpointError(f"{path} is a folder without a checkpoint; give the folder of a run, or a file")
    return run.read_best()
