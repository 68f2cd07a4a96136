"""Standard output and standard error where nobody reads them any more: a closed pipe, or none from the start."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TextIO


def write_error(text: str) -> None:
    """Write ``text`` to standard error, or nowhere where its reader is gone.

    Ctrl-C in ``gpucnn train 2>&1 | tee log`` ends tee as well, and saving must not fail by it.
    """
    if sys.stderr is None:  # closed before the program began: 2>&-
        return
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except BrokenPipeError:
        silence(sys.stderr)


def silence(stream: TextIO | None) -> None:
    """Have what is still in ``stream``'s buffer go nowhere.

    The interpreter flushes both streams as it ends, and makes the exit status 120 where that fails.
    """
    if stream is None:
        return
    with contextlib.suppress(OSError, ValueError):  # a stand-in without a descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)


class LastingErrors(io.TextIOBase):
    """Standard error as a stream that outlives its reader, for the progress of a training."""

    def write(self, text: str) -> int:
        """Write ``text``; its length."""
        write_error(text)
        return len(text)
