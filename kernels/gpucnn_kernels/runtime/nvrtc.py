"""NVRTC by itself: compiles a source for any architecture on a machine without a GPU or driver.

For tests and tables, which ask whether a kernel compiles, how many registers it takes and whether it spills. It
needs the packages nvidia-cuda-nvrtc and nvidia-cuda-runtime (named -cu12 for CUDA 12), and no CuPy.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from gpucnn_kernels.errors import CompileError, DeviceError
from gpucnn_kernels.source import Source

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""Turing, Ampere (A100 and GeForce), Ada, Hopper, Blackwell (B200 and GeForce)."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What a kernel takes of a multiprocessor: registers a thread, bytes of static shared memory and spills."""

    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


@lru_cache(maxsize=1)
def _library() -> tuple[Any, list[str]]:
    """(the library, its include folders). Raises DeviceError, with what to install, where it is not there."""
    # The wheels share a folder "nvidia"; a module of that name elsewhere on the path must not stand for it.
    folders = [path for path in (Path(place) / "nvidia" for place in sys.path) if path.is_dir()]
    libraries = [
        (int(path.name.rpartition(".")[2]), path)
        for folder in folders
        for path in folder.glob("*/lib/libnvrtc.so.*")
        if "alt" not in path.name and path.name.rpartition(".")[2].isdigit()
    ]
    if not libraries:
        raise DeviceError(
            "NVRTC is not installed: pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12 (some 95 MB)"
        )
    path = max(libraries)[1]
    # CUDA 12's wheels have a folder each, CUDA 13's share one: the headers must be of the library's version.
    folders = [path.parents[1], path.parents[2] / "cuda_runtime"]
    headers = [str(folder / "include") for folder in folders if (folder / "include" / "cuda_fp16.h").is_file()][:1]
    library = ctypes.CDLL(str(path))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library, headers


def available() -> tuple[bool, str]:
    """(whether NVRTC can be used, the version or the reason)."""
    try:
        library, headers = _library()
    except (DeviceError, OSError) as error:
        return False, str(error)
    if not headers:
        return False, "the CUDA headers are not installed: pip install nvidia-cuda-runtime-cu12"
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return True, f"NVRTC {major.value}.{minor.value}"


def compile_source(source: Source, architecture: str, options: Sequence[str] = ()) -> tuple[bytes, str]:
    """(cubin, log) of ``source`` for an ``architecture`` such as "sm_90". Raises CompileError with its lines."""
    return _compiled(source, source.architecture or architecture, ["--ptxas-options=-v", *options], "CUBIN")


def compile_to_ptx(source: Source, architecture: str) -> str:
    """The PTX of ``source`` for an ``architecture``, with the places in the source; raises CompileError."""
    virtual = (source.architecture or architecture).replace("sm_", "compute_")
    ptx, _ = _compiled(source, virtual, ["-lineinfo"], "PTX")
    return ptx.rstrip(b"\0").decode()


def _compiled(source: Source, architecture: str, options: Sequence[str], what: str) -> tuple[bytes, str]:
    """(CUBIN or PTX, log)."""
    library, headers = _library()
    program = ctypes.c_void_p()
    _check(
        library,
        library.nvrtcCreateProgram(
            ctypes.byref(program), source.text.encode(), f"{source.name}.cu".encode(), 0, None, None
        ),
    )
    try:
        arguments = [f"-arch={architecture}", "-std=c++17", "-ftz=true"]
        arguments += [f"-I{folder}" for folder in headers] + list(options)
        encoded = (ctypes.c_char_p * len(arguments))(*(argument.encode() for argument in arguments))
        status = library.nvrtcCompileProgram(program, len(arguments), encoded)
        log = _text(library, program, "ProgramLog")
        if status != 0:
            raise CompileError(f"{source.title} does not compile for {architecture}:\n{log}")
        size = ctypes.c_size_t()
        _check(library, library[f"nvrtcGet{what}Size"](program, ctypes.byref(size)))
        made = ctypes.create_string_buffer(size.value)
        _check(library, library[f"nvrtcGet{what}"](program, made))
        return made.raw, log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(library: Any, program: ctypes.c_void_p, what: str) -> str:
    size = ctypes.c_size_t()
    _check(library, library[f"nvrtcGet{what}Size"](program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, library[f"nvrtcGet{what}"](program, buffer))
    return buffer.value.decode(errors="replace")


def _check(library: Any, status: int) -> None:
    if status != 0:
        raise CompileError(f"NVRTC: {library.nvrtcGetErrorString(status).decode()}")


_ENTRY = re.compile(r"Compiling entry function '(\w+)' for")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def resources(source: Source, architecture: str, options: Sequence[str] = ()) -> dict[str, Resources]:
    """By kernel, what the compiler reports that it takes on this architecture."""
    _, log = compile_source(source, architecture, options)
    found: dict[str, Resources] = {}
    sections = _ENTRY.split(log)
    for name, report in zip(sections[1::2], sections[2::2], strict=True):
        stack, used, shared = _STACK.search(report), _USED.search(report), _SHARED.search(report)
        if stack is None or used is None:
            raise CompileError(f"{source.title}: the compiler's report on '{name}' was not understood:\n{report}")
        found[name] = Resources(
            int(used[1]), int(shared[1]) if shared else 0, int(stack[1]), int(stack[2]), int(stack[3])
        )
    if set(found) != set(source.kernels):
        raise CompileError(
            f"{source.title}: the compiler reported on {sorted(found)}, the text has {sorted(source.kernels)}"
        )
    return found


def architectures_of(source: Source, capability: tuple[int, int]) -> tuple[str, ...]:
    """Those of ARCHITECTURES that have a compute capability, such as (8, 0), or a later one.

    Of a source for one architecture it is the one of that name: "sm_90" of "sm_90a".
    """
    if source.architecture is not None:
        return (source.architecture.removesuffix("a"),)
    major, minor = capability
    return tuple(name for name in ARCHITECTURES if int(name.removeprefix("sm_")) >= 10 * major + minor)


def resources_of(
    forms: Iterable[tuple[Source, str]], processes: int | None = None
) -> dict[tuple[str, str], dict[str, Resources]]:
    """By (title, architecture) of each of these (source, architecture), what :func:`resources` says.

    NVRTC compiles one program at a time in a process, whatever the threads, so this takes processes.
    """
    jobs = [(Source(made.name, made.definitions, made.text), architecture) for made, architecture in forms]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(processes or cores, len(jobs))
    if processes < 2:
        return dict(map(_job, jobs))
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return dict(pool.map(_job, jobs, chunksize=4))


def _job(job: tuple[Source, str]) -> tuple[tuple[str, str], dict[str, Resources]]:
    source, architecture = job
    return (source.title, architecture), resources(source, architecture)
