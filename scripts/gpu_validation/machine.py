"""What the run was on: GPU, driver, libraries; and NVIDIA's compute-sanitizer, where it is installed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SANITIZED = (
    "convolution",
    "columns",
    "pooling",
    "batch norm",
    "softmax",
    "cross-entropy",
    "optimizers",
    "layouts",
    "augmentation",
)
"""The families that compute-sanitizer looks at: those with shared memory, barriers or uneven edges."""


def facts(runtime: str) -> dict[str, Any]:
    """Names and versions."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "numpy": importlib.metadata.version("numpy"),
        "checkout": commit(),
    }
    if runtime == "host":
        return found | {"gpu": "none: the host runtime"}
    import cupy

    cuda, runtime = cupy.cuda, cupy.cuda.runtime
    properties = runtime.getDeviceProperties(runtime.getDevice())
    known: dict[str, Callable[[], Any]] = {
        "gpu": lambda: properties["name"].decode(),
        "compute_capability": lambda: f"{properties['major']}.{properties['minor']}",
        "multiprocessors": lambda: properties["multiProcessorCount"],
        "memory_gib": lambda: round(runtime.memGetInfo()[1] / 2**30, 1),
        "free_gib": lambda: round(runtime.memGetInfo()[0] / 2**30, 1),
        "gpus": runtime.getDeviceCount,
        "driver": driver_version,
        "cuda_of_driver": lambda: version(runtime.driverGetVersion()),
        "cuda_of_cupy": lambda: version(runtime.runtimeGetVersion()),
        "nvrtc": lambda: ".".join(map(str, cuda.nvrtc.getVersion())),
        "cublas": lambda: cuda.cublas.getVersion(cuda.device.get_cublas_handle()),
        "cupy": lambda: cupy.__version__,
    }
    return found | {name: _told(tell) for name, tell in known.items()}


def _told(tell: Callable[[], Any]) -> Any:
    """A fact; where it cannot be had, that: no reason not to run."""
    try:
        return tell()
    except Exception as error:
        return f"not known ({type(error).__name__}: {error})"


def version(number: int) -> str:
    """CUDA's 12090 as 12.9."""
    return f"{number // 1000}.{number % 1000 // 10}"


def driver_version() -> str:
    """As nvidia-smi says."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not known ({error})"
    return (answer.stdout.strip().splitlines() or ["not known"])[0]


def commit() -> str:
    """The commit of the checkout, and whether files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--match="]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "not known"
    return answer.stdout.strip() or "not known"


def find_sanitizer() -> str | None:
    """The path of compute-sanitizer, or None: it comes with the CUDA toolkit, not with the packages from PyPI."""
    found = shutil.which("compute-sanitizer")
    if found is not None:
        return found
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for home in filter(None, homes):
        for place in ("bin", "compute-sanitizer"):
            path = Path(home) / place / "compute-sanitizer"
            if path.is_file():
                return str(path)
    return None


def sanitize(seed: int, seconds: float) -> list[dict[str, Any]]:
    """Run a few problems of each family under memcheck and racecheck, ``seconds`` in all; what each found."""
    tool = find_sanitizer()
    if tool is None:
        return []
    results = []
    until = time.monotonic() + seconds
    for check in ("memcheck", "racecheck"):
        command = [
            # Libraries ask the driver for what it may not have, and take the refusal: no errors of ours.
            tool, "--tool", check, "--error-exitcode", "86", "--print-limit", "5", "--report-api-errors", "no",
            sys.executable, str(ROOT / "scripts" / "validate_gpu.py"), "--reduced", "--no-training",
            "--no-sanitizer", "--one-process", "--exact-allocations", "--dtypes", "float32,bfloat16",
            "--seed", str(seed), "--families", ",".join(SANITIZED),
        ]  # fmt: skip
        left = until - time.monotonic()
        began = time.monotonic()
        result: dict[str, Any] = {"tool": check, "families": list(SANITIZED)}
        if left < 20:
            results.append({**result, "finished": False, "passed": False, "output": "no time was left"})
            continue
        answer = _run_group(command, left)
        if answer is None:
            results.append({**result, "finished": False, "passed": False, "output": f"stopped after {left:.0f} s"})
            continue
        lines = [line for line in (answer.stdout + answer.stderr).splitlines() if line.startswith("=====")]
        passed = answer.returncode == 0
        # Another status is the tool's that cannot watch this GPU, or the program's that it ran: nothing was found.
        results.append({
            **result, "finished": answer.returncode in (0, 86), "passed": passed,
            "seconds": time.monotonic() - began,
            "output": "\n".join(lines[-12:] if passed else (lines or answer.stderr.splitlines())[:40]),
        })  # fmt: skip
    return results


def _run_group(command: list[str], seconds: float) -> subprocess.CompletedProcess[str] | None:
    """Run a command; None where it took longer, and it and all that it started have been ended."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return None
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
