"""Batch normalization: training and inference and their gradients, over all axes but 1 of (N, C) or (N, C, H, W).

x is float32, float16, bfloat16 or float64, contiguous or channels-last. Everything that is one number a channel
(weight, bias, mean, inverse_std, running statistics and the parameters' gradients) is what the sums run in:
float32, and float64 for float64 x. Half precision would lose a running mean's small steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gpucnn_kernels.activations import FUNCTIONS
from gpucnn_kernels.arrays import DeviceArray, image_layout
from gpucnn_kernels.errors import ArgumentError, DtypeError
from gpucnn_kernels.launch import Call
from gpucnn_kernels.overlap import require_apart
from gpucnn_kernels.problem import ProblemError
from gpucnn_kernels.runtime import ITEM_SIZES
from gpucnn_kernels.source import SCALARS

SOURCE = "batch_norm"
PACKS_SOURCE = "batch_norm_packs"
SOURCES: dict[str, tuple[dict[str, str], ...]] = {SOURCE: ({},), PACKS_SOURCE: ({},)}

_THREADS = 256
_WARP = 32
_BLOCKS = 1024  # enough to fill the largest GPUs; the same on all, so that results are the same on all
_MAX_PARTS = 512  # pieces of a channel, which one warp combines
_PER_THREAD = 16  # numbers that a thread should have at least before a channel is split
_PACKS_PER_THREAD = 8  # where it takes packs of 16 bytes

_WHOLE_THREADS = 512
_WHOLE_NUMBERS = _PER_THREAD * _WHOLE_THREADS
"""Of a block that makes all of a batch norm in one launch: more take it longer than two further launches do."""
_WHOLE_WIDTH = 8  # channels of such a block where channels are neighbours: as many as fill 32 bytes in float32

MASKS = ("identity", "relu", "leaky_relu", "relu6")
"""The activations that :func:`batch_norm_backward` goes back through: comparing the result says each slope."""


def _checked(call: Call, *per_channel: str, values: str = "x") -> tuple[str, int]:
    """(dtype of the ``values``, channels) after the checks that all functions share."""
    x = call[values]
    dtype = call.floating(values)
    if len(x.shape) not in (2, 4):
        raise ProblemError(f"batch norm takes (N, C) or (N, C, H, W), got {values} of shape {x.shape}")
    if len(x.shape) == 4:
        image_layout(x)
    else:
        call.contiguous(values)
    accumulate = SCALARS[dtype][1]
    for name in per_channel:
        array = call.get(name)
        if array is not None and array.dtype != accumulate:
            raise DtypeError(
                f"{name} must be {accumulate} where {values} is {dtype}: batch norm keeps its parameters and "
                f"statistics in {accumulate}; got {array.dtype}, convert it with .astype('{accumulate}')"
            )
        call.require(name, shape=(x.shape[1],))
    call.contiguous(*per_channel)
    return dtype, x.shape[1]


def _walk(x: DeviceArray, whole: bool = True) -> dict[str, int]:
    """How the kernels' blocks go over x: the struct BatchNormWalk.

    With ``whole`` a block has all numbers of its channels where these are few.
    """
    channels = x.shape[1]
    count = x.size // max(channels, 1)
    pixels = x.shape[2] * x.shape[3] if len(x.shape) == 4 else 1
    if pixels == 1 or image_layout(x) == "channels_last":
        width, inner, steps = min(_WARP, 1 << max(channels - 1, 0).bit_length()), 1, (1, channels, 1)
    else:
        width, inner, steps = 1, max(pixels, 1), (1, channels * pixels, pixels)
    narrow = min(width, _WHOLE_WIDTH)
    whole = whole and count * narrow <= _WHOLE_NUMBERS
    width = narrow if whole else width
    tiles = max(1, -(-channels // width))
    lanes = _THREADS // width
    parts = min(-(-_BLOCKS // tiles), -(-count // (lanes * _PER_THREAD)), _MAX_PARTS)
    per_part = count if whole else -(-count // max(parts, 1))
    return {
        "channels": channels,
        "width": width,
        "parts": max(1, -(-count // max(per_part, 1))),
        "count": count,
        "per_part": max(per_part, 1),
        "inner": inner,
        "inner_step": steps[0],
        "outer_step": steps[1],
        "channel_step": steps[2],
    }


def _is_whole(walk: dict[str, int]) -> bool:
    """Whether one launch makes all of it."""
    return walk["count"] * walk["width"] <= _WHOLE_NUMBERS and walk["width"] <= _WHOLE_WIDTH


def _whole_threads(walk: dict[str, int]) -> int:
    """Of a block: as many as have four numbers each, a warp at least."""
    lanes = -(-walk["count"] * walk["width"] // 4)
    return max(_WARP, min(_WHOLE_THREADS, 1 << max(lanes - 1, 0).bit_length()))


@dataclass(frozen=True)
class _Passes:
    """How the passes over the images are started: their source, what their kernels' names end with, and the walks.

    ``walk`` is the kernels' own, ``numbers`` the struct BatchNormWalk that combining the parts takes.
    """

    source: str
    form: str
    dtype: str
    walk: dict[str, int]
    numbers: dict[str, int]

    @property
    def in_packs(self) -> bool:
        """Whether they go through the images in packs of 16 bytes."""
        return self.source == PACKS_SOURCE

    def launch(self, call: Call, kernel: str, *, mask: DeviceArray | None = None, **arguments: Any) -> None:
        """Start ``kernel`` in this form; a ``mask`` there is in packs only."""
        if self.in_packs and kernel != "statistics":
            arguments["mask"] = mask
        name = f"batch_norm_{kernel}{self.form}"
        call.launch(self.source, name, _grid(self.walk), scalar=self.dtype, walk=self.walk, **arguments)


def _passes(numbers: dict[str, int], *arrays: DeviceArray | None) -> _Passes:
    """In packs where these arrays, of which the first is x, allow it; otherwise number by number."""
    x = arrays[0]
    assert x is not None
    pack = 16 // ITEM_SIZES[x.dtype]
    plain = _Passes(SOURCE, "", x.dtype, numbers, numbers)
    if any(array is not None and array.address % 16 for array in arrays):
        return plain
    across = numbers["inner"] == 1
    length = numbers["channels"] if across else numbers["inner"]
    if length % pack or length // pack >= 2**31 or 0 in x.shape:
        return plain
    channels = numbers["channels"] // pack if across else numbers["channels"]
    count = numbers["count"] if across else numbers["count"] // pack
    width = min(_WARP, 1 << (channels - 1).bit_length()) if across else 1
    tiles, lanes = -(-channels // width), _THREADS // width
    parts = min(-(-_BLOCKS // tiles), -(-count // (lanes * _PACKS_PER_THREAD)), _MAX_PARTS)
    per_part = -(-count // parts)
    walk = {
        "channels": channels,
        "width": width,
        "parts": -(-count // per_part),
        "inner": 1 if across else length // pack,
        "count": count,
        "per_part": per_part,
        "outer_step": numbers["outer_step"],
        "channel_step": pack if across else numbers["channel_step"],
    }
    combined = {"parts": walk["parts"], "per_part": per_part if across else per_part * pack}
    return _Passes(PACKS_SOURCE, "_across" if across else "_along", x.dtype, walk, numbers | combined)


def _mask_bytes(x: DeviceArray) -> int:
    """Of the mask of an image of x's shape and dtype: one for each pack."""
    return x.size * ITEM_SIZES[x.dtype] // 16


def _grid(walk: dict[str, int]) -> tuple[int, int]:
    return -(-walk["channels"] // walk["width"]), walk["parts"]


def _combine(call: Call, kernel: str, dtype: str, walk: dict[str, int], **arguments: Any) -> None:
    """Start a kernel that gives a warp to each channel."""
    warps = _THREADS // _WARP
    blocks = -(-walk["channels"] // warps)
    call.launch(SOURCE, kernel, blocks, (_WARP, warps), scalar=dtype, walk=walk, **arguments)


def _function(activation: str) -> int:
    if activation not in FUNCTIONS:
        raise ArgumentError(f"activation must be one of {', '.join(FUNCTIONS)}, got {activation!r}")
    return FUNCTIONS[activation]


def batch_norm_forward(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    *,
    momentum: float = 0.1,
    epsilon: float = 1e-5,
    residual: Any = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    with_mask: bool = False,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """(y, mean, inverse_std) with statistics over all axes but 1 of x (N, C) or (N, C, H, W).

    y = (x - mean) * inverse_std * weight + bias, inverse_std = 1 / sqrt(biased variance + epsilon), then plus the
    ``residual``, if any, of x's shape, dtype and layout, and then the ``activation`` ("leaky_relu" with
    ``negative_slope``), rounded once. The running statistics, where given, move in place by ``momentum`` towards
    the mean and the *unbiased* variance. All others but x and y are (C,) and float32 (float64 for float64 x).
    ``out`` has x's layout, and may be x or the residual. Few numbers a channel take one launch, more take three.

    ``with_mask`` adds a fourth result, which :func:`batch_norm_backward` reads instead of y: a byte (uint8) for
    each 16 bytes of y, in the order of memory, in which bit k says whether number k is above 0, and for ReLU6 also
    below 6. It is None where there is no gain: of few numbers a channel, of planes or channels that fill no pieces
    of 16 bytes or begin off their boundaries, and without an activation that backward goes through.

    Raises ProblemError with fewer than two values a channel, LayoutError where x is neither contiguous nor
    channels-last.
    """
    function = _function(activation)
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    with Call(stream, x=x, residual=residual, **vectors, out=out) as call:
        dtype, channels = _checked(call, *vectors)
        call.floating("x", "residual", "out")
        call.elementwise("x", "residual", "out")
        walk = _walk(call["x"])
        if channels and walk["count"] < 2:
            raise ProblemError(
                f"batch norm in training needs at least two values a channel, got {walk['count']} from x of shape "
                f"{call['x'].shape}: a batch of one has no variance; use a larger batch, or batch_norm_inference"
            )
        accumulate = SCALARS[dtype][1]
        y = call.output(call["x"].shape, dtype, like=call["x"])
        mean, inverse_std = call.empty((channels,), accumulate), call.empty((channels,), accumulate)
        line: dict[str, Any] = {
            "x": call["x"],
            "residual": call.get("residual"),
            "y": y,
            "mean": mean,
            "weight": call.get("weight"),
            "bias": call.get("bias"),
            "function": function,
            "negative_slope": negative_slope,
        }
        moved: dict[str, Any] = {"running_mean": call.get("running_mean"), "running_var": call.get("running_var")}
        moved |= {"inverse_std": inverse_std, "momentum": momentum, "epsilon": epsilon}
        if _is_whole(walk):
            grid, threads = _grid(walk), _whole_threads(walk)
            call.launch(SOURCE, "batch_norm_whole", grid, threads, scalar=dtype, walk=walk, **line, **moved)
            results = call.give(y, mean, inverse_std)
            return (*results, None) if with_mask else results
        passes = _passes(walk, call["x"], call.get("residual"), y)
        rest, size = call.scratch(channels, accumulate), channels * passes.numbers["parts"]
        partial: dict[str, Any] = {
            "means": call.scratch(size, "float64"),
            "squares": call.scratch(size, accumulate),
        }
        passes.launch(call, "statistics", x=call["x"], **partial)
        _combine(call, "batch_norm_combine", dtype, passes.numbers, **partial, mean=mean, rest=rest, **moved)
        mask = None
        if with_mask and passes.in_packs and function and activation in MASKS:
            mask = call.empty((_mask_bytes(y),), "uint8", name="mask")
        line |= {"rest": rest, "scale": inverse_std, "scale_is_variance": False, "epsilon": epsilon}
        passes.launch(call, "normalize", mask=mask, **line)
        results = call.give(y, mean, inverse_std)
        return (*results, None if mask is None else call.give(mask)) if with_mask else results


def batch_norm_backward(
    dy: Any,
    x: Any,
    weight: Any,
    mean: Any,
    inverse_std: Any,
    *,
    y: Any = None,
    mask: Any = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    out: Any = None,
    out_weight: Any = None,
    out_bias: Any = None,
    out_residual: Any = None,
    stream: Any = None,
) -> Any:
    """(dx, dweight, dbias) of the training-time batch norm.

    ``mean`` and ``inverse_std`` are forward's. dx has x's dtype, the others, (C,), are float32 (float64 for
    float64 x). dy, x and ``out`` have one layout; ``out`` may be dy or x. An empty batch gives zero dweight and
    dbias.

    dy is the gradient for the result before any activation, or, with ``y``, the result itself, and the
    ``activation`` that made it, for that: "relu", "relu6", or "leaky_relu" with a ``negative_slope`` above 0.
    Where forward gave a ``mask`` with y, that is read instead, if x, dy and the results begin on boundaries of 16
    bytes. The gradient for the residual, dy through the activation, goes to ``out_residual`` where that is given,
    which may be dy. dweight and dbias go to ``out_weight`` and ``out_bias`` where these are given. Few numbers a
    channel take one launch, more take three.

    Raises ArgumentError for another activation, or one without y, or a slope that is not above 0, or a mask of
    another shape.
    """
    function = _function_back(activation, y, negative_slope)
    vectors: dict[str, Any] = {"weight": weight, "mean": mean, "inverse_std": inverse_std}
    results = {"out_weight": out_weight, "out_bias": out_bias}
    images = {"dy": dy, "x": x, "y": y}
    with Call(stream, **images, mask=mask, **vectors, out=out, **results, out_residual=out_residual) as call:
        dtype, channels = _checked(call, *vectors)
        call.floating("dy", "x", "y", "out", "out_residual")
        call.elementwise("x", "dy", "y", "out", "out_residual")
        call.contiguous(*results, "mask")
        call.require("mask", "uint8", (_mask_bytes(call["x"]),))
        walk = _walk(call["x"])
        accumulate = SCALARS[dtype][1]
        dx = call.output(call["x"].shape, dtype, like=call["x"])
        dweight, dbias = (call.output((channels,), accumulate, name=name) for name in results)
        before = None
        if out_residual is not None:
            before = call.output(call["x"].shape, dtype, name="out_residual")
            require_apart(before, call["x"])  # which is read again after it was written
        _require_vectors_apart(call, vectors, dweight, dbias)
        given: dict[str, Any] = {"dy": call["dy"], "y": call.get("y") if function else None, "function": function}
        arrays: dict[str, Any] = {
            "x": call["x"],
            "mean": call["mean"],
            "negative_slope": negative_slope,
        }
        kept: dict[str, Any] = {
            "inverse_std": call["inverse_std"],
            "weight": call.get("weight"),
            "dweight": dweight,
            "dbias": dbias,
        }
        if _is_whole(walk):
            call.launch(
                SOURCE,
                "batch_norm_backward_whole",
                _grid(walk),
                _whole_threads(walk),
                scalar=dtype,
                before=before,
                dx=dx,
                walk=walk,
                **given,
                **arrays,
                **kept,
            )
            return call.give(dx, dweight, dbias)
        known = call.get("mask") if function else None
        passes = _passes(walk, call["x"], call["dy"], given["y"] if known is None else None, before, dx)
        if passes.in_packs and known is not None:
            given |= {"mask": known, "y": None}
        partials = call.scratch(3 * channels * passes.numbers["parts"], accumulate)
        coefficients = call.scratch(3 * channels, accumulate)
        passes.launch(call, "backward_sums", before=before, partials=partials, **given, **arrays)
        results = {"partials": partials, "coefficients": coefficients}
        _combine(call, "batch_norm_backward_combine", dtype, passes.numbers, **results, **kept)
        if before is not None:  # it has gone through the activation
            given = {"dy": before, "y": None, "function": FUNCTIONS["identity"]}
        passes.launch(call, "backward_data", dx=dx, coefficients=coefficients, **given, **arrays)
        return call.give(dx, dweight, dbias)


def _require_vectors_apart(call: Call, vectors: Iterable[str], dweight: DeviceArray, dbias: DeviceArray) -> None:
    """Raise ArgumentError where a parameter's gradient would overwrite what is still read, or the other one."""
    for place, result in enumerate((dweight, dbias)):
        require_apart(result, *(call.get(name) for name in vectors), *(dweight, dbias)[:place])


def _function_back(activation: str, y: Any, negative_slope: float) -> int:
    """The number of an activation that the gradient goes back through. Raises ArgumentError for what cannot be."""
    if activation not in MASKS:
        raise ArgumentError(f"batch norm goes back through {', '.join(MASKS)}, got activation={activation!r}")
    if activation != "identity" and y is None:
        raise ArgumentError(f"the gradient goes back through {activation} by its result: give it as y")
    if activation == "leaky_relu" and not negative_slope > 0:
        raise ArgumentError(
            f"the result of leaky_relu says which of its inputs were positive where negative_slope is above 0, "
            f"got {negative_slope}"
        )
    return FUNCTIONS[activation]


def batch_norm_inference(
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    *,
    epsilon: float = 1e-5,
    activation: str = "identity",
    negative_slope: float = 0.01,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """(x - running_mean) / sqrt(running_var + epsilon) * weight + bias, and then the ``activation``.

    All but x and the result are (C,) and float32 (float64 for float64 x); weight and bias may be None. ``out`` has
    x's layout, and may be x.
    """
    function = _function(activation)
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    with Call(stream, x=x, **vectors, out=out) as call:
        dtype, _ = _checked(call, *vectors)
        call.floating("x", "out")
        call.elementwise("x", "out")
        y = call.output(call["x"].shape, dtype, like=call["x"])
        _normalize(
            call,
            call["x"],
            y,
            epsilon,
            mean=call["running_mean"],
            bias=call.get("bias"),
            function=function,
            negative_slope=negative_slope,
        )
        return call.give(y)


def _normalize(call: Call, x: DeviceArray, y: DeviceArray, epsilon: float, **line: Any) -> None:
    """Y = a line of each channel of x, by the running variance: what ``line`` has."""
    _passes(_walk(x, whole=False), x, y).launch(
        call,
        "normalize",
        x=x,
        residual=None,
        y=y,
        rest=None,
        scale=call["running_var"],
        weight=call.get("weight"),
        scale_is_variance=True,
        epsilon=epsilon,
        **line,
    )


def batch_norm_inference_backward(
    dy: Any,
    x: Any,
    weight: Any,
    running_mean: Any,
    running_var: Any,
    *,
    epsilon: float = 1e-5,
    out: Any = None,
    out_weight: Any = None,
    out_bias: Any = None,
    stream: Any = None,
) -> Any:
    """(dx, dweight, dbias) of :func:`batch_norm_inference`, whose statistics are numbers and have no gradient.

    dx = dy * weight / sqrt(running_var + epsilon) takes one pass, without x. ``x`` may be None: dweight and dbias,
    which take two launches more, are then None, too. dx has dy's dtype, they are float32 (float64 for float64 dy).
    dy, x and ``out`` have one layout; ``out`` may be dy, or x. An empty batch gives zero dweight and dbias.
    """
    vectors: dict[str, Any] = {"weight": weight, "running_mean": running_mean, "running_var": running_var}
    results = {"out_weight": out_weight, "out_bias": out_bias}
    with Call(stream, dy=dy, x=x, **vectors, out=out, **results) as call:
        dtype, channels = _checked(call, *vectors, values="dy")
        call.floating("dy", "x", "out")
        call.elementwise("dy", "x", "out")
        call.contiguous(*results)
        accumulate = SCALARS[dtype][1]
        dx = call.output(call["dy"].shape, dtype, like=call["dy"])
        dweight = dbias = None
        if x is not None:
            dweight, dbias = (call.output((channels,), accumulate, name=name) for name in results)
            _require_vectors_apart(call, vectors, dweight, dbias)
            _sum_for_parameters(call, dweight, dbias, epsilon)
        line: dict[str, Any] = {
            "mean": None,
            "bias": None,
            "function": FUNCTIONS["identity"],
            "negative_slope": 0.0,
        }
        _normalize(call, call["dy"], dx, epsilon, **line)
        return call.give(dx), *(None if array is None else call.give(array) for array in (dweight, dbias))


def _sum_for_parameters(call: Call, dweight: DeviceArray, dbias: DeviceArray, epsilon: float) -> None:
    """The gradients of inference's weight and bias, before dx may take the place of what they are made of."""
    dy, x = call["dy"], call["x"]
    passes = _passes(_walk(x, whole=False), x, dy)
    partials = call.scratch(3 * dweight.size * passes.numbers["parts"], dweight.dtype)
    passes.launch(
        call,
        "backward_sums",
        dy=dy,
        x=x,
        y=None,
        before=None,
        mean=call["running_mean"],
        partials=partials,
        function=FUNCTIONS["identity"],
        negative_slope=0.0,
    )
    _combine(
        call,
        "batch_norm_inference_combine",
        dy.dtype,
        passes.numbers,
        partials=partials,
        variance=call["running_var"],
        dweight=dweight,
        dbias=dbias,
        epsilon=epsilon,
    )
