"""Where computations run: chosen once, with the reason said; and the ways of an array between the devices.

A device is named as in PyTorch: "cpu", "cuda" (which is "cuda:0") or "cuda:1". On a GPU arrays are CuPy's, and
CuPy is imported when a CUDA device is first used and never before. Where ``GPUCNN_KERNELS_RUNTIME=host`` has the
kernels run on the CPU, "cuda" is that, and arrays are :class:`gpucnn_kernels.runtime.host_array.HostArray`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy

from gpucnn.errors import ArgumentError, DeviceError, DtypeError
from gpucnn.names import unknown

__all__ = [
    "DEVICES",
    "Device",
    "choose_device",
    "copy_into",
    "cuda_facts",
    "cuda_status",
    "device_of",
    "is_device_array",
    "is_host_runtime",
    "module_of",
    "on_device",
    "require_same_device",
    "split_name",
    "synchronize",
    "to_cpu",
    "to_device",
]

DEVICES = ("auto", "cpu", "cuda")
_EXTRAS = "pip install 'gpucnn[cuda12]' (driver 525 or newer) or 'gpucnn[cuda13]' (driver 580 or newer)"
_CUDA_13 = 13000  # as the runtime counts: 1000 * major + 10 * minor
_LEAST_CAPABILITY = {12: (5, 0), 13: (7, 5)}
"""The oldest GPUs that the libraries of each CUDA generation hold code for, as compute capability."""


@dataclass(frozen=True, slots=True)
class Device:
    """A chosen device.

    Attributes:
        name: "cpu" or "cuda".
        reason: why it was chosen, for the user to read.
        index: which of several GPUs.
    """

    name: str
    reason: str
    index: int = 0

    def __str__(self) -> str:
        """The name as options and ``Layer.to`` take it: "cpu", "cuda" or "cuda:1"."""
        return f"{self.name}:{self.index}" if self.index else self.name


def split_name(name: str | Device) -> tuple[str, int]:
    """("cpu", 0), ("auto", 0) or ("cuda", index) of a device's name. Raises ArgumentError for another name."""
    if isinstance(name, Device):
        return name.name, name.index
    if isinstance(name, str):
        if name in DEVICES:
            return name, 0
        if found := re.fullmatch(r"cuda:(\d+)", name):
            return "cuda", int(found[1])
    hint = "; cuda takes a number, as in cuda:1" if str(name).startswith("cuda:") else ""
    raise ArgumentError(unknown("device", name, DEVICES) + hint)


# ---------------------------------------------------------------- choosing


def choose_device(requested: str | None = None) -> Device:
    """The device for ``requested``, else for $GPUCNN_DEVICE, else for "auto".

    "auto" takes CUDA where a GPU works and the CPU elsewhere, and says why; it never takes the host runtime.
    Raises DeviceError, with the reason, where "cuda" is asked for and cannot be used; ArgumentError for any other
    name.
    """
    source = "asked for"
    if requested is None:
        requested = os.environ.get("GPUCNN_DEVICE") or "auto"
        source = "set by GPUCNN_DEVICE"
    name, index = split_name(requested)
    if name == "cpu":
        return Device("cpu", source)
    usable, reason = cuda_status(index)
    if name == "cuda":
        if not usable:
            raise DeviceError(
                f"device '{requested}' cannot be used: {reason}; use --device cpu, or auto to fall back"
            )
        return Device("cuda", f"{source}; {reason}", index)
    if is_host_runtime():
        return Device("cpu", f"auto: {reason}; --device cuda takes it")
    return Device("cuda" if usable else "cpu", f"auto: {reason}")


def is_host_runtime() -> bool:
    """Whether "cuda" stands for the host runtime, the kernels compiled for the CPU.

    Raises ArgumentError where GPUCNN_KERNELS_RUNTIME names no runtime.
    """
    from gpucnn_kernels.errors import KernelError
    from gpucnn_kernels.runtime import current_name

    try:
        return current_name() == "host"
    except KernelError as error:
        raise ArgumentError(str(error)) from error


def cuda_status(index: int = 0) -> tuple[bool, str]:
    """(whether "cuda:<index>" can be used, the reason): a CuPy that imports is not yet a GPU that works."""
    if is_host_runtime():
        if index:
            return (
                False,
                f"GPUCNN_KERNELS_RUNTIME=host has one device, cuda:0, and no cuda:{index}",
            )
        return True, (
            "GPUCNN_KERNELS_RUNTIME=host: kernels run on the host runtime, on the CPU, for tests and not for speed"
        )
    cupy, problem = _import_cupy()
    if cupy is None:
        return False, problem
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy raises many kinds for a broken driver or library; each is a reason
        return False, _without_driver(cupy, error)
    if index >= count:
        there = {0: "no NVIDIA GPU", 1: "one GPU, cuda:0"}.get(count, f"{count} GPUs, cuda:0 to cuda:{count - 1}")
        return False, f"CuPy {cupy.__version__} works, but there is {there}" + (
            f", no cuda:{index}" if count else ""
        )
    try:
        properties = cupy.cuda.runtime.getDeviceProperties(index)
        generation = cupy.cuda.runtime.runtimeGetVersion() // 1000
        name, capability = properties["name"].decode(), (properties["major"], properties["minor"])
    except Exception as error:
        return False, f"CuPy {cupy.__version__} finds a GPU but cannot use it: {_first_line(error)}"
    least = _LEAST_CAPABILITY.get(generation, (0, 0))
    if capability < least:
        advice = "install 'gpucnn[cuda12]' instead" if generation * 1000 >= _CUDA_13 else "it is too old"
        return False, (
            f"{name} has compute capability {'.'.join(map(str, capability))}, and CUDA {generation} needs "
            f"{'.'.join(map(str, least))}; {advice}"
        )
    libraries: dict[str, Callable[[], Any]] = {
        "NVRTC, the compiler of the kernels": lambda: cupy.cuda.nvrtc.getVersion(),
        "cuBLAS, which multiplies matrices": lambda: cupy.cuda.cublas,  # CuPy loads it here
    }
    for library, load in libraries.items():
        try:
            load()
        except Exception as error:
            return False, (
                f"{library}, cannot be loaded ({_first_line(error)}); it comes with the extra: "
                f"pip install 'gpucnn[cuda{generation}]'"
            )
    return True, f"{name} found"


def _import_cupy() -> tuple[Any, str]:
    """(CuPy or None, why there is none)."""
    if importlib.util.find_spec("cupy") is None:
        return None, f"CuPy is not installed; {_EXTRAS}"
    wheels = _cupy_wheels()
    if len(wheels) > 1:
        return None, (
            f"{' and '.join(wheels)} are both installed and overwrite each other's files; pip uninstall -y "
            f"{' '.join(wheels)}, then {_EXTRAS}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what CuPy warns of at import is said here, as the reason
            import cupy
    except Exception as error:  # an ImportError, or whatever a damaged library raises
        from gpucnn_kernels.runtime.cuda import import_advice

        return None, (
            f"CuPy does not import: {_first_line(error)}; {import_advice(error) or f'install it again: {_EXTRAS}'}"
        )
    return cupy, ""


def _cupy_wheels() -> list[str]:
    """The names of the installed packages that hold a CuPy."""
    import importlib.metadata  # it loads half of the standard library

    names = {(found.metadata["Name"] or "").lower() for found in importlib.metadata.distributions()}
    return sorted(name for name in names if re.fullmatch(r"cupy(-cuda\d+x|-rocm-[\d-]+)?", name))


def _without_driver(cupy: Any, error: Exception) -> str:
    """Why CuPy finds no driver: none at all, one too old for its CUDA, or what the driver itself says."""
    said = _first_line(error)
    try:
        driver, needed = cupy.cuda.runtime.driverGetVersion(), cupy.cuda.runtime.runtimeGetVersion()
    except Exception as second:  # not even that: the first error is the better one to show
        return f"CuPy {cupy.__version__} does not work here: {said} ({_first_line(second)})"
    if driver == 0:
        return (
            f"CuPy {cupy.__version__} is installed but finds no usable NVIDIA GPU or driver; install the driver, "
            "or start the container with --gpus all"
        )
    if driver // 1000 < needed // 1000:
        advice = "update it to 580 or newer, or install 'gpucnn[cuda12]'" if driver >= 12000 else "update it"
        return (
            f"the NVIDIA driver serves CUDA {driver // 1000}.{driver % 1000 // 10}, older than CuPy's CUDA "
            f"{needed // 1000}; {advice}"
        )
    return f"CuPy {cupy.__version__} does not work here: {said}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def cuda_facts() -> dict[str, Any]:
    """What there is to know of CUDA on this machine, fit for JSON: for ``gpucnn info``.

    Keys: "runtime" ("cuda" or "host"), "usable", "reason", "cupy" (its version, or None), "driver" and "cuda" (the
    CUDA versions that the driver serves and that CuPy brings, as "12.9"; None where unknown) and "gpus", each with
    "name", "compute_capability", "memory_bytes" and "free_bytes".
    """
    usable, reason = cuda_status()
    facts: dict[str, Any] = {
        "runtime": "host" if is_host_runtime() else "cuda",
        "usable": usable,
        "reason": reason,
        "cupy": None,
        "driver": None,
        "cuda": None,
        "gpus": [],
    }
    cupy = None if is_host_runtime() else _import_cupy()[0]
    if cupy is None:
        return facts
    facts["cupy"] = cupy.__version__
    runtime = cupy.cuda.runtime
    with contextlib.suppress(Exception):  # the reason above says what is wrong
        driver, cuda = runtime.driverGetVersion(), runtime.runtimeGetVersion()
        facts["driver"] = f"{driver // 1000}.{driver % 1000 // 10}" if driver else None
        facts["cuda"] = f"{cuda // 1000}.{cuda % 1000 // 10}"
        for index in range(runtime.getDeviceCount()):
            properties = runtime.getDeviceProperties(index)
            with cupy.cuda.Device(index):
                free, total = runtime.memGetInfo()
            facts["gpus"].append(
                {
                    "name": properties["name"].decode(),
                    "compute_capability": f"{properties['major']}.{properties['minor']}",
                    "memory_bytes": int(total),
                    "free_bytes": int(free),
                }
            )
    return facts


# ---------------------------------------------------------------- arrays


def _host_array_type() -> Any:
    """HostArray, or None while nobody has loaded it: then there are none."""
    module = sys.modules.get("gpucnn_kernels.runtime.host_array")
    return None if module is None else module.HostArray


def _cupy_array_type() -> Any:
    """cupy.ndarray, or None while nobody has imported CuPy."""
    module = sys.modules.get("cupy")
    return None if module is None else getattr(module, "ndarray", None)


def is_device_array(array: Any) -> bool:
    """Whether ``array`` is in device memory: a cupy.ndarray or a HostArray."""
    kind = type(array)
    if kind is numpy.ndarray:
        return False
    host, cupy = _host_array_type(), _cupy_array_type()
    return (host is not None and isinstance(array, host)) or (cupy is not None and isinstance(array, cupy))


def module_of(array: Any) -> Any:
    """The module that makes arrays like ``array``: numpy, cupy or ``host_arrays``.

    Raises DtypeError for anything that is no array of these, with what to do.
    """
    if type(array) is numpy.ndarray:
        return numpy
    if is_device_array(array):
        if isinstance(array, numpy.ndarray):
            return sys.modules["gpucnn_kernels.runtime.host_array"].host_arrays
        return sys.modules["cupy"]
    if isinstance(array, numpy.ndarray):
        return numpy
    raise DtypeError(
        f"expected a numpy.ndarray, got {type(array).__module__}.{type(array).__qualname__}; use "
        "numpy.asarray(...) for lists and array-likes (on a GPU, cupy.asarray)"
    )


def device_of(array: Any) -> str:
    """Where ``array`` is: "cpu", "cuda:0", "cuda:1", ... Raises DtypeError for what is no array."""
    if module_of(array) is numpy:
        return "cpu"
    return "cuda:0" if isinstance(array, numpy.ndarray) else f"cuda:{int(array.device.id)}"


def require_same_device(array: Any, other: Any, message: str) -> None:
    """Raise DeviceError unless both arrays are on one device.

    ``message`` is completed with {array} and {other}, the two devices.
    """
    kind = type(array)
    if kind is type(other):  # as every layer has it at every step
        if issubclass(kind, numpy.ndarray):
            return
        if kind is _cupy_array_type() and array.device == other.device:
            return
    ours, theirs = device_of(array), device_of(other)
    if ours != theirs:
        raise DeviceError(message.format(array=ours, other=theirs))


def to_cpu(array: Any) -> Any:
    """``array`` as a numpy.ndarray: itself where it is one, a copy where it is on a GPU.

    Lists and other things that numpy.asarray takes are taken, too.
    """
    if type(array) is numpy.ndarray:
        return array
    if not is_device_array(array):
        return numpy.asarray(array)
    with on_device(device_of(array)):  # CuPy copies on the current device's stream, whatever GPU the array is on
        return array.get()


def to_device(array: Any, device: str | Device) -> Any:
    """``array`` on ``device``: itself where it is there already, otherwise a copy.

    Raises DeviceError, with the reason, where the device cannot be used; ArgumentError for an unknown name ("auto"
    is one here: choose first).
    """
    name, index = split_name(device)
    if name == "auto":
        raise ArgumentError("'auto' is no place for an array; take choose_device('auto'), or 'cpu' or 'cuda'")
    if name == "cpu":
        return to_cpu(array)
    usable_module = _device_module(index)
    if is_device_array(array) and device_of(array) == f"cuda:{index}" and module_of(array) is usable_module:
        return array
    with on_device(device):
        if is_device_array(array) and module_of(array) is usable_module:
            return array.copy()  # from another GPU: the copy is made on the current one
        return usable_module.asarray(to_cpu(array))


_checked: set[int] = set()  # GPUs found usable: asking costs milliseconds, and this is asked for every batch


def _device_module(index: int) -> Any:
    """``cupy``, or ``host_arrays`` on the host runtime. Raises DeviceError where cuda:<index> cannot be used."""
    host = is_host_runtime()
    if host or index not in _checked:
        usable, reason = cuda_status(index)
        if not usable:
            raise DeviceError(f"device 'cuda:{index}' cannot be used: {reason}")
    if host:
        from gpucnn_kernels.runtime.host_array import host_arrays

        return host_arrays
    _checked.add(index)
    import cupy

    return cupy


def copy_into(target: Any, values: Any) -> None:
    """``target[...] = values``, wherever the two are: a transfer where it takes one."""
    if is_device_array(target):
        values = to_device(values, device_of(target))
        with on_device(device_of(target)):
            target[...] = values
    else:
        target[...] = to_cpu(values)


def on_device(device: str | Device) -> contextlib.AbstractContextManager[Any]:
    """A context in which new arrays and launches go to that GPU; for the CPU and the host runtime, nothing."""
    name, index = split_name(device)
    cupy = sys.modules.get("cupy")
    if name != "cuda" or cupy is None or is_host_runtime():
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[Any] = cupy.cuda.Device(index)
    return context


def synchronize(device: str | Device) -> None:
    """Wait until all that was started on ``device`` is done, as for a measurement of time."""
    name, index = split_name(device)
    if name == "cuda" and not is_host_runtime():
        _device_module(index).cuda.Device(index).synchronize()
