"""Every compiled form that the kernels of this package have: for tests, tables, and compiling ahead.

A module that starts kernels says in ``SOURCES`` of which files and with which definitions: source name ->
definition sets. Each set stands for one form a dtype; one with ``"SCALAR": None`` has no element type and stands
for itself. "CAPABILITY": (8, 0) says that a form needs that compute capability, or a later one, to compile; with
"ARCHITECTURE": "sm_90a" beside it, that one alone. Beside them ``SHARED_BYTES`` says, by kernel, the dynamic
shared memory that a block is started with, where it takes some.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import gpucnn_kernels
from gpucnn_kernels.errors import ArgumentError
from gpucnn_kernels.runtime import ahead, current
from gpucnn_kernels.source import SCALARS, Source, variant

Progress = Callable[[str, int, int], object]
"""Called before each compile with its title, its number from 1, and how many there are."""


def _modules() -> Iterator[ModuleType]:
    for module in pkgutil.iter_modules(gpucnn_kernels.__path__):
        if not module.ispkg and module.name != "catalog":
            yield importlib.import_module(f"gpucnn_kernels.{module.name}")


def sources() -> dict[str, tuple[dict[str, Any], ...]]:
    """The definition sets of every source, by its name. Imports every module of the package."""
    found: dict[str, tuple[dict[str, Any], ...]] = {}
    for module in _modules():
        for source, sets in getattr(module, "SOURCES", {}).items():
            known = found.get(source, ())
            found[source] = known + tuple(definitions for definitions in sets if definitions not in known)
    return found


def capabilities(dtypes: Iterable[str] = tuple(SCALARS)) -> dict[Source, tuple[int, int]]:
    """Every source in each of its forms for arrays of these dtypes, and the oldest compute capability it is for.

    (0, 0) is any.
    """
    dtypes = list(dtypes)
    made: dict[Source, tuple[int, int]] = {}
    for name, sets in sorted(sources().items()):
        for definitions in sets:
            others = {
                macro: value for macro, value in definitions.items() if macro not in ("SCALAR", "CAPABILITY")
            }
            only = definitions.get("SCALAR")
            for scalar in dtypes if "SCALAR" not in definitions else [only] if only in (None, *dtypes) else []:
                made[variant(name, scalar, others)] = definitions.get("CAPABILITY", (0, 0))
    return made


def shared_bytes() -> dict[str, int]:
    """Dynamic shared memory in bytes a block, by the kernels that take some."""
    found: dict[str, int] = {}
    for module in _modules():
        found.update(getattr(module, "SHARED_BYTES", {}))
    return found


def variants(dtypes: Iterable[str] = tuple(SCALARS)) -> list[Source]:
    """Every source in each of its forms for arrays of these dtypes."""
    return list(capabilities(dtypes))


def _runs_on(has: tuple[int, int], source: Source, needed: tuple[int, int]) -> bool:
    """Whether a GPU of compute capability ``has`` runs a form that needs ``needed``: that, or a later one."""
    return needed == has if source.architecture is not None else needed <= has


def warm_up(dtypes: Iterable[str] = ("float32",), progress: Progress | None = None, *, processes: int = 1) -> int:
    """Compile all kernels for these dtypes ahead of their use, for the current device; how many modules that were.

    Those that need a newer GPU are left out. Later processes find them in the disk cache. ``processes`` compile at
    a time, up to 16; each takes a core and, on a GPU, some 0.5 GB of its memory until this is done. With 1 it is
    this process that does it, which has all of them loaded then.

    Raises ArgumentError for an unknown dtype or no process, DeviceError where no GPU can be used and CompileError
    where a kernel does not compile.
    """
    dtypes = [dtypes] if isinstance(dtypes, str) else list(dtypes)
    for dtype in dtypes:
        if dtype not in SCALARS:
            raise ArgumentError(f"kernels take arrays of {', '.join(SCALARS)}, got {dtype}")
    if processes < 1:
        raise ArgumentError(f"processes must be at least 1, got {processes}")
    runtime = current()
    device = runtime.current_device()
    has = runtime.capability(device)
    modules = [source for source, needed in capabilities(dtypes).items() if _runs_on(has, source, needed)]
    told: list[Source] = []

    def begin(source: Source) -> None:
        told.append(source)
        if progress is not None:
            progress(source.title, len(told), len(modules))

    left = modules
    if processes > 1:
        left = ahead.compile_in_processes(runtime.name, device, modules, processes, begin)
    for source in left:
        if source not in told:
            begin(source)
        runtime.module(source, device)
    return len(modules)
