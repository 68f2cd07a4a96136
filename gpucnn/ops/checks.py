"""Checks that the operations of every backend share; each message says what came and what was expected.

They look at dtypes, shapes and numbers of Python, never into an array, so they cost no transfer from a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from gpucnn.device import is_device_array
from gpucnn.errors import ArgumentError, DtypeError, ShapeError
from gpucnn_kernels.problem import Conv2dProblem, IntOrPair, Padding, pair

REDUCTIONS = ("mean", "sum", "none")
ENDINGS = ("identity", "relu", "leaky_relu", "relu6")
"""The activations that a batch norm in training can end with: gradients go back through them by their results."""
BY_RESULT = ("identity", "relu", "leaky_relu", "sigmoid", "tanh")
"""Those that a gradient goes back through by the result alone."""


def own_precision(dtype: Any) -> str | None:
    """What gpucnn_kernels takes as ``precision``: products of 16-bit numbers may be those of tensor cores."""
    return str(dtype) if str(dtype) in ("float16", "bfloat16") else None


# ---------------------------------------------------------------- one array, one value


def require_array(array: Any, name: str) -> None:
    """Raise DtypeError unless ``array`` is a NumPy array, or one in device memory."""
    if not isinstance(array, numpy.ndarray) and not is_device_array(array):
        raise DtypeError(
            f"{name} must be a numpy.ndarray (on a GPU, a cupy.ndarray), got {type(array).__qualname__}"
        )


def require_floating(array: Any, name: str) -> None:
    """Raise DtypeError unless ``array`` holds floating-point numbers; in device memory bfloat16 are such, too."""
    require_array(array, name)
    if array.dtype.kind != "f" and not (str(array.dtype) == "bfloat16" and is_device_array(array)):
        raise DtypeError(
            f"{name} must hold floating-point numbers, got dtype {array.dtype}; convert it with .astype('float32')"
        )


def require_shape(array: Any, shape: Sequence[int], name: str) -> None:
    """Raise ShapeError unless ``array`` has ``shape``."""
    if tuple(array.shape) != tuple(shape):
        raise ShapeError(f"{name} must have shape {tuple(shape)}, got {tuple(array.shape)}")


def require_dimensions(array: Any, dimensions: int, axes: str, name: str) -> None:
    """Raise ShapeError unless ``array`` has ``dimensions`` axes; ``axes`` names them for the message."""
    if array.ndim != dimensions:
        raise ShapeError(f"{name} must have {dimensions} dimensions {axes}, got shape {tuple(array.shape)}")


def require_choice(value: str, choices: Sequence[str], name: str) -> None:
    """Raise ArgumentError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ArgumentError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_out(out: Any, shape: Sequence[int], dtype: Any) -> None:
    """Raise unless ``out`` is an array that the result, of this shape and dtype, can be written to."""
    require_array(out, "out")
    size = tuple(int(length) for length in shape)
    if tuple(out.shape) != size:
        raise ShapeError(f"out must have the result's shape {size}, got {out.shape}")
    if out.dtype != numpy.dtype(dtype):
        raise DtypeError(f"out must have the result's dtype {numpy.dtype(dtype)}, got {out.dtype}")


def check_gradient(dy: Any, saved: Any) -> None:
    """Raise unless ``dy`` and what the forward pass saved are floating-point arrays of one shape."""
    require_floating(dy, "the output gradient")
    require_floating(saved, "the saved array")
    require_shape(dy, saved.shape, "the output gradient")


def check_axis(x: Any, axis: int) -> None:
    """Raise ArgumentError unless ``x`` has the ``axis`` to take a softmax over."""
    if not -x.ndim <= axis < x.ndim:
        raise ArgumentError(f"softmax over axis {axis} of an array with {x.ndim} axes, shape {x.shape}")


# ---------------------------------------------------------------- convolution


def check_bias(bias: Any, channels: int) -> None:
    """Raise ShapeError or DtypeError unless ``bias`` is None or one number an output channel."""
    if bias is not None:
        require_floating(bias, "bias")
        require_shape(bias, (channels,), "bias")


def check_residual(residual: Any, shape: Sequence[int]) -> None:
    """Raise ShapeError or DtypeError unless ``residual`` is None or of the ``shape`` of what it is added to."""
    if residual is not None:
        require_floating(residual, "residual")
        require_shape(residual, shape, "residual")


def forward_problem(x: Any, weight: Any, bias: Any, **parameters: Any) -> Conv2dProblem:
    """The convolution of x with weight, its arrays checked; ``parameters`` are stride, padding, ..., groups."""
    require_floating(x, "x")
    require_floating(weight, "weight")
    problem = Conv2dProblem.from_shapes(x.shape, weight.shape, **parameters)
    check_bias(bias, problem.K)
    return problem


def backward_data_problem(dy: Any, weight: Any, input_size: Sequence[int], **parameters: Any) -> Conv2dProblem:
    """The convolution whose output gradient is dy, its arrays checked."""
    require_floating(dy, "dy")
    require_floating(weight, "weight")
    require_dimensions(weight, 4, "(K, C / groups, R, S)", "weight")
    return Conv2dProblem.from_output(dy.shape, weight.shape, pair(input_size, "input_size"), **parameters)


def backward_filter_problem(
    dy: Any, x: Any, kernel_size: IntOrPair, groups: int, **parameters: Any
) -> Conv2dProblem:
    """The convolution of x whose output gradient is dy, its arrays checked."""
    require_floating(dy, "dy")
    require_floating(x, "x")
    require_dimensions(dy, 4, "(N, K, P, Q)", "dy")
    require_dimensions(x, 4, "(N, C, H, W)", "x")
    if groups < 1 or x.shape[1] % groups:
        raise ShapeError(f"groups={groups} must divide the {x.shape[1]} input channels")
    problem = Conv2dProblem.from_output(
        (x.shape[0], *dy.shape[1:]),
        (dy.shape[1], x.shape[1] // groups, *pair(kernel_size, "kernel_size")),
        x.shape[2:],
        groups=groups,
        **parameters,
    )
    if dy.shape[0] != x.shape[0]:
        raise ShapeError(f"dy has {dy.shape[0]} images and x {x.shape[0]}; they must have as many")
    return problem


def check_algorithm(direction: str, algorithm: str, names: Sequence[str], problem: Conv2dProblem) -> None:
    """Raise ArgumentError unless ``algorithm`` is "auto" or one of the ``names`` of its direction.

    And where it is "depthwise" and the problem is not.
    """
    if algorithm != "auto" and algorithm not in names:
        raise ArgumentError(
            f"unknown algorithm {algorithm!r} for conv2d {direction}; choose auto or one of {', '.join(names)}"
        )
    if algorithm == "depthwise" and problem.groups != problem.C:
        others = ", ".join(name for name in names if name != "depthwise")
        raise ArgumentError(
            f"algorithm 'depthwise' needs as many groups as input channels, got groups={problem.groups} for "
            f"{problem.C} channels; choose auto or one of {others}"
        )


def window_problem(
    shape: Sequence[int], kernel_size: IntOrPair, stride: IntOrPair, padding: Padding, dilation: IntOrPair
) -> Conv2dProblem:
    """The convolution to one channel whose windows are im2col's of an image of this shape."""
    channels = shape[1] if len(shape) == 4 else 1
    weight_shape = (1, channels, *pair(kernel_size, "kernel_size"))
    return Conv2dProblem.from_shapes(shape, weight_shape, stride=stride, padding=padding, dilation=dilation)


def columns_problem(
    columns: Any,
    input_size: Sequence[int],
    kernel_size: IntOrPair,
    stride: IntOrPair,
    padding: Padding,
    dilation: IntOrPair,
) -> Conv2dProblem:
    """The same of the columns that col2im takes, which are checked."""
    require_floating(columns, "columns")
    r, s = pair(kernel_size, "kernel_size")
    if columns.ndim != 3 or columns.shape[1] % (r * s) or columns.shape[1] == 0:
        raise ShapeError(f"col2im expects columns of shape (N, C * {r} * {s}, P * Q), got {columns.shape}")
    n, c = columns.shape[0], columns.shape[1] // (r * s)
    problem = window_problem((n, c, *pair(input_size, "input_size")), (r, s), stride, padding, dilation)
    if columns.shape[2] != problem.P * problem.Q:
        raise ShapeError(
            f"col2im got columns of shape {columns.shape}, but an input of {problem.H}x{problem.W} has "
            f"{problem.P}x{problem.Q} = {problem.P * problem.Q} windows"
        )
    return problem


# ---------------------------------------------------------------- pooling


def check_argmax(argmax: Any, shape: Sequence[int], dtype: Any) -> None:
    """Raise unless ``argmax`` has this shape and dtype."""
    require_array(argmax, "argmax")
    require_shape(argmax, shape, "argmax")
    if argmax.dtype != dtype:
        raise DtypeError(f"argmax must have dtype {dtype}, got {argmax.dtype}")


def check_adaptive(array: Any, name: str, axes: str) -> None:
    """Raise unless ``array`` is floating-point with four axes."""
    require_floating(array, name)
    require_dimensions(array, 4, axes, f"{name} of adaptive pooling")


def check_pixels(shape: Sequence[int]) -> None:
    """Raise ShapeError where an image to be pooled adaptively has no pixel."""
    if min(shape[2:]) < 1:
        raise ShapeError(f"adaptive pooling needs an image of at least one pixel, got shape {tuple(shape)}")


# ---------------------------------------------------------------- normalization, dropout, linear


def check_batch_norm(x: Any, **per_channel: Any) -> None:
    """Raise unless x is (N, C) or (N, C, H, W) and the named arrays, where given, hold a number a channel."""
    require_floating(x, "the input")
    if x.ndim not in (2, 4):
        raise ShapeError(f"batch norm takes (N, C) or (N, C, H, W), got shape {x.shape}")
    for name, array in per_channel.items():
        if array is not None:
            require_floating(array, name)
            require_shape(array, (x.shape[1],), name)


def check_batch_norm_inference_gradient(dy: Any, x: Any, **per_channel: Any) -> None:
    """Raise unless dy, and x where it is given, have one shape that batch norm takes, with numbers a channel."""
    check_batch_norm(dy, **per_channel)
    if x is not None:
        require_floating(x, "the input")
        require_shape(x, dy.shape, "the input")


def check_ending(
    activation: str, y: Any, shape: Sequence[int], negative_slope: float, endings: Sequence[str] = ENDINGS
) -> None:
    """Raise ArgumentError or ShapeError unless a gradient goes back through ``activation`` by its result y."""
    require_choice(activation, endings, "activation")
    if activation == "identity":
        return
    if activation == "leaky_relu" and not negative_slope > 0:
        raise ArgumentError(
            "the result of leaky_relu says which of its inputs were positive where negative_slope is above 0, "
            f"got {negative_slope}"
        )
    if y is None:
        raise ArgumentError(f"the gradient goes back through {activation} by its result: give it as y")
    require_floating(y, "the result y")
    require_shape(y, shape, "the result y")


def check_batch(x: Any) -> None:
    """Raise ShapeError where x has fewer than two values a channel, of which there is no variance."""
    channels = x.shape[1]
    count = x.size // max(1, channels)
    if channels and count < 2:
        raise ShapeError(
            f"batch norm in training needs at least two values a channel, got {count} from an input of shape "
            f"{x.shape}: a batch of one has no variance; use a larger batch (drop_last=True drops a last batch of "
            "one) or evaluation mode"
        )


def check_probability(probability: float) -> None:
    """Raise ArgumentError unless a dropout probability lies in 0 .. 1."""
    if not 0 <= probability <= 1:
        raise ArgumentError(f"the dropout probability must lie between 0 and 1, got {probability!r}")


def dropout_mask_shape(x: Any, per_channel: bool) -> tuple[int, ...]:
    """The shape of the mask for x. Raises ShapeError where there are no channels to drop."""
    if not per_channel:
        return tuple(x.shape)
    if x.ndim < 2:
        raise ShapeError(f"dropout of whole channels needs an input (N, C, ...), got shape {x.shape}")
    return (*x.shape[:2], *(1,) * (x.ndim - 2))


def check_mask(mask: Any, dy: Any) -> None:
    """Raise unless dy is floating-point and the dropout mask broadcasts to it."""
    require_floating(dy, "the output gradient")
    require_array(mask, "the mask")
    if mask.ndim != dy.ndim or any(m not in (1, d) for m, d in zip(mask.shape, dy.shape, strict=True)):
        raise ShapeError(f"a mask of shape {mask.shape} does not fit an output gradient of shape {dy.shape}")


def check_linear_forward(x: Any, weight: Any, bias: Any) -> None:
    """Raise unless x (N, in), weight (out, in) and bias (out,) or None go together."""
    require_floating(x, "the input")
    require_array(weight, "the weight")
    require_dimensions(x, 2, "(N, in features)", "the input")
    require_dimensions(weight, 2, "(out features, in features)", "the weight")
    if x.shape[1] != weight.shape[1]:
        raise ShapeError(
            f"the input has {x.shape[1]} features (shape {x.shape}) but the weight of shape {weight.shape} "
            f"expects {weight.shape[1]}"
        )
    if bias is not None:
        require_array(bias, "the bias")
        require_shape(bias, weight.shape[:1], "the bias")


def check_linear_gradient(dy: Any) -> None:
    """Raise unless dy is (N, out)."""
    require_floating(dy, "the output gradient")
    require_dimensions(dy, 2, "(N, out features)", "the output gradient")


def check_linear_data(dy: Any, weight: Any) -> None:
    """Raise unless dy (N, out) and weight (out, in) go together."""
    check_linear_gradient(dy)
    require_array(weight, "the weight")
    require_dimensions(weight, 2, "(out features, in features)", "the weight")
    require_shape(dy, (dy.shape[0], weight.shape[0]), "the output gradient")


def check_linear_weight(dy: Any, x: Any) -> None:
    """Raise unless dy (N, out) and x (N, in) go together."""
    check_linear_gradient(dy)
    require_array(x, "the input")
    require_dimensions(x, 2, "(N, in features)", "the input")
    require_shape(dy, (x.shape[0], dy.shape[1]), "the output gradient")


# ---------------------------------------------------------------- losses


def check_classification(
    scores: Any,
    name: str,
    targets: Any,
    weight: Any,
    label_smoothing: float,
    reduction: str,
    ignore_index: int | None = None,
) -> None:
    """Raise unless scores (N, C) and targets (N,) or (N, C) go together; labels' values are not looked at."""
    require_floating(scores, name)
    require_dimensions(scores, 2, "(N, classes)", name)
    require_choice(reduction, REDUCTIONS, "reduction")
    n, classes = scores.shape
    if not 0 <= label_smoothing <= 1:
        raise ArgumentError(f"label_smoothing must lie between 0 and 1, got {label_smoothing!r}")
    check_ignore_index(ignore_index)
    if weight is not None:
        require_array(weight, "the class weights")
        require_shape(weight, (classes,), "the class weights")
    require_array(targets, "the targets")
    if targets.ndim == 1:
        if targets.dtype.kind not in "iu":
            raise DtypeError(
                f"targets (N,) are class numbers and must be integers, got dtype {targets.dtype}; "
                "convert them with .astype('int64'), or give probabilities of shape (N, C)"
            )
        require_shape(targets, (n,), "the targets")
    else:
        if targets.dtype.kind != "f" and str(targets.dtype) != "bfloat16":
            raise DtypeError(
                f"targets of shape {targets.shape} are probabilities and must be floating point, got dtype "
                f"{targets.dtype}; class numbers have shape ({n},)"
            )
        require_shape(targets, scores.shape, "the targets")
        if ignore_index is not None and ignore_index >= 0:
            raise ArgumentError(
                f"ignore_index={ignore_index} is a class number, and targets of shape {tuple(targets.shape)} are "
                "probabilities; leave it away, or give class numbers"
            )


def check_ignore_index(ignore_index: Any) -> None:
    """Raise ArgumentError unless ``ignore_index`` is an integer or None."""
    if ignore_index is not None and (isinstance(ignore_index, bool) or not hasattr(ignore_index, "__index__")):
        raise ArgumentError(f"ignore_index must be an integer or None, got {ignore_index!r}")


def label_error(label: int, position: int, classes: int) -> ArgumentError:
    """What to raise for a class number that is none."""
    return ArgumentError(
        f"label {label} at position {position} is out of range: with {classes} classes, "
        f"labels are 0 .. {classes - 1}; check the data set and the model's num_classes"
    )


def check_loss_pair(first: Any, second: Any, reduction: str, first_name: str, second_name: str) -> None:
    """Raise unless a loss's two arrays are floating-point and of one shape, and its reduction is one."""
    require_floating(first, first_name)
    require_floating(second, second_name)
    require_shape(second, first.shape, second_name)
    require_choice(reduction, REDUCTIONS, "reduction")


def check_broadcast(factor: Any, shape: Sequence[int], name: str) -> None:
    """Raise ShapeError unless ``factor``, where given, broadcasts to the logits' shape."""
    if factor is None:
        return
    require_array(factor, name)
    pairs = zip(reversed(factor.shape), reversed(tuple(shape)), strict=False)
    if factor.ndim > len(shape) or any(ours not in (1, theirs) for ours, theirs in pairs):
        raise ShapeError(f"{name} of shape {factor.shape} does not broadcast to the logits' {tuple(shape)}")


# ---------------------------------------------------------------- optimizers, images


def check_buffers(parameter: Any, *buffers: Any) -> None:
    """Raise unless an optimizer's buffers, where given, are flat, floating-point and as long as the parameter."""
    for buffer in (parameter, *buffers):
        if buffer is not None:
            require_floating(buffer, "an optimizer's buffer")
            require_dimensions(buffer, 1, "(a flat buffer)", "an optimizer's buffer")
            require_shape(buffer, parameter.shape, "an optimizer's buffer")


def check_momentum(rule: str, momentum: float, buffer: Any) -> None:
    """Raise ArgumentError where a rule with momentum has nowhere to keep it."""
    if momentum and buffer is None:
        raise ArgumentError(f"{rule} with momentum={momentum} needs a momentum_buffer, got None")


def check_step(step: int) -> None:
    """Raise ArgumentError where Adam's step count has not begun."""
    if step < 1:
        raise ArgumentError(f"Adam's step counts from 1, got {step}")


def check_images(images: Any, mean: Sequence[float], std: Sequence[float], flip: Any, crop_offset: Any) -> None:
    """Raise unless images are uint8 (N, H, W, C) and the rest has a number a channel or a row an image."""
    if not (isinstance(images, numpy.ndarray) or is_device_array(images)) or images.dtype != numpy.uint8:
        found = getattr(images, "dtype", None) or type(images).__qualname__
        raise DtypeError(f"images must be a numpy.ndarray of uint8, got {found}")
    require_dimensions(images, 4, "(N, H, W, C)", "images")
    n, channels = images.shape[0], images.shape[3]
    if len(mean) != channels or len(std) != channels:
        raise ShapeError(f"images have {channels} channels, but mean has {len(mean)} values and std {len(std)}")
    if min(std, default=1.0) <= 0:
        raise ArgumentError(f"std must be positive, got {tuple(std)}")
    if flip is not None:
        require_array(flip, "flip")
        require_shape(flip, (n,), "flip")
    if crop_offset is not None:
        require_array(crop_offset, "crop_offset")
        require_shape(crop_offset, (n, 2), "crop_offset")
