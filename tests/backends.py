"""The backends of one set of tests: the CPU with its compiled loops, with NumPy alone, and the CUDA kernels on it.

Tests are written with NumPy arrays. ``backend.operation(...)``, for any operation of the contract, hands them to
the backend in its own kind of array, and what comes back to the test as NumPy arrays again: the CUDA backend gets
HostArrays on the same memory, so strides, overlaps and ``out`` reach it as the test made them, and must answer
with HostArrays. A test parametrized over ``backends.ALL`` runs once for each.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy
import pytest

from gpucnn.layers import Layer
from gpucnn.ops import cpu, cuda
from gpucnn.ops.cpu import compiled
from gpucnn.parameters import Parameter
from gpucnn_kernels.runtime import using
from gpucnn_kernels.runtime.host_array import HostArray


@dataclass(frozen=True)
class Backend:
    """A backend: its ``name``, its module ``ops``, and the ways of an array between a test and it.

    ``device`` is where a layer goes to run on it; ``loops`` whether the CPU may use its compiled loops.
    """

    name: str
    ops: ModuleType
    kind: type[numpy.ndarray[Any, Any]]
    device: str
    loops: bool = True

    def asarray(self, array: Any) -> Any:
        """A NumPy array, or a tuple with some in it, as the backend takes it, on the same memory."""
        if type(array) is tuple:
            return tuple(map(self.asarray, array))
        return array.view(self.kind) if type(array) is numpy.ndarray else array

    def to_numpy(self, array: Any) -> Any:
        """An array of the backend as NumPy's, on the same memory."""
        assert type(array) is self.kind, f"the {self.name} backend answered with a {type(array).__qualname__}"
        return array.view(numpy.ndarray)

    @contextlib.contextmanager
    def running(self) -> Iterator[Backend]:
        """Inside, kernels run on the host runtime, and device "cuda" is that."""
        with using("host"), contextlib.nullcontext() if self.loops else compiled.switched(False):
            yield self

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_") or not hasattr(self.ops, name):
            raise AttributeError(name)
        return _operation(self, name)

    def answer(self, result: Any) -> Any:
        """A result of an operation, as NumPy's where it is an array."""
        return self.to_numpy(result) if isinstance(result, numpy.ndarray) else result


@functools.cache
def _operation(backend: Backend, name: str) -> Callable[..., Any]:
    function = getattr(backend.ops, name)

    @functools.wraps(function)
    def operation(*arguments: Any, **options: Any) -> Any:
        out = options.get("out")
        with backend.running():
            given = {key: backend.asarray(value) for key, value in options.items()}
            result = function(*map(backend.asarray, arguments), **given)
        parts = result if isinstance(result, tuple) else (result,)
        # The very array that was given as out comes back as the test knows it.
        known = [out if out is not None and part is given["out"] else backend.answer(part) for part in parts]
        return tuple(known) if isinstance(result, tuple) else known[0]

    return operation


CPU = Backend("cpu", cpu, numpy.ndarray, "cpu")
NUMPY = Backend("numpy", cpu, numpy.ndarray, "cpu", loops=False)
CUDA = Backend("cuda", cuda, HostArray, "cuda")
ALL = [pytest.param(backend, id=backend.name) for backend in (CPU, NUMPY, CUDA)]
BACKENDS = pytest.mark.parametrize("backend", ALL)


class Placed:
    """A layer on a backend's device, called with NumPy arrays and answering with them."""

    def __init__(self, backend: Backend, layer: Layer) -> None:
        self.backend = backend
        with backend.running():
            self.layer = layer.to(backend.device)

    def __call__(self, x: Any) -> Any:
        with self.backend.running():
            return self.backend.to_numpy(self.layer(self.backend.asarray(x)))

    def backward(self, dy: Any) -> Any:
        """The gradient for the input."""
        with self.backend.running():
            return self.backend.to_numpy(self.layer.backward(self.backend.asarray(dy)))

    def eval(self) -> Placed:
        """Itself, in evaluation mode."""
        self.layer.eval()
        return self

    def value(self, name: str) -> Any:
        """The numbers of the parameter or buffer ``name``."""
        found = getattr(self.layer, name)
        return self.backend.to_numpy(found.data if isinstance(found, Parameter) else found)

    def gradient(self, name: str) -> Any:
        """The gradient of the parameter ``name``."""
        return self.backend.to_numpy(getattr(self.layer, name).gradient)
