"""Where data sets lie on this machine, and how a missing file is downloaded."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gpucnn.errors import DataError, StorageError

_TIMEOUT_SECONDS = 30
_CHUNK_BYTES = 1 << 20


def cache_folder() -> Path:
    """The user's cache for gpucnn: the platform's usual place, or below $XDG_CACHE_HOME where that is set."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "gpucnn"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "gpucnn" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "gpucnn"
    return Path.home() / ".cache" / "gpucnn"


def search_folders(data_dir: Path | None, subfolders: Sequence[str], system: Sequence[str] = ()) -> list[Path]:
    """Existing folders to look in: ``data_dir``, $GPUCNN_DATA, the user's cache, each with its ``subfolders``.

    ``system`` are absolute paths that come last. Raises DataError where ``data_dir`` is given and no folder.
    """
    if data_dir is not None and not data_dir.is_dir():
        what = "is not a folder" if data_dir.exists() else "does not exist"
        raise DataError(f"data folder {data_dir} {what}; give the folder that holds the data set's files")
    bases = [data_dir] if data_dir is not None else []
    if given := os.environ.get("GPUCNN_DATA"):
        bases.append(Path(given).expanduser())
    bases.append(cache_folder())
    folders = [base / sub for base in bases for sub in ("", *subfolders)] + [Path(path) for path in system]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def download(urls: Sequence[str], target: Path, md5: str) -> None:
    """Download ``target`` from the first of ``urls`` that works; it appears whole and verified, or not at all.

    ``md5`` is the checksum that the data set's publisher gives. Says on standard error what it does. Raises
    DataError where no address gives the right file, StorageError where the file cannot be written.
    """
    try:  # before anything is downloaded in vain
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {target.parent}: {error.strerror}") from error
    failures = []
    for url in urls:
        print(f"gpucnn: downloading {url} to {target}", file=sys.stderr)
        failure = _try_download(url, target, md5)
        if failure is None:
            return
        failures.append(f"{url}: {failure}")
    raise DataError(
        f"cannot download {target.name} ({'; '.join(failures)}); get the file by other means and put it into "
        f"{target.parent}"
    )


def _try_download(url: str, target: Path, md5: str) -> str | None:
    """Download once; the reason where that fails."""
    import hashlib
    import http.client
    import urllib.request

    digest = hashlib.md5(usedforsecurity=False)
    received: list[bytes] = []
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            while chunk := response.read(_CHUNK_BYTES):
                digest.update(chunk)
                received.append(chunk)
    except (OSError, http.client.HTTPException) as error:  # urllib's errors are OSErrors
        return str(error) or type(error).__name__
    if digest.hexdigest() != md5:
        return f"what came is not the published file (MD5 {digest.hexdigest()}, expected {md5})"
    _write(received, target)
    return None


def _write(chunks: Sequence[bytes], target: Path) -> None:
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise StorageError(
            f"cannot write {target}: {error.strerror}; make room or choose another folder"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
