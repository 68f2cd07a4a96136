"""A run's checkpoints: what goes into one, when it is written, and back from it."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from gpucnn.device import to_cpu
from gpucnn.errors import NonFiniteError
from gpucnn.layers import Layer
from gpucnn.training.checkpoint import Checkpoint, Position, write_checkpoint
from gpucnn.training.diagnosis import find_non_finite_weight
from gpucnn.training.history import History
from gpucnn.training.options import TrainingOptions
from gpucnn.training.run_folder import RunFolder
from gpucnn.training.steps import StepParts


def architecture_of(model: Layer) -> dict[str, Any] | None:
    """What rebuilds the model; None for one that is of no registry."""
    return getattr(model, "architecture", None)


class Saver:
    """Writes the checkpoints of a run, and keeps the best weights of one that has no folder.

    Args:
        run: the folder, or None: then nothing is written.
        parts: what the run's steps work on.
        data: what a checkpoint says of the data.

    Attributes:
        best_state: the evaluated ``state_dict`` of the best epoch, where there is no folder.
    """

    def __init__(self, run: RunFolder | None, parts: StepParts, data: dict[str, Any]) -> None:
        self.run, self._parts, self._data = run, parts, data
        self.best_state: dict[str, Any] | None = None
        self._saved_at, self._saved_step = time.monotonic(), 0

    def begin(self, position: Position) -> None:
        """The run is at ``position``, and saved so."""
        self._saved_at, self._saved_step = time.monotonic(), position.step

    @property
    def what_is_kept(self) -> str:
        """What the user has, whatever happens now, in words."""
        if self.run is None:
            return "without a run folder nothing is saved"
        return f"the checkpoint of step {self._saved_step} is kept in {self.run.last_path}"

    def averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model computes with the average of its weights, where the run has one."""
        average = self._parts.average
        return contextlib.nullcontext() if average is None else average.in_use()

    def save(self, options: TrainingOptions, position: Position, history: History) -> None:
        """Write the last checkpoint. Raises NonFiniteError where a weight is not finite: the one before stays."""
        if self.run is None:
            return
        parts, checkpoint = self._parts, self._checkpoint(options, position, history)
        checkpoint.optimizer = parts.optimizer.state_dict()
        if parts.scaler is not None:
            checkpoint.loss_scaling = parts.scaler.state_dict()
        if parts.average is not None:
            checkpoint.ema = {name: to_cpu(array) for name, array in parts.average.average.items()}
        write_checkpoint(self.run.last_path, checkpoint)
        self.begin(position)

    def save_best(self, options: TrainingOptions, position: Position, history: History) -> None:
        """Keep the weights that are evaluated, those of the best epoch."""
        with self.averaged_weights():
            if self.run is None:
                self.best_state = self._parts.model.state_dict()
            else:
                write_checkpoint(self.run.best_path, self._checkpoint(options, position, history))

    def save_if_due(self, options: TrainingOptions, position: Position, history: History) -> None:
        """Save where the options ask for it after so many steps or seconds."""
        steps, seconds = options.checkpoint_steps, options.checkpoint_seconds
        if (steps is not None and position.step - self._saved_step >= steps) or (
            seconds is not None and time.monotonic() - self._saved_at >= seconds
        ):
            self.save(options, position, history)

    def _checkpoint(self, options: TrainingOptions, position: Position, history: History) -> Checkpoint:
        model = self._parts.model
        state = model.state_dict()
        if (found := find_non_finite_weight(state)) is not None:
            raise NonFiniteError(
                f"after step {position.step}, {found}; {self.what_is_kept}; lower the learning rate"
            )
        return Checkpoint(
            model=state,
            architecture=architecture_of(model),
            options=options.to_dict(),
            data=self._data,
            position=position,
            generators=self._parts.random.capture(),
            history=history.records,
            stopped_early=history.stopped_early,
        )


def restore(checkpoint: Checkpoint, parts: StepParts) -> None:
    """Bring the parts of a run to where they were. Raises CheckpointError where it is of others."""
    parts.model.load_state_dict(checkpoint.model)
    parts.optimizer.load_state_dict(checkpoint.optimizer)
    if parts.average is not None:
        parts.average.load(checkpoint.ema)
    if parts.scaler is not None:
        parts.scaler.load_state_dict(checkpoint.loss_scaling)
    parts.random.restore(checkpoint.generators)
