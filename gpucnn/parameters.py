"""Parameters: trainable arrays with their gradients, as views in one flat buffer a dtype.

A network that computes in 16 bits keeps its parameters in float32, and beside each a copy in 16 bits, which its
convolutions and linear layers read; :func:`refresh_narrow_copies` brings the copies up to date.

On a GPU the weights of convolutions may lie channels-last, (K, C, R, S) with memory that runs K, R, S, C, as the
kernels for tensor cores read them: gradients, copies and an optimizer's statistics then lie so, too. What is saved
never does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy

from gpucnn.device import copy_into, device_of, is_device_array, on_device, to_device
from gpucnn.errors import DeviceError, DtypeError, ShapeError
from gpucnn.ops import Array, array_module
from gpucnn.ops.memory_format import is_channels_last

_buffer_numbers = itertools.count(1)

PITCH = 8
"""Elements: 16 bytes in 16 bits, the pieces in which tensor cores' kernels read weights that lie so."""


class Parameter:
    """A trainable array and its gradient.

    Attributes:
        data: the values.
        gradient: an array of the same shape and dtype that ``backward`` adds to and ``zero_grad`` clears. It is
            cleared when it is next looked at: the first gradient after ``zero_grad`` takes its place, and spares
            a pass that writes zeros and one that reads them. A view of it that was taken before is not cleared.
        requires_grad: False freezes it; layers then leave its gradient alone and optimizers skip it.
        path: where it is in its model ("features.0.weight"), for messages.
        buffer: the flat buffer that it was last laid into; None for none, or none since it was moved.
        narrow_copy: the values in 16 bits as they were at the last refresh, where a model computes in them.
    """

    __slots__ = ("_gradient", "_is_cleared", "buffer", "data", "narrow_copy", "path", "requires_grad")

    _is_cleared: bool

    def __init__(self, data: Array, requires_grad: bool = True) -> None:
        self.data = data
        with on_device(device_of(data)):
            self.gradient = array_module(data).zeros_like(data)
        self.requires_grad = requires_grad
        self.path = ""
        self.buffer: FlatBuffer | None = None
        self.narrow_copy: Array | None = None

    @property
    def gradient(self) -> Array:
        """The sum of all gradients since it was cleared."""
        if self._is_cleared:
            self._gradient.fill(0)
            self._is_cleared = False
        return self._gradient

    @gradient.setter
    def gradient(self, array: Array) -> None:
        self._gradient = array
        self._is_cleared = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        return tuple(self.data.shape)

    @property
    def size(self) -> int:
        """The number of values."""
        return int(self.data.size)

    @property
    def dtype(self) -> Any:
        """The dtype of the values."""
        return self.data.dtype

    @property
    def working(self) -> Array:
        """What convolutions and linear layers compute with: the copy in 16 bits where there is one, else data."""
        return self.data if self.narrow_copy is None else self.narrow_copy

    @property
    def buffer_number(self) -> int:
        """The number of its flat buffer, 0 for none: buffers are told apart by it."""
        return 0 if self.buffer is None else self.buffer.number

    @property
    def device(self) -> str:
        """Where the values are: "cpu", "cuda:0", ..."""
        return device_of(self.data)

    def move(self, device: str | None = None, dtype: Any = None) -> None:
        """Bring values and gradient to ``device`` and ``dtype``, each unless None: into arrays of their own.

        Where they are there already nothing happens. Raises DeviceError where the device cannot be used.
        """
        data, gradient = self.data, self.gradient
        channels_last = is_channels_last(data)
        if dtype is not None and data.dtype != dtype:
            data, gradient = data.astype(dtype), gradient.astype(dtype)
        if device is not None:
            data, gradient = to_device(data, device), to_device(gradient, device)
        if data is not self.data:
            self.data, self.gradient = data, gradient
            self.buffer = self.narrow_copy = None
            self.lay(channels_last and is_device_array(data))  # between devices CuPy copies to C order

    def lay(self, channels_last: bool) -> None:
        """Have values (K, C, R, S) and gradient lie channels-last, or contiguous: in arrays of their own.

        Where they do so already nothing happens.
        """
        last = channels_last and is_device_array(self.data)
        arrays = _lying(self.data, last), _lying(self.gradient, last)
        if arrays[0] is not self.data:
            self.data, self.gradient = arrays
            self.buffer = self.narrow_copy = None

    def add_gradient(self, gradient: Array) -> None:
        """Add to the gradient, unless the parameter is frozen; what comes in 16 bits is added in the own dtype."""
        if not self.requires_grad:
            return
        if self._is_cleared:
            self._gradient[...] = gradient
            self._is_cleared = False
        else:
            self._gradient += gradient

    def add_gradient_by(self, operation: Callable[..., Array], dy: Array, *others: Array, **options: Any) -> None:
        """Add ``operation(dy, *others, **options)``, of dy's dtype, unless the parameter is frozen.

        The first one since the gradient was cleared is computed right where it belongs.
        """
        if not self.requires_grad:
            return
        if self._is_cleared and self._gradient.dtype == dy.dtype:
            operation(dy, *others, **options, out=self._gradient)
            self._is_cleared = False
        else:
            self.add_gradient(operation(dy, *others, **options))

    @property
    def first_gradient_place(self) -> Array | None:
        """Where the first gradient since it was cleared is to be written whole; None for any later one.

        Who has written it says so by :meth:`first_gradient_is_there`.
        """
        return self._gradient if self._is_cleared and self.requires_grad else None

    def first_gradient_is_there(self) -> None:
        """What :attr:`first_gradient_place` gave has been written."""
        self._is_cleared = False

    def zero_grad(self) -> None:
        """Set the gradient to zero."""
        self._is_cleared = True

    def copy_from(self, values: Any) -> None:
        """Set the values in place (views of the flat buffer stay views), from an array on any device or a list.

        Raises ShapeError where the shapes differ, DtypeError where ``values`` are not real numbers.
        """
        array = values if is_device_array(values) else numpy.asarray(values)
        if tuple(array.shape) != self.shape:
            raise ShapeError(f"parameter '{self.path}' has shape {self.shape}, got {tuple(array.shape)}")
        if array.dtype.kind not in "fiu":
            raise DtypeError(f"parameter '{self.path}' takes real numbers, got dtype {array.dtype}")
        copy_into(self.data, array)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """The values, so that numpy.asarray(parameter) and numpy.allclose take a parameter on the CPU.

        Raises DeviceError on a GPU, from which nothing is copied unasked.
        """
        if is_device_array(self.data):
            raise DeviceError(
                f"parameter '{self.path}' is on {self.device}, and NumPy works on the CPU; take "
                "gpucnn.device.to_cpu(parameter.data)"
            )
        return numpy.array(self.data, dtype=dtype, copy=copy)

    def __deepcopy__(self, memo: dict[int, Any]) -> Parameter:
        """A parameter of its own: values and gradient copied, in no flat buffer."""
        twin = Parameter(self.data.copy("K"), self.requires_grad)
        twin.gradient[...] = self.gradient
        twin.path = self.path
        memo[id(self)] = twin
        return twin

    def __repr__(self) -> str:
        return f"Parameter({self.path or 'unnamed'}, shape={self.shape}, dtype={self.dtype})"


class FlatBuffer:
    """Parameters of one dtype laid end to end: ``data`` and ``gradient`` are 1-d, each parameter views of both.

    An optimizer step, a clearing or a reduction is then one operation on one array, and so is the conversion to
    16 bits: ``narrow``, where a model computes in them, has the same layout. Each parameter begins at a multiple
    of PITCH elements, in ``offsets``; between them lie zeros, in values and gradients, which steps leave zero.

    A parameter that lies channels-last does so here, too. What leaves the program is brought to the order that
    does not know of it, by :meth:`in_c_order`, and what comes from outside by :meth:`in_own_order`.
    """

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        self.parameters = list(parameters)
        first = self.parameters[0].data
        self.device, self.number = device_of(first), next(_buffer_numbers)
        self.narrow: Array | None = None
        size = sum(_padded(parameter.size) for parameter in self.parameters)
        with on_device(self.device):
            self.data = array_module(first).zeros(size, first.dtype)
            self._gradient = array_module(first).zeros(size, first.dtype)
            self._lay()

    def _lay(self) -> None:
        self.offsets: list[int] = []
        self._channels_last = [is_channels_last(parameter.data) for parameter in self.parameters]
        start = 0
        for parameter, last in zip(self.parameters, self._channels_last, strict=True):
            stop = start + parameter.size
            view = _shaped(self.data[start:stop], parameter.shape, last)
            gradient = _shaped(self._gradient[start:stop], parameter.shape, last)
            view[...], gradient[...] = parameter.data, parameter.gradient
            parameter.data, parameter.gradient = view, gradient
            parameter.buffer, parameter.narrow_copy = self, None
            self.offsets.append(start)
            start += _padded(parameter.size)

    @property
    def gradient(self) -> Array:
        """All gradients; those that were cleared, and have had nothing added since, are zeros from now on."""
        for parameter in self.parameters:
            if parameter._is_cleared:
                _ = parameter.gradient
        return self._gradient

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        for parameter in self.parameters:
            parameter.zero_grad()

    def holds(self) -> bool:
        """Whether every parameter is still a view of this buffer (another buffer may have taken them over)."""
        return all(
            parameter.data.base is self.data and parameter._gradient.base is self._gradient
            for parameter in self.parameters
        )

    def refresh_narrow(self, dtype: str) -> None:
        """Convert all values to the 16-bit ``dtype``; the parameters' narrow copies are views of the result."""
        if self.narrow is None or self.narrow.dtype != dtype:
            self.narrow = array_module(self.data).empty(self.data.size, dtype)
            for parameter, start in zip(self.parameters, self.offsets, strict=True):
                if parameter.buffer is self:
                    view = self.narrow[start : start + parameter.size]
                    parameter.narrow_copy = shaped_like(parameter.data, view)
        self.narrow[...] = self.data

    def in_c_order(self, array: Array) -> Array:
        """A copy of ``array``, laid out as this buffer, with every parameter's elements in C order.

        ``array`` itself where they are so already.
        """
        return self._ordered(array, from_c_order=False)

    def in_own_order(self, array: Array) -> Array:
        """A copy of ``array``, with every parameter's elements in C order, laid out as this buffer.

        ``array`` itself where it is so already.
        """
        return self._ordered(array, from_c_order=True)

    def _ordered(self, array: Array, *, from_c_order: bool) -> Array:
        if not any(self._channels_last):
            return array
        ordered = array.copy()
        for parameter, start, last in zip(self.parameters, self.offsets, self._channels_last, strict=True):
            if last:
                place = slice(start, start + parameter.size)
                target = _shaped(ordered[place], parameter.shape, from_c_order)
                target[...] = _shaped(array[place], parameter.shape, not from_c_order)
        return ordered


def shaped_like(model: Array, elements: Array) -> Array:
    """A view of a 1-d array with the shape of ``model``, in the order in which that lies."""
    return _shaped(elements, tuple(model.shape), is_channels_last(model))


def _shaped(elements: Array, shape: tuple[int, ...], channels_last: bool) -> Array:
    """A view of a 1-d array as one of ``shape``, in C order or (K, C, R, S) channels-last."""
    if not channels_last:
        return elements.reshape(shape)
    k, c, r, s = shape
    return elements.reshape(k, r, s, c).transpose(0, 3, 1, 2)


def _lying(array: Array, channels_last: bool) -> Array:
    """``array`` in C order or channels-last: itself where it lies so, otherwise a copy."""
    if is_channels_last(array) == channels_last and (channels_last or array.flags.c_contiguous):
        return array
    elements = array_module(array).empty(array.size, array.dtype)
    copy = _shaped(elements, tuple(array.shape), channels_last)
    copy[...] = array
    return copy


def _padded(size: int) -> int:
    return -(-size // PITCH) * PITCH


def refresh_narrow_copies(parameters: Iterable[Parameter], dtype: str) -> None:
    """Bring the parameters' copies in the 16-bit ``dtype`` up to date: one conversion a flat buffer.

    Parameters that lie in no buffer, or left theirs, are converted one by one. Values too large for ``dtype``
    become infinite.
    """
    done: set[int] = set()
    with numpy.errstate(over="ignore"):
        for parameter in parameters:
            buffer = parameter.buffer
            if buffer is None or parameter.data.base is not buffer.data:
                parameter.narrow_copy = parameter.data.astype(dtype)
            elif buffer.number not in done:
                done.add(buffer.number)
                buffer.refresh_narrow(dtype)


def drop_narrow_copies(parameters: Iterable[Parameter]) -> None:
    """Forget the copies: the parameters are computed with as they are."""
    for parameter in parameters:
        parameter.narrow_copy = None
        if parameter.buffer is not None:
            parameter.buffer.narrow = None


def flatten(parameters: Iterable[Parameter]) -> list[FlatBuffer]:
    """Lay parameters into one flat buffer a dtype (and device), in their order; each becomes a view."""
    by_kind: dict[Any, list[Parameter]] = {}
    for parameter in parameters:
        by_kind.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    return [FlatBuffer(group) for group in by_kind.values()]
