"""Arrays that stand for device memory where kernels run on the host runtime.

A :class:`HostArray` is a numpy.ndarray that behaves as a cupy.ndarray does where the two differ and programs go
wrong: it does not mix with plain NumPy arrays, reductions and single elements are 0-d arrays, some methods do not
know bfloat16, and only ``get`` and ``host_arrays.asnumpy`` lead back to NumPy. A transfer that a program forgot is
then an error on a machine without a GPU too.

What a subclass cannot refuse, because NumPy does not ask it: ``numpy.asarray(host)``, ``numpy.array(host)`` and
their like give a plain view of the same memory, ``plain[...] = host`` and ``plain[host]`` work.
``host.view(numpy.ndarray)`` is the way in for code that implements operations; nothing else should use it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy

from gpucnn_kernels.runtime.host_graph import arrays_in, recording, refuse

__all__ = ["HostArray", "HostArrays", "host_arrays"]

PlainArray = numpy.ndarray[Any, numpy.dtype[Any]]

_MIXED = (
    "a numpy.ndarray of shape {shape} came where a device array (HostArray) is needed; move it first, with "
    "to_device(...) or host_arrays.asarray(...), or take the device array to NumPy with .get()"
)


class HostArray(PlainArray):
    """An array in what stands for device memory. Made by :data:`host_arrays`, never by hand."""

    def get(self) -> PlainArray:
        """A copy as a plain numpy.ndarray, in C order."""
        refuse("copy an array to the host")
        return numpy.array(self.view(numpy.ndarray), order="C")

    def set(self, values: PlainArray) -> None:
        """Copy a plain numpy.ndarray of the same shape and dtype into this array.

        Raises TypeError for anything else, ValueError where the shapes differ.
        """
        refuse("copy an array from the host")
        if type(values) is not numpy.ndarray:
            raise TypeError(f"set takes a numpy.ndarray, got {type(values).__qualname__}")
        if values.dtype != self.dtype:
            raise TypeError(f"set takes the array's own dtype, {self.dtype}, got {values.dtype}")
        if values.shape != self.shape:
            raise ValueError(f"set takes the array's own shape, {self.shape}, got {values.shape}")
        self.view(numpy.ndarray)[...] = values

    def __array_ufunc__(self, ufunc: numpy.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        """Every operator and ufunc: refuses plain arrays and lists, gives HostArrays."""
        for value in inputs:
            if isinstance(value, (list, tuple)):
                raise TypeError(f"{ufunc.__name__} takes device arrays and numbers, got {type(value).__name__}")
        out = options.get("out")
        given, named = list(map(_plain, inputs)), {name: _plain(value) for name, value in options.items()}
        operation = getattr(ufunc, method)
        if out is None and method != "at":
            operation = _in_c_order(operation)
        result = _perform(lambda: operation(*given, **named), (given, named), out or method == "at")
        if out is None:
            return _host(result)
        return out[0] if isinstance(out, tuple) and len(out) == 1 else out

    def __array_function__(self, func: Callable[..., Any], types: Any, args: Any, kwargs: Any) -> Any:
        """NumPy's functions: refuse plain arrays, give HostArrays."""
        out = kwargs.get("out")
        given, named = _plain(args), _plain(kwargs)
        result = _perform(lambda: func(*given, **named), (given, named), out)
        return out if isinstance(out, HostArray) else _host(result)

    def __getitem__(self, index: Any) -> Any:
        """A view, or a copy for index arrays; a single element is a 0-d view."""
        _refuse_plain_index(index)
        if recording() is not None and (indices := list(arrays_in(index))):
            if any(array.dtype == bool for array in indices):
                refuse("count the places of a mask")
            plain, place = self.view(numpy.ndarray), _plain(index)
            return _host(_perform(lambda: plain[place], (plain, place)))
        found = super().__getitem__(index)
        if isinstance(found, numpy.ndarray):
            return found
        return super().__getitem__((*index, ...) if isinstance(index, tuple) else (index, ...))

    def __setitem__(self, index: Any, value: Any) -> None:
        """Assign a device array or a number; a plain array is refused."""
        _refuse_plain_index(index)
        if isinstance(value, (list, tuple)):
            raise TypeError(f"only device arrays and numbers can be assigned, got {type(value).__name__}")
        target, place, values = self.view(numpy.ndarray), _plain(index), _plain(value)
        _perform(lambda: target.__setitem__(place, values), (target, place, values), True)

    def fill(self, value: Any) -> None:
        """Set every element to a number."""
        target, number = self.view(numpy.ndarray), _plain(value)
        _perform(lambda: target.fill(number), (target, number), True)


def _in_c_order(operation: Callable[..., Any]) -> Callable[..., Any]:
    """``operation``, its new arrays contiguous whatever the order of its inputs in memory: so CuPy makes them."""

    def in_c_order(*arguments: Any, **options: Any) -> Any:
        return _contiguous(operation(*arguments, **options))

    return in_c_order


def _contiguous(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(map(_contiguous, result))
    return numpy.ascontiguousarray(result) if isinstance(result, numpy.ndarray) and result.ndim else result


def _perform(function: Callable[[], Any], arguments: Any, in_place: Any = None) -> Any:
    """What ``function`` gives, a NumPy function of ``arguments``; or, while work is captured, what it will give.

    ``in_place`` is anything but None or False where it changes one of them instead.
    """
    recorder = recording()
    if recorder is None:
        return function()
    if in_place is None or in_place is False:
        return recorder.result(function, list(arrays_in(arguments)))
    return recorder.in_place(function, arrays_in(arguments))


_NOT_IN_BFLOAT16 = ("argmax", "argmin", "clip")


def _method(name: str) -> Callable[..., Any]:
    """The method ``name`` of numpy.ndarray, for methods that NumPy does not run through a ufunc."""
    plain_method = getattr(numpy.ndarray, name)

    def method(self: HostArray, *arguments: Any, **options: Any) -> Any:
        if name in _NOT_IN_BFLOAT16 and str(self.dtype) == "bfloat16":
            raise TypeError(f"{name} of bfloat16: CuPy 14 has none; convert with .astype('float32') first")
        out = options.get("out")
        given, named = (self.view(numpy.ndarray), *_plain(arguments)), _plain(options)
        result = _perform(lambda: plain_method(*given, **named), (given, named), out)
        if result is given[0]:  # astype(copy=False) of what has the dtype
            return self
        return out if isinstance(out, HostArray) else _host(result)

    method.__name__ = name
    method.__doc__ = f"``numpy.ndarray.{name}``; gives a HostArray, 0-d where NumPy gives a number."
    return method


for _name in (
    *(
        "all",
        "any",
        "argmax",
        "argmin",
        "argsort",
        "astype",
        "choose",
        "clip",
        "compress",
        "copy",
        "cumprod",
        "cumsum",
        "dot",
        "flatten",
        "max",
        "mean",
    ),
    *("min", "nonzero", "prod", "repeat", "searchsorted", "std", "sum", "take", "trace", "var"),
):
    setattr(HostArray, _name, _method(_name))


def _reading(name: str) -> Callable[..., Any]:
    """The method ``name`` of numpy.ndarray, which looks at the values."""
    plain_method = getattr(numpy.ndarray, name)

    def method(self: HostArray, *arguments: Any) -> Any:
        refuse("look at an array's values")
        return plain_method(self.view(numpy.ndarray), *arguments)

    method.__name__ = name
    method.__doc__ = f"``numpy.ndarray.{name}``, but not while work is captured."
    return method


for _name in ("__bool__", "__complex__", "__float__", "__index__", "__int__", "item", "tobytes", "tolist"):
    setattr(HostArray, _name, _reading(_name))


def _plain(value: Any) -> Any:
    """``value`` with plain views in place of HostArrays; TypeError where it holds a plain array already."""
    if isinstance(value, HostArray):
        return value.view(numpy.ndarray)
    if isinstance(value, numpy.ndarray):
        raise TypeError(_MIXED.format(shape=value.shape))
    if type(value) in (list, tuple):
        return type(value)(_plain(entry) for entry in value)
    if type(value) is dict:
        return {name: _plain(entry) for name, entry in value.items()}
    return value


def _host(result: Any) -> Any:
    """``result`` with HostArrays in place of plain arrays and of NumPy's numbers."""
    if isinstance(result, numpy.ndarray):
        return result.view(HostArray)
    if isinstance(result, numpy.generic):
        return numpy.array(result).view(HostArray)
    if type(result) in (list, tuple):
        return type(result)(_host(entry) for entry in result)
    if isinstance(result, tuple):  # a named one, of numpy.unique or numpy.linalg
        return type(result)(*(_host(entry) for entry in result))
    return result


def _refuse_plain_index(index: Any) -> None:
    for entry in index if isinstance(index, tuple) else (index,):
        if isinstance(entry, numpy.ndarray) and not isinstance(entry, HostArray):
            raise TypeError(_MIXED.format(shape=entry.shape))


class HostArrays:
    """NumPy's functions over HostArrays: what ``cupy`` is to a GPU. The one object is :data:`host_arrays`.

    Each function takes HostArrays and numbers, refuses plain arrays (TypeError) and gives HostArrays. ``asarray``,
    ``array`` and ``ascontiguousarray`` are the way in: they take plain arrays and lists, and copy them.
    """

    ndarray = HostArray

    def __init__(self, module: ModuleType = numpy) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if isinstance(found, ModuleType):
            found = HostArrays(found)
        elif isinstance(found, numpy.ufunc):
            found = _Ufunc(found)
        elif callable(found) and not isinstance(found, type):
            found = _function(found)
        self.__dict__[name] = found
        return found

    def array(
        self, values: Any, dtype: Any = None, copy: bool = True, order: Any = "K", ndmin: int = 0
    ) -> HostArray:
        """A HostArray of anything that numpy.array takes; with ``copy=False`` a HostArray that fits is kept."""
        if isinstance(values, HostArray) and not copy and (dtype is None or values.dtype == dtype):
            return values
        if not isinstance(values, HostArray):
            refuse("copy an array from the host")
            return numpy.array(values, dtype=dtype, order=order, ndmin=ndmin).view(HostArray)
        plain = values.view(numpy.ndarray)
        copied: HostArray = _host(
            _perform(lambda: numpy.array(plain, dtype=dtype, order=order, ndmin=ndmin), plain)
        )
        return copied

    def asarray(self, values: Any, dtype: Any = None, order: Any = "K") -> HostArray:
        """``values`` itself where it is a HostArray of that dtype, otherwise a copy in device memory."""
        return self.array(values, dtype, False, order)

    def ascontiguousarray(self, values: Any, dtype: Any = None) -> HostArray:
        """``values`` in C order."""
        if (
            isinstance(values, HostArray)
            and values.flags.c_contiguous
            and (dtype is None or values.dtype == dtype)
        ):
            return values
        return self.array(values, dtype, True, "C")

    @staticmethod
    def asnumpy(values: Any) -> PlainArray:
        """A copy of a HostArray as a plain array; anything else as numpy.asarray takes it."""
        return values.get() if isinstance(values, HostArray) else numpy.asarray(values)


def _function(function: Callable[..., Any], new: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """``function`` over HostArrays; where it is not given ``out``, ``new`` stands for it."""

    def on_host_arrays(*arguments: Any, **options: Any) -> Any:
        out = options.get("out")
        given, named = _plain(arguments), _plain(options)
        called = function if out is not None or new is None else new
        result = _perform(lambda: called(*given, **named), (given, named), out)
        return out if isinstance(out, HostArray) else _host(result)

    on_host_arrays.__name__ = getattr(function, "__name__", "function")
    on_host_arrays.__doc__ = getattr(function, "__doc__", None)
    return on_host_arrays


class _Ufunc:
    """A ufunc over HostArrays; its methods (``reduce``, ``at``, ...) as attributes."""

    def __init__(self, ufunc: numpy.ufunc) -> None:
        self._call = _function(ufunc, new=_in_c_order(ufunc))
        self._ufunc = ufunc

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._call(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._ufunc, name)
        return _function(found) if callable(found) else found


host_arrays = HostArrays()
"""Stands for a module: ``host_arrays.zeros((2, 3))``, ``host_arrays.asarray(plain)``, ``.asnumpy(host)``."""
