"""Operations on arrays: one contract, one backend a kind of array.

``backend_of(array)`` is the module whose functions take that array: :mod:`gpucnn.ops.cpu` for NumPy, its
:mod:`gpucnn.ops.cpu.narrow` for NumPy's arrays in 16 bits, ``gpucnn.ops.cuda`` for arrays in device memory, which
is imported when the first of them comes. Layers call operations through it, so the array's type chooses the
backend.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy

from gpucnn.device import module_of
from gpucnn.ops import cpu
from gpucnn.ops.contract import Array, Operations
from gpucnn.ops.cpu import narrow

__all__ = ["Array", "Operations", "array_module", "backend_of"]

_CUDA = "gpucnn.ops.cuda"
_whole: Any = None  # that module, once it is all there


def backend_of(array: Any) -> Operations:
    """The backend whose operations take ``array``.

    Raises DtypeError for anything but an array that a backend handles.
    """
    if type(array) is numpy.ndarray or module_of(array) is numpy:
        return narrow if array.dtype.itemsize == 2 and narrow.is_narrow(array) else cpu
    global _whole
    backend: Any = sys.modules.get(_CUDA)
    if backend is None or backend is not _whole:
        backend = _whole = importlib.import_module(_CUDA)  # waits where another thread is importing it
    whole: Operations = backend
    return whole


def array_module(array: Any) -> Any:
    """The module that makes arrays like ``array``: numpy, cupy, or ``host_arrays`` for the host runtime's arrays.

    Raises DtypeError for anything but an array that a backend handles.
    """
    return module_of(array)
