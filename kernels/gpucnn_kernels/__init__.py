"""CUDA kernels for convolutional networks, for any project: functions on arrays, no model classes.

Every function takes device arrays (CuPy, PyTorch, JAX, Numba: anything with ``__cuda_array_interface__`` or
DLPack), keyword arguments, ``out=`` and ``stream=``, and answers in the kind of its first argument. Importing this
package loads neither CuPy nor a compiler; a kernel compiles when it is first used. With
``GPUCNN_KERNELS_RUNTIME=host`` the same kernels run on NumPy arrays without a GPU, for tests.

A stream is CuPy's, PyTorch's, Numba's, whatever has ``__cuda_stream__``, or an address; without one, work goes to
PyTorch's current stream where the first argument is PyTorch's, else to CuPy's. Nothing waits for it, with two
exceptions: functions that answer with a Python number or look at their labels, and calls with JAX arrays, whose
memory JAX makes and reuses in an order of its own.

This package never imports ``gpucnn``; ``gpucnn`` imports it.
"""

from __future__ import annotations

import importlib
from typing import Any

from gpucnn_kernels.errors import (
    ArgumentError,
    CompileError,
    DeviceError,
    DtypeError,
    KernelError,
    LayoutError,
)
from gpucnn_kernels.problem import Conv2dProblem, Pool2dProblem, ProblemError

_MODULES = {
    "activations": [
        f"{name}_{direction}"
        for name in ("gelu", "leaky_relu", "relu", "relu6", "sigmoid", "silu", "tanh")
        for direction in ("forward", "backward")
    ],
    "conv2d": [
        "conv2d_algorithms",
        "conv2d_backward_bias",
        "conv2d_backward_data",
        "conv2d_backward_filter",
        "conv2d_choose",
        "conv2d_forward",
    ],
    "conv2d_max_pool": ["conv2d_max_pool2d_forward", "conv2d_max_pool2d_pays"],
    "conv_transpose2d": [
        "conv_transpose2d_backward_data",
        "conv_transpose2d_backward_filter",
        "conv_transpose2d_forward",
    ],
    "columns": ["col2im", "im2col"],
    "pooling": [
        f"{name}_{direction}"
        for name in ("adaptive_avg_pool2d", "avg_pool2d", "max_pool2d")
        for direction in ("forward", "backward")
    ],
    "normalization": [
        "batch_norm_backward",
        "batch_norm_forward",
        "batch_norm_inference",
        "batch_norm_inference_backward",
    ],
    "softmax": ["softmax_backward", "softmax_forward"],
    "losses": [
        f"{name}_{direction}"
        for name in ("binary_cross_entropy_with_logits", "mean_squared_error", "softmax_cross_entropy")
        for direction in ("forward", "backward")
    ],
    "dropout": ["dropout_backward", "dropout_forward"],
    "linear": [
        "linear_backward",
        "linear_backward_bias",
        "linear_backward_data",
        "linear_backward_weight",
        "linear_forward",
    ],
    "optimizer_step": ["adam_step", "clip_by_norm", "rmsprop_step", "scale", "sgd_step", "sum_of_squares"],
    "augmentation": ["augment_images"],
    "images": ["images_to_float"],
    "layout": ["to_channels_last", "to_contiguous"],
    "catalog": ["warm_up"],
    "tuning": ["autotune"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "ArgumentError",
    "CompileError",
    "Conv2dProblem",
    "DeviceError",
    "DtypeError",
    "KernelError",
    "LayoutError",
    "Pool2dProblem",
    "ProblemError",
    *sorted(_HOME),
]


def __getattr__(name: str) -> Any:
    """Load a function's module when the function is first asked for (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'gpucnn_kernels' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"gpucnn_kernels.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
