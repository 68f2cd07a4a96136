"""The one list of convolutions that every algorithm, layer and kernel is tested on.

``SMALL`` have few enough products for oracles written as plain loops (tests/oracles); ``LARGE`` do not, and are
there to reach the blocks, threads and remainders that small ones never fill.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy
from numpy.typing import DTypeLike, NDArray

from gpucnn.ops.cpu import compiled
from gpucnn_kernels import conv2d_filter_direct
from gpucnn_kernels.problem import Conv2dProblem
from tests.oracles.convolution import Geometry


def _problem(
    input_shape: tuple[int, int, int, int], outputs: int, kernel: tuple[int, int], **parameters: Any
) -> Conv2dProblem:
    depth = input_shape[1] // parameters.get("groups", 1)
    return Conv2dProblem.from_shapes(input_shape, (outputs, depth, *kernel), **parameters)


SMALL: dict[str, Conv2dProblem] = {
    # tiny
    "one-number": _problem((1, 1, 1, 1), 1, (1, 1)),
    "one-pixel-many-channels": _problem((2, 5, 1, 1), 3, (1, 1)),
    "one-row": _problem((2, 2, 1, 9), 3, (1, 3), padding=(0, 1)),
    "one-column": _problem((2, 2, 9, 1), 3, (3, 1), padding=(1, 0)),
    # plain
    "k3": _problem((2, 3, 6, 7), 4, (3, 3)),
    "k3-same": _problem((3, 2, 7, 5), 3, (3, 3), padding="same"),
    "k5-same": _problem((1, 2, 8, 8), 2, (5, 5), padding=2),
    "k2-same": _problem((2, 2, 5, 6), 3, (2, 2), padding="same"),
    "k4": _problem((1, 3, 7, 6), 2, (4, 4), padding=1),
    "rectangular-2x5": _problem((2, 2, 6, 9), 3, (2, 5), padding=(1, 2)),
    "rectangular-3x1": _problem((2, 3, 6, 5), 2, (3, 1)),
    "kernel-is-image": _problem((3, 2, 4, 5), 3, (4, 5)),
    "kernel-is-padded-image": _problem((2, 1, 3, 2), 2, (5, 4), padding=1),
    # 1x1
    "k1": _problem((2, 5, 4, 6), 3, (1, 1)),
    "k1-strided": _problem((2, 3, 5, 6), 4, (1, 1), stride=2),
    "k1-padded": _problem((2, 3, 3, 4), 2, (1, 1), padding=1),
    "k1-grouped": _problem((2, 4, 3, 5), 6, (1, 1), groups=2),
    # strided
    "k3-s2": _problem((2, 3, 9, 9), 4, (3, 3), stride=2),
    "k3-s2-same-size": _problem((2, 3, 8, 8), 4, (3, 3), stride=2, padding=1),
    "k3-s2-rows-left-over": _problem((2, 2, 8, 10), 3, (3, 3), stride=2),
    "k2-s3-gaps": _problem((1, 2, 9, 10), 3, (2, 2), stride=3),
    "k4-s2": _problem((2, 2, 8, 6), 2, (4, 4), stride=2, padding=1),
    "stride-1x3": _problem((1, 3, 5, 11), 2, (3, 3), stride=(1, 3), padding=1),
    "stride-larger-than-image": _problem((2, 2, 3, 3), 2, (2, 2), stride=5),
    # dilated
    "k3-d2": _problem((1, 2, 9, 8), 3, (3, 3), dilation=2, padding=2),
    "k3-d2-s2": _problem((2, 2, 9, 11), 2, (3, 3), dilation=2, stride=2, padding=1),
    "k2-d3x1-s2x3": _problem((1, 2, 8, 8), 2, (2, 3), dilation=(3, 1), stride=(2, 3), padding=(2, 1)),
    "dilation-equals-stride-3": _problem((1, 2, 10, 10), 2, (3, 2), dilation=3, stride=3, padding=2),
    # asymmetric padding
    "padding-0-1-2-3": _problem((2, 2, 5, 5), 2, (3, 3), padding=(0, 1, 2, 3)),
    "padding-right-only-s2": _problem((1, 3, 6, 6), 2, (3, 3), stride=2, padding=(0, 1, 0, 1)),
    "padding-beyond-kernel": _problem((2, 2, 3, 4), 2, (2, 3), padding=(3, 2, 4, 5)),
    "padding-beyond-kernel-s3": _problem((1, 2, 4, 4), 3, (2, 2), stride=3, padding=(5, 2, 4, 3)),
    # grouped
    "groups-2": _problem((2, 4, 6, 5), 6, (3, 3), padding=1, groups=2),
    "groups-3-s2": _problem((1, 6, 7, 7), 3, (3, 3), stride=2, padding=1, groups=3),
    "groups-2-d2": _problem((1, 4, 7, 8), 2, (2, 3), dilation=2, groups=2),
    "depthwise": _problem((2, 4, 6, 6), 4, (3, 3), padding=1, groups=4),
    "depthwise-s2": _problem((2, 3, 9, 7), 3, (3, 3), stride=2, padding=1, groups=3),
    "depthwise-multiplier-2": _problem((2, 3, 5, 6), 6, (3, 2), padding=(1, 0), groups=3),
    "depthwise-d2": _problem((1, 3, 8, 8), 3, (3, 3), dilation=2, padding=2, groups=3),
    # from the seed articles
    "article-5x5-k3-s2": _problem((1, 2, 5, 5), 1, (3, 3), stride=2),
    "article-one-dimensional": _problem((1, 1, 1, 5), 1, (1, 3)),
    "article-4x4-k2": _problem((1, 1, 4, 4), 1, (2, 2)),
    "article-4x4x3-k2": _problem((1, 3, 4, 4), 1, (2, 2)),
}

LARGE: dict[str, Conv2dProblem] = {
    "lenet-1": _problem((9, 1, 28, 28), 6, (5, 5), padding=2),
    "lenet-2": _problem((9, 6, 14, 14), 16, (5, 5)),
    "animalnet-1": _problem((2, 3, 64, 64), 16, (3, 3), stride=2),
    "animalnet-2": _problem((3, 16, 25, 25), 32, (3, 3), stride=2),
    "resnet-stem": _problem((2, 3, 56, 56), 8, (7, 7), stride=2, padding=3),
    "resnet-block": _problem((3, 16, 20, 20), 16, (3, 3), padding=1),
    "resnet-down": _problem((3, 16, 15, 15), 24, (3, 3), stride=2, padding=1),
    "resnet-shortcut": _problem((3, 16, 16, 16), 32, (1, 1), stride=2),
    "resnet-last": _problem((13, 24, 7, 7), 24, (3, 3), padding=1),
    "bottleneck": _problem((2, 64, 24, 24), 16, (1, 1)),
    "mobilenet-depthwise": _problem((2, 32, 28, 28), 32, (3, 3), padding=1, groups=32),
    "resnext-block": _problem((2, 32, 15, 15), 32, (3, 3), padding=1, groups=4),
    "dilated-block": _problem((2, 8, 33, 31), 12, (3, 3), padding=4, dilation=4),
    "one-tall-image": _problem((1, 8, 301, 12), 8, (3, 3), padding=1),
    "many-images": _problem((10, 8, 36, 36), 8, (3, 3), padding=1),
    "wide-rows": _problem((1, 2, 6, 900), 4, (3, 3), padding=1),
}

ALL = SMALL | LARGE


def parameters(problems: dict[str, Conv2dProblem]) -> list[Any]:
    """The problems as pytest parameters, with their names as ids."""
    import pytest  # here, so that the list itself can be read where pytest is not installed

    return [pytest.param(problem, id=name) for name, problem in problems.items()]


def geometry(problem: Conv2dProblem) -> Geometry:
    """The problem as the oracles take it."""
    return Geometry(problem.stride, problem.padding, problem.dilation, problem.groups)


def options(problem: Conv2dProblem) -> dict[str, Any]:
    """The problem as keyword arguments of the operations."""
    return {
        "stride": problem.stride,
        "padding": problem.padding,
        "dilation": problem.dilation,
        "groups": problem.groups,
    }


def can_do(
    algorithm: str, direction: str, problem: Conv2dProblem, backend: str, dtype: DTypeLike = numpy.float64
) -> bool:
    """Whether the algorithm of ``backend`` ("cpu", "numpy", "cuda") can do this direction of the problem."""
    if algorithm == "depthwise":
        return problem.groups == problem.C
    if algorithm == "direct":
        if backend == "cuda" and direction == "backward_filter":
            return conv2d_filter_direct.takes(problem, numpy.dtype(dtype).name)
        if backend == "cuda":
            return problem.C // problem.groups <= 8
        return backend == "cpu" and numpy.dtype(dtype).itemsize < 8 and compiled.available()
    if algorithm == "winograd":
        kernel, settings = (problem.R, problem.S), (*problem.stride, *problem.dilation, problem.groups)
        limit = direction != "backward_data" or max(problem.padding) < problem.R
        return kernel in ((3, 3), (5, 5)) and settings == (1, 1, 1, 1, 1) and limit
    return True


def arrays(
    problem: Conv2dProblem, dtype: DTypeLike = numpy.float64
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """(x, weight, bias, dy) for the problem: standard normal numbers, always the same for the same problem."""
    generator = numpy.random.default_rng(zlib.crc32(repr(problem).encode()))
    shapes = (problem.input_shape, problem.weight_shape, (problem.K,), problem.output_shape)
    x, weight, bias, dy = (generator.standard_normal(shape).astype(dtype) for shape in shapes)
    return x, weight, bias, dy
