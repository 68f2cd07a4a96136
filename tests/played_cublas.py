"""A module that plays cupy.cuda.cublas on the host's memory: what cuBLAS's manual says of its matrix products.

It multiplies matrices stored by columns and refuses what cuBLAS refuses, so that the arguments of a call can be
held against the product that they ask for. It says nothing of speed or rounding on a GPU.
"""

from __future__ import annotations

import ctypes

import numpy
from numpy.lib.stride_tricks import as_strided

from gpucnn_kernels.arrays import numpy_dtype

DTYPES = {0: "float32", 1: "float64", 2: "float16", 14: "bfloat16"}  # cudaDataType
COMPUTE = {68: "float32", 70: "float64"}  # CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_64F


def _matrices(rows, columns, address, kind, leading, stride, count):
    """(count, rows, columns) of the numbers from ``address`` on, each matrix stored by columns."""
    assert leading >= max(1, rows), f"the leading dimension {leading} is smaller than the {rows} rows"
    dtype = numpy_dtype(DTYPES[kind])
    elements = (count - 1) * stride + (columns - 1) * leading + rows
    memory = numpy.frombuffer((ctypes.c_char * (elements * dtype.itemsize)).from_address(address), dtype)
    return as_strided(memory, (count, rows, columns), [step * dtype.itemsize for step in (stride, 1, leading)])


class PlayedCublas:
    """Remembers the math mode at each product, and the names of what was called."""

    def __init__(self):
        self.mode, self.modes, self.called = 0, [], []

    def getMathMode(self, handle):
        assert handle == 77
        return self.mode

    def setMathMode(self, handle, mode):
        assert handle == 77
        self.mode = mode

    def gemmEx(self, handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, *rest):
        self.called.append("gemmEx")
        a, b, c = (A, Atype, lda, 0), (B, Btype, ldb, 0), (*rest[:3], 0)
        self._multiply(handle, (transa, transb), (m, n, k), alpha, a, b, beta, c, 1, *rest[3:])

    def gemmStridedBatchedEx(
        self, handle, transa, transb, m, n, k, alpha, A, Atype, lda, strideA, B, Btype, ldb, strideB, beta, *rest
    ):
        self.called.append("gemmStridedBatchedEx")
        a, b, c = (A, Atype, lda, strideA), (B, Btype, ldb, strideB), rest[:4]
        self._multiply(handle, (transa, transb), (m, n, k), alpha, a, b, beta, c, *rest[4:])

    def _multiply(self, handle, transposed, sizes, alpha, a, b, beta, c, count, compute_type, algorithm):
        assert handle == 77
        assert algorithm == -1  # CUBLAS_GEMM_DEFAULT
        self.modes.append(self.mode)
        m, n, k = sizes
        wide = COMPUTE[compute_type]
        assert a[1] == b[1]
        assert DTYPES[c[1]] in (DTYPES[a[1]], wide)
        assert (wide == "float64") == (DTYPES[a[1]] == "float64")
        scale = {"float32": ctypes.c_float, "float64": ctypes.c_double}[wide]
        factor, before = (scale.from_address(address).value for address in (alpha, beta))
        left = _matrices(*((k, m) if transposed[0] else (m, k)), *a, count).astype(wide)
        right = _matrices(*((n, k) if transposed[1] else (k, n)), *b, count).astype(wide)
        result = _matrices(m, n, *c, count)
        left = left.swapaxes(1, 2) if transposed[0] else left
        right = right.swapaxes(1, 2) if transposed[1] else right
        product = factor * (left @ right)
        if before:  # with beta 0, C is not read: it may hold NaN
            product += before * result.astype(wide)
        result[...] = product.astype(result.dtype)
