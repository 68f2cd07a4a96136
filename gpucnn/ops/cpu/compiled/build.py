"""From the C++ sources to a shared library for this processor, compiled once and kept on disk."""

from __future__ import annotations

import os
import platform
import tempfile
from pathlib import Path

from gpucnn_kernels.runtime.compiler import (
    HostCompileError,
    HostUnavailableError,
    announced,
    cache_folder,
    find_compiler,
    fingerprint,
    machine_flags,
    run_compiler,
)

SOURCE = Path(__file__).parent / "source"

FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-math-errno",
    "-fno-trapping-math",  # or no selection by a comparison is vectorized
    "-ffp-contract=fast",  # a product and a sum are one instruction, rounded once
    "-Wall",
    "-Wextra",
    "-Werror=vla",
)


def build() -> Path:
    """The library, from the cache or compiled now. Raises HostCompileError, HostUnavailableError."""
    from concurrent.futures import ThreadPoolExecutor  # here, as every import of the operations would pay for it

    if platform.system() not in ("Linux", "Darwin"):
        raise HostUnavailableError(f"they are compiled on Linux and macOS, this is {platform.system()}")
    compiler = find_compiler()
    flags = [*FLAGS, *machine_flags()]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-mprefer-vector-width=512")  # full registers where there are such
    headers = "\n".join(path.read_text(encoding="utf-8") for path in sorted(SOURCE.glob("*.h")))
    units = {path: path.read_text(encoding="utf-8") for path in sorted(SOURCE.glob("*.cpp"))}
    folder = cache_folder("cpu")
    library = folder / f"gpucnn-{fingerprint(compiler, flags, headers, *units.values())}.so"
    if library.is_file():
        return library
    with (
        announced("the CPU's loops"),
        tempfile.TemporaryDirectory(dir=folder, prefix="compiling-") as scratch,
        ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as workers,
    ):

        def compiled(path: Path) -> str:
            # An object is kept, too: a change of one source does not compile the others anew.
            kept = folder / f"{path.stem}-{fingerprint(compiler, flags, headers, units[path])}.o"
            if not kept.is_file():
                made = Path(scratch) / f"{path.stem}.o"
                _run(compiler, [*flags, "-c", "-o", str(made), str(path)], path.name)
                os.replace(made, kept)
            return str(kept)

        objects = list(workers.map(compiled, units))
        made = Path(scratch) / "made.so"
        _run(compiler, ["-shared", "-pthread", "-o", str(made), *objects], "the library")
        os.replace(made, library)
    return library


def _run(compiler: str, arguments: list[str], title: str) -> None:
    said = run_compiler(compiler, arguments)
    if said is not None:
        raise HostCompileError(f"{compiler} does not compile {title}:\n{said}")
