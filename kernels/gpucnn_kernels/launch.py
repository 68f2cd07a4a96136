"""The one checked way to start a kernel.

A driver takes a list of addresses and asks nothing: a double where a float is expected, a strided view taken for a
contiguous one, a host pointer or a count past 2^31 give wrong numbers or end the process. Every kernel here starts
through :meth:`Call.launch`, which holds the arguments against the kernel's own declaration, read from its source.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import operator
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from gpucnn_kernels import source as sources
from gpucnn_kernels.arrays import JAX, DeviceArray, device_array, image_layout, in_kind, library_of
from gpucnn_kernels.errors import ArgumentError, DeviceError, DtypeError, LayoutError
from gpucnn_kernels.gpu import Gpu, gpu_of
from gpucnn_kernels.overlap import require_apart, require_same_or_apart
from gpucnn_kernels.runtime import ITEM_SIZES, Pointer, current

THREADS = 256
"""The block size of kernels that give each thread an element."""

_MAX_GRID = (2**31 - 1, 65535, 65535)
_MAX_BLOCK_DEPTH = 64
_MAX_SHARED_BYTES = 227 << 10  # of any GPU so far; what the one at hand has is checked where it is known
_MAX_BLOCKS = 1 << 16


def blocks_for(count: int, threads: int = THREADS, per_thread: int = 1) -> int:
    """Blocks of a grid-stride loop over ``count`` elements: one thread each, up to 65,536 blocks."""
    return min(-(-count // (threads * per_thread)), _MAX_BLOCKS)


def blocks_for_packs(count: int, dtype: str) -> int:
    """Blocks for ``count`` elements where a thread takes two packs of 16 bytes, as packs.cuh has them."""
    return blocks_for(count, per_thread=2 * 16 // ITEM_SIZES[dtype])


class Call:
    """One call of a public function: its array arguments checked, its outputs made, its kernels started.

    A context: inside, allocations and launches go to the arrays' device and to ``stream``. Arguments are looked up
    by name, None stays None::

        with Call(stream, x=x, out=out) as call:
            y = call.output(call["x"].shape, call["x"].dtype, like=call["x"])
            call.launch("activations", "relu_forward", blocks, x=call["x"], y=y, count=y.size)
            return call.give(y)
    """

    def __init__(self, stream: Any = None, /, **arrays: Any) -> None:
        self._runtime = current()
        self._arrays = {
            name: None if value is None else device_array(self._runtime, value, name)
            for name, value in arrays.items()
        }
        present = [array for array in self._arrays.values() if array is not None]
        if not present:
            raise DtypeError(f"at least one of {', '.join(arrays)} must be an array")
        self._first = present[0]
        for array in present[1:]:
            if array.device != self._first.device:
                raise DeviceError(
                    f"{self._first.name} is on device {self._first.device}, but {array.name} is on device "
                    f"{array.device}"
                )
        self._stream = _torch_stream(self._first.given) if stream is None else stream
        self._context = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._context.enter_context(self._runtime.on(self._first.device, self._stream))
        if any(array is not None and library_of(array.given) in JAX for array in self._arrays.values()):
            self._context.callback(self._runtime.wait)  # JAX does not know who reads the memory it hands out again
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.close()

    # ------------------------------------------------------------ arguments

    def __getitem__(self, name: str) -> DeviceArray:
        """The array argument ``name``. Raises DtypeError where None was given."""
        array = self._arrays[name]
        if array is None:
            raise DtypeError(f"{name} must be an array, got None")
        return array

    def get(self, name: str) -> DeviceArray | None:
        """The array argument ``name``, or None where none was given."""
        return self._arrays[name]

    def floating(self, *names: str) -> str:
        """The dtype that the named arguments (those given) share, one that kernels compute with.

        Raises DtypeError where one is no floating-point array or they differ.
        """
        first: DeviceArray | None = None
        for name in names:
            array = self._arrays[name]
            if array is None:
                continue
            if array.dtype not in sources.SCALARS:
                raise DtypeError(f"{name} must be one of {', '.join(sources.SCALARS)}, got {array.dtype}")
            if first is not None and array.dtype != first.dtype:
                raise DtypeError(
                    f"{name} is {array.dtype}, but {first.name} is {first.dtype}; convert one with .astype(...)"
                )
            first = first or array
        assert first is not None
        return first.dtype

    @property
    def capability(self) -> tuple[int, int]:
        """The compute capability of the arrays' device, such as (9, 0)."""
        return self._runtime.capability(self._first.device)

    @property
    def device(self) -> int:
        """The number of the arrays' device."""
        return self._first.device

    @property
    def gpu(self) -> Gpu:
        """The arrays' device as :mod:`gpucnn_kernels.gpu` describes one, to reckon with."""
        return gpu_of(self._runtime.name, self._first.device, self.capability)

    def require(self, name: str, dtype: str | None = None, shape: Sequence[int] | None = None) -> None:
        """Raise unless the argument ``name``, where given, has this dtype and shape."""
        array = self._arrays[name]
        if array is None:
            return
        if dtype is not None and array.dtype != dtype:
            raise DtypeError(f"{name} must be {dtype}, got {array.dtype}; convert it with .astype('{dtype}')")
        if shape is not None and array.shape != tuple(shape):
            raise ArgumentError(f"{name} must have shape {tuple(shape)}, got {array.shape}")

    def contiguous(self, *names: str) -> None:
        """Raise LayoutError unless the named arguments, where given, are C-contiguous."""
        for name in names:
            array = self._arrays[name]
            if array is not None and not array.contiguous:
                raise LayoutError(
                    f"{name} of shape {array.shape} has strides {array.strides} (in elements), not contiguous; "
                    "copy it first with ascontiguousarray"
                )

    def elementwise(self, *names: str) -> None:
        """Raise unless the named arguments, where given, are dense and agree in shape and strides.

        They are then walked through in memory order by one index. Those whose names begin with "out" are written,
        and must be one of the others or share no memory with them.
        """
        first: DeviceArray | None = None
        for name in names:
            array = self._arrays[name]
            if array is None:
                continue
            if first is None:
                if not array.dense:
                    raise LayoutError(
                        f"{name} of shape {array.shape} has strides {array.strides} (in elements), with gaps or "
                        "overlaps; copy it first with ascontiguousarray"
                    )
                first = array
            elif array.shape != first.shape:
                raise ArgumentError(f"{name} has shape {array.shape}, but {first.name} has shape {first.shape}")
            elif not array.same_layout(first):
                raise LayoutError(
                    f"{name} has strides {array.strides}, but {first.name} has {first.strides} (in elements); "
                    "bring both to the same memory format"
                )
        read = [self._arrays[name] for name in names if not name.startswith("out")]
        written = [array for name in names if name.startswith("out") and (array := self._arrays[name]) is not None]
        for place, out in enumerate(written):
            require_same_or_apart(out, *read)
            require_apart(out, *written[:place])

    # ------------------------------------------------------------ outputs

    def empty(
        self, shape: Sequence[int], dtype: str, *, like: DeviceArray | None = None, name: str = ""
    ) -> DeviceArray:
        """A new array, its values undefined; where shapes agree, laid out as ``like``, and channels-last as it is.

        An image of another shape than ``like``'s is channels-last where ``like`` is that and not contiguous.
        """
        shape = tuple(shape)
        order: Sequence[int] = range(len(shape))
        if like is not None and len(shape) == len(like.shape):
            if shape == like.shape and like.dense:
                order = sorted(order, key=lambda axis: (-like.strides[axis], -like.shape[axis], axis))
            elif len(shape) == 4 and image_layout(like) == "channels_last":
                order = (0, 2, 3, 1)
        array = self._runtime.empty([shape[axis] for axis in order], dtype, self._first.array)
        inverse = sorted(range(len(shape)), key=lambda axis: order[axis])
        array = array.transpose(inverse)
        return device_array(self._runtime, array, name)

    def output(
        self, shape: Sequence[int], dtype: str, *, like: DeviceArray | None = None, name: str = "out"
    ) -> DeviceArray:
        """The argument ``name`` where it was given, checked, otherwise a new array as :meth:`empty` makes."""
        array = self._arrays.get(name)
        if array is None:
            return self.empty(shape, dtype, like=like, name=name)
        self.require(name, dtype, shape)
        array.pointer(writable=True)  # raises for one that must not be written
        if not array.dense:
            raise LayoutError(f"{name} has strides {array.strides} (in elements), with gaps; pass a dense array")
        return array

    def scratch(self, size: int, dtype: str) -> DeviceArray:
        """A workspace of ``size`` elements, its values undefined, that lives as long as the caller holds it."""
        return self.empty((size,), dtype, name="workspace")

    def give(self, *arrays: DeviceArray) -> Any:
        """The results in the kind of the first argument: one, or a tuple. An ``out`` comes back as it was."""
        results = tuple(
            array.given if any(array is known for known in self._arrays.values()) else self._in_kind(array)
            for array in arrays
        )
        return results[0] if len(results) == 1 else results

    def _in_kind(self, array: DeviceArray) -> Any:
        return in_kind(array.array, self._first.given)

    # ------------------------------------------------------------ launch

    def launch(
        self,
        source: str | sources.Source,
        kernel: str,
        blocks: int | tuple[int, ...],
        threads: int | tuple[int, ...] = THREADS,
        *,
        scalar: str | None = None,
        definitions: Mapping[str, str | int] | None = None,
        shared_bytes: int = 0,
        **arguments: Any,
    ) -> None:
        """Start ``kernel`` of ``source`` for elements of dtype ``scalar``; a grid without blocks starts nothing.

        ``arguments`` are by the kernel's own parameter names: DeviceArrays or None for pointers, numbers for
        values, mappings for structs. Raises ArgumentError or DtypeError, naming argument, expected and got.
        """
        if isinstance(source, str):
            source = sources.variant(source, scalar, definitions)
        if kernel not in source.kernels:
            raise ArgumentError(f"{source.title} has no kernel '{kernel}'; it has {', '.join(source.kernels)}")
        declared = source.kernels[kernel]
        grid, block = _three(blocks, f"{kernel}: blocks"), _three(threads, f"{kernel}: threads")
        if block[0] * block[1] * block[2] > declared.max_threads or min(block) < 1:
            raise ArgumentError(f"{kernel}: a block of {block} threads; it takes 1 to {declared.max_threads}")
        if block[2] > _MAX_BLOCK_DEPTH:
            raise ArgumentError(
                f"{kernel}: a block of {block} threads; a GPU takes {_MAX_BLOCK_DEPTH} along z at most"
            )
        if any(not 0 <= count <= most for count, most in zip(grid, _MAX_GRID, strict=True)):
            raise ArgumentError(f"{kernel}: a grid of {grid} blocks; a GPU takes 0 (nothing) to {_MAX_GRID}")
        if not 0 <= shared_bytes <= _MAX_SHARED_BYTES:
            raise ArgumentError(
                f"{kernel}: {shared_bytes} bytes of shared memory a block; a GPU takes 0 to {_MAX_SHARED_BYTES}"
            )
        names = [parameter.name for parameter in declared.parameters]
        if set(names) != set(arguments):
            raise ArgumentError(f"{kernel} takes ({', '.join(names)}), got ({', '.join(arguments)})")
        packed = [self._packed(kernel, parameter, arguments[parameter.name]) for parameter in declared.parameters]
        if min(grid) < 1:
            return
        module = self._runtime.module(source, self._first.device)
        module.launch(kernel, grid, block, packed, shared_bytes, self._stream)

    def _packed(self, kernel: str, parameter: sources.Parameter, value: Any) -> Pointer | Any:
        where = f"{kernel}: {parameter.name}"
        if parameter.value is not None:
            return pack(parameter.value, value, where)
        if value is None:
            return None
        if not isinstance(value, DeviceArray):
            raise DtypeError(f"{where} must be a device array, got {type(value).__qualname__}")
        if value.dtype != parameter.dtype:
            raise DtypeError(f"{where} must be {parameter.dtype}, got {value.dtype} ({value.name})")
        if value.device != self._first.device:
            raise DeviceError(f"{where} is on device {value.device}, not on {self._first.device}")
        return value.pointer(writable=not parameter.constant)


def pack(kind: type[Any], value: Any, where: str) -> Any:
    """``value`` as ``kind``, a ctypes number or structure: integers exactly, real numbers rounded to the width.

    Raises DtypeError where it is no such number, ArgumentError where it does not fit the width or a struct's
    fields are not the ones given.
    """
    if issubclass(kind, ctypes.Structure):
        fields: dict[str, type[Any]] = {field[0]: field[1] for field in kind._fields_}
        if not isinstance(value, Mapping) or set(value) != set(fields):
            given = ", ".join(map(str, value)) if isinstance(value, Mapping) else type(value).__qualname__
            raise ArgumentError(f"{where} is a struct of ({', '.join(fields)}), got ({given})")
        packed = {name: pack(field, value[name], f"{where}.{name}") for name, field in fields.items()}
        return kind(**{name: getattr(number, "value", number) for name, number in packed.items()})
    if kind in (ctypes.c_float, ctypes.c_double):
        return _real(kind, value, where)
    if type(value).__name__ in ("bool", "bool_"):  # NumPy's has no __index__
        value = bool(value)
    if not hasattr(value, "__index__") or getattr(value, "shape", ()) != ():
        raise DtypeError(f"{where} must be an integer, got {value!r}")
    number = int(value)
    integer = kind(number)
    if int(integer.value) != number:
        raise ArgumentError(
            f"{where} = {number} does not fit {kind.__name__.removeprefix('c_')} ({8 * ctypes.sizeof(kind)} bits)"
        )
    return integer


def _real(kind: type[Any], value: Any, where: str) -> Any:
    dtype = getattr(value, "dtype", None)  # of NumPy's numbers: an array is none, and a complex one loses a part
    if not hasattr(value, "__float__") or getattr(value, "shape", ()) != () or getattr(dtype, "kind", "") == "c":
        raise DtypeError(f"{where} must be a number, got {value!r}")
    too_large = f"{where} = {value} does not fit a {kind.__name__.removeprefix('c_')}"
    try:
        number = float(value)
    except OverflowError:
        raise ArgumentError(too_large) from None
    packed = kind(number)
    if math.isfinite(number) and not math.isfinite(packed.value):
        raise ArgumentError(too_large)
    return packed


def _three(sizes: int | tuple[int, ...], where: str) -> tuple[int, int, int]:
    try:
        numbers = [operator.index(size) for size in ((sizes,) if hasattr(sizes, "__index__") else tuple(sizes))]
    except TypeError:
        numbers = []
    if not 1 <= len(numbers) <= 3:
        raise ArgumentError(f"{where} must be an integer or up to three, got {sizes!r}")
    x, y, z = (*numbers, 1, 1)[:3]
    return x, y, z


def _torch_stream(given: Any) -> Any:
    """PyTorch's current stream for one of its tensors, so that kernels keep the caller's order; else None."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(given, torch.Tensor) or not given.is_cuda:
        return None
    return torch.cuda.current_stream(given.device)
