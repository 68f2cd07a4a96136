"""Ctrl-C and SIGTERM during training: finish the step, save, and leave."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self


class TrainingInterrupted(KeyboardInterrupt):
    """Training stopped at the user's wish, with everything saved.

    Attributes:
        signal_number: the signal that asked for it (SIGINT is 2, SIGTERM 15).
    """

    def __init__(self, message: str, signal_number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class InterruptWatch:
    """While active, the first SIGINT or SIGTERM is only noted; a second one stops the program at once.

    Signals reach Python's main thread alone, so in any other thread this watches nothing and changes nothing.

    Args:
        announce: called with a line for the user when a signal comes. That it cannot be shown stops nothing.
    """

    def __init__(self, announce: Callable[[str], None]) -> None:
        self._announce = announce
        self._previous: dict[int, Any] = {}
        self.received: int | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                previous = signal.getsignal(number)
                if previous is not None:  # None: set outside Python, and could not be put back
                    self._previous[number] = previous
                    signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        # Ctrl-C in a pipeline ends the reader of the stream as well (OSError), the stream may be closed
        # (ValueError), and the signal may have come in the middle of another write to it (RuntimeError).
        # None of them may prevent the saving.
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            self._announce("stopping after this step, then saving; once more to stop at once without saving")
