"""Max and average pooling of images (N, C, H, W), forward and backward, contiguous or channels-last.

float32, float16, bfloat16 or float64; 16-bit sums are taken in float32 and rounded once. Backward passes gather:
each pixel adds up the windows around it in a fixed order, so no result depends on the order in which threads run.
A new result has the layout of the first argument; ``out`` may have either layout, and shares no memory with an
input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpucnn_kernels.activations import FUNCTIONS
from gpucnn_kernels.arrays import DeviceArray, image_layout
from gpucnn_kernels.errors import ArgumentError
from gpucnn_kernels.launch import THREADS, Call, blocks_for
from gpucnn_kernels.overlap import require_apart
from gpucnn_kernels.problem import IntOrPair, Pool2dProblem, ProblemError, pair
from gpucnn_kernels.runtime import ITEM_SIZES

SOURCES: dict[str, tuple[dict[str, str], ...]] = {"max_pooling": ({},), "average_pooling": ({},)}

BY_RESULT = ("identity", "relu", "leaky_relu", "sigmoid", "tanh")
"""The activations that :func:`max_pool2d_backward` goes back through: their results say their slopes."""

_MOST_BYTE_PLACES = 256  # places of a window that an argmax of one byte can tell apart
_WARP_PLACES = 32  # from here on a window of a contiguous image keeps a warp busy
_MOST_BLOCKS_Y = 65535
_ENOUGH_BLOCKS = 4096  # several for every multiprocessor of the largest GPUs


def max_pool2d_forward(
    x: Any,
    *,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """(y, argmax), both (N, C, P, Q): the largest value of each window and its place r * S + s in it.

    Padding never wins. On ties the first place in row order wins; the first NaN of a window wins. argmax is uint8
    where the window has at most 256 places, otherwise int32. A dilated window without a place in the image gives
    minus infinity and place 0. Raises ProblemError where the window does not fit the image.
    """
    with Call(stream, x=x, out=out) as call:
        dtype = call.floating("x", "out")
        image_layout(call["x"])
        problem = Pool2dProblem.from_shapes(
            call["x"].shape, kernel_size, stride=stride, padding=padding, dilation=dilation, ceil_mode=ceil_mode
        )
        y = call.output(problem.output_shape, dtype, like=call["x"])
        argmax = call.empty(problem.output_shape, _argmax_dtype(problem), like=call["x"], name="argmax")
        require_apart(y, call["x"])
        arrays: dict[str, Any] = {"x": call["x"], "y": y, "argmax": argmax}
        if not (
            _small(problem)
            and _launch_one_layout(
                call, "max_pooling", "max_pool_forward", problem, (problem.P, problem.Q), arrays
            )
        ):
            _launch(
                call,
                "max_pooling",
                f"max_pool_forward{_suffix(problem)}",
                problem,
                order=call["x"],
                size=(problem.P, problem.Q),
                **_with_strides(arrays),
            )
        return call.give(y, argmax)


def max_pool2d_backward(
    dy: Any,
    argmax: Any,
    *,
    input_size: Sequence[int],
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    y: Any = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """The gradient for x, (N, C, H, W): each dy (N, C, P, Q) added at its window's argmax.

    ``argmax`` is what :func:`max_pool2d_forward` gave, and ``input_size`` is (H, W). With ``y``, the pooled
    result, laid out as dy, and the ``activation`` that x was the result of, it is the gradient for what the
    activation read: "relu", "sigmoid", "tanh", or "leaky_relu" with a ``negative_slope`` above 0, whose slopes
    their results say.

    Raises ProblemError where argmax and the sizes do not fit together, ArgumentError or DtypeError where dy,
    argmax or y is not of the output's shape and dtype, ArgumentError for another activation, or one without y.
    """
    function = _function(activation, y, negative_slope)
    with Call(stream, dy=dy, argmax=argmax, y=y, out=out) as call:
        dtype = call.floating("dy", "y", "out")
        call.elementwise("dy", "y")
        image_layout(call["dy"])
        problem = Pool2dProblem.from_shapes(
            (*call["dy"].shape[:2], *input_size),
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            ceil_mode=ceil_mode,
        )
        call.require("dy", shape=problem.output_shape)
        call.require("argmax", _argmax_dtype(problem), problem.output_shape)
        dx = call.output(problem.input_shape, dtype, like=call["dy"])
        require_apart(dx, call["dy"], call["argmax"])
        arrays: dict[str, Any] = {"dy": call["dy"], "argmax": call["argmax"], "dx": dx}
        size = _pairs(problem, planes=dx.contiguous)
        before: dict[str, Any] = {"function": function, "negative_slope": negative_slope}
        if function:
            arrays["y"] = call["y"]
        else:
            before["y"] = None
        if not (
            _small(problem)
            and problem.stride == (2, 2)
            and not (function and problem.R > 2)
            and _launch_one_layout(call, "max_pooling", "max_pool_backward", problem, size, arrays, **before)
        ):
            before["y"] = arrays.pop("y", None)
            _launch(
                call,
                "max_pooling",
                f"max_pool_backward{_suffix(problem)}",
                problem,
                order=dx,
                size=(problem.H, problem.W),
                **before,
                **_with_strides(arrays),
            )
        return call.give(dx)


def _function(activation: str, y: Any, negative_slope: float) -> int:
    """The number of an activation whose result says its slope. Raises ArgumentError for what cannot be."""
    if activation not in BY_RESULT:
        raise ArgumentError(f"max pooling goes back through {', '.join(BY_RESULT)}, got activation={activation!r}")
    if activation != "identity" and y is None:
        raise ArgumentError(f"the gradient goes back through {activation} by the pooled result: give it as y")
    if activation == "leaky_relu" and not negative_slope > 0:
        raise ArgumentError(
            "the result of leaky_relu says which of its inputs were positive where negative_slope is above 0, "
            f"got {negative_slope}"
        )
    return FUNCTIONS[activation]


def avg_pool2d_forward(
    x: Any,
    *,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """The mean of each window, (N, C, P, Q).

    The divisor counts the window's places inside the padded input (``count_include_pad``) or inside the input
    only, as in PyTorch. Raises ProblemError where the window does not fit the image.
    """
    with Call(stream, x=x, out=out) as call:
        image_layout(call["x"])
        problem = Pool2dProblem.from_shapes(
            call["x"].shape, kernel_size, stride=stride, padding=padding, ceil_mode=ceil_mode
        )
        return _average_forward(call, problem, problem.output_shape, _average(count_include_pad=count_include_pad))


def avg_pool2d_backward(
    dy: Any,
    *,
    input_size: Sequence[int],
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """The gradient for x, (N, C, H, W): dy over the divisor, added to each place of its window.

    ``input_size`` is (H, W). Raises ProblemError where the window does not fit, ArgumentError where dy is not of
    the output's shape.
    """
    with Call(stream, dy=dy, out=out) as call:
        image_layout(call["dy"])
        problem = Pool2dProblem.from_shapes(
            (*call["dy"].shape[:2], *input_size), kernel_size, stride=stride, padding=padding, ceil_mode=ceil_mode
        )
        call.require("dy", shape=problem.output_shape)
        return _average_backward(
            call, problem, problem.output_shape, _average(count_include_pad=count_include_pad)
        )


def adaptive_avg_pool2d_forward(x: Any, *, output_size: IntOrPair, out: Any = None, stream: Any = None) -> Any:
    """Means over windows floor(i * H / P) .. ceil((i + 1) * H / P): (N, C, P, Q) for any input size.

    ``output_size`` is an integer or (P, Q). Raises ProblemError where the image has no pixel.
    """
    with Call(stream, x=x, out=out) as call:
        image_layout(call["x"])
        shape = (*call["x"].shape[:2], *pair(output_size, "output_size"))
        return _average_forward(call, *_adaptive(call["x"].shape, shape))


def adaptive_avg_pool2d_backward(
    dy: Any, *, input_size: Sequence[int], out: Any = None, stream: Any = None
) -> Any:
    """The gradient for x, (N, C, H, W), of dy (N, C, P, Q); ``input_size`` is (H, W).

    Raises ProblemError where the image or dy has no pixel.
    """
    with Call(stream, dy=dy, out=out) as call:
        image_layout(call["dy"])
        shape = (*call["dy"].shape[:2], *input_size)
        _require_pixels(shape)
        if min(call["dy"].shape[2:]) < 1:
            raise ProblemError(f"adaptive pooling gives at least one pixel, got dy of shape {call['dy'].shape}")
        return _average_backward(call, *_adaptive(shape, call["dy"].shape))


# ---------------------------------------------------------------- launches


def _argmax_dtype(problem: Pool2dProblem) -> str:
    return "uint8" if problem.R * problem.S <= _MOST_BYTE_PLACES else "int32"


def _suffix(problem: Pool2dProblem) -> str:
    return "" if _argmax_dtype(problem) == "uint8" else "_large_window"


def _average(adaptive: bool = False, count_include_pad: bool = False) -> dict[str, int]:
    return {"adaptive": int(adaptive), "count_include_pad": int(count_include_pad)}


def _require_pixels(shape: Sequence[int]) -> None:
    if len(shape) == 4 and min(shape[2:]) < 1:
        raise ProblemError(f"adaptive pooling needs an image of at least one pixel, got shape {tuple(shape)}")


def _adaptive(
    shape: Sequence[int], output_shape: tuple[int, ...]
) -> tuple[Pool2dProblem, tuple[int, ...], dict[str, int]]:
    """Adaptive pooling as a problem, its output's shape and the kernels' struct Average.

    Where the output divides the image, its windows are those of pooling with that stride. Otherwise the problem
    has no window of its own, and the kernels find it for each output.
    """
    _require_pixels(shape)
    if len(shape) == 4 and shape[2] % output_shape[2] == 0 and shape[3] % output_shape[3] == 0:
        window = shape[2] // output_shape[2], shape[3] // output_shape[3]
        return Pool2dProblem.from_shapes(shape, window), output_shape, _average()
    return Pool2dProblem.from_shapes(shape, 1), output_shape, _average(adaptive=True)


def _average_forward(call: Call, problem: Pool2dProblem, shape: tuple[int, ...], average: dict[str, int]) -> Any:
    dtype = call.floating("x", "out")
    x = call["x"]
    y = call.output(shape, dtype, like=x)
    require_apart(y, x)
    options = {"count_include_pad": average["count_include_pad"]}
    if (
        _small(problem)
        and not average["adaptive"]
        and _launch_one_layout(
            call,
            "average_pooling",
            "average_pool_forward",
            problem,
            (shape[2], shape[3]),
            {"x": x, "y": y},
            **options,
        )
    ):
        return call.give(y)
    rows, columns = _largest_window(problem, shape, average)
    if rows * columns >= _WARP_PLACES and x.contiguous:
        call.launch(
            "average_pooling",
            "average_pool_forward_large_window",
            blocks_for(y.size, THREADS // 32),
            scalar=dtype,
            x=x,
            y=y,
            pooling=_pooling(problem, shape, False, 0),
            average=average,
            planes=problem.N * problem.C,
            y_strides=_strides(y),
        )
    else:
        _launch(
            call,
            "average_pooling",
            "average_pool_forward",
            problem,
            order=x,
            size=shape[2:],
            output_shape=shape,
            x=x,
            y=y,
            average=average,
            x_strides=_strides(x),
            y_strides=_strides(y),
        )
    return call.give(y)


def _average_backward(call: Call, problem: Pool2dProblem, shape: tuple[int, ...], average: dict[str, int]) -> Any:
    dtype = call.floating("dy", "out")
    dx = call.output(problem.input_shape, dtype, like=call["dy"])
    require_apart(dx, call["dy"])
    apart = problem.stride[0] >= problem.R and problem.stride[1] >= problem.S
    if (
        apart
        and not average["adaptive"]
        and _launch_one_layout(
            call,
            "average_pooling",
            "average_pool_backward",
            problem,
            (problem.H, problem.W),
            {"dy": call["dy"], "dx": dx},
            count_include_pad=average["count_include_pad"],
        )
    ):
        return call.give(dx)
    _launch(
        call,
        "average_pooling",
        "average_pool_backward",
        problem,
        order=dx,
        size=(problem.H, problem.W),
        output_shape=shape,
        dy=call["dy"],
        dx=dx,
        average=average,
        dy_strides=_strides(call["dy"]),
        dx_strides=_strides(dx),
    )
    return call.give(dx)


def _largest_window(problem: Pool2dProblem, shape: Sequence[int], average: dict[str, int]) -> tuple[int, int]:
    if average["adaptive"]:
        return -(-problem.H // shape[2]), -(-problem.W // shape[3])
    return min(problem.R, problem.H), min(problem.S, problem.W)


def _small(problem: Pool2dProblem) -> bool:
    """Whether the windows are of a size that has kernels of its own."""
    return (problem.R, problem.S) in ((2, 2), (3, 3)) and problem.dilation == (1, 1)


def _launch_one_layout(
    call: Call,
    source: str,
    kernel: str,
    problem: Pool2dProblem,
    size: tuple[int, int],
    arrays: dict[str, Any],
    **options: Any,
) -> bool:
    """Start the form of a kernel for arrays that all have one layout, where they do; whether they do.

    ``size`` is how many rows and columns of threads an image takes.
    """
    dtype = next(iter(arrays.values())).dtype
    pack = 16 // ITEM_SIZES[dtype]
    if all(array.contiguous for array in arrays.values()):
        form, rows, positions = "planes", problem.N * problem.C, size[0] * size[1]
    elif problem.C % pack == 0 and all(_in_packs(array, pack) for array in arrays.values()):
        form, rows, positions = "packs", problem.N * size[0], size[1] * (problem.C // pack)
    else:
        return False
    if max(positions, problem.H * problem.W) >= 2**31 or (form == "packs" and rows >= 2**31):
        return False
    across, down = _block(positions)
    blocks = -(-positions // across)
    # What a thread works out once serves several planes, as long as the blocks are enough for any GPU.
    most = _MOST_BLOCKS_Y if form == "packs" else min(-(-_ENOUGH_BLOCKS // max(blocks, 1)), _MOST_BLOCKS_Y)
    call.launch(
        source,
        f"{kernel}_{form}",
        (blocks, min(-(-rows // down), most)),
        (across, down),
        scalar=dtype,
        pooling=_pooling(problem, problem.output_shape, form == "packs", rows),
        **arrays,
        **options,
    )
    return True


def _in_packs(image: DeviceArray, pack: int) -> bool:
    """Whether every ``pack`` channels of an image, channels-last, can be moved as one."""
    return image.channels_last and image.address % (pack * ITEM_SIZES[image.dtype]) == 0


def _pairs(problem: Pool2dProblem, planes: bool) -> tuple[int, int]:
    """Rows and columns of threads for the gradient of windows with a stride of 2.

    Pairs of rows, counted from the edge of the padding, and columns, or pairs of those too where not ``planes``.
    """
    rows, columns = (
        -(-(size + padding) // 2) for size, padding in zip((problem.H, problem.W), problem.padding, strict=True)
    )
    return rows, problem.W if planes else columns


def _launch(
    call: Call,
    source: str,
    kernel: str,
    problem: Pool2dProblem,
    *,
    order: DeviceArray,
    size: Sequence[int],
    output_shape: Sequence[int] | None = None,
    **arguments: Any,
) -> None:
    """A thread for every pixel of images of ``size`` (height, width), in the order of ``order`` in memory."""
    channels_last = image_layout(order) == "channels_last"
    height, width = size
    positions, rows = (
        (width * problem.C, problem.N * height) if channels_last else (height * width, problem.N * problem.C)
    )
    if max(positions, problem.H * problem.W) >= 2**31:
        raise ArgumentError(
            "pooling takes planes of fewer than 2^31 pixels and, channels-last, lines of fewer than 2^31 "
            f"elements; got {problem.input_shape}"
        )
    across, down = _block(positions)
    call.launch(
        source,
        kernel,
        (-(-positions // across), min(-(-rows // down), _MOST_BLOCKS_Y)),
        (across, down),
        scalar=order.dtype,
        pooling=_pooling(problem, output_shape or problem.output_shape, channels_last, rows),
        **arguments,
    )


def _block(positions: int) -> tuple[int, int]:
    """A block's threads along an image's positions, and along its rows."""
    across = min(THREADS, 1 << max(positions - 1, 0).bit_length())
    return across, THREADS // across


def _pooling(
    problem: Pool2dProblem, output_shape: Sequence[int], channels_last: bool, rows: int
) -> dict[str, int]:
    """The kernels' struct Pooling."""
    fields = {letter: getattr(problem, letter) for letter in "CHWRS"}
    fields["P"], fields["Q"] = output_shape[2:]
    for name in ("stride", "padding", "dilation"):
        fields[f"{name}_h"], fields[f"{name}_w"] = getattr(problem, name)
    return fields | {"rows": rows, "channels_last": int(channels_last)}


def _with_strides(arrays: dict[str, Any]) -> dict[str, Any]:
    return arrays | {f"{name}_strides": _strides(array) for name, array in arrays.items()}


def _strides(image: DeviceArray) -> dict[str, int]:
    """The kernels' struct Strides. Raises LayoutError where the image is neither contiguous nor channels-last."""
    image_layout(image)
    return dict(zip("nchw", image.strides, strict=True))
