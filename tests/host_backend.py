"""A stand-in for gpucnn.ops.cuda over HostArrays: NumPy's operations behind the contract of device arrays.

It lets the tests of everything above the operations run device "cuda" without a compiler, and quickly. Each
function takes HostArrays only, as the kernels do, and gives HostArrays.
"""

from __future__ import annotations

import functools
import importlib.machinery
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy
import pytest

from gpucnn.ops import cpu
from gpucnn.ops.contract import Operations
from gpucnn_kernels.runtime.host_array import HostArray

NAME = "gpucnn.ops.cuda"


def _into(value: Any, name: str) -> Any:
    if isinstance(value, HostArray):
        return value.view(numpy.ndarray)
    if isinstance(value, tuple):
        return tuple(_into(part, name) for part in value)
    if isinstance(value, numpy.ndarray):
        raise TypeError(f"{name} is a numpy.ndarray, and the operation was called for device arrays")
    return value


def _out(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(_out(part) for part in result)
    if isinstance(result, numpy.generic):
        return numpy.array(result).view(HostArray)
    return result.view(HostArray) if isinstance(result, numpy.ndarray) else result


def _on_host_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def operation(*arguments: Any, **options: Any) -> Any:
        result = function(
            *(_into(value, f"argument {number}") for number, value in enumerate(arguments)),
            **{name: _into(value, name) for name, value in options.items()},
        )
        out = options.get("out")
        if out is None:
            return _out(result)
        return (out, *_out(result[1:])) if isinstance(result, tuple) else out

    return operation


def make_backend() -> types.ModuleType:
    """The module."""
    backend = types.ModuleType(NAME)
    backend.__spec__ = importlib.machinery.ModuleSpec(NAME, None)
    for name, value in vars(Operations).items():
        if inspect.isfunction(value) and not name.startswith("_"):
            setattr(backend, name, _on_host_arrays(getattr(cpu, name)))
    return backend


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have device "cuda" be the host runtime with this backend, and NumPy refuse to convert HostArrays unasked."""
    monkeypatch.setenv("GPUCNN_KERNELS_RUNTIME", "host")
    monkeypatch.setitem(sys.modules, NAME, make_backend())
    refuse_conversions(monkeypatch)


def refuse_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a subclass cannot refuse: numpy.asarray and its like raise TypeError for a HostArray, as for CuPy's."""
    for name in ("asarray", "array", "ascontiguousarray", "asanyarray"):
        monkeypatch.setattr(numpy, name, _refusing(getattr(numpy, name)))


def _refusing(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def refusing(values: Any, *arguments: Any, **options: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(values, HostArray) and caller.startswith(("gpucnn.", "test_")):
            raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")
        return function(values, *arguments, **options)

    return refusing
