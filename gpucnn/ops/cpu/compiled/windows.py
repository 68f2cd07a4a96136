"""Windows over planes, as the compiled loops take them."""

from __future__ import annotations

from functools import lru_cache

import numpy
from numpy.typing import NDArray

from gpucnn_kernels.problem import Conv2dProblem, Pool2dProblem


@lru_cache(maxsize=256)  # a network has the same few again and again
def windows(problem: Conv2dProblem | Pool2dProblem) -> NDArray[numpy.int64]:
    """The ``Windows`` of source/windows.h: sizes, strides, padding before the image and dilation, in its order."""
    channels = problem.C
    outputs = problem.K if isinstance(problem, Conv2dProblem) else channels
    top, left = problem.padding[0], problem.padding[2 if len(problem.padding) == 4 else 1]
    made = numpy.array(
        [
            problem.N,
            channels,
            outputs // channels if channels else 1,
            problem.H,
            problem.W,
            problem.P,
            problem.Q,
            problem.R,
            problem.S,
            *problem.stride,
            top,
            left,
            *problem.dilation,
        ],
        numpy.int64,
    )
    made.flags.writeable = False
    return made
