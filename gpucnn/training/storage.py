"""Files that appear whole or not at all: written under a temporary name, synced, then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gpucnn.errors import CheckpointError, StorageError

TEMPORARY_SUFFIX = ".part"

_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EACCES: "no permission; choose a folder that you may write to",
    errno.EPERM: "no permission; choose a folder that you may write to",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOENT: "the folder does not exist; create it first",
    errno.ENOTDIR: "part of the path is a file, not a folder; choose another folder",
}


def storage_error(path: Path, error: OSError) -> StorageError:
    """The StorageError for a failed write to ``path``: the path, the reason and what to do."""
    reason = _REMEDIES.get(error.errno or 0, "check the disk and the path")
    raised = StorageError(f"cannot write {path}: {error.strerror or error}: {reason}")
    raised.errno = error.errno
    return raised


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of ``path`` when the block ends well.

    Whatever stops the block (an error, a full disk, the end of the process) leaves the previous file as it was.
    The bytes reach the disk before the name does, so that a power cut cannot leave a name without its contents.

    Raises StorageError, with the temporary file removed, where the disk refuses.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            raise storage_error(path, error) from error
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` last; a system that cannot sync folders is left to its own ways."""
    with contextlib.suppress(OSError):  # Windows cannot open a folder, some file systems cannot sync one
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create ``folder`` and its parents. Raises StorageError where that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise StorageError(f"cannot create the folder {folder}: a file has that name; choose another") from error
    except OSError as error:
        raise storage_error(folder, error) from error


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with atomic_file(path) as file:
        file.write(text.encode())


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises CheckpointError where it is missing, unreadable or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; is this a run folder?") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); restore it from a copy") from error
