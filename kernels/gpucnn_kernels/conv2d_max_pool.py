"""Convolution, bias, activation and max pooling as one kernel: the layers of small networks.

cuda/conv2d_max_pool.cu says how. It pays where the channels that are summed over are few, as what a window's sums
share is kept in caches and not in tiles, and where windows overlap little, as what they share is computed for each
of them. :func:`conv2d_max_pool2d_pays` draws that line by counting, not yet by measurement.
"""

from __future__ import annotations

from typing import Any

from gpucnn_kernels.conv2d import by_channel, result_array
from gpucnn_kernels.conv2d_forward_paths import Epilogue, axes, channel_counts, filter_strides, strides
from gpucnn_kernels.errors import ArgumentError
from gpucnn_kernels.launch import Call
from gpucnn_kernels.problem import Conv2dProblem, IntOrPair, Padding, Pool2dProblem

SOURCES: dict[str, tuple[dict[str, str], ...]] = {"conv2d_max_pool": ({},)}

MOST_PLACES = 256
"""Of a pooling window: its argmax is one byte."""

_THREADS = 128
_WIDE, _NARROW = 16, 4  # output channels of a block; float64 has half as many in the wide one
_ENOUGH_BLOCKS = 128  # to keep a GPU of some hundred multiprocessors busy

_MOST_TAPS = 160  # LeNet's second layer has 150
_MOST_OUTPUTS = 32


def conv2d_max_pool2d_pays(problem: Conv2dProblem, pool: Pool2dProblem) -> bool:
    """Whether the one kernel is taken for the convolution ``problem`` and the pooling ``pool`` of its result.

    All of these must hold:

    ==========================================  ===================================================================
    at most 160 channels a group times taps     more make sums that implicit_gemm or tensor cores make faster
    at most 32 output channels                  more read each pixel too often: once for each 16 of them
    pooling windows that do not overlap         every sum is made once
    windows of at most 256 places               the argmax is one byte
    ==========================================  ===================================================================

    So it is for both layers of LeNet-5 and the first one of AnimalNet. The bounds are counted, not measured.
    """
    taps = problem.C // problem.groups * problem.R * problem.S
    apart = all(stride >= extent for stride, extent in zip(pool.stride, pool.extent, strict=True))
    return taps <= _MOST_TAPS and problem.K <= _MOST_OUTPUTS and apart and pool.R * pool.S <= MOST_PLACES


def conv2d_max_pool2d_forward(
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    pool_size: IntOrPair,
    pool_stride: IntOrPair | None = None,
    pool_padding: IntOrPair = 0,
    pool_dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    activation: str = "identity",
    negative_slope: float = 0.01,
    with_argmax: bool = True,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """(y, argmax), both (N, K, P', Q'): max pooling of a convolution's result, all of it in one launch.

    What begins with ``pool_``, and ``ceil_mode``, are :func:`gpucnn_kernels.max_pool2d_forward`'s, the rest
    :func:`gpucnn_kernels.conv2d_forward`'s. y and argmax (uint8, for :func:`gpucnn_kernels.max_pool2d_backward`)
    are what the two functions give one after the other with algorithm "direct", up to the rounding of the sums;
    the convolution's own result is made nowhere. With ``with_argmax=False``, for inference, y alone is answered,
    and no argmax is made.

    Training needs no more: where the activation's slope is a function of its result (ReLU, leaky ReLU of a slope
    above 0, sigmoid, tanh), the gradient for the sums is max_pool2d_backward of the activation's backward at y,
    since only the winners have one.

    x, weight and ``out`` may each be contiguous or channels-last; results are laid out as ``out``, or as x. Raises
    what the two functions raise, and ArgumentError for a window of more than 256 places.
    """
    with Call(stream, x=x, weight=weight, bias=bias, out=out) as call:
        dtype = call.floating("x", "weight", "bias", "out")
        images, weights = call["x"], call["weight"]
        problem = Conv2dProblem.from_shapes(
            images.shape, weights.shape, stride=stride, padding=padding, dilation=dilation, groups=groups
        )
        pool = Pool2dProblem.from_shapes(
            problem.output_shape,
            pool_size,
            stride=pool_stride,
            padding=pool_padding,
            dilation=pool_dilation,
            ceil_mode=ceil_mode,
        )
        if pool.R * pool.S > MOST_PLACES:
            raise ArgumentError(
                f"a pooling window in one kernel with its convolution has at most {MOST_PLACES} places, got "
                f"{pool.R}x{pool.S} = {pool.R * pool.S}; call conv2d_forward and max_pool2d_forward"
            )
        epilogue = Epilogue(by_channel(call, "bias", problem.K), activation, negative_slope)
        y = result_array(call, pool.output_shape, dtype, images, epilogue.bias)
        argmax = call.empty(pool.output_shape, "uint8", like=y, name="argmax") if with_argmax else None
        channels = channel_counts(problem, transposed=False)
        vertical, horizontal = axes(problem, transposed=False)
        tile, outputs, blocks = _tile(dtype, channels["output"], pool.N * pool.P * pool.Q, problem.groups)
        call.launch(
            "conv2d_max_pool",
            f"conv2d_max_pool_{tile}",
            (blocks, -(-channels["output"] // outputs), problem.groups),
            _THREADS,
            scalar=dtype,
            x=images,
            x_strides=strides(images),
            filter=weights,
            filter_strides=filter_strides(weights, problem, transposed=False),
            bias=epilogue.bias,
            y=y,
            y_strides=strides(y),
            argmax=argmax,
            channels=channels,
            vertical=vertical,
            horizontal=horizontal,
            pool=_pool(pool),
            epilogue=epilogue.fields,
        )
        return call.give(y) if argmax is None else call.give(y, argmax)


def _tile(dtype: str, channels: int, pixels: int, groups: int) -> tuple[str, int, int]:
    """(name, channels of a block, blocks along the pixels): the wide one where it leaves blocks enough."""
    wide = _WIDE // 2 if dtype == "float64" else _WIDE
    blocks = -(-pixels // _THREADS)
    enough = blocks * -(-channels // wide) * groups >= _ENOUGH_BLOCKS
    return ("wide", wide, blocks) if enough and channels > _NARROW else ("narrow", _NARROW, blocks)


def _pool(pool: Pool2dProblem) -> dict[str, int]:
    """The kernel's struct Pool."""
    fields = {letter: getattr(pool, letter) for letter in "PQRS"}
    for name in ("stride", "padding", "dilation"):
        fields[f"{name}_h"], fields[f"{name}_w"] = getattr(pool, name)
    return fields
