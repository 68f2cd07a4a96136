"""Dense matrix products: cuBLAS through CuPy, or NumPy's where kernels run on the host.

cuBLAS is called itself and not through cupy.matmul, which an environment variable can tell to round float32 to
TF32, which copies batches that are not C-contiguous, and which cannot sum 16-bit products into float32 arrays;
nor, where it can be helped, through cupy.cuda.cublas, see :mod:`gpucnn_kernels.runtime.cublas`.
One rule holds in both places: float32, float16 and bfloat16 are multiplied and added up in float32, float64 in
float64, and the result is rounded once, when it is stored.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from gpucnn_kernels.arrays import DeviceArray, device_array
from gpucnn_kernels.errors import ArgumentError, DeviceError, DtypeError, LayoutError
from gpucnn_kernels.overlap import require_apart
from gpucnn_kernels.runtime import current
from gpucnn_kernels.runtime.cublas import beside, workspace_bytes
from gpucnn_kernels.source import SCALARS

# The numbers of cudaDataType and cublasComputeType_t, which are part of CUDA's binary interface.
_DATA_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}
_COMPUTE_TYPES = {"float32": 68, "float64": 70}
# CUBLAS_DEFAULT_MATH, which rounds nothing to TF32, and CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION, without
# which a 16-bit product that is split among blocks may be added up in 16 bits.
_MATH_MODE = 0 | 16
_DEFAULT_ALGORITHM = -1
_MOST = 2**31 - 1


def matmul(a: Any, b: Any, *, out: Any = None, accumulate: bool = False) -> Any:
    """A (M, I) @ b (I, N), or a batch of them (B, M, I) @ (B, I, N), where a batch of one goes with any other.

    Takes and answers with arrays of the runtime in use, inside a :class:`~gpucnn_kernels.launch.Call`, whose
    device and stream it uses. a and b have one floating dtype; ``out`` has it too, or the dtype that is computed
    in (float32 for 16-bit factors). ``accumulate`` adds the product to ``out``. Each matrix, or its transposed,
    may be part of a larger one: one of its axes has stride 1, the other any stride without overlap.

    Raises ArgumentError where shapes do not fit or ``out`` shares memory with a factor, DtypeError and LayoutError
    for other dtypes and strides, DeviceError for bfloat16 on a GPU before compute capability 8.0.
    """
    runtime = current()
    left, right = device_array(runtime, a, "a"), device_array(runtime, b, "b")
    shape = _result_shape(left, right)
    if out is None:
        if accumulate:
            raise ArgumentError("accumulate adds to out, and there is no out")
        out = runtime.empty(shape, left.dtype, left.array)
    target = device_array(runtime, out, "out")
    _check(left, right, target, shape)
    if target.size == 0:
        return out
    if left.shape[-1] == 0:  # sums of nothing
        if not accumulate:
            target.array.view(f"int{8 * target.array.dtype.itemsize}")[...] = 0
    elif runtime.name == "host":
        from gpucnn_kernels.runtime.host_graph import perform

        arrays = left.array, right.array, target.array
        perform(lambda: _multiply_on_host(*arrays, accumulate), *arrays)
    else:
        try:
            from cupy.cuda import cublas, device
        except ImportError as error:
            raise DeviceError(
                f"cuBLAS, which multiplies matrices, cannot be loaded ({error}); it comes with the extra: "
                "pip install 'gpucnn[cuda12]' or 'gpucnn[cuda13]', whichever matches the driver"
            ) from error

        capability = device.get_compute_capability()  # "75" is 7.5
        if left.dtype == "bfloat16" and int(capability) < 80:
            raise DeviceError(
                "matrix products of bfloat16 need a GPU of compute capability 8.0 or newer, this one's is "
                f"{capability[:-1]}.{capability[-1]}; use float16 or float32"
            )
        handle, direct = device.get_cublas_handle(), beside(getattr(cublas, "__file__", None))
        if direct is None:
            multiply_by_cublas(cublas, handle, left, right, target, accumulate)
        else:
            # Of the pool's memory, in the stream's order: gone with this call, for the next one to take.
            workspace = runtime.empty((workspace_bytes(capability),), "uint8", left.array)
            direct.prepare(handle, _stream_address(), runtime.address(workspace), workspace.size)
            multiply_by_cublas(direct, handle, left, right, target, accumulate)
    return out


def _stream_address() -> int:
    from cupy.cuda import get_current_stream

    return int(get_current_stream().ptr)


def _result_shape(a: DeviceArray, b: DeviceArray) -> tuple[int, ...]:
    fits = len(a.shape) == len(b.shape) in (2, 3) and a.shape[-1] == b.shape[-2]
    if fits and len(a.shape) == 3:
        fits = a.shape[0] == b.shape[0] or 1 in (a.shape[0], b.shape[0])
    if not fits:
        raise ArgumentError(f"matmul takes (M, I) @ (I, N) or (B, M, I) @ (B, I, N), got {a.shape} @ {b.shape}")
    batch = (a.shape[0] if b.shape[0] == 1 else b.shape[0],) if len(a.shape) == 3 else ()
    return *batch, a.shape[-2], b.shape[-1]


def _check(a: DeviceArray, b: DeviceArray, out: DeviceArray, shape: tuple[int, ...]) -> None:
    if a.dtype not in SCALARS or a.dtype != b.dtype:
        raise DtypeError(f"matmul takes two arrays of one of {', '.join(SCALARS)}, got {a.dtype} and {b.dtype}")
    if out.dtype not in (a.dtype, SCALARS[a.dtype][1]):
        raise DtypeError(
            f"the product of {a.dtype} arrays is {a.dtype} or {SCALARS[a.dtype][1]}, out is {out.dtype}"
        )
    if out.shape != shape:
        raise ArgumentError(f"out must have shape {shape}, got {out.shape}")
    for array in (a, b, out):
        require_matrix(array)
    require_apart(out, a, b)


def require_matrix(array: DeviceArray) -> None:
    """Raise LayoutError unless it is a matrix, or a batch of them, stored by rows or by columns."""
    if array.size:
        _stored(array)


# ---------------------------------------------------------------- NumPy


def _multiply_on_host(a: Any, b: Any, out: Any, accumulate: bool) -> None:
    import numpy

    a, b, out = (array.view(numpy.ndarray) for array in (a, b, out))
    wide = numpy.float64 if a.dtype == numpy.float64 else numpy.float32
    with numpy.errstate(all="ignore"):
        product = a.astype(wide, copy=False) @ b.astype(wide, copy=False)
        if accumulate:
            product += out.astype(wide, copy=False)
        out[...] = product.astype(out.dtype, copy=False)


# ---------------------------------------------------------------- cuBLAS


@dataclasses.dataclass(frozen=True, slots=True)
class _Stored:
    """How a matrix lies in memory: its rows one after the other, or (``by_columns``) its columns."""

    by_columns: bool
    leading: int  # elements from one row, or column, to the next
    batch: int  # elements from one matrix to the next; 0 where there is one


def _stored(array: DeviceArray) -> _Stored:
    rows, columns = array.shape[-2:]
    down, across = array.strides[-2:]
    batch = array.strides[0] if len(array.shape) == 3 and array.shape[0] > 1 else 0
    # The stride of an axis of length 1 says nothing.
    if (columns == 1 or across == 1) and (rows == 1 or down >= columns):
        return _Stored(False, columns if rows == 1 else down, batch)
    if (rows == 1 or down == 1) and (columns == 1 or across >= rows):
        return _Stored(True, rows if columns == 1 else across, batch)
    raise LayoutError(
        f"{array.name} of shape {array.shape} has strides {array.strides} (in elements); a matrix product takes "
        "rows or columns without gaps: copy it first with ascontiguousarray"
    )


def _transposed(array: DeviceArray) -> DeviceArray:
    *batch, rows, columns = range(len(array.shape))
    order = (*batch, columns, rows)
    return dataclasses.replace(
        array,
        shape=tuple(array.shape[axis] for axis in order),
        strides=tuple(array.strides[axis] for axis in order),
    )


def multiply_by_cublas(
    library: Any, handle: int, a: DeviceArray, b: DeviceArray, out: DeviceArray, accumulate: bool
) -> None:
    """Queue the product with ``library``, cupy.cuda.cublas or what stands for it in a test."""
    import numpy

    if _stored(out).by_columns:
        a, b, out = _transposed(b), _transposed(a), _transposed(out)
    # cuBLAS takes matrices by columns; stored by rows they are their transposed ones, and out' = b' a'.
    first, second, result = _stored(b), _stored(a), _stored(out)
    m, n, k = b.shape[-1], a.shape[-2], a.shape[-1]
    for number in (m, n, k, first.leading, second.leading, result.leading):
        if number > _MOST:
            raise ArgumentError(f"a matrix product of {a.shape} @ {b.shape} is too large: {number} > {_MOST}")
    # "Transposed" to cuBLAS is what here is stored by columns.
    flags = int(first.by_columns), int(second.by_columns)
    wide = SCALARS[a.dtype][1]
    scales = numpy.array([1, 1 if accumulate else 0], wide)
    one, before = scales.ctypes.data, scales.ctypes.data + scales.itemsize
    factor, target = _DATA_TYPES[a.dtype], _DATA_TYPES[out.dtype]
    end = _COMPUTE_TYPES[wide], _DEFAULT_ALGORITHM
    mode = library.getMathMode(handle)
    library.setMathMode(handle, _MATH_MODE)
    try:
        if len(out.shape) == 2 or out.shape[0] == 1:
            library.gemmEx(
                handle,
                *flags,
                *(m, n, k),
                one,
                *(b.address, factor, first.leading),
                *(a.address, factor, second.leading),
                before,
                *(out.address, target, result.leading),
                *end,
            )
        else:
            library.gemmStridedBatchedEx(
                handle,
                *flags,
                *(m, n, k),
                one,
                *(b.address, factor, first.leading, first.batch),
                *(a.address, factor, second.leading, second.batch),
                before,
                *(out.address, target, result.leading, result.batch),
                out.shape[0],
                *end,
            )
    finally:
        library.setMathMode(handle, mode)
