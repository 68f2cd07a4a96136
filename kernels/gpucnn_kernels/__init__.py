"""The shapes, and later the CUDA kernels, of gpucnn's operations: importable without a GPU or a compiler.

This package never imports ``gpucnn``; ``gpucnn`` imports it.
"""

from gpucnn_kernels.problem import Conv2dProblem, Pool2dProblem, ProblemError

__all__ = ["Conv2dProblem", "Pool2dProblem", "ProblemError"]
