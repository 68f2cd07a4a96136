"""What lies between the contract's arrays, of any strides and mixed dtypes, and what the kernels take.

Kernels take arrays of one dtype and one device, without gaps, images contiguous or channels-last, and copy
nothing. Here is what the contract adds: errors in gpucnn's own classes and words, copies of arrays laid out
otherwise, a common dtype, and ``out`` of any strides or sharing memory with an input. Arrays that kernels can take
as they are, which is what layers make, pass through untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy

import gpucnn_kernels as kernels
from gpucnn.device import device_of, is_device_array, module_of, on_device
from gpucnn.errors import ArgumentError, DeviceError, DtypeError, GpucnnError
from gpucnn.ops.checks import check_out
from gpucnn.ops.contract import Array

Layout = Callable[[Array], bool]

_MOVE = "move it: .to('cuda') for a model, a layer or a loss, gpucnn.device.to_device(array, 'cuda') for an array"

# ---------------------------------------------------------------- devices and errors


def check_devices(**arrays: Any) -> None:
    """Raise DeviceError, naming the array, unless all that are arrays are in the memory of one device.

    What is no array at all is for the checks of dtypes to name.
    """
    on_gpu = [(name, array) for name, array in arrays.items() if is_device_array(array)]
    there = f" as {on_gpu[0][0]} does" if on_gpu else ""
    for name, array in arrays.items():
        if isinstance(array, numpy.ndarray) and not is_device_array(array):
            raise DeviceError(
                f"{name} is a numpy.ndarray, on the CPU, and must be in the memory of a GPU{there}; {_MOVE}"
            )
    for name, array in on_gpu[1:]:
        if (ours := device_of(on_gpu[0][1])) != (theirs := device_of(array)):
            raise DeviceError(f"{on_gpu[0][0]} is on {ours}, but {name} is on {theirs}; move one of them")


def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """``function`` of gpucnn_kernels, what it raises in gpucnn's classes."""
    try:
        return function(*arguments, **options)
    except (kernels.DeviceError, kernels.CompileError) as error:
        raise DeviceError(str(error)) from error
    except kernels.DtypeError as error:
        raise DtypeError(str(error)) from error
    except (kernels.ArgumentError, kernels.LayoutError) as error:
        raise ArgumentError(str(error)) from error
    except kernels.KernelError as error:
        raise GpucnnError(str(error)) from error


# ---------------------------------------------------------------- layouts


def is_contiguous(array: Array) -> bool:
    """Whether the elements lie in C order without gaps."""
    return bool(array.flags.c_contiguous)


def is_image(array: Array) -> bool:
    """Whether (N, C, H, W) is contiguous or channels-last."""
    return bool(array.flags.c_contiguous or array.transpose(0, 2, 3, 1).flags.c_contiguous)


def is_matrix(array: Array) -> bool:
    """Whether a matrix lies by rows or by columns, without gaps."""
    return bool(array.flags.c_contiguous or array.flags.f_contiguous)


def is_dense(array: Array) -> bool:
    """Whether the elements lie in some order of the axes without gaps or overlaps."""
    if array.flags.c_contiguous:
        return True
    order = sorted(range(array.ndim), key=lambda axis: (-array.strides[axis], -array.shape[axis]))
    return bool(array.transpose(order).flags.c_contiguous)


def _same_layout(array: Array, other: Array) -> bool:
    return array.shape == other.shape and all(
        length < 2 or ours == theirs
        for length, ours, theirs in zip(array.shape, array.strides, other.strides, strict=True)
    )


def contiguous(array: Array, dtype: Any = None) -> Array:
    """``array`` in C order and of ``dtype``: itself where it is that, otherwise a copy."""
    if array.flags.c_contiguous and (dtype is None or array.dtype == dtype):
        return array
    with on_device(device_of(array)), numpy.errstate(all="ignore"):
        return module_of(array).ascontiguousarray(array, dtype)


def image(array: Array, dtype: Any) -> Array:
    """``array`` (N, C, H, W) contiguous or channels-last and of ``dtype``: itself, or a contiguous copy."""
    return array if array.dtype == dtype and is_image(array) else contiguous(array, dtype)


def matrix(array: Array, dtype: Any) -> Array:
    """``array`` (rows, columns) by rows or by columns and of ``dtype``: itself, or a contiguous copy."""
    return array if array.dtype == dtype and is_matrix(array) else contiguous(array, dtype)


def dense(array: Array, dtype: Any) -> Array:
    """``array`` without gaps and of ``dtype``: itself where it is that, otherwise a contiguous copy."""
    return array if array.dtype == dtype and is_dense(array) else contiguous(array, dtype)


def laid_out_as(first: Array, array: Array, dtype: Any) -> Array:
    """``array``, of the shape of ``first``, in its memory format and of ``dtype``: itself, or a copy."""
    if array.dtype == dtype and _same_layout(array, first):
        return array
    with on_device(device_of(array)), numpy.errstate(all="ignore"):
        copy = module_of(array).empty_like(first, dtype=dtype)
        copy[...] = array
        return copy


def ordered_as(model: Array, array: Array, dtype: Any) -> Array:
    """``array`` as a convolution lays out what it makes of ``model``, and of ``dtype``: itself or a copy.

    Contiguous where the image ``model`` is, otherwise channels-last.
    """
    if model.flags.c_contiguous:
        return contiguous(array, dtype)
    rows = array.transpose(0, 2, 3, 1)
    if rows.flags.c_contiguous and array.dtype == dtype:
        return array
    with on_device(device_of(array)), numpy.errstate(all="ignore"):
        return module_of(array).ascontiguousarray(rows, dtype).transpose(0, 3, 1, 2)


# ---------------------------------------------------------------- dtypes


def common_dtype(first: Array, *others: Array | None) -> numpy.dtype[Any]:
    """The dtype to compute in: the first array's, or a wider one where another array has that."""
    dtypes = {first.dtype, *(array.dtype for array in others if array is not None)}
    dtype: numpy.dtype[Any] = first.dtype if len(dtypes) == 1 else numpy.result_type(*dtypes)
    return dtype


def accumulating_dtype(dtype: Any) -> numpy.dtype[Any]:
    """What sums of ``dtype`` run in, and what batch norm and losses keep their weights in: float32 or float64."""
    return numpy.dtype("float64" if dtype == "float64" else "float32")


# ---------------------------------------------------------------- results


def usable(
    out: Array | None,
    shape: Sequence[int],
    dtype: Any,
    computed: Any,
    *reads: Array | None,
    layout: Layout = is_contiguous,
) -> Array | None:
    """``out`` where a kernel may write its result straight to it, otherwise None; :func:`finish` then copies.

    It may where it has a layout that the kernel writes and the dtype ``computed`` in, and shares no memory with
    what the kernel ``reads``. Raises unless out has the result's ``shape`` and ``dtype``.
    """
    if out is None:
        return None
    check_out(out, shape, dtype)
    fits = out.dtype == computed and layout(out) and not any(_overlap(out, array) for array in reads)
    return out if fits else None


def usable_in_place(out: Array | None, first: Array, dtype: Any, *reads: Array | None) -> Array | None:
    """The same for element-wise kernels: ``out`` has the layout of ``first``, and may be an input itself."""
    if out is None:
        return None
    check_out(out, first.shape, dtype)
    fits = out.dtype == first.dtype and _same_layout(out, first)
    apart = all(
        not _overlap(out, array) or (_address(out) == _address(array) and _same_layout(out, array))
        for array in (first, *reads)
        if array is not None
    )
    return out if fits and apart else None


def finish(result: Array, out: Array | None, dtype: Any) -> Array:
    """``result`` in ``out`` where it is given and is not there yet, and in ``dtype``."""
    if result is out or (out is None and result.dtype == dtype):
        return result
    with on_device(device_of(result)), numpy.errstate(all="ignore"):  # what float16 cannot hold is infinite in it
        if out is None:
            return result.astype(dtype)
        out[...] = result
        return out


def write_back(array: Array, changed: Array) -> None:
    """Bring to ``array`` what an operation in place did to ``changed``, where that is a copy of it."""
    if changed is not array:
        finish(changed, array, array.dtype)


def _overlap(array: Array, other: Array | None) -> bool:
    return other is not None and bool(module_of(array).may_share_memory(array, other))


def _address(array: Array) -> int:
    return int(array.ctypes.data if isinstance(array, numpy.ndarray) else array.data.ptr)
