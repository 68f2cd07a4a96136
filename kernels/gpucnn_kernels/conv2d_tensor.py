"""Convolutions on tensor cores: algorithm "tensor" of all three directions, and the precisions that it has.

==========  ==================  ==========================================================================
arrays      precision           each product
==========  ==================  ==========================================================================
float32     float32 (or None)   three tf32 products of numbers split in two: float32's accuracy ("3xTF32")
float32     tf32                one product of numbers rounded to tf32 (10 fraction bits)
float16     float16 (or None)   exact
bfloat16    bfloat16 (or None)  exact
==========  ==================  ==========================================================================

Sums are float32, rounded once to the arrays' dtype. Rounding to tf32 is to nearest, ties to even from compute
capability 9.0 on and away from zero before. 3xTF32 gives what float32 gives of infinities and of numbers up to
3.4e38, too: a sum that is not finite is taken again in float32. Of a number below 2e-35 digits are lost, as what
is left of it beside its tf32 part is below 1e-38.

The kernels read channels-last arrays in pieces of 16 bytes. What does not lie so is copied by one launch into a
workspace of the same size, filled up with zeros to whole pieces: arrays that are contiguous, or whose channels a
group are no multiple of 4 (float32) or 8 (16 bits), the weights of an input gradient always. Results are written
in either layout without a copy. So contiguous callers are not refused, but pay one pass over each of x and dy that
is read, where channels-last ones pay none. A refusal would cost them the same pass, and another for the result.

A first layer's images, of up to four channels, are read as they lie: conv2d_first_layer makes its product, but for
three products, and conv2d_first_layer_filter its filter's gradient in 16 bits.

GPUs from compute capability 8.0 on; others are refused in words.
"""

from __future__ import annotations

from typing import Any

from gpucnn_kernels import conv2d_first_layer, conv2d_first_layer_filter
from gpucnn_kernels.arrays import DeviceArray
from gpucnn_kernels.conv2d_forward_paths import (
    Epilogue,
    channel_counts,
    product_arguments,
    stride_phases,
    strides,
    terms,
)
from gpucnn_kernels.conv2d_pieces import DTYPES, chunk_of, packed_filter, packed_image
from gpucnn_kernels.conv2d_tiles import TENSOR_FILTER_TILES, TENSOR_TILES, tensor_filter_tile, tensor_tile
from gpucnn_kernels.errors import ArgumentError, DeviceError, DtypeError
from gpucnn_kernels.launch import Call
from gpucnn_kernels.problem import Conv2dProblem
from gpucnn_kernels.runtime import itemsize

PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
CAPABILITY = (8, 0)
"""The oldest compute capability with cp.async and tensor cores of tf32 and bfloat16."""

_FORMS: tuple[dict[str, Any], ...] = tuple(
    {"SCALAR": dtype, "PRODUCTS": products, "CAPABILITY": CAPABILITY}
    for dtype, products in (("float32", "1"), ("float32", "3"), ("float16", "1"), ("bfloat16", "1"))
)
SOURCES: dict[str, tuple[dict[str, Any], ...]] = {
    "conv2d_tensor": _FORMS,
    "conv2d_tensor_filter": _FORMS,
}

_STAGES, _LINE = 4, 64  # of the ring in shared memory, and bytes that a row of each holds
SHARED_BYTES = {
    **{
        tile.name: _STAGES * (tile.positions + tile.channels) * _LINE
        for tile in TENSOR_TILES  # of three products less
    },
    # Rows of positions, padded: 32 by 2 * side + 16 bytes in 16 bits, 16 by 4 * side + 32 in float32.
    **{tile.name: _STAGES * 32 * (2 * (tile.positions + tile.channels) + 32) for tile in TENSOR_FILTER_TILES},
}
"""Dynamic shared memory of a block, in bytes."""

_FILTER_BLOCKS = 512  # that the positions of a filter gradient are split for
_LEAST_POSITIONS = 256  # of a part: below, adding up the parts costs more than the parts save
_PARTIAL_BYTES = 64 << 20  # of the workspace for the parts' sums


def check_precision(precision: str | None, dtype: str) -> None:
    """Raise ArgumentError unless arrays of ``dtype`` can be computed in ``precision``."""
    if precision is None:
        return
    if precision not in PRECISIONS:
        raise ArgumentError(f"precision must be one of {', '.join(PRECISIONS)} or None, got {precision!r}")
    known = {"float32": ("float32", "tf32"), "float64": ()}.get(dtype, (dtype,))
    if precision not in known:
        takes = f"theirs is {' or '.join(known)}" if known else "they have no other than their own: pass None"
        raise ArgumentError(f"precision {precision!r} is not for arrays of {dtype}; {takes}")


def check(call: Call, dtype: str) -> None:
    """Raise unless the tensor cores of the call's device take arrays of ``dtype``."""
    if dtype not in DTYPES:
        raise DtypeError(f"algorithm 'tensor' takes arrays of {', '.join(DTYPES)}, got {dtype}; choose auto")
    if call.capability < CAPABILITY:
        has, needs = (".".join(map(str, capability)) for capability in (call.capability, CAPABILITY))
        raise DeviceError(
            f"algorithm 'tensor' needs a GPU of compute capability {needs} or newer, this one's is {has}; "
            "choose auto"
        )


def _definitions(dtype: str, precision: str | None) -> dict[str, str]:
    return {"PRODUCTS": "3" if dtype == "float32" and precision != "tf32" else "1"}


# ---------------------------------------------------------------- forward and input gradient


def convolve(
    call: Call,
    problem: Conv2dProblem,
    source: DeviceArray,
    weight: DeviceArray,
    output: DeviceArray,
    epilogue: Epilogue,
    *,
    precision: str | None = None,
    transposed: bool = False,
) -> None:
    """Fill ``output``, y from x or (``transposed``) dx from dy."""
    check(call, source.dtype)
    if not transposed and conv2d_first_layer.takes(problem, source.dtype, precision):
        conv2d_first_layer.convolve(call, problem, source, weight, output, epilogue)
        return
    channels = channel_counts(problem, transposed)
    phases, positions = stride_phases(problem, transposed)
    units = phases * problem.groups
    depth = terms(problem, transposed, chunk_of(source.dtype))
    made = tensor_tile(call.gpu, source.dtype, precision, channels["output"], positions, units, depth)
    tiles = -(-positions // made.positions)
    image = packed_image(call, source, problem.groups)
    filters, filter_strides = packed_filter(call, problem, weight, transposed)
    chunk = chunk_of(source.dtype)
    definitions = _definitions(source.dtype, precision)
    if definitions["PRODUCTS"] == "3":
        epilogue = epilogue.apart_from(call, output)  # a sum that is taken again meets its residual twice
    call.launch(
        "conv2d_tensor",
        made.name,
        -(-channels["output"] // made.channels) * tiles * units,
        32 * made.warps,
        scalar=source.dtype,
        definitions=definitions,
        shared_bytes=SHARED_BYTES[made.name],
        input=image,
        input_strides=strides(image),
        filter=filters,
        filter_strides=filter_strides,
        **product_arguments(problem, output, epilogue, transposed, chunk),
        vectors=int(_in_vectors(output, epilogue.residual, channels["output"], chunk, phases)),
        tiles=tiles,
    )


# ---------------------------------------------------------------- the filter's gradient


def filter_sums(
    call: Call, problem: Conv2dProblem, dy: DeviceArray, x: DeviceArray, precision: str | None = None
) -> tuple[DeviceArray, int]:
    """(a row of the weight's sums, ordered K, R, S, C / groups, for every part of the positions, their number)."""
    check(call, x.dtype)
    if conv2d_first_layer_filter.takes(problem, x.dtype):
        return conv2d_first_layer_filter.filter_sums(call, problem, dy, x)
    chunk = chunk_of(x.dtype)
    outputs, depth = problem.K // problem.groups, problem.C // problem.groups
    dy_chunks, x_chunks = -(-outputs // chunk), -(-depth // chunk)
    columns = problem.R * problem.S * x_chunks * chunk
    positions = problem.N * problem.P * problem.Q
    made = tensor_filter_tile(call.gpu, x.dtype, precision, dy_chunks * chunk, columns, problem.groups, positions)
    blocks = made.blocks(dy_chunks * chunk, columns, problem.groups)
    elements = problem.K * depth * problem.R * problem.S
    most = max(1, _PARTIAL_BYTES // (4 * elements))
    parts = max(1, min(-(-_FILTER_BLOCKS // blocks), -(-positions // _LEAST_POSITIONS), most))
    depth_a_step = _LINE // itemsize(x.dtype)
    part = -(-positions // parts)
    part += -part % depth_a_step
    parts = -(-positions // part)
    image, slopes = packed_image(call, x, problem.groups), packed_image(call, dy, problem.groups)
    steps = strides(image)
    partial = call.scratch(parts * elements, "float32")
    call.launch(
        "conv2d_tensor_filter",
        made.name,
        blocks * parts,
        32 * made.warps,
        scalar=x.dtype,
        definitions=_definitions(x.dtype, precision),
        shared_bytes=SHARED_BYTES[made.name],
        x=image,
        dy=slopes,
        partial=partial,
        gradient={
            "positions": positions,
            "part": part,
            **{f"x_{axis}": steps[axis] for axis in "nhw"},
            "dy_pixel": slopes.shape[1],
            "groups": problem.groups,
            "K": outputs,
            "C": depth,
            "x_chunks": x_chunks,
            "dy_chunks": dy_chunks,
            **{letter: getattr(problem, letter) for letter in "HWRSPQ"},
            "stride_h": problem.stride[0],
            "stride_w": problem.stride[1],
            "top": problem.padding[0],
            "left": problem.padding[2],
            "dilation_h": problem.dilation[0],
            "dilation_w": problem.dilation[1],
        },
    )
    return partial, parts


# ---------------------------------------------------------------- how results lie


def _in_vectors(output: DeviceArray, residual: DeviceArray | None, channels: int, chunk: int, phases: int) -> bool:
    """Whether the result's neighbours, ``channels`` of a group or an image's pixels, are in pieces of 16 bytes."""
    steps, (_, _, height, width) = strides(output), output.shape
    whole = channels % chunk == 0 if steps["c"] < steps["w"] else phases == 1 and height * width % chunk == 0
    return whole and all(image is None or image.address % 16 == 0 for image in (output, residual))
