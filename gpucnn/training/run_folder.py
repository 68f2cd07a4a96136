"""A run folder: everything about one training run, under names that stay the same.

| file | what it is |
|---|---|
| config.json | what was asked for: enough to repeat the run |
| history.jsonl | one line an epoch |
| last.safetensors | the newest checkpoint: where ``resume`` goes on |
| best.safetensors | the weights of the best epoch |
| summary.json | results of the finished run, with the confusion matrix |
| curves.png, confusion.png | pictures |
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpucnn.errors import ArgumentError, CheckpointError
from gpucnn.training import run_lock
from gpucnn.training.checkpoint import Checkpoint, read_checkpoint
from gpucnn.training.history import History
from gpucnn.training.storage import TEMPORARY_SUFFIX, make_folder, read_json, storage_error, write_json

_CONFIG, _HISTORY, _SUMMARY = "config.json", "history.jsonl", "summary.json"
_LAST, _BEST = "last.safetensors", "best.safetensors"
_CURVES, _CONFUSION = "curves.png", "confusion.png"
_FILES = (_CONFIG, _HISTORY, _SUMMARY, _LAST, _BEST, _CURVES, _CONFUSION)


class RunFolder:
    """The files of one run. Making this object touches nothing on disk; :meth:`create` and the writers do."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._holds_lock = False

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, and keep it from every other process, and every other RunFolder, that asks for this.

        Again inside of the block, it does nothing. A folder that was made here goes again where the block raises
        before anything was written. Raises ArgumentError where another one has it, StorageError where the folder
        cannot be made.
        """
        if self._holds_lock:
            yield
            return
        is_new = not self.path.exists()
        make_folder(self.path)
        try:
            with run_lock.locked(self.path):
                self._holds_lock = True
                try:
                    yield
                finally:
                    self._holds_lock = False
        except BaseException:
            if is_new:
                with contextlib.suppress(OSError):  # it is not empty
                    self.path.rmdir()
            raise

    @property
    def config_path(self) -> Path:
        """What was asked for."""
        return self.path / _CONFIG

    @property
    def history_path(self) -> Path:
        """One JSON line an epoch."""
        return self.path / _HISTORY

    @property
    def summary_path(self) -> Path:
        """The results."""
        return self.path / _SUMMARY

    @property
    def last_path(self) -> Path:
        """The newest checkpoint."""
        return self.path / _LAST

    @property
    def best_path(self) -> Path:
        """The checkpoint of the best epoch."""
        return self.path / _BEST

    @property
    def curves_path(self) -> Path:
        """The picture of the learning curves."""
        return self.path / _CURVES

    @property
    def confusion_path(self) -> Path:
        """The picture of the confusion matrix."""
        return self.path / _CONFUSION

    def holds_run(self) -> bool:
        """Whether anything of a run that began is in the folder; a config alone is of one that did not."""
        return any((self.path / name).exists() for name in _FILES if name != _CONFIG)

    def create(self, config: Mapping[str, Any] | None = None, *, overwrite: bool = False) -> RunFolder:
        """Make the folder for a new run and write its config; returns itself.

        Raises ArgumentError where the folder holds a run already, unless ``overwrite``: then the old run's files
        (and no others) are removed. Raises StorageError where the disk refuses.
        """
        if self.holds_run():
            if not overwrite:
                raise ArgumentError(
                    f"{self.path} already holds a run; resume it, choose another folder, or overwrite it"
                )
            self._remove(_FILES)
        make_folder(self.path)
        self.remove_temporary_files()
        write_json(self.config_path, dict(config or {}))
        return self

    def remove_temporary_files(self) -> None:
        """Remove what a killed process left half-written."""
        self._remove(tuple(f".{name}{TEMPORARY_SUFFIX}" for name in _FILES))

    def _remove(self, names: tuple[str, ...]) -> None:
        for name in names:
            path = self.path / name
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise storage_error(path, error) from error

    def read_config(self) -> dict[str, Any]:
        """What :meth:`create` was given. Raises CheckpointError where this is no run folder."""
        config = read_json(self.config_path)
        if not isinstance(config, dict):
            raise CheckpointError(f"{self.config_path} holds {type(config).__name__}, expected a JSON object")
        return config

    def read_history(self, monitor: str = "accuracy") -> History:
        """The finished epochs. Raises CheckpointError where there is no readable history."""
        return History.read(self.history_path, monitor)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the results. Raises StorageError where the disk refuses."""
        write_json(self.summary_path, dict(summary))

    def read_summary(self) -> dict[str, Any]:
        """The results. Raises CheckpointError where the run has none yet."""
        summary = read_json(self.summary_path)
        if not isinstance(summary, dict):
            raise CheckpointError(f"{self.summary_path} holds {type(summary).__name__}, expected a JSON object")
        return summary

    def read_last(self) -> Checkpoint:
        """The newest checkpoint. Raises CheckpointError where there is none, or a damaged one."""
        return read_checkpoint(self.last_path)

    def read_best(self) -> Checkpoint:
        """The best epoch's checkpoint, or the newest where no epoch has ended yet."""
        return read_checkpoint(self.best_path if self.best_path.exists() else self.last_path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"
