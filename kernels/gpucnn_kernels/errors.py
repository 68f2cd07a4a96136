"""The errors of gpucnn_kernels, each over the built-in exception that a caller would expect.

:class:`gpucnn_kernels.problem.ProblemError` is the other one: shapes and parameters that do not fit together.
"""

from __future__ import annotations


class KernelError(Exception):
    """Whatever gpucnn_kernels finds wrong with what it was given, or with the machine."""


class ArgumentError(KernelError, ValueError):
    """A parameter is out of its range, or an array has the wrong shape or element count."""


class DtypeError(KernelError, TypeError):
    """An array has the wrong element type, is read-only, or is no device array at all."""


class LayoutError(KernelError, ValueError):
    """An array is neither contiguous nor channels-last, or arrays that must agree in layout do not."""


class DeviceError(KernelError, RuntimeError):
    """Arrays lie on different devices, or no device can be used; the message gives the reason."""


class CompileError(KernelError, RuntimeError):
    """A kernel does not compile; the message has the compiler's lines."""
