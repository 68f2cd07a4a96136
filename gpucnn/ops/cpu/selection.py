"""Choosing numbers by a boolean mask, without branches.

numpy.where, copyto and ``where=`` test the mask one element at a time, and a mask that no branch predictor can
guess costs them some 6 ns each. The same choice as an AND of bit patterns is a vector instruction, ten times
faster; and unlike a product with 0 and 1 it makes no NaN of an infinity.
"""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.ops.cpu.memory import FloatArray

_INTEGERS = {2: numpy.int16, 4: numpy.int32, 8: numpy.int64}


def bits_of(mask: NDArray[numpy.bool_], dtype: numpy.dtype[Any]) -> NDArray[Any]:
    """The mask as integers as wide as ``dtype``: all ones where it holds, all zeros elsewhere."""
    return numpy.negative(mask.view(numpy.int8)).astype(_INTEGERS[dtype.itemsize])


def keep(values: FloatArray, mask: NDArray[numpy.bool_], out: FloatArray) -> None:
    """Out = values where the mask holds, +0 elsewhere; ``out`` may be ``values``."""
    bits = bits_of(mask, values.dtype)
    numpy.bitwise_and(values.view(bits.dtype), bits, out=out.view(bits.dtype))


def choose(mask: NDArray[numpy.bool_], this: float, other: float, dtype: numpy.dtype[Any]) -> FloatArray:
    """An array of the number ``this`` where the mask holds, the number ``other`` elsewhere."""
    bits = bits_of(mask, dtype)
    these, others = numpy.array([this, other], dtype).view(bits.dtype)
    bits &= these ^ others
    bits ^= others
    return bits.view(dtype)
