"""What the user sees while a network trains: a bar on a terminal, plain lines in a pipe or a log."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any, TextIO

from gpucnn.training.history import EpochRecord

LINE_INTERVAL = 30.0  # seconds between lines within an epoch


class Progress:
    """The base: shows nothing."""

    def begin_epoch(self, epoch: int, epochs: int, images: int, done: int) -> None:
        """Epoch ``epoch`` (from 1) of ``epochs`` begins, or goes on with ``done`` of its ``images`` done."""

    def step(self, images: int, loss: float, accuracy: float) -> None:
        """A step with that many images was taken; ``loss`` and ``accuracy`` are the epoch's means so far."""

    def validate(self, images: int) -> None:
        """The epoch's steps are done; the validation of that many images begins."""

    def end_epoch(self, record: EpochRecord, is_best: bool) -> None:
        """The epoch has ended."""

    def message(self, text: str) -> None:
        """A line for the user."""

    def close(self) -> None:
        """Nothing more comes."""


class _Output:
    """A stream that may fail: the run goes on when the reader of its progress is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:  # tqdm asks for the encoding and the terminal's width
        return getattr(self._stream, name)


class LineProgress(Progress):
    """A line an epoch, and one now and then within a long epoch. A stream that refuses a line loses that line.

    Args:
        stream: where to write; standard error unless given.
        interval: seconds between lines within an epoch.
    """

    def __init__(self, stream: TextIO | None = None, interval: float = LINE_INTERVAL) -> None:
        self.stream = sys.stderr if stream is None else stream
        self._output = _Output(self.stream)
        self.interval = interval
        self._epoch = self._epochs = self._images = self._done = 0
        self._last = self._began = time.monotonic()
        self._done_before = 0

    def begin_epoch(self, epoch: int, epochs: int, images: int, done: int) -> None:
        """Remember where the epoch is."""
        self._epoch, self._epochs, self._images, self._done = epoch, epochs, images, done
        self._last = self._began = time.monotonic()
        self._done_before = done

    def step(self, images: int, loss: float, accuracy: float) -> None:
        """Write a line where the last is ``interval`` seconds ago."""
        self._done += images
        now = time.monotonic()
        if now - self._last >= self.interval:
            self._last = now
            rate = (self._done - self._done_before) / max(now - self._began, 1e-9)
            self.message(
                f"{_epoch_number(self._epoch, self._epochs)}  {100 * self._done // max(self._images, 1):3d} %  "
                f"loss {loss:.4f}  accuracy {accuracy:.4f}  {rate:.0f} images/s"
            )

    def end_epoch(self, record: EpochRecord, is_best: bool) -> None:
        """Write the epoch's line."""
        self.message(describe_epoch(record, self._epochs, is_best))

    def message(self, text: str) -> None:
        """Write ``text`` as a line."""
        self._output.write(text + "\n")
        self._output.flush()


class BarProgress(Progress):
    """A tqdm bar for the epoch under way, above it a line for each that has ended.

    What the stream refuses is lost.

    Args:
        stream: where to draw; standard error unless given.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self._output = _Output(self.stream)
        self._bar: Any = None
        self._epochs = 0

    def begin_epoch(self, epoch: int, epochs: int, images: int, done: int) -> None:
        """Draw a new bar."""
        from tqdm import tqdm

        self.close()
        self._epochs = epochs
        self._bar = tqdm(
            total=images,
            initial=done,
            desc=_epoch_number(epoch, epochs),
            unit="img",
            file=self._output,
            leave=False,
            dynamic_ncols=True,
        )

    def step(self, images: int, loss: float, accuracy: float) -> None:
        """Move the bar."""
        self._bar.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.4f}", refresh=False)
        self._bar.update(images)

    def validate(self, images: int) -> None:
        """Say so beside the bar."""
        self._bar.set_postfix_str("validating")

    def end_epoch(self, record: EpochRecord, is_best: bool) -> None:
        """Put the epoch's line in the bar's place."""
        self.close()
        self.message(describe_epoch(record, self._epochs, is_best))

    def message(self, text: str) -> None:
        """Write ``text`` as a line above the bar."""
        from tqdm import tqdm

        tqdm.write(text, file=self._output)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def make_progress(stream: TextIO | None = None, *, quiet: bool = False) -> Progress:
    """A bar where ``stream`` (default: standard error) is a terminal, lines elsewhere, nothing if ``quiet``."""
    target = sys.stderr if stream is None else stream
    if quiet:
        return Progress()
    return BarProgress(target) if target.isatty() else LineProgress(target)


def describe_epoch(record: EpochRecord, epochs: int, is_best: bool) -> str:
    """An epoch in a line."""
    text = f"{_epoch_number(record.epoch, epochs)}  loss {record.train_loss:.4f}  "
    text += f"accuracy {record.train_accuracy:.4f}"
    if record.validation_loss is not None and record.validation_accuracy is not None:
        text += f"  validation loss {record.validation_loss:.4f}  accuracy {record.validation_accuracy:.4f}"
        text += " *" if is_best else "  "
    return f"{text}  {record.seconds:.1f} s  {record.images_per_second:.0f} images/s"


def _epoch_number(epoch: int, epochs: int) -> str:
    return f"epoch {epoch:{len(str(epochs))}d}/{epochs}"
