"""``gpucnn warm-up``: compile the kernels before they are needed."""

from __future__ import annotations

import time
from typing import Any

from gpucnn.cli.precision import input_dtype
from gpucnn.cli.report import note
from gpucnn.cli.runs import requested_device
from gpucnn.cli.settings import Settings
from gpucnn.device import on_device
from gpucnn.layers.precision import NARROW, check_precision
from gpucnn.ops.cpu import compiled


def run(settings: Settings, arguments: dict[str, Any]) -> int:
    """Compile what the device needs, the GPU's kernels or the CPU's loops; the exit status."""
    device = requested_device(settings)
    if device.name != "cuda":
        return _warm_up_cpu()
    precision = settings["precision"]
    check_precision(precision)
    from gpucnn_kernels import warm_up
    from gpucnn_kernels.runtime import ahead

    quiet = settings["quiet"]
    note(f"device: {device} ({device.reason})", quiet=quiet)

    def progress(name: str, number: int, total: int) -> None:
        note(f"[{number}/{total}] {name}", quiet=quiet)

    began = time.perf_counter()
    with on_device(device):
        # Beside 16-bit activations the weights, the optimizer and the loss are float32.
        weights = input_dtype(precision)
        dtypes = (weights, precision) if precision in NARROW else (weights,)
        processes = settings["processes"] or min(ahead.cores(), ahead.MOST_PROCESSES)
        count = warm_up(dtypes=dtypes, progress=progress, processes=processes)
    print(f"{count} modules compiled in {time.perf_counter() - began:.1f} seconds")
    return 0


def _warm_up_cpu() -> int:
    began = time.perf_counter()
    if compiled.available():
        print(f"the CPU's loops are compiled, in {time.perf_counter() - began:.1f} seconds")
    else:
        print(f"nothing to compile for the CPU, NumPy does the work: {compiled.why_not()}")
    return 0
