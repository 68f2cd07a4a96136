"""Makes the virtual environment .venv beside the checkout and installs gpucnn into it. Part of run.py.

Standard library only. What is in the environment stands in a stamp file inside it, which says "complete" only
after an install has ended well: one that was interrupted or failed is never trusted by the next run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import gpu_detection

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
STAMP = ENVIRONMENT / "gpucnn-setup.json"

# What is downloaded where nothing is cached, in MB, measured with pip on Linux x86-64; others differ a little.
MEGABYTES = {"": 20, "images": 7, "plot": 19, "test": 130, "cuda12": 1800, "cuda13": 1250}
CONTENTS = {
    "": "NumPy, safetensors, threadpoolctl, tqdm",
    "images": "Pillow",
    "plot": "Matplotlib",
    "test": "pytest, hypothesis, coverage, ruff, mypy, NVRTC",
    "cuda12": "CuPy with CUDA 12's libraries",
    "cuda13": "CuPy with CUDA 13's libraries",
}
GPU_CHOICES = ("auto", "cuda12", "cuda13", "none")

Stamp = dict[str, Any]


class SetupError(Exception):
    """Setting up failed; the message says what to do."""


def say(message: str) -> None:
    """Print to standard error, so that a command's own output stays clean."""
    print(message, file=sys.stderr, flush=True)


def environment_python() -> Path:
    """The environment's own Python."""
    return ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def base_python() -> str:
    """The Python that runs this; where that is the environment's own, the one that it was made from."""
    if Path(sys.prefix).resolve() == ENVIRONMENT:
        return str(getattr(sys, "_base_executable", sys.executable))
    return sys.executable


# ---------------------------------------------------------------- the stamp


def fingerprint() -> Stamp:
    """What the environment is right for: this pyproject.toml, this Python, this place."""
    return {
        "pyproject": hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest(),
        "python": "{}.{}.{} ".format(*sys.version_info[:3]) + sys.base_prefix,
        "checkout": str(ROOT),
    }


def read_stamp() -> Stamp:
    """What the last set-up wrote; empty where there is none or it cannot be read."""
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(stamp: Stamp) -> None:
    """Write it whole or not at all."""
    temporary = STAMP.with_suffix(".tmp")
    temporary.write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, STAMP)


# ---------------------------------------------------------------- tools


def tool_environment() -> dict[str, str]:
    """The variables for pip and uv, without those that would lead an install elsewhere."""
    away = ("PYTHONHOME", "PYTHONPATH", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if name not in away}
    return {**kept, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}


def call(command: list[str], purpose: str) -> None:
    """Run a tool quietly; SetupError with the end of what it printed where it fails."""
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=tool_environment()
            )
        except OSError as error:
            raise SetupError(f"{purpose} failed: {error}") from error
        try:
            status = wait_showing_time(process, purpose)
        except BaseException:
            process.kill()
            process.wait()
            raise
        if status != 0:
            output.seek(0)
            lines = output.read().decode("utf-8", "replace").strip().splitlines()[-25:]
            shown = "".join(f"  | {line}\n" for line in lines)
            raise SetupError(f"{purpose} failed with exit status {status}:\n{shown}".rstrip())


def wait_showing_time(process: subprocess.Popen[bytes], purpose: str) -> int:
    """Wait for it; on a terminal show that it is at work, and for how long."""
    began = time.monotonic()
    terminal = sys.stderr.isatty()
    try:
        while True:
            try:
                return process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                if terminal:
                    print(f"\r  {purpose}: {time.monotonic() - began:.0f} s ", end="", file=sys.stderr, flush=True)
    finally:
        if terminal:
            print("\r" + " " * (len(purpose) + 20) + "\r", end="", file=sys.stderr, flush=True)


def works(*command: str) -> bool:
    """Whether a command ends with status 0."""
    try:
        return subprocess.run(command, capture_output=True, env=tool_environment(), timeout=300).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


# ---------------------------------------------------------------- making and installing


def create_environment() -> None:
    """Make .venv afresh: with venv and pip, or with uv, or with venv but without pip."""
    if ENVIRONMENT.is_symlink() or ENVIRONMENT.is_file():
        raise SetupError(f"{ENVIRONMENT} is a link or a file, not a folder: move it away")
    try:
        if ENVIRONMENT.exists():
            shutil.rmtree(ENVIRONMENT)
        ENVIRONMENT.mkdir()
        write_stamp({"state": "started"})  # whatever is in the folder from here on is known to be unfinished
    except OSError as error:
        raise SetupError(f"{ENVIRONMENT} cannot be made: {error}") from error
    python, uv, place = base_python(), shutil.which("uv"), str(ENVIRONMENT)
    if works(python, "-c", "import venv, ensurepip"):
        call([python, "-m", "venv", place], "making the virtual environment")
    elif uv is not None:
        command = [uv, "venv", "--quiet", "--allow-existing", "--no-project", "--python", python, place]
        call(command, "making the virtual environment with uv")
    elif works(python, "-c", "import venv") and works(python, "-m", "pip", "--version"):
        call([python, "-m", "venv", "--without-pip", place], "making the virtual environment")
    else:
        version = "{}.{}".format(*sys.version_info[:2])
        raise SetupError(
            f"{python} can make no virtual environment: it lacks the module ensurepip, and there is neither uv "
            f"nor pip.\nOn Debian and Ubuntu: apt install python{version}-venv. Elsewhere: install uv or pip."
        )


def install_command(extras: list[str]) -> list[str]:
    """The command that installs this checkout, editable, with the extras, into .venv."""
    python, uv = str(environment_python()), shutil.which("uv")
    checkout = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    if works(python, "-m", "pip", "--version"):
        return [python, "-m", "pip", "install", "--quiet", "--editable", checkout]
    if uv is not None:
        return [uv, "pip", "install", "--quiet", "--python", python, "--editable", checkout]
    if works(base_python(), "-m", "pip", "--version"):
        return [base_python(), "-m", "pip", "--python", python, "install", "--quiet", "--editable", checkout]
    raise SetupError(f"{ENVIRONMENT} has no pip, and neither uv nor another pip is there: delete it and try again")


def make_usable() -> Stamp:
    """Leave a .venv whose Python runs, made anew where it has to be; the stamp of what is in it.

    One that this script did not make (uv makes a .venv too) is added to, never deleted.
    """
    stamp = read_stamp()
    right = all(stamp.get(name) == value for name, value in fingerprint().items())
    if stamp.get("state") == "complete" and right and environment_python().exists():
        return stamp
    foreign = stamp.get("foreign", False) or (not STAMP.exists() and (ENVIRONMENT / "pyvenv.cfg").exists())
    if foreign:
        if not works(str(environment_python()), "-c", "import sys; sys.exit(sys.version_info < (3, 11))"):
            raise SetupError(
                f"{ENVIRONMENT} was not made by this script and has no working Python 3.11 or newer: move it away"
            )
    else:
        if stamp:
            say("The environment is unfinished, or of another Python or pyproject.toml: making it again.")
        create_environment()
    return {"extras": [], "gpu": stamp.get("gpu", "auto"), "foreign": foreign}


def announce(extras: list[str]) -> None:
    """Say what comes, and about how much of it."""
    megabytes = sum(MEGABYTES[extra] for extra in extras)
    amount = f"{megabytes} MB" if megabytes < 1000 else f"{megabytes / 1000:.1f} GB"
    contents = ", ".join(CONTENTS[extra] for extra in extras)
    say(f"Installing {contents} into {ENVIRONMENT} (about {amount} to download)")


def install(extras: list[str], stamp: Stamp) -> Stamp:
    """Install the extras beside those already there; the new stamp, written once all is in place."""
    announce(extras)
    together = sorted({*stamp["extras"], *extras} - {""})
    command = install_command(together)
    write_stamp({**stamp, "state": "started"})
    try:
        call(command, "installing")
    except SetupError:
        # pip downloads everything before it installs anything, so what was there is most often whole: look.
        whole = "import gpucnn, gpucnn_kernels, numpy, safetensors, threadpoolctl, tqdm"
        if stamp.get("state") == "complete" and works(str(environment_python()), "-P", "-c", whole):
            write_stamp(stamp)
        raise
    stamp = {**stamp, **fingerprint(), "state": "complete", "extras": together}
    write_stamp(stamp)
    return stamp


def set_up(extras: tuple[str, ...], gpu: str | None) -> None:
    """Make .venv hold gpucnn with the extras, and CuPy as ``gpu`` says (None: as last time, "auto" at first)."""
    stamp = make_usable()
    fresh = stamp.get("state") != "complete"
    missing = [*([""] if fresh else []), *(extra for extra in extras if extra not in stamp["extras"])]
    if missing:
        stamp = install(missing, stamp)
    if gpu is not None and gpu != stamp["gpu"]:
        stamp = {**stamp, "gpu": gpu}
        write_stamp(stamp)
    installed = [extra for extra in gpu_detection.EXTRAS if extra in stamp["extras"]]
    wanted = stamp["gpu"]
    if wanted == "auto" and not installed:
        wanted, reason = gpu_detection.choose_extra(gpu_detection.detect())
        if fresh or wanted != "none":
            say(f"GPU: {reason}.")
    if wanted not in gpu_detection.EXTRAS or wanted in installed:
        return
    if installed:
        raise SetupError(
            f"{installed[0]} is in {ENVIRONMENT}, and two CuPys do not work side by side: delete that first"
        )
    try:
        install([wanted], stamp)
    except SetupError as error:
        raise SetupError(
            f"{error}\nAll but the GPU part is set up: add --gpu none to go on without it."
        ) from error


class Lock:
    """Holds off a second set-up of the same checkout. It is on this very file, and dies with its process."""

    def __enter__(self) -> Self:
        self.file = open(Path(__file__).resolve(), "rb")
        try:
            if os.name == "nt":
                import msvcrt

                self.file.seek(1 << 30)  # past the end: Windows keeps others from reading what is locked
                msvcrt.locking(self.file.fileno(), msvcrt.LK_LOCK, 1)
            else:
                import fcntl

                try:
                    fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    say("Another set-up is at work in this checkout: waiting for it.")
                    fcntl.flock(self.file, fcntl.LOCK_EX)
        except OSError:
            pass  # some network file systems know no locks
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()
