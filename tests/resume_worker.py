"""A small training run for test_resume.py: ``python resume_worker.py FOLDER [KILL]``.

It resumes where FOLDER holds a run. KILL makes the process kill itself with SIGKILL at a chosen place of a
checkpoint write: "half-written", "unsynced" (all bytes written, none synced), "unnamed" (synced, not renamed) or
"unnoticed" (renamed, the folder not synced), each time at the write whose number is in KILL_AT.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy

from gpucnn import layers
from gpucnn.data import ArrayDataset, Augmentation
from gpucnn.random import manual_seed
from gpucnn.training import Callback, RunFolder, Trainer, TrainingOptions, storage

EPOCHS, IMAGES, BATCH_SIZE = 24, 163, 6  # 27 steps an epoch: the last image alone is left out


def make_data() -> tuple[ArrayDataset, ArrayDataset]:
    generator = numpy.random.default_rng(5)
    patterns = generator.integers(0, 200, (3, 6, 6))
    labels = generator.integers(0, 3, IMAGES + 40)
    images = patterns[labels] + generator.integers(0, 56, (len(labels), 6, 6))
    images = images.astype(numpy.uint8)
    return (
        ArrayDataset(images[:IMAGES], labels[:IMAGES], classes=["a", "b", "c"]),
        ArrayDataset(images[IMAGES:], labels[IMAGES:], classes=["a", "b", "c"]),
    )


def make_model() -> layers.Sequential:
    manual_seed(3)
    return layers.Sequential(
        layers.Conv2d(1, 3, 3),
        layers.BatchNorm2d(3),
        layers.ReLU(),
        layers.Dropout2d(0.1),
        layers.Flatten(),
        layers.Dropout(0.2),
        layers.Linear(48, 3),
    )


def make_trainer(run: RunFolder | None, callbacks: tuple[Callback, ...] = (), **changes: Any) -> Trainer:
    train, validation = make_data()
    options = {
        "epochs": EPOCHS,
        "batch_size": BATCH_SIZE,
        "checkpoint_steps": 3,
        "ema_decay": 0.98,
        "clip_norm": 1.0,
        "warmup_epochs": 0.5,
        "label_smoothing": 0.1,
        "class_weights": "balanced",
        "early_stopping": EPOCHS,
        "workers": 1,
        **changes,
    }
    return Trainer(
        make_model(),
        train,
        validation,
        options=TrainingOptions(**options),
        augmentation=Augmentation(horizontal_flip=True, shift=1),
        run=run,
        callbacks=callbacks,
    )


def kill_this_process(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class HalfWritten:
    """A file in which the first half of a write reaches the disk and then the process dies."""

    def __init__(self, file: Any) -> None:
        self.file, self.written = file, 0

    def write(self, data: Any) -> None:
        self.written += 1
        if self.written == 4:  # the header and two tensors are there
            self.file.write(bytes(data)[: len(bytes(data)) // 2])
            self.file.flush()
            kill_this_process()
        self.file.write(data)


def arrange_death(place: str, number: int) -> None:
    """Die at ``place`` of checkpoint write ``number``."""
    from gpucnn.training import checkpoint

    plain = storage.atomic_file
    writes = 0

    @contextlib.contextmanager
    def deadly(path: Path) -> Any:
        nonlocal writes
        writes += 1
        if writes != number:
            with plain(path) as file:
                yield file
            return
        if place == "half-written":
            with plain(path) as file:
                yield HalfWritten(file)
            return
        name = {"unsynced": "fsync", "unnamed": "replace"}.get(place)
        if name is not None:
            setattr(storage.os, name, kill_this_process)
        else:
            storage.sync_folder = kill_this_process
        with plain(path) as file:
            yield file

    checkpoint.atomic_file = deadly


class Announce(Callback):
    def on_fit_start(self, trainer: Trainer) -> None:
        print("training", flush=True)


if __name__ == "__main__":
    folder = RunFolder(sys.argv[1])
    if len(sys.argv) > 2:
        arrange_death(sys.argv[2], int(os.environ["KILL_AT"]))
    make_trainer(folder, (Announce(),)).fit(resume=True)
