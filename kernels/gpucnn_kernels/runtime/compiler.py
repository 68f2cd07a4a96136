"""The machine's C++ compiler, and the folder where what it makes is kept."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

SHOWN_LINES = 24
SAY_AFTER_SECONDS = 1.0


class HostCompileError(RuntimeError):
    """The text does not compile for the host, or there is no compiler; the message says what to do."""


class HostUnavailableError(HostCompileError):
    """Nothing can be compiled for this machine: there is no compiler, or the system is not known."""


# ---- the compiler ----


def find_compiler() -> str:
    """The path of ``$CXX``, g++ or clang++. Raises HostUnavailableError where there is none."""
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["g++", "clang++", "c++"]:
        found = shutil.which(name)
        if found:
            return found
    if asked:
        raise HostUnavailableError(
            f"the C++ compiler that CXX names is not there: '{asked}'; unset CXX or correct it"
        )
    raise HostUnavailableError(
        "no C++ compiler is there; install g++ (apt install g++, dnf install gcc-c++) or clang++"
    )


@functools.cache
def _version(compiler: str, changed: int) -> str:
    del changed  # the file's time: part of the memory's key, so that a new compiler is asked again
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _identity(compiler: str) -> str:
    return _version(compiler, os.stat(compiler).st_mtime_ns)


def is_clang(compiler: str) -> bool:
    """Whether the compiler says that it is Clang."""
    return "clang" in _identity(compiler)


def machine_flags() -> list[str]:
    """Flags that allow every instruction of this processor."""
    return ["-march=native"] if platform.machine() in ("x86_64", "aarch64") else []


@functools.cache
def _machine() -> str:
    """The processor's features, on which -march=native depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    kinds = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    return "\n".join([platform.machine(), *dict.fromkeys(line for line in lines if line.startswith(kinds))])


def fingerprint(compiler: str, flags: Sequence[str], *texts: str) -> str:
    """What a compiled file depends on, as 32 hexadecimal digits: compiler, processor, flags and texts."""
    parts = [compiler, _identity(compiler), _machine(), " ".join(flags), *texts]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def run_compiler(compiler: str, arguments: Sequence[str]) -> str | None:
    """Run the compiler; None where it succeeds, otherwise the part of its messages that helps."""
    done = subprocess.run([compiler, *arguments], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    lines = (done.stderr or done.stdout).strip().splitlines()
    # The errors first, and the lines that show where; the notes after them rarely help.
    first = next((index for index, line in enumerate(lines) if " error: " in line or "undefined" in line), 0)
    shown = lines[first : first + SHOWN_LINES]
    if len(lines) > first + len(shown):
        shown.append(f"... and {len(lines) - first - len(shown)} more lines")
    return "\n".join(shown) or f"exit status {done.returncode}"


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
    """While inside: a line on stderr where compiling takes so long that one would wonder."""
    timer = threading.Timer(SAY_AFTER_SECONDS, _say_compiling, (what,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say_compiling(what: str) -> None:
    print(f"gpucnn_kernels: compiling {what}, first use", file=sys.stderr, flush=True)


# ---- the cache ----

_fallback: list[Path] = []


def cache_folder(kind: str) -> Path:
    """Where compiled libraries of a kind are kept; a temporary folder, with a line on stderr, if not writable."""
    if os.environ.get("GPUCNN_KERNELS_CACHE"):
        root = Path(os.environ["GPUCNN_KERNELS_CACHE"])
    elif os.environ.get("XDG_CACHE_HOME"):
        root = Path(os.environ["XDG_CACHE_HOME"]) / "gpucnn_kernels"
    else:
        root = Path.home() / ".cache" / "gpucnn_kernels"
    folder = root / kind
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
        reason = "it is not writable"
    except OSError as error:
        reason = str(error)
    if not _fallback:
        _fallback.append(Path(tempfile.mkdtemp(prefix="gpucnn-kernels-")))
        print(
            f"gpucnn_kernels: cannot keep compiled kernels in {folder} ({reason}); they go to {_fallback[0]} "
            "for this process (GPUCNN_KERNELS_CACHE names another folder)",
            file=sys.stderr,
            flush=True,
        )
    return _fallback[0]
