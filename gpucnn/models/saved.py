"""Models from files: what ``Model.save`` and training runs wrote."""

from __future__ import annotations

from pathlib import Path

from gpucnn import initializers
from gpucnn.errors import CheckpointError
from gpucnn.models.model import Model
from gpucnn.models.registry import available, create
from gpucnn.training import Checkpoint, RunFolder, read_checkpoint


def load(path: str | Path) -> Model:
    """The model in a checkpoint, or in a run folder (its best), ready to evaluate and predict.

    Raises CheckpointError where the file is missing, damaged, or of a model that the registry does not have: build
    such a network yourself and call its ``load``.
    """
    checkpoint = read_model_checkpoint(path)
    architecture = checkpoint.architecture or {}
    if architecture.get("name") not in available():
        raise CheckpointError(
            f"{path} is a checkpoint of '{architecture.get('name')}', which is not in the registry "
            f"({', '.join(available())}); build the network yourself and call its load(path)"
        )
    with initializers.skipped():
        model = create(**architecture)
    model.load_state_dict(checkpoint.evaluation_state)
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
