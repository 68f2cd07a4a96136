"""Hooks into a training run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpucnn.training.history import EpochRecord

if TYPE_CHECKING:
    from gpucnn.training.trainer import Trainer


class Callback:
    """Derive from this and define what you need; an exception from a callback ends the run."""

    def on_fit_start(self, trainer: Trainer) -> None:
        """Everything is ready, or restored; no step has been taken since."""

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        """An optimizer step was taken; ``loss`` is its batch's."""

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        """An epoch was validated, recorded and saved."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """The run is finished (not interrupted)."""
