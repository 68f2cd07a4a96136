"""The errors that gpucnn raises: one small hierarchy over the built-in exceptions.

Each message says what came, what was expected and what to do. The command line prints any of them as one line
and exits with status 2; a program catches :class:`GpucnnError` for all of them, or the built-in class.
"""

from __future__ import annotations

from typing import Any


class GpucnnError(Exception):
    """Whatever gpucnn finds wrong with what it was given."""


class ShapeError(GpucnnError, ValueError):
    """An array has the wrong shape for the layer or operation."""


class DtypeError(GpucnnError, TypeError):
    """An array has the wrong element type, or is no array at all."""


class ArgumentError(GpucnnError, ValueError):
    """A parameter is out of its range, or an option or name is unknown."""


class StateError(GpucnnError, RuntimeError):
    """A call came in the wrong order, such as backward before forward."""


class DataError(GpucnnError, ValueError):
    """A data set or a file of one is missing, damaged or not what it claims to be."""


class CheckpointError(GpucnnError, ValueError):
    """A checkpoint or run folder is missing, damaged, or belongs to another model."""


class StorageError(GpucnnError, OSError):
    """A file could not be written: no space, no permission, no such folder."""


class DeviceError(GpucnnError, RuntimeError):
    """The device asked for cannot be used; the message gives the reason."""


class NonFiniteError(GpucnnError, ArithmeticError):
    """The loss, an output or a gradient became infinite or not a number."""


class MissingDependencyError(GpucnnError, ImportError):
    """An optional package is needed; the message says which extra installs it."""


def locate(error: Exception, path: str, layer: Any) -> Exception:
    """``error`` as raised by the layer at ``path``: the same class, the path in front of its message.

    The innermost layer gets to name itself; containers that see the error pass leave it as it is.
    """
    if getattr(error, "layer_path", None) is not None:
        return error
    shown = str(layer) if "\n" not in str(layer) else type(layer).__name__  # a container's repr is a whole tree
    name = f"layer '{path}' ({shown})" if path else shown
    located = type(error)(f"{name}: {error}")
    located.layer_path = path  # type: ignore[attr-defined]
    return located
