"""Every compiled form that the kernels of this package have: for tests, tables, and compiling ahead.

A module that starts kernels says in ``SOURCES`` of which files and with which definitions: source name ->
definition sets. Each set stands for one form a dtype; one with ``"SCALAR": None`` has no element type and stands
for itself.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any

import gpucnn_kernels
from gpucnn_kernels.errors import ArgumentError
from gpucnn_kernels.runtime import current
from gpucnn_kernels.source import SCALARS, Source, variant

Progress = Callable[[str, int, int], object]
"""Called before each compile with its title, its number from 1, and how many there are."""


def sources() -> dict[str, tuple[dict[str, Any], ...]]:
    """The definition sets of every source, by its name. Imports every module of the package."""
    found: dict[str, tuple[dict[str, Any], ...]] = {}
    for module in pkgutil.iter_modules(gpucnn_kernels.__path__):
        if module.ispkg or module.name == "catalog":
            continue
        named = getattr(importlib.import_module(f"gpucnn_kernels.{module.name}"), "SOURCES", {})
        for source, sets in named.items():
            known = found.get(source, ())
            found[source] = known + tuple(definitions for definitions in sets if definitions not in known)
    return found


def variants(dtypes: Iterable[str] = tuple(SCALARS)) -> list[Source]:
    """Every source in each of its forms for arrays of these dtypes."""
    dtypes = list(dtypes)
    made: dict[Source, None] = {}
    for name, sets in sorted(sources().items()):
        for definitions in sets:
            others = {macro: value for macro, value in definitions.items() if macro != "SCALAR"}
            for scalar in dtypes if "SCALAR" not in definitions else [definitions["SCALAR"]]:
                made[variant(name, scalar, others)] = None
    return list(made)


def warm_up(dtypes: Iterable[str] = ("float32",), progress: Progress | None = None) -> int:
    """Compile all kernels for these dtypes ahead of their use, for the current device; how many modules that were.

    Later processes find them in the disk cache. Raises ArgumentError for an unknown dtype, DeviceError where no
    GPU can be used and CompileError where a kernel does not compile.
    """
    dtypes = [dtypes] if isinstance(dtypes, str) else list(dtypes)
    for dtype in dtypes:
        if dtype not in SCALARS:
            raise ArgumentError(f"kernels take arrays of {', '.join(SCALARS)}, got {dtype}")
    runtime = current()
    device = runtime.current_device()
    modules = variants(dtypes)
    for number, source in enumerate(modules, 1):
        if progress is not None:
            progress(source.title, number, len(modules))
        runtime.module(source, device)
    return len(modules)
