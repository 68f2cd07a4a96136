"""Operations on arrays: one contract, one backend a kind of array.

``backend_of(array)`` is the module whose functions take that array: :mod:`gpucnn.ops.cpu` for NumPy. Layers call
operations through it, so the array's type chooses the backend.
"""

from __future__ import annotations

from typing import Any

import numpy

from gpucnn.errors import DtypeError
from gpucnn.ops import cpu
from gpucnn.ops.contract import Array, Operations

__all__ = ["Array", "Operations", "array_module", "backend_of"]


def backend_of(array: Any) -> Operations:
    """The backend whose operations take ``array``.

    Raises DtypeError for anything but an array that a backend of this version handles.
    """
    if isinstance(array, numpy.ndarray):
        return cpu
    raise DtypeError(
        f"expected a numpy.ndarray, got {type(array).__module__}.{type(array).__qualname__}; "
        "use numpy.asarray(...) for lists and array-likes"
    )


def array_module(array: Any) -> Any:
    """The module that makes arrays like ``array``: numpy for NumPy arrays."""
    backend_of(array)
    return numpy
