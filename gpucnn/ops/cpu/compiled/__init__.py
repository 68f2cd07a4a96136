"""The CPU's hot loops in C++, compiled when first used; NumPy does their work where they cannot be.

NumPy makes one trip through memory for each of its calls, and has no call for a depthwise convolution, a pooling
window or an erf; threads that share Python's interpreter wait for one another between short calls. So what costs
time in training is here a second time: float32, in C order, one call an operation, spread over threads inside it.
The modules beside this one call these loops where :func:`usable` says so; everything else (other dtypes, other
layouts, a machine without a compiler) goes the NumPy way, which is the reference for them.

The sources in ``source/`` are compiled for this processor by the machine's C++ compiler (``$CXX``, g++ or clang++)
and kept in the folder that also keeps the host runtime's kernels. ``GPUCNN_COMPILED=0`` does without them;
``GPUCNN_COMPILED=1`` makes it an error where they cannot be had. The two ways differ by rounding; each gives
the same bits on every call, with any number of threads.
"""

from gpucnn.ops.cpu.compiled.library import Function, available, function, switched, usable, why_not

__all__ = ["Function", "available", "function", "switched", "usable", "why_not"]
