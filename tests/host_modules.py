"""What the tests of the host runtime share: texts compiled once, plain and sanitized, and launched on arrays."""

from __future__ import annotations

import ctypes
import re
from functools import cache
from typing import Any

import numpy
import pytest

from gpucnn_kernels.runtime.host import HostModule, Memory
from gpucnn_kernels.source import source_from_text

# Results start as these bytes, so that a place that is not written shows.
POISON = 0xA5


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch):
    """For tests that say themselves in which order threads run, and what is sanitized. Used by importing it."""
    monkeypatch.delenv("GPUCNN_KERNELS_HOST_ORDER", raising=False)
    monkeypatch.delenv("GPUCNN_KERNELS_HOST_SANITIZE", raising=False)


def reads(array: numpy.ndarray) -> Memory:
    """A pointer argument that the kernel may read."""
    assert array.flags.c_contiguous
    return Memory(array.ctypes.data, array.nbytes, False)


def writes(array: numpy.ndarray) -> Memory:
    """A pointer argument that the kernel may read and write."""
    assert array.flags.c_contiguous
    return Memory(array.ctypes.data, array.nbytes, True)


def poisoned(shape: Any, dtype: Any) -> numpy.ndarray:
    """A new array in which every byte is 0xA5."""
    array = numpy.empty(shape, dtype)
    array.reshape(-1).view(numpy.uint8).fill(POISON)
    return array


def whole_text(text: str) -> str:
    """The text as NVRTC gets it, with the project's headers in it."""
    return source_from_text(text).text


@cache
def module(text: str, sanitize: bool, ptx: str | None = None, kernels: tuple[str, ...] = ()) -> HostModule:
    """The text, or its PTX for an architecture, compiled once a session; ``kernels``: not all that it has."""
    source = source_from_text(text)
    return HostModule(source.text, kernels or kernel_names(text), sanitize=sanitize, ptx=ptx)


def of_ptx(*values: Any, name: str) -> Any:
    """A parameter of a test that runs what NVRTC makes of a text."""
    return pytest.param(*values, id=name, marks=pytest.mark.nvrtc)


def kernel_names(text: str) -> list[str]:
    """The names of the kernels of a text, as it writes them: ``extern "C" __global__ void name(``."""
    return re.findall(r"__global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\(", text)


def launch(compiled: HostModule, name: str, grid: Any, block: Any, *arguments: Any, **options: Any) -> None:
    """Launch with grid and block as numbers or tuples; integers become c_int, floats c_float."""
    values = [
        ctypes.c_int(argument)
        if isinstance(argument, int)
        else ctypes.c_float(argument)
        if isinstance(argument, float)
        else argument
        for argument in arguments
    ]
    compiled.launch(name, dimensions(grid), dimensions(block), values, **options)


def dimensions(size: int | tuple[int, ...]) -> tuple[int, int, int]:
    """(64, 1, 1) of 64 and (8, 4, 1) of (8, 4)."""
    sizes = (size,) if isinstance(size, int) else size
    return (*sizes, 1, 1)[:3]
