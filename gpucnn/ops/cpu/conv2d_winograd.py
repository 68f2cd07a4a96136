"""Winograd's convolution: 36 products for 16 outputs of a 3x3 kernel, where the plain sum takes 144.

Lavin and Gray, "Fast algorithms for convolutional neural networks", 2016. The image is cut into tiles of 4x4
outputs, which read 6x6 inputs: F(4x4, 3x3). With the matrices B (6x6), G (6x3) and A (4x6), a tile's output is

    Y = A [ (G w G^T) * (B d B^T) ] A^T          * element by element, summed over the input channels

The sum over channels makes each of the 36 elements a matrix product of its own, (K, C) @ (C, tiles):

    forward          M[e] = U[e] (K, C) @ V[e] (C, T)      U = G w G^T,  V = B d B^T
    filter gradient  U'[e] = Z[e] (K, T) @ V[e] (T, C)     Z = A^T dy A, dw = G^T U' G: the adjoint
    input gradient   forward, of dy, with the kernel rotated by 180 degrees and its channels exchanged

F(2x2, 5x5) has 6x6 inputs too, and differs in the sizes of G and A alone: 36 products for 4 outputs, where the
plain sum takes 100.

float32 takes the compiled loops (:mod:`gpucnn.ops.cpu.compiled.winograd`) where there are such, which evaluate at
the same points; what follows here is the NumPy way.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from typing import Any

import numpy
from numpy.typing import DTypeLike, NDArray

from gpucnn.ops.cpu import compiled, conv2d_winograd_wide
from gpucnn.ops.cpu.blocks import ranges
from gpucnn.ops.cpu.compiled import winograd as compiled_winograd
from gpucnn.ops.cpu.conv2d_blocks import SMALL_FLOPS, Block, runs
from gpucnn.ops.cpu.conv2d_winograd_tiles import INPUT, OUTPUTS, filter_transform, place, tiles_of, transforms
from gpucnn.ops.cpu.threads import parallel_for, scratch
from gpucnn_kernels.problem import Conv2dProblem

# By measurement, on 2 MiB of second-level cache: fewer tiles make small products, more leave the cache.
_TILES = 160
# For each size of the kernel: the geometric mean of inputs and outputs from which it is faster than the plain sum.
_CHANNELS = {3: 44, 5: 90}
_LEAST_TILES = 48
_COMPILED_CHANNELS = 16  # the same for the compiled loops


def is_possible(direction: str, problem: Conv2dProblem) -> bool:
    """Whether the algorithm can do this problem: a 3x3 or 5x5 kernel at stride 1 without dilation, one group.

    The input gradient also needs padding of at most 2 or 4, or it would be a convolution of a part of dy.
    """
    return (
        problem.R == problem.S in OUTPUTS
        and problem.stride == (1, 1)
        and problem.dilation == (1, 1)
        and problem.groups == 1
        and (direction != "backward_data" or max(problem.padding) < problem.R)
    )


def is_wanted() -> bool:
    """Whether ``GPUCNN_WINOGRAD`` leaves it on."""
    return os.environ.get("GPUCNN_WINOGRAD") != "0"


def pays(direction: str, problem: Conv2dProblem, dtype: DTypeLike) -> bool:
    """Whether "auto" takes it: where it is possible, faster, and its rounding is welcome.

    float64 is asked for when digits count, so it is always summed plainly; ``GPUCNN_WINOGRAD=0`` sums float32
    plainly too.
    """
    if not is_possible(direction, problem) or numpy.dtype(dtype).itemsize > 4:
        return False
    if not is_wanted():
        return False
    return (_pays_compiled if compiled.available() else _pays_on_numpy)(direction, problem)


def _tiles(direction: str, problem: Conv2dProblem) -> tuple[int, float]:
    """(tiles, outputs they have room for over outputs there are)."""
    height, width = (problem.H, problem.W) if direction == "backward_data" else (problem.P, problem.Q)
    size = OUTPUTS[problem.R]
    tiles = -(-height // size) * -(-width // size)
    return max(problem.N, 1) * tiles, tiles * size * size / (height * width)


def _pays_compiled(direction: str, problem: Conv2dProblem) -> bool:
    """Where there are compiled loops, by measurement against "direct".

    Time over that of "direct" (forward, input gradient, filter gradient; one thread):

    ====================  ================  ====================  ================
    layer                                   layer
    ====================  ================  ====================  ================
    16->16 k3 56x56 N16   0.65  0.63  0.57  16->16 k5 56x56 N16   0.82  0.77  0.76
    32->32 k3 56x56 N16   0.51  0.52  0.43  32->32 k5 28x28 N16   0.56  0.61  0.50
    64->64 k3 56x56 N16   0.43  0.42  0.36  64->64 k5 28x28 N16   0.51  0.53  0.41
    16->32 k3 14x14 N64   0.60  0.61  0.64  64->64 k3 7x7 N1      0.54  0.58  0.47
    24->24 k3 28x28 N64   0.70  0.69  0.68  3->64 k3 224x224 N4   1.21  1.27  1.68
    ====================  ================  ====================  ================

    Products are made six tiles and 16 outputs at a time, so what is missing there is done for nothing.
    """
    tiles, waste = _tiles(direction, problem)
    outputs = problem.C if direction == "backward_data" else problem.K
    waste *= -(-tiles // 6) * 6 / tiles * (-(-outputs // 16) * 16 / outputs)
    return math.sqrt(problem.C * problem.K) >= _COMPILED_CHANNELS * waste**2


def _pays_on_numpy(direction: str, problem: Conv2dProblem) -> bool:
    """Without compiled loops, by measurement against the plain sum (time over "rows", forward, one thread).

    ========  =====  =====  =====  =====  ============
    channels  56x56  28x28  14x14  7x7    28x28, N = 1
    ========  =====  =====  =====  =====  ============
    32        1.06   1.07   1.39   1.12   1.41
    64        0.74   0.82   1.05   0.97   1.02
    128       0.61   0.69   0.79   0.80   0.75
    256       0.59   0.68   0.84   0.75   0.74
    ========  =====  =====  =====  =====  ============

    Transforming tiles costs the same for any number of channels, and tiles that reach over the edge are done for
    nothing. 5x5 kernels gain less, for their tiles have fewer outputs: of 64->192 on 27x27, 50 ms in place of 57
    forward, 67 for 66 and 54 for 62 backward; of 128->128 on 28x28, 44 for 51, 46 for 53 and 49 for 47. So they
    take it forward only.
    """
    if problem.R == 5 and direction != "forward":
        return False
    tiles, waste = _tiles(direction, problem)
    wide = math.sqrt(problem.C * problem.K) >= _CHANNELS[problem.R] * waste**2
    return wide and tiles >= _LEAST_TILES


def _blocks(problem: Conv2dProblem, tiles: int) -> list[Block]:
    """The tiles in blocks of about ``tiles``: rows of tiles of one image, or whole images. Rows count in tiles."""
    size = OUTPUTS[problem.R]
    high, wide = -(-problem.P // size), -(-problem.Q // size)
    if 2 * high * wide <= 3 * tiles:
        count = max(1, min(problem.N, tiles // (high * wide)))
        return [Block(n, min(n + count, problem.N), 0, high) for n in range(0, problem.N, count)]
    rows = -(-high // -(-high // max(1, tiles // wide)))  # of equal height
    return [Block(n, n + 1, top, min(top + rows, high)) for n in range(problem.N) for top in range(0, high, rows)]


_CHUNK = 1 << 14  # filters (of one input and one output channel) that a task transforms


def _over_filters(shape: tuple[int, ...], function: Callable[[slice], None]) -> None:
    """Call ``function`` with parts of the first axis of a weight's ``shape``, spread over the threads.

    (A product outside the pool would be spread over BLAS's own threads, which then wait for more by spinning, for
    longer than a convolution takes, on the cores that ours need.)
    """
    parts = ranges(shape[0], max(1, _CHUNK // shape[1]))
    parallel_for(len(parts), lambda task: function(parts[task]))


def _transformed_filters(weight: NDArray[Any], turned: bool) -> NDArray[Any]:
    """U (36, K, C); where ``turned``, of the kernels rotated by 180 degrees, inputs and outputs exchanged."""
    k, c, size, _ = weight.shape
    of_filter = filter_transform(size, weight.dtype, turned)
    filters = numpy.empty((INPUT * INPUT, k, c), weight.dtype)

    def transform(part: slice) -> None:
        kernels = weight[part].reshape(-1, size * size)
        columns = slice(part.start * c, part.stop * c)
        numpy.matmul(of_filter, kernels.T, out=filters.reshape(INPUT * INPUT, -1)[:, columns])

    _over_filters(weight.shape, transform)
    return filters.transpose(0, 2, 1) if turned else filters


def forward(
    problem: Conv2dProblem, x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any] | None, out: NDArray[Any]
) -> None:
    """Y (N, K, P, Q) into ``out``, which may have any strides."""
    _convolve(problem, x, weight, bias, out, turned=False)


def _convolve(
    problem: Conv2dProblem,
    x: NDArray[Any],
    weight: NDArray[Any],
    bias: NDArray[Any] | None,
    out: NDArray[Any],
    *,
    turned: bool,
) -> None:
    if x.dtype == numpy.float32 and compiled.usable(weight, bias, out):
        compiled_winograd.convolve(problem, numpy.ascontiguousarray(x), weight, bias, out, turned=turned)
        return
    if conv2d_winograd_wide.fits(problem, x.itemsize):
        conv2d_winograd_wide.convolve(problem, x, weight, bias, out, turned=turned)
        return
    of_input, _, of_output = transforms(problem.R, x.dtype)
    size, padding = OUTPUTS[problem.R], (problem.padding[0], problem.padding[2])
    filters = _transformed_filters(weight, turned)
    wide = -(-problem.Q // size)
    work = _blocks(problem, _TILES)

    def multiply(task: int) -> None:
        block = work[task]
        tiles = tiles_of("tiles", x, block, wide, INPUT, size, padding)
        transformed = scratch("transformed", tiles.shape, x.dtype)
        numpy.matmul(of_input, tiles, out=transformed)
        count = tiles.shape[1] // problem.C
        products = scratch("products", (len(filters), problem.K, count), x.dtype)
        numpy.matmul(filters, transformed.reshape(-1, problem.C, count), out=products)
        outputs = scratch("outputs", (size * size, problem.K * count), x.dtype)
        numpy.matmul(of_output, products.reshape(len(filters), -1), out=outputs)
        place(outputs, block, wide, size, bias, out)

    parallel_for(len(work), multiply, small=problem.flops < SMALL_FLOPS)


def backward_data(problem: Conv2dProblem, dy: NDArray[Any], weight: NDArray[Any], out: NDArray[Any]) -> None:
    """Dx (N, C, H, W) into ``out``: the convolution of dy with the rotated kernel."""
    top, bottom, left, right = (problem.R - 1 - padding for padding in problem.padding)
    convolution = Conv2dProblem.from_shapes(
        dy.shape, (problem.C, problem.K, problem.R, problem.S), padding=(top, bottom, left, right)
    )
    _convolve(convolution, dy, weight, None, out, turned=True)


def backward_filter(problem: Conv2dProblem, dy: NDArray[Any], x: NDArray[Any], out: NDArray[Any]) -> None:
    """Dw (K, C, R, S) into ``out``: partial sums over runs of blocks, then added in their order."""
    if dy.dtype == x.dtype == numpy.float32 and compiled.usable(out):
        compiled_winograd.backward_filter(problem, numpy.ascontiguousarray(dy), numpy.ascontiguousarray(x), out)
        return
    if conv2d_winograd_wide.fits(problem, x.itemsize):
        conv2d_winograd_wide.backward_filter(problem, dy, x, out)
        return
    of_input, of_filter, of_output = transforms(problem.R, x.dtype)
    size, padding = OUTPUTS[problem.R], (problem.padding[0], problem.padding[2])
    wide = -(-problem.Q // size)
    # Each block adds 36 K C numbers to the sum: more tiles a block where there are many channels.
    work = _blocks(problem, max(_TILES, 2 * problem.K, 2 * problem.C))
    elements = INPUT * INPUT
    parts = runs(len(work), elements * problem.K * problem.C * x.itemsize)
    partial = numpy.empty((len(parts), elements, problem.K, problem.C), out.dtype)

    def sum_run(task: int) -> None:
        total = target = partial[task]
        for number in parts[task]:
            block = work[number]
            tiles = tiles_of("tiles", x, block, wide, INPUT, size, padding)
            transformed = scratch("transformed", tiles.shape, x.dtype)
            numpy.matmul(of_input, tiles, out=transformed)
            gradients = tiles_of("gradients", dy, block, wide, size, size, (0, 0))
            spread = scratch("products", (elements, gradients.shape[1]), dy.dtype)
            numpy.matmul(of_output.T, gradients, out=spread)
            count = tiles.shape[1] // problem.C
            by_channel = transformed.reshape(elements, problem.C, count)
            numpy.matmul(spread.reshape(elements, problem.K, count), by_channel.transpose(0, 2, 1), out=target)
            if target is not total:
                total += target
            else:
                target = scratch("outputs", total.shape, out.dtype)

    parallel_for(len(parts), sum_run, small=problem.flops < SMALL_FLOPS)

    def transform(part: slice) -> None:
        result = partial[0, :, part]
        for other in itertools.islice(partial, 1, None):
            result += other[:, part]
        gradient = result.reshape(elements, -1).T @ of_filter
        out[part] = gradient.reshape(out[part].shape)

    _over_filters(out.shape, transform)
