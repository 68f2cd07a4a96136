"""The command line: ``gpucnn train | evaluate | predict | info | warm-up``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from gpucnn.cli.parser import parse
from gpucnn.cli.settings import Settings, resolve
from gpucnn.cli.streams import silence, write_error
from gpucnn.errors import GpucnnError
from gpucnn_kernels.errors import KernelError
from gpucnn_kernels.problem import ProblemError

FAILED, INTERRUPTED, PIPE_CLOSED = 2, 130, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    0: done. 2: something is wrong with what was asked for or found, said in one line on standard error.
    130 (143): stopped by Ctrl-C (SIGTERM). 1: whoever read the output stopped reading.
    """
    try:
        return _run(sys.argv[1:] if argv is None else list(argv))
    except (GpucnnError, KernelError, ProblemError) as error:
        return _fail(str(error))
    except BrokenPipeError:
        silence(sys.stdout)
        return PIPE_CLOSED
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except MemoryError as error:
        return _fail(f"not enough memory ({error}); take a smaller --batch-size or --image-size")
    except KeyboardInterrupt as interruption:
        write_error(f"\n{str(interruption) or 'interrupted'}\n")
        return 128 + int(getattr(interruption, "signal_number", INTERRUPTED - 128))


def _run(argv: list[str]) -> int:
    command, options, flags, arguments = parse(argv)
    settings = resolve(options, flags)
    module = import_module(f"gpucnn.cli.{command.replace('-', '_')}")
    run: Callable[[Settings, dict[str, Any]], int] = module.run
    status = run(settings, arguments)
    if sys.stdout is not None:  # it is where the shell closed it: >&-
        sys.stdout.flush()
    return status


def _fail(message: str) -> int:
    write_error(f"gpucnn: error: {' '.join(message.split())}\n")
    return FAILED


__all__ = ["main"]
