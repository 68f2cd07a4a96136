"""The command line: ``gpucnn train | evaluate | predict | info``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from gpucnn.cli.parser import parse
from gpucnn.cli.settings import Settings, resolve
from gpucnn.errors import GpucnnError
from gpucnn_kernels.problem import ProblemError

FAILED, INTERRUPTED, PIPE_CLOSED = 2, 130, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    0: done. 2: something is wrong with what was asked for or found, said in one line on standard error.
    130 (143): stopped by Ctrl-C (SIGTERM). 1: whoever read the output stopped reading.
    """
    try:
        return _run(sys.argv[1:] if argv is None else list(argv))
    except (GpucnnError, ProblemError) as error:
        return _fail(str(error))
    except BrokenPipeError:
        # The interpreter flushes standard output as it ends: it must find a place that takes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except MemoryError as error:
        return _fail(f"not enough memory ({error}); take a smaller --batch-size or --image-size")
    except KeyboardInterrupt as interruption:
        print(f"\n{str(interruption) or 'interrupted'}", file=sys.stderr)
        return 128 + int(getattr(interruption, "signal_number", INTERRUPTED - 128))


def _run(argv: list[str]) -> int:
    command, options, flags, arguments = parse(argv)
    settings = resolve(options, flags)
    run: Callable[[Settings, dict[str, Any]], int] = import_module(f"gpucnn.cli.{command}").run
    status = run(settings, arguments)
    sys.stdout.flush()
    return status


def _fail(message: str) -> int:
    print(f"gpucnn: error: {' '.join(message.split())}", file=sys.stderr)
    return FAILED


__all__ = ["main"]
