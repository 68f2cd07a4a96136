"""What tuning remembers: a file for each GPU, driver, CUDA and text of the kernels, shared by processes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gpucnn_kernels.runtime.compiler import cache_folder
from gpucnn_kernels.source import FOLDER

FORMAT = 1


class Choice(NamedTuple):
    """A way, and its tile where it has several."""

    path: str
    tile: str = ""


class Memory:
    """The choices of one GPU, in a file that several processes may read and write at a time."""

    def __init__(self, path: Path, identity: dict[str, str]) -> None:
        self.path, self.identity = path, identity
        self._choices = self._read()

    def get(self, key: str) -> Choice | None:
        """What was chosen, in this process or by what the file said when it was read."""
        entry = self._choices.get(key)
        return None if entry is None else Choice(entry["path"], entry["tile"])

    def put(self, key: str, choice: Choice, seconds: dict[Choice, float]) -> Choice:
        """Remember a choice; what it is now: another process may have made one meanwhile, which stays."""
        times = {" ".join(each).strip(): float(f"{value:.4g}") for each, value in seconds.items()}
        with _file_lock(self.path):
            self._choices |= self._read()
            if self.get(key) not in seconds:  # another process's choice stays, unless it is none
                self._choices[key] = {**choice._asdict(), "seconds": times}
            try:
                self._write()
            except OSError as error:
                _say(f"cannot remember what was measured in {self.path}: {error}")
        return self.get(key) or choice

    def _read(self) -> dict[str, dict[str, Any]]:
        """The file's choices; none, with a line, where it is damaged or not of this GPU and these kernels."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["identity"] != self.identity or content["format"] != FORMAT:
                raise ValueError(f"it is of {content['identity']}")
            choices: dict[str, dict[str, Any]] = content["choices"]
            for entry in choices.values():
                if not (isinstance(entry["path"], str) and isinstance(entry["tile"], str)):
                    raise TypeError("an entry without a path and a tile")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            _say(f"{self.path} is not used and will be written anew: {error}")
            return {}
        return choices

    def _write(self) -> None:
        content = {"format": FORMAT, "identity": self.identity, "choices": self._choices}
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
            os.replace(temporary, self.path)
        except BaseException:
            os.unlink(temporary)
            raise


@functools.cache
def memory_of(runtime: str, device: int) -> Memory:
    """What is remembered for a device of a runtime."""
    identity = {"kernels": fingerprint(), **_machine(runtime, device)}
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
    return Memory(cache_folder("autotune") / f"{name}.json", identity)


@functools.cache
def fingerprint() -> str:
    """Of the text of all kernels, and of the modules that start those of convolutions."""
    files = [path for path in FOLDER.iterdir() if path.suffix in (".cu", ".cuh")]
    files += Path(__file__).parent.glob("conv2d*.py")
    texts = [path.read_bytes() for path in sorted(files)]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()


def _machine(runtime: str, device: int) -> dict[str, str]:
    if runtime != "cuda":
        return {"gpu": f"none: the {runtime} runtime"}
    import cupy

    cuda = cupy.cuda.runtime
    return {
        "gpu": cuda.getDeviceProperties(device)["name"].decode(),
        "driver": str(cuda.driverGetVersion()),
        "cuda": str(cuda.runtimeGetVersion()),
    }


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """One process at a time; where the system has no such locks the last one to write wins, which is harmless."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        file = open(path.with_suffix(".lock"), "w", encoding="utf-8")  # noqa: SIM115 (closed below, with the lock)
    except OSError:
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(words: str) -> None:
    print(f"gpucnn_kernels: autotune: {words}", file=sys.stderr, flush=True)
