"""The paths of a forward convolution, each a function that fills y; the module ``conv2d`` checks and chooses.

:func:`implicit_gemm` also makes the input gradient, which is the same sum with other steps: see cuda/conv2d.cuh.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from gpucnn_kernels.activations import FUNCTIONS
from gpucnn_kernels.arrays import DeviceArray, image_layout
from gpucnn_kernels.columns import columns_shape, images, launch_im2col
from gpucnn_kernels.conv2d_tiles import implicit_tile
from gpucnn_kernels.depthwise_forms import form_of, usual_suffix
from gpucnn_kernels.errors import ArgumentError
from gpucnn_kernels.launch import THREADS, Call, blocks_for
from gpucnn_kernels.matmul import matmul
from gpucnn_kernels.problem import Conv2dProblem
from gpucnn_kernels.runtime import itemsize
from gpucnn_kernels.source import SCALARS

SOURCES: dict[str, tuple[dict[str, str], ...]] = {
    "conv2d_implicit_gemm": ({},),
    "conv2d_depthwise": ({},),
    "conv2d_epilogue": ({},),
}

WORKSPACE_BYTES = 1 << 28
"""Columns are made for so many images at a time that they take no more than this, but at least for one."""

_MOST_UNITS = 65535  # blocks along y and z
_SLIDING_THREADS = 128
_RUN, _SHORT_RUN = 28, 4  # rows of a depthwise kernel's thread
_ENOUGH_THREADS = 1 << 17  # of long runs, to keep a GPU of some hundred multiprocessors busy


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What happens to a sum before it is stored: activation(scale * sum + bias + residual).

    scale and bias are (K,), the residual lies as the output does; each is left out where it is None.
    """

    bias: DeviceArray | None = None
    activation: str = "identity"
    negative_slope: float = 0.01
    scale: DeviceArray | None = None
    residual: DeviceArray | None = None

    def __post_init__(self) -> None:
        if self.activation not in FUNCTIONS:
            raise ArgumentError(f"activation must be one of {', '.join(FUNCTIONS)}, got {self.activation!r}")

    @property
    def nothing(self) -> bool:
        """Whether the sum stays as it is."""
        return self.activation == "identity" and not any(term is not None for term in self.terms.values())

    @property
    def terms(self) -> dict[str, Any]:
        """The arrays, by the kernels' names for them."""
        return {"scale": self.scale, "bias": self.bias, "residual": self.residual}

    def of_images(self, first: int, last: int) -> Epilogue:
        """The epilogue of a part of the batch."""
        if self.residual is None:
            return self
        return dataclasses.replace(self, residual=images(self.residual, first, last))

    def apart_from(self, call: Call, output: DeviceArray) -> Epilogue:
        """The same, its residual a copy where that is ``output`` itself: for what writes before it has read."""
        residual = self.residual
        if residual is None or residual.address != output.address or residual.size == 0:
            return self
        copy = call.empty(residual.shape, residual.dtype, like=residual, name=residual.name)
        copy.array[...] = residual.array
        return dataclasses.replace(self, residual=copy)

    @property
    def fields(self) -> dict[str, Any]:
        """As the kernels' struct."""
        return {"function": FUNCTIONS[self.activation], "negative_slope": self.negative_slope}


# ---------------------------------------------------------------- the kernels' structs


def strides(array: DeviceArray) -> dict[str, int]:
    """The strides of an image, or of a filter as N C H W.

    An axis of length 1 may have any. Here it has what the layout gives it, as kernels tell by the strides of
    channels and columns which of the two is the inner one: an image of one column is no exception.
    """
    found = array.strides
    if 1 in array.shape:
        _, c, h, w = array.shape
        last = array.channels_last and c > 1
        found = (h * w * c, 1, w * c, c) if last else (c * h * w, h * w, w, 1)
    return dict(zip("nchw", found, strict=True))


def channel_counts(problem: Conv2dProblem, transposed: bool) -> dict[str, int]:
    """The kernels' struct Channels."""
    outputs, depth = problem.K // problem.groups, problem.C // problem.groups
    if transposed:
        outputs, depth = depth, outputs
    return {"images": problem.N, "groups": problem.groups, "output": outputs, "source": depth}


def filter_strides(weight: DeviceArray, problem: Conv2dProblem, transposed: bool) -> dict[str, int]:
    """The kernels' struct FilterStrides."""
    k, c, r, s = weight.strides
    output, source = (c, k) if transposed else (k, c)
    return {"output": output, "source": source, "r": r, "s": s, "group": problem.K // problem.groups * k}


def axes(problem: Conv2dProblem, transposed: bool) -> tuple[dict[str, int], dict[str, int]]:
    """The kernels' structs Axis: the vertical and the horizontal one."""
    made = []
    for axis in (0, 1):
        lengths = (problem.P, problem.Q)[axis], (problem.H, problem.W)[axis]
        output, source = reversed(lengths) if transposed else lengths
        stride, dilation = problem.stride[axis], problem.dilation[axis]
        common = math.gcd(stride, dilation)
        made.append(
            {
                "output": output,
                "source": source,
                "kernel": (problem.R, problem.S)[axis],
                "stride": stride,
                "dilation": dilation,
                "pad": problem.padding[2 * axis],
                "common": common,
                "inverse": pow(dilation // common, -1, stride // common),
            }
        )
    return made[0], made[1]


def stride_phases(problem: Conv2dProblem, transposed: bool) -> tuple[int, int]:
    """(how many phases of the stride hold any row and column, the positions of the largest over the batch)."""
    if not transposed:
        return 1, problem.N * problem.P * problem.Q
    down, across = problem.stride
    positions = problem.N * -(-problem.H // down) * -(-problem.W // across)
    return min(down, problem.H) * min(across, problem.W), positions


def terms(problem: Conv2dProblem, transposed: bool, chunk: int = 1) -> float:
    """Of a sum, the mean over the stride phases, with source channels rounded up to ``chunk``."""
    if not transposed:
        return -(-problem.C // problem.groups // chunk) * chunk * problem.R * problem.S
    phases = min(problem.stride[0], problem.H) * min(problem.stride[1], problem.W)
    return -(-problem.K // problem.groups // chunk) * chunk * problem.R * problem.S / phases


def product_arguments(
    problem: Conv2dProblem, output: DeviceArray, epilogue: Epilogue, transposed: bool, chunk: int = 1
) -> dict[str, Any]:
    """What every implicit matrix product is told beside its factors, source channels rounded up to ``chunk``."""
    channels, (vertical, horizontal) = channel_counts(problem, transposed), axes(problem, transposed)
    return {
        **epilogue.terms,
        "output": output,
        "output_strides": strides(output),
        "channels": {**channels, "source": -(-channels["source"] // chunk) * chunk},
        "vertical": vertical,
        "horizontal": horizontal,
        "transposed": int(transposed),
        "epilogue": epilogue.fields,
    }


# ---------------------------------------------------------------- the paths


def implicit_gemm(
    call: Call,
    problem: Conv2dProblem,
    source: DeviceArray,
    weight: DeviceArray,
    output: DeviceArray,
    epilogue: Epilogue,
    *,
    transposed: bool = False,
) -> None:
    """Fill ``output``, y from x or (``transposed``) dx from dy: tiles through shared memory, one launch."""
    channels = channel_counts(problem, transposed)
    phases, positions = stride_phases(problem, transposed)
    units = phases * problem.groups
    depth = terms(problem, transposed)
    tile = implicit_tile(call.gpu, source.dtype, channels["output"], positions, units, depth)
    for first in range(0, units, _MOST_UNITS):
        call.launch(
            "conv2d_implicit_gemm",
            tile.name,
            (
                -(-positions // tile.positions),
                -(-channels["output"] // tile.channels),
                min(units - first, _MOST_UNITS),
            ),
            32 * tile.warps,
            scalar=source.dtype,
            input=source,
            input_strides=strides(source),
            filter=weight,
            filter_strides=filter_strides(weight, problem, transposed),
            **product_arguments(problem, output, epilogue, transposed),
            first_unit=first,
        )


def depthwise(
    call: Call,
    problem: Conv2dProblem,
    source: DeviceArray,
    weight: DeviceArray,
    output: DeviceArray,
    epilogue: Epilogue,
    *,
    transposed: bool = False,
) -> None:
    """Fill ``output``, y from x or (``transposed``) dx from dy, where each input channel is a group of its own."""
    vertical, horizontal = axes(problem, transposed)
    kernel, threads = "conv2d_depthwise", THREADS
    blocks: tuple[int, ...] = (blocks_for(output.size),)
    more: dict[str, Any] = {"count": output.size}
    if depthwise_slides(problem, transposed) and problem.C * horizontal["output"] < 1 << 31:
        left = problem.S - 1 - problem.padding[2] if transposed else problem.padding[2]
        form = form_of(problem, left, source, output, epilogue.residual)
        kernel = f"conv2d_depthwise_{problem.R}x{problem.S}_stride_{problem.stride[0]}{form.suffix}"
        threads = _SLIDING_THREADS
        lines = problem.C // form.channels * -(-horizontal["output"] // form.columns)
        run = _RUN if problem.N * lines * vertical["output"] >= _RUN * _ENOUGH_THREADS else _SHORT_RUN
        run = max(run, -(-vertical["output"] // _MOST_UNITS))
        blocks = (-(-lines // threads), -(-vertical["output"] // run), min(problem.N, _MOST_UNITS))
        more = {"run": run}
    call.launch(
        "conv2d_depthwise",
        kernel,
        blocks,
        threads,
        scalar=source.dtype,
        input=source,
        input_strides=strides(source),
        filter=weight,
        filter_strides=filter_strides(weight, problem, transposed),
        **epilogue.terms,
        output=output,
        output_strides=strides(output),
        channels=channel_counts(problem, transposed),
        vertical=vertical,
        horizontal=horizontal,
        transposed=int(transposed),
        epilogue=epilogue.fields,
        **more,
    )


def depthwise_slides(problem: Conv2dProblem, transposed: bool) -> bool:
    """Whether a depthwise problem has a kernel of its own, whose threads make runs of numbers below each other."""
    return (
        problem.K == problem.C
        and (problem.R, problem.S) in ((3, 3), (5, 5))
        and problem.dilation == (1, 1)
        and (problem.stride == (1, 1) or (problem.stride == (2, 2) and not transposed))
    )


_INSTRUCTIONS = {
    (3, 1): {"_columns": 21, "_channels": 25, "": 39},
    (3, 2): {"_columns": 31, "_channels": 39, "": 71},
    (5, 1): {"_columns": 47, "": 63},
    (5, 2): {"_columns": 57, "": 97},
}
"""Of a depthwise kernel's loop for each output, as compiled for sm_90 and without an epilogue, by kernel size and
stride: the more of float32's and bfloat16's."""
_START = 450  # instructions that a thread's run begins with


def depthwise_instructions(problem: Conv2dProblem, transposed: bool, channels_last: bool) -> float:
    """For each output of a depthwise kernel that slides, where images begin on boundaries of packs."""
    left = problem.S - 1 - problem.padding[2] if transposed else problem.padding[2]
    suffix = usual_suffix(problem, left, channels_last)
    rows = min(problem.H if transposed else problem.P, _RUN)
    return _INSTRUCTIONS[problem.S, problem.stride[0]][suffix] + _START / (4 * rows)


def im2col(
    call: Call,
    problem: Conv2dProblem,
    x: DeviceArray,
    weight: DeviceArray,
    y: DeviceArray,
    epilogue: Epilogue,
) -> None:
    """Fill y by a matrix product of cuBLAS (on the host NumPy's), with the windows of x as columns.

    A 1x1 kernel at stride 1 without padding needs no columns: x itself is the matrix. 16-bit sums stay in a
    float32 workspace until the epilogue is done, so that they are rounded once.
    """
    wide = SCALARS[y.dtype][1]
    pointwise, matrix = is_pointwise(problem), filter_matrix(call, weight)
    depth = matrix.shape[1]
    outputs = problem.K // problem.groups
    for first, last in batches(problem, x.dtype, pointwise):
        part_x, part_y = images(x, first, last), images(y, first, last)
        if pointwise:
            columns = as_matrices(part_x)
        else:
            workspace = call.empty((last - first, *columns_shape(problem)[1:]), x.dtype)
            launch_im2col(call, part_x, workspace, problem)
            columns = workspace.array
        apart = wide != y.dtype and not epilogue.nothing
        sums = call.empty(part_y.shape, wide, like=part_y) if apart else part_y
        products = as_matrices(sums)
        for group in range(problem.groups):
            k, c = slice(group * outputs, (group + 1) * outputs), slice(group * depth, (group + 1) * depth)
            matmul(matrix[k][None], columns[:, c], out=products[:, k])
        finish(call, part_y, epilogue.of_images(first, last), sums if apart else None)


def finish(call: Call, y: DeviceArray, epilogue: Epilogue, wide: DeviceArray | None = None) -> None:
    """The epilogue of y in place, or from ``wide``, laid out as y in its computing dtype, into y."""
    if epilogue.nothing and wide is None:
        return
    run = y.shape[2] * y.shape[3] if image_layout(y) == "contiguous" else 1
    call.launch(
        "conv2d_epilogue",
        "conv2d_finish",
        blocks_for(y.size, per_thread=16 // itemsize(y.dtype)),
        scalar=y.dtype,
        wide=wide,
        y=y,
        **epilogue.terms,
        channels=y.shape[1],
        run=run,
        count=y.size,
        epilogue=epilogue.fields,
    )


# ---------------------------------------------------------------- matrices


def is_pointwise(problem: Conv2dProblem) -> bool:
    """Whether every output pixel sees the one input pixel at its own place."""
    return (problem.R, problem.S, problem.stride, problem.padding) == (1, 1, (1, 1), (0, 0, 0, 0))


def batches(problem: Conv2dProblem, dtype: str, pointwise: bool) -> list[tuple[int, int]]:
    """(first, last) images to be done together: all of them, or as many as the columns' workspace may hold."""
    _, rows, positions = columns_shape(problem)
    most = problem.N if pointwise else max(1, WORKSPACE_BYTES // (rows * positions * itemsize(dtype)))
    return [(first, min(first + most, problem.N)) for first in range(0, problem.N, most)] if problem.N else []


def filter_matrix(call: Call, weight: DeviceArray) -> Any:
    """The filter as a matrix (K, C / groups * R * S), its columns in im2col's order: a view, or else a copy."""
    if not weight.contiguous:
        packed = call.empty(weight.shape, weight.dtype)
        packed.array[...] = weight.array
        weight = packed
    return weight.array.reshape(weight.shape[0], -1)


def as_matrices(image: DeviceArray) -> Any:
    """(N, C, H, W) in either layout as N matrices (C, H * W): a view."""
    n, c, h, w = image.shape
    if image.contiguous:
        return image.array.reshape(n, c, h * w)
    return image.array.transpose(0, 2, 3, 1).reshape(n, h * w, c).transpose(0, 2, 1)
