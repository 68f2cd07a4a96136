"""cuBLAS itself, beside CuPy, which refuses to call it while a stream is captured.

CuPy 14's functions raise NotImplementedError there, though cuBLAS takes part in a capture (its manual's chapter on
CUDA graphs) where its workspace is the caller's: its own would be allocated inside the graph. The workspace has
the size of cuBLAS's own, and products take this way whether they are captured or not, so that cuBLAS chooses, and
adds up, alike in both. The library is the one that CuPy has loaded, and so is the handle.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

_POINTER, _INT, _STRIDE = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong
_SIZES = (_INT,) * 5  # transposed, transposed, m, n, k
_MATRIX, _BATCH = (_POINTER, _INT, _INT), (_POINTER, _INT, _INT, _STRIDE)
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cublasSetStream_v2": (_POINTER, _POINTER),
    "cublasSetWorkspace_v2": (_POINTER, _POINTER, ctypes.c_size_t),
    "cublasGetMathMode": (_POINTER, ctypes.POINTER(_INT)),
    "cublasSetMathMode": (_POINTER, _INT),
    "cublasGemmEx": (_POINTER, *_SIZES, _POINTER, *_MATRIX, *_MATRIX, _POINTER, *_MATRIX, _INT, _INT),
    "cublasGemmStridedBatchedEx": (
        *(_POINTER, *_SIZES, _POINTER, *_BATCH, *_BATCH, _POINTER, *_BATCH),
        *(_INT, _INT, _INT),
    ),
}
_HOPPER = 90
_MIB = 1 << 20


def workspace_bytes(capability: str) -> int:
    """What cuBLAS takes for itself, by compute capability ("90" is 9.0): cublasSetWorkspace() in its manual."""
    return (32 if int(capability) >= _HOPPER else 4) * _MIB


class Cublas:
    """The functions of a loaded cuBLAS that products need, under CuPy's names.

    Raises AttributeError where the library has one of them not.
    """

    def __init__(self, library: Any) -> None:
        self._functions = {name: _function(library, name, types) for name, types in _SIGNATURES.items()}

    def _call(self, name: str, *arguments: Any) -> None:
        status = self._functions[name](*arguments)
        if status:
            raise RuntimeError(f"{name.removesuffix('_v2')} answered with status {status} (cublasStatus_t)")

    def prepare(self, handle: int, stream: int, workspace: int, size: int) -> None:
        """Have the handle's next calls run on ``stream``, with ``size`` bytes at ``workspace``."""
        self._call("cublasSetStream_v2", handle, stream)  # takes the workspace before away
        self._call("cublasSetWorkspace_v2", handle, workspace, size)

    def getMathMode(self, handle: int) -> int:
        """The handle's math mode."""
        mode = _INT()
        self._call("cublasGetMathMode", handle, ctypes.byref(mode))
        return mode.value

    def setMathMode(self, handle: int, mode: int) -> None:
        """Set it."""
        self._call("cublasSetMathMode", handle, mode)

    def gemmEx(self, handle: int, *arguments: int) -> None:
        """One product, in cuBLAS's order of arguments."""
        self._call("cublasGemmEx", handle, *arguments)

    def gemmStridedBatchedEx(self, handle: int, *arguments: int) -> None:
        """A batch of products."""
        self._call("cublasGemmStridedBatchedEx", handle, *arguments)


def _function(library: Any, name: str, types: tuple[Any, ...]) -> Any:
    function = getattr(library, name)
    function.argtypes, function.restype = types, _INT
    return function


@functools.cache
def beside(extension: str | None) -> Cublas | None:
    """The cuBLAS that CuPy's ``extension``, the path of its module, is linked to; None where it cannot be reached.

    Looking a name up in a loaded library looks in those that it was linked to as well, but for Windows.
    """
    if extension is None:
        return None
    try:
        return Cublas(ctypes.CDLL(extension))
    except (OSError, AttributeError):
        return None
