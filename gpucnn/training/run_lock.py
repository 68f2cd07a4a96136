"""One process at a time trains in a run folder: a lock that ends with the process, however that ends."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from gpucnn.errors import ArgumentError

NAME = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of an existing ``folder``. Raises ArgumentError, saying who has it, where another holds it.

    It is advisory, and the system's: the file that is left behind by a process that was killed locks nothing.
    Where there are no such locks (on Windows, on some network file systems), or the folder cannot be written,
    nothing is locked; what cannot be written says so by itself.
    """
    path = folder / NAME
    descriptor = _acquire(path)
    try:
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):  # removed by hand, or with the folder
                path.unlink()
            os.close(descriptor)


def _acquire(path: Path) -> int | None:
    """The locked file; None where nothing can be locked."""
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):  # else its last owner has just removed it
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(_owner()).encode())
                return descriptor
        except BlockingIOError:
            message = _in_use(path)
            os.close(descriptor)
            raise ArgumentError(message) from None
        except OSError:
            os.close(descriptor)
            return None
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _owner() -> dict[str, str | int]:
    now = datetime.datetime.now().astimezone().isoformat(" ", "minutes")
    return {"process": os.getpid(), "machine": socket.gethostname(), "since": now}


def _in_use(path: Path) -> str:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        who = f"process {owner['process']} on '{owner['machine']}', since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it is just being written, or was removed
        who = "another process"
    return (
        f"{path.parent} is in use: {who}, trains in it; wait for that process or end it, or choose another folder"
    )
