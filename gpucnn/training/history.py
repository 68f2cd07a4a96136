"""What happened in each epoch, and which epoch was the best."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpucnn.errors import CheckpointError
from gpucnn.training.storage import atomic_file

MONITORS = ("accuracy", "loss")


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One epoch.

    Attributes:
        epoch: counts from 1.
        step: optimizer steps taken since the start of the run.
        lr: the learning rate of the epoch's last step.
        train_loss: the mean over the epoch's images, each taken as it was trained on (augmented, with dropout).
        train_accuracy: the share of those images that were classified rightly, 0 .. 1.
        validation_loss: the mean over the validation images, in evaluation mode; None without a validation set.
        validation_accuracy: the share of those that were classified rightly; None without a validation set.
        seconds: wall-clock time, validation included.
        images_per_second: training images over the time spent in training steps.
        skipped_steps: steps of the epoch that changed no weight, because float16 could not hold their gradients.
        loss_scale: what the loss is multiplied by after the epoch; 1 but in float16, see ``LossScaler``.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float
    train_accuracy: float
    validation_loss: float | None
    validation_accuracy: float | None
    seconds: float
    images_per_second: float
    skipped_steps: int = 0
    loss_scale: float = 1.0

    def score(self, monitor: str) -> tuple[float, ...]:
        """What makes an epoch better: larger wins, place by place.

        "accuracy" is the validation accuracy, and at equal accuracy the smaller validation loss; "loss" is the
        validation loss alone. Without a validation set the later epoch is the better one.
        """
        if self.validation_loss is None or self.validation_accuracy is None:
            return (float(self.epoch),)
        if monitor == "loss":
            return (-self.validation_loss,)
        return (self.validation_accuracy, -self.validation_loss)


@dataclass(slots=True)
class History:
    """The epochs of a run, oldest first.

    Attributes:
        records: one :class:`EpochRecord` an epoch.
        monitor: what "best" looks at, "accuracy" or "loss".
        stopped_early: whether early stopping ended the run before its last epoch.
    """

    records: list[EpochRecord] = field(default_factory=list)
    monitor: str = "accuracy"
    stopped_early: bool = False

    @property
    def best(self) -> EpochRecord | None:
        """The best epoch, the first of equals; None before the first epoch has ended."""
        return max(self.records, key=lambda record: record.score(self.monitor), default=None)

    @property
    def epochs_since_best(self) -> int:
        """How many epochs have passed since the best one: what early stopping counts."""
        best = self.best
        return self.records[-1].epoch - best.epoch if best else 0

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[EpochRecord]:
        return iter(self.records)

    def __getitem__(self, index: int) -> EpochRecord:
        return self.records[index]

    def write(self, path: Path) -> None:
        """Write JSON lines, one an epoch, whole or not at all."""
        with atomic_file(path) as file:
            for record in self.records:
                file.write((json.dumps(dataclasses.asdict(record), allow_nan=False) + "\n").encode())

    @classmethod
    def read(cls, path: Path, monitor: str = "accuracy") -> History:
        """The history in a file that :meth:`write` made. Raises CheckpointError where it is none."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise CheckpointError(f"cannot read the history {path}: {error.strerror}") from error
        try:
            return cls(records_from(json.loads(line) for line in lines), monitor)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is not a training history: {error}") from error


def records_from(rows: Iterable[dict[str, Any]]) -> list[EpochRecord]:
    """Records from their JSON form."""
    return [EpochRecord(**row) for row in rows]
