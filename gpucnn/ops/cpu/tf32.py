"""TF32 on the CPU: factors rounded as tensor cores' kernels round them, products added up in float32."""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.errors import ArgumentError

ALGORITHM = "tensor_tf32"
"""What convolutions of every backend call it: the algorithm is theirs to choose, their factors are in TF32."""

_DROPPED = 13  # of float32's 23 fraction bits, TF32 has 10


def rounded(array: NDArray[Any]) -> NDArray[Any]:
    """float32 numbers with 10 fraction bits, to nearest, ties away from zero; what is not finite stays as it is.

    Raises ArgumentError for arrays of another dtype.
    """
    if array.dtype != numpy.float32:
        raise ArgumentError(f"algorithm '{ALGORITHM}' takes float32 arrays, got {array.dtype}")
    bits = numpy.array(array, order="K").view(numpy.uint32)  # a copy
    # Half of the last bit that is kept; where a carry runs into the exponent the next power of two is meant.
    numpy.add(bits, 1 << (_DROPPED - 1), out=bits, where=numpy.isfinite(array))
    bits &= numpy.uint32((0xFFFFFFFF << _DROPPED) & 0xFFFFFFFF)
    numpy.copyto(bits.view(numpy.float32), array, where=numpy.isnan(array))
    return bits.view(numpy.float32)
