"""``gpucnn info``: what this machine has, which device would be chosen and why, what there is to train."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

import numpy
from threadpoolctl import threadpool_info

import gpucnn
from gpucnn import models
from gpucnn.cli.recipes import FOLDER, RECIPES
from gpucnn.cli.report import print_json, table
from gpucnn.cli.settings import Settings
from gpucnn.data import load
from gpucnn.data.idx import SOURCES, find_idx_files
from gpucnn.device import choose_device, cuda_facts
from gpucnn.errors import DeviceError, GpucnnError
from gpucnn.layers.precision import usable_precisions
from gpucnn.ops.cpu import compiled
from gpucnn.ops.cpu.threads import thread_count


def run(settings: Settings, arguments: dict[str, Any]) -> int:
    """Print it; the exit status."""
    found = collect(settings)
    if settings["json"]:
        print_json(found)
        return 0
    libraries = ", ".join(
        f"{library['name']} {library['version']} ({library['threads']} threads)" for library in found["blas"]
    )
    device = found["device"]
    print(f"gpucnn    {found['gpucnn']}, {found['path']}")
    print(f"Python    {found['python']}, {found['platform']}")
    print(f"NumPy     {found['numpy']}, BLAS: {libraries or 'unknown'}")
    print(f"threads   {found['threads']}")
    loops = found["cpu_loops"]
    print(f"CPU loops {'compiled' if loops['compiled'] else 'in NumPy: ' + loops['reason']}")
    print(f"device    {device['name'] or 'none'} ({device['reason']})")
    print(f"CUDA      {'usable' if found['cuda']['usable'] else 'not usable'}: {found['cuda']['reason']}")
    for line in describe_cuda(found["cuda"]):
        print(line)
    print(f"precision {', '.join(found['precisions'])}\n")
    rows = [
        (entry["name"], "x".join(map(str, entry["input_shape"])), f"{entry['parameters']:,}")
        for entry in found["models"]
    ]
    print(table(("model", "input", "parameters"), rows))
    print()
    width = max(len(name) for name in found["data"])
    for name, state in found["data"].items():
        print(f"{name:{width}}  {state['detail']}")
    return 0


def describe_cuda(facts: dict[str, Any]) -> list[str]:
    """Lines on the runtime of the kernels, CuPy, the driver and each GPU."""
    if facts["cupy"] is None:
        return [f"runtime   {facts['runtime']}"]
    driver = f"a driver for CUDA {facts['driver']}" if facts["driver"] else "no driver"
    lines = [
        f"runtime   {facts['runtime']}, CuPy {facts['cupy']} with CUDA {facts['cuda'] or 'unknown'}, {driver}"
    ]
    for index, gpu in enumerate(facts["gpus"]):
        free, total = gpu["free_bytes"] / 2**30, gpu["memory_bytes"] / 2**30
        lines.append(
            f"cuda:{index:<5}{gpu['name']}, compute capability {gpu['compute_capability']}, "
            f"{free:.1f} of {total:.1f} GiB free"
        )
    return lines


def collect(settings: Settings) -> dict[str, Any]:
    """Everything that ``info`` tells, fit for JSON."""
    device = _device(settings)
    return {
        "gpucnn": gpucnn.__version__,
        "path": str(Path(gpucnn.__file__).parent),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "numpy": numpy.__version__,
        "blas": [
            {"name": library["internal_api"], "version": library["version"], "threads": library["num_threads"]}
            for library in threadpool_info()
            if library["user_api"] == "blas"
        ],
        "threads": thread_count(),
        "cpu_loops": {"compiled": compiled.available(), "reason": compiled.why_not()},
        "device": device,
        "cuda": cuda_facts(),
        "precisions": list(usable_precisions()),
        "models": [_model(name) for name in models.available()],
        "data": {name: _data(name, settings["data-dir"]) for name in RECIPES if name != FOLDER},
    }


def _device(settings: Settings) -> dict[str, Any]:
    try:
        device = choose_device(settings["device"])
    except DeviceError as error:  # what it is asked to tell, not a failure of telling it
        return {"name": None, "reason": str(error)}
    return {"name": str(device), "reason": device.reason}


def _model(name: str) -> dict[str, Any]:
    info = models.describe(name)
    return {
        "name": name,
        "input_shape": list(info.input_shape),
        "parameters": info.parameter_count,
        "options": info.options,
        "description": info.description,
    }


def _data(name: str, data_dir: str | None) -> dict[str, Any]:
    try:
        if name in SOURCES and find_idx_files(name, None if data_dir is None else Path(data_dir)) is None:
            return {"found": False, "detail": f"not here; `gpucnn train --data {name}` downloads it"}
        splits = load(name, data_dir=data_dir, download=False)
    except GpucnnError as error:
        return {"found": False, "detail": str(error).replace(" as data_dir", " as --data-dir")}
    sizes = ", ".join(f"{len(part):,} {part_name}" for part_name, part in splits.parts().items())
    return {"found": True, "detail": f"found: {sizes}"}
