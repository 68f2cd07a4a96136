"""Activations, pooling, batch norm, softmax, dropout and the fully connected layer."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy

import gpucnn_kernels as kernels
from gpucnn_kernels.linear import ALGORITHMS
from scripts.gpu_validation.bench import (
    LAYOUTS,
    Bench,
    accumulated,
    by_comparison,
    rounding,
)
from tests.oracles import activations as activation_oracle
from tests.oracles import linear as linear_oracle
from tests.oracles import normalization as normalization_oracle
from tests.oracles import pooling as pooling_oracle
from tests.pool_problems import POOL_PROBLEMS

Array = numpy.ndarray[Any, Any]

# ------------------------------------------------------------ activations

# (name, options, the function, the derivative by x, whether backward takes the output)
ACTIVATIONS = (
    ("relu", {}, activation_oracle.relu, activation_oracle.relu_derivative, True),
    ("relu6", {}, activation_oracle.relu6, activation_oracle.relu6_derivative, True),
    (
        "leaky_relu", {"negative_slope": 0.2}, lambda x: activation_oracle.leaky_relu(x, 0.2),
        lambda x: activation_oracle.leaky_relu_derivative(x, 0.2), False,
    ),
    ("sigmoid", {}, activation_oracle.sigmoid, lambda y: y * (1 - y), True),
    ("tanh", {}, math.tanh, lambda y: (1 - y) * (1 + y), True),
    ("gelu", {}, activation_oracle.gelu, activation_oracle.gelu_derivative, False),
    (
        "gelu", {"approximate": "tanh"}, activation_oracle.gelu_tanh, activation_oracle.gelu_tanh_derivative, False
    ),
    ("silu", {}, activation_oracle.silu, activation_oracle.silu_derivative, False),
)  # fmt: skip


def check_activations(bench: Bench) -> None:
    """Forward and backward, at ordinary numbers, large ones, zeros and infinities."""
    shapes = [(3, 5, 7, 11), (4001 if bench.whole else 301,)]
    for numbers, shape in product(bench.numbers(), shapes):
        x, dy = numbers.normal(*shape, scale=3), numbers.normal(*shape)
        x.flat[:4] = 0.0, 30.0, -30.0, 80.0
        for name, options, function, derivative, of_output in ACTIVATIONS:
            expected = activation_oracle.elementwise(function, x)
            value = numbers.rounded(expected) if of_output else x
            slope = activation_oracle.elementwise(derivative, value)
            for dtype, layout in product(numbers.dtypes, LAYOUTS if len(shape) == 4 else LAYOUTS[:1]):
                title = f"{shape}, {layout}"
                forward, backward = (
                    getattr(kernels, f"{name}_{direction}") for direction in ("forward", "backward")
                )
                bench.check(
                    f"{name}_forward", title, dtype,
                    lambda: forward(
                        bench.put(x, dtype, layout), **options
                    ),
                    [expected], [rounding(dtype, expected, 1 + numpy.abs(expected), 8)],
                    algorithm=options.get("approximate", ""),
                )  # fmt: skip
                bench.check(
                    f"{name}_backward", title, dtype,
                    lambda: backward(
                        bench.put(dy, dtype, layout), bench.put(value, dtype, layout), **options
                    ),
                    [dy * slope], [rounding(dtype, dy * slope, dy * (1 + numpy.abs(value)), 8)],
                    algorithm=options.get("approximate", ""),
                )  # fmt: skip


# ------------------------------------------------------------ pooling


def check_pooling(bench: Bench) -> None:
    """Max pooling exactly, with its places; means; their gradients; adaptive means."""
    cases = POOL_PROBLEMS if bench.whole else POOL_PROBLEMS[::4]
    for numbers, case in product(bench.numbers(), cases):
        x = numbers.rounded(numpy.round(numbers.normal(*case.shape) * 4) / 4)  # with ties
        windows = case.kernel, case.stride, case.padding, case.dilation, case.ceil_mode
        y, argmax = pooling_oracle.max_pool(x, *windows)
        dy = numbers.normal(*y.shape)
        dx = pooling_oracle.max_pool_backward(dy, argmax, case.shape, *windows)
        size = pooling_oracle.max_pool_backward(numpy.abs(dy), argmax, case.shape, *windows)
        small = numpy.uint8 if case.kernel[0] * case.kernel[1] <= 256 else numpy.int32
        terms = case.kernel[0] * case.kernel[1]
        for dtype, layout in product(numbers.dtypes, LAYOUTS):
            title = f"{case.name}, {layout}"

            def put(values: Array, dtype: str | None = dtype, layout: str = layout) -> Any:
                return bench.put(values, dtype, layout)

            bench.check(
                "max_pool2d_forward", title, dtype,
                lambda: kernels.max_pool2d_forward(put(x), **case.options, dilation=case.dilation),
                [y, argmax], [0.0, 0.0],
            )  # fmt: skip
            bench.check(
                "max_pool2d_backward", title, dtype,
                lambda: kernels.max_pool2d_backward(
                    put(dy), put(argmax.astype(small), None), input_size=case.shape[2:], **case.options,
                    dilation=case.dilation,
                ),
                [dx], [rounding(dtype, dx, size, terms)],
            )  # fmt: skip
            through = pooling_oracle.max_pool_backward(numpy.where(y > 0, dy, 0), argmax, case.shape, *windows)
            bench.check(
                "max_pool2d_backward", f"{title}, through relu", dtype,
                lambda: kernels.max_pool2d_backward(
                    put(dy), put(argmax.astype(small), None), input_size=case.shape[2:], **case.options,
                    dilation=case.dilation, y=put(numpy.maximum(y, 0)), activation="relu",
                ),
                [through], [rounding(dtype, through, size, terms)],
            )  # fmt: skip
        if case.dilation == (1, 1):
            check_means(bench, case, numbers, x, dy)
    check_adaptive(bench)


def check_means(bench: Bench, case: Any, numbers: Any, x: Array, dy: Array) -> None:
    """Average pooling, its divisor counting the padding or not."""
    terms = case.kernel[0] * case.kernel[1]
    for counted in (True, False):
        given = case.kernel, case.stride, case.padding, case.ceil_mode, counted
        y = pooling_oracle.avg_pool(x, *given)
        size = pooling_oracle.avg_pool(numpy.abs(x), *given)
        dx = pooling_oracle.avg_pool_backward(dy, case.shape, *given)
        gradient_size = pooling_oracle.avg_pool_backward(numpy.abs(dy), case.shape, *given)
        for dtype, layout in product(numbers.dtypes, LAYOUTS):
            title = f"{case.name}, {layout}, padding {'counted' if counted else 'not counted'}"
            bench.check(
                "avg_pool2d_forward", title, dtype,
                lambda: kernels.avg_pool2d_forward(
                    bench.put(x, dtype, layout), **case.options, count_include_pad=counted
                ),
                [y], [rounding(dtype, y, size, terms + 2)],
            )  # fmt: skip
            bench.check(
                "avg_pool2d_backward", title, dtype,
                lambda: kernels.avg_pool2d_backward(
                    bench.put(dy, dtype, layout), input_size=case.shape[2:], **case.options,
                    count_include_pad=counted,
                ),
                [dx], [rounding(dtype, dx, gradient_size, terms + 2)],
            )  # fmt: skip


def check_adaptive(bench: Bench) -> None:
    """Means over windows of different sizes."""
    sizes = [((2, 3, 9, 7), (4, 3)), ((1, 5, 6, 6), (1, 1)), ((2, 2, 5, 4), (5, 8)), ((3, 20, 7, 7), (1, 1))]
    for numbers, (shape, output) in product(bench.numbers(), sizes):
        x, dy = numbers.normal(*shape), numbers.normal(*shape[:2], *output)
        y = pooling_oracle.adaptive_avg_pool(x, output)
        size = pooling_oracle.adaptive_avg_pool(numpy.abs(x), output)
        dx = pooling_oracle.adaptive_avg_pool_backward(dy, shape[2:])
        gradient_size = pooling_oracle.adaptive_avg_pool_backward(numpy.abs(dy), shape[2:])
        terms = shape[2] * shape[3]
        for dtype, layout in product(numbers.dtypes, LAYOUTS):
            title = f"{shape} to {output}, {layout}"
            bench.check(
                "adaptive_avg_pool2d_forward", title, dtype,
                lambda: kernels.adaptive_avg_pool2d_forward(
                    bench.put(x, dtype, layout), output_size=output
                ),
                [y], [rounding(dtype, y, size, terms + 2)],
            )  # fmt: skip
            bench.check(
                "adaptive_avg_pool2d_backward", title, dtype,
                lambda: kernels.adaptive_avg_pool2d_backward(
                    bench.put(dy, dtype, layout), input_size=shape[2:]
                ),
                [dx], [rounding(dtype, dx, gradient_size, terms + 2)],
            )  # fmt: skip


# ------------------------------------------------------------ batch norm


def check_batch_norm(bench: Bench) -> None:
    """Training, its gradient, inference; a channel of a large mean; with a residual and ReLU, both ways."""
    # The last two take three launches, number by number and in packs; the second one several blocks share.
    shapes = [(4, 3, 5, 7), (30, 2, 17, 18), (6, 40, 3, 2), (33, 5), (2, 2, 31, 9), (300, 3, 6, 5), (130, 8, 8, 8)]
    for numbers, shape in product(bench.numbers(), shapes if bench.whole else shapes[:2]):
        channels, epsilon = shape[1], 1e-5
        x, dy = numbers.normal(*shape), numbers.normal(*shape)
        x = numbers.rounded(x + numbers.normal(1, channels, *[1] * (len(shape) - 2), scale=2))
        residual, mask = numbers.normal(*shape), numpy.maximum(numbers.normal(*shape), 0)
        decided = numpy.where(mask > 0, 100.0, -100.0)  # a residual whose signs are those of its sum with y
        weight, bias, mean0 = numbers.normal(channels), numbers.normal(channels), numbers.normal(channels)
        var0 = numbers.uniform(0.5, 2.0, channels)
        y, mean, inverse = normalization_oracle.batch_norm(x, weight, bias, epsilon)
        dx, dweight, dbias = normalization_oracle.batch_norm_backward(dy, x, weight, epsilon)
        inferred = normalization_oracle.batch_norm_inference(x, weight, bias, mean0, var0, epsilon)
        count = x.size // channels
        _, variance = normalization_oracle.statistics(x)
        running = 0.9 * mean0 + 0.1 * mean, 0.9 * var0 + 0.1 * variance * count / (count - 1)
        # What is rounded on the way: numbers of the size of |x| times the largest scale, over a channel's sums.
        over = numpy.abs(weight * inverse).max() * (1 + numpy.abs(x).max()) + numpy.abs(bias).max()
        backward_over = (
            numpy.abs(weight * inverse).max() * (1 + numpy.abs(dy).max()) * (1 + numpy.abs(x).max()) ** 2
        )
        sums = count * (1 + numpy.abs(dy).max()) * (1 + numpy.abs(x).max()) * inverse.max()
        for dtype, layout in product(numbers.dtypes, LAYOUTS if len(shape) == 4 else LAYOUTS[:1]):
            title, wide = f"{shape}, {layout}", accumulated(dtype)

            def forward(dtype: str = dtype, layout: str = layout, wide: str = wide) -> Any:
                moving = [bench.put(values, wide) for values in (mean0, var0)]
                vectors = [bench.put(values, wide) for values in (weight, bias)]
                results = kernels.batch_norm_forward(
                    bench.put(x, dtype, layout), *vectors, *moving, momentum=0.1, epsilon=epsilon
                )
                return (*results, *moving)

            bench.check(
                "batch_norm_forward", title, dtype, forward, [y, mean, inverse, *running],
                [
                    rounding(dtype, y, over, 16),
                    *(rounding(wide, part, 1 + numpy.abs(x).max(), 16) for part in (mean, inverse, *running)),
                ],
            )  # fmt: skip
            bench.check(
                "batch_norm_backward", title, dtype,
                lambda: kernels.batch_norm_backward(
                    bench.put(dy, dtype, layout), bench.put(x, dtype, layout),
                    *(bench.put(values, wide) for values in (weight, mean, inverse)),
                ),
                [dx, dweight, dbias],
                [
                    rounding(dtype, dx, backward_over, 16),
                    rounding(wide, dweight, sums, 4),
                    rounding(wide, dbias, sums, 4),
                ],
            )  # fmt: skip
            total = numpy.maximum(y + residual, 0)
            bench.check(
                "batch_norm_forward", f"{title}, residual, relu", dtype,
                lambda: kernels.batch_norm_forward(
                    bench.put(x, dtype, layout), *(bench.put(values, wide) for values in (weight, bias)),
                    epsilon=epsilon, residual=bench.put(residual, dtype, layout), activation="relu",
                )[0],
                [total], [rounding(dtype, total, over + numpy.abs(residual).max(), 18)],
            )  # fmt: skip
            through = normalization_oracle.batch_norm_backward(numpy.where(mask > 0, dy, 0), x, weight, epsilon)

            def backward(dtype: str = dtype, layout: str = layout, wide: str = wide) -> Any:
                passed = bench.put(numpy.full(dy.shape, numpy.nan), dtype, layout)
                results = kernels.batch_norm_backward(
                    bench.put(dy, dtype, layout), bench.put(x, dtype, layout),
                    *(bench.put(values, wide) for values in (weight, mean, inverse)),
                    y=bench.put(mask, dtype, layout), activation="relu", out_residual=passed,
                )  # fmt: skip
                return (*results, passed)

            bench.check(
                "batch_norm_backward", f"{title}, through relu", dtype, backward,
                [*through, numpy.where(mask > 0, dy, 0)],
                [
                    rounding(dtype, through[0], backward_over, 16),
                    *(rounding(wide, part, sums, 4) for part in through[1:]),
                    0.0,
                ],
            )  # fmt: skip

            def by_mask(dtype: str = dtype, layout: str = layout, wide: str = wide) -> Any:
                ended, _, _, bits = kernels.batch_norm_forward(
                    bench.put(x, dtype, layout), *(bench.put(values, wide) for values in (weight, bias)),
                    residual=bench.put(decided, dtype, layout), activation="relu", with_mask=True,
                )  # fmt: skip
                return kernels.batch_norm_backward(
                    bench.put(dy, dtype, layout), bench.put(x, dtype, layout),
                    *(bench.put(values, wide) for values in (weight, mean, inverse)),
                    y=ended, mask=bits, activation="relu",
                )  # fmt: skip

            bench.check(
                "batch_norm_backward", f"{title}, by forward's mask", dtype, by_mask, [*through],
                [
                    rounding(dtype, through[0], backward_over, 16),
                    *(rounding(wide, part, sums, 4) for part in through[1:]),
                ],
            )  # fmt: skip
            bench.check(
                "batch_norm_inference", title, dtype,
                lambda: kernels.batch_norm_inference(
                    bench.put(x, dtype, layout), *(bench.put(part, wide) for part in (weight, bias, mean0, var0)),
                    epsilon=epsilon,
                ),
                [inferred],
                [rounding(dtype, inferred, 4 * (numpy.abs(weight).max() * (1 + numpy.abs(x).max()) + 3), 8)],
            )  # fmt: skip
            given = normalization_oracle.batch_norm_inference_backward(dy, x, weight, mean0, var0, epsilon)
            distances = (numpy.abs(x).max() + numpy.abs(mean0).max()) / numpy.sqrt(var0.min())
            bench.check(
                "batch_norm_inference_backward", title, dtype,
                lambda: kernels.batch_norm_inference_backward(
                    *(bench.put(part, dtype, layout) for part in (dy, x)),
                    *(bench.put(part, wide) for part in (weight, mean0, var0)),
                    epsilon=epsilon,
                ),
                given,
                [
                    rounding(dtype, given[0], numpy.abs(given[0]), 8),
                    rounding(wide, given[1], sums * distances, 8),
                    rounding(wide, given[2], sums, 8),
                ],
            )  # fmt: skip


# ------------------------------------------------------------ softmax, dropout, linear


def check_softmax(bench: Bench) -> None:
    """Along each axis, short and long."""
    cases = [((5, 7), 1), ((3, 4, 5), 1), ((2, 3, 4, 5), 0), ((2, 1500), -1), ((70, 33), 1)]
    for numbers, (shape, axis) in product(bench.numbers(), cases if bench.whole else cases[:3]):
        x, dy = numbers.normal(*shape, scale=4), numbers.normal(*shape)
        expected = activation_oracle.softmax(x, axis)
        y = numbers.rounded(expected)
        gradient = y * (dy - (dy * y).sum(axis, keepdims=True))
        size = y * (numpy.abs(dy) + (numpy.abs(dy) * y).sum(axis, keepdims=True))
        for dtype in numbers.dtypes:
            bench.check(
                "softmax_forward", f"{shape}, axis {axis}", dtype,
                lambda: kernels.softmax_forward(bench.put(x, dtype), axis=axis),
                [expected], [rounding(dtype, expected, expected * (8 + numpy.abs(x).max()), 8)],
            )  # fmt: skip
            bench.check(
                "softmax_backward", f"{shape}, axis {axis}", dtype,
                lambda: kernels.softmax_backward(bench.put(dy, dtype), bench.put(y, dtype), axis=axis),
                [gradient], [rounding(dtype, gradient, size, 16)],
            )  # fmt: skip


def philox(seed: int, count: int) -> list[int]:
    """The first words of Philox4x32-10: Salmon, Moraes, Dror and Shaw, "Parallel random numbers", 2011."""
    words: list[int] = []
    for block in range(-(-count // 4)):
        c = [block & 0xFFFFFFFF, block >> 32, 0, 0]
        k = [seed & 0xFFFFFFFF, seed >> 32]
        for _ in range(10):
            first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [
                (second >> 32) ^ c[1] ^ k[0], second & 0xFFFFFFFF,
                (first >> 32) ^ c[3] ^ k[1], first & 0xFFFFFFFF,
            ]  # fmt: skip
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        words += c
    return words[:count]


def check_dropout(bench: Bench) -> None:
    """Exactly the masks of the Philox stream, in C order of the array whatever its layout; and the gradient."""
    for numbers, shape in product(bench.numbers(), [(3, 4, 5, 6), (701,)]):
        x = numbers.normal(*shape)
        seed, probability, offset = int(numbers.random.integers(2**60)), 0.3, 5
        scale = 1 / (1 - probability)
        for per_channel in (False, True) if len(shape) == 4 else (False,):
            drawn = (*shape[:2], 1, 1) if per_channel else shape
            words = philox(seed, offset + math.prod(drawn))[offset:]
            mask = numpy.array([word >= probability * 2**32 for word in words]).reshape(drawn)
            expected = numpy.where(mask, x * scale, 0.0)
            for dtype, layout in product(numbers.dtypes, LAYOUTS if len(shape) == 4 else LAYOUTS[:1]):
                title = f"{shape}, {layout}" + (", per channel" if per_channel else "")
                bound = rounding(dtype, expected, expected)
                bench.check(
                    "dropout_forward", title, dtype,
                    lambda: kernels.dropout_forward(
                        bench.put(x, dtype, layout), probability=probability, seed=seed, offset=offset,
                        per_channel=per_channel,
                    ),
                    [expected, mask], [bound, 0.0],
                )  # fmt: skip
                bench.check(
                    "dropout_backward", title, dtype,
                    lambda: kernels.dropout_backward(
                        bench.put(x, dtype, layout), bench.put(mask, None, layout), probability=probability
                    ),
                    [expected], [bound],
                )  # fmt: skip


def check_linear(bench: Bench) -> None:
    """The fully connected layer, in one launch by both tiles and by cuBLAS, and its operations one by one."""
    sizes = [(6, 11, 4), (1, 1, 1), (1, 300, 3), (7, 1, 2), (70, 90, 33)]
    for numbers, (count, inputs, outputs) in product(bench.numbers(), sizes):
        x, weight = numbers.normal(count, inputs), numbers.normal(outputs, inputs)
        bias, dy = numbers.normal(outputs), numbers.normal(count, outputs)
        y = linear_oracle.forward(x, weight, bias)
        dx, dweight, dbias = linear_oracle.backward(dy, x, weight)
        for dtype in numbers.dtypes:
            summed = accumulated(dtype)
            plain_x, plain_weight, plain_dy = (part.astype(summed) for part in (x, weight, dy))

            def one_by_one(terms: Array, summed: str = summed) -> Array:
                return numpy.cumsum(terms, axis=0, dtype=summed)[-1]

            def put(values: Array, dtype: str = dtype) -> Any:
                return bench.put(values, dtype)

            plain = one_by_one(plain_x.T[:, :, None] * plain_weight.T[:, None]) + bias.astype(summed)
            rows = {
                "linear_forward": (lambda: kernels.linear_forward(put(x), put(weight), put(bias)), y, plain),
                "linear_backward_data": (
                    lambda: kernels.linear_backward_data(put(dy), put(weight)), dx,
                    one_by_one(plain_dy.T[:, :, None] * plain_weight[:, None]),
                ),
                "linear_backward_weight": (
                    lambda: kernels.linear_backward_weight(put(dy), put(x)), dweight,
                    one_by_one(plain_dy[:, :, None] * plain_x[:, None]),
                ),
                "linear_backward_bias": (
                    lambda: kernels.linear_backward_bias(put(dy)), dbias, one_by_one(plain_dy)
                ),
            }  # fmt: skip
            for operation, (run, expected, plain) in rows.items():
                terms = max(inputs, outputs, count)
                bound = by_comparison(dtype, expected, plain, terms)
                bench.check(operation, f"{count}, {inputs}, {outputs}", dtype, run, [expected], [bound])
            for algorithm in ALGORITHMS[1:]:
                check_linear_together(bench, algorithm, dtype, x, weight, bias, dy)


def check_linear_together(
    bench: Bench, algorithm: str, dtype: str, x: Array, weight: Array, bias: Array, dy: Array
) -> None:
    """A layer with its ReLU, and all of its gradients, whose parameters' are wider than 16 bits."""
    size = f"{len(x)}, {x.shape[1]}, {len(bias)}"
    sums = linear_oracle.forward(x, weight, bias)
    shut = sums * dy < 0  # what the ReLU lets through is told by its result, here any one
    opened = numpy.where(shut, 0.0, 1.0)
    gradients = linear_oracle.backward(dy * opened, x, weight)
    largest = max(x.shape[1], len(bias), len(x))
    loose = [rounding(accumulated(dtype), part, largest, largest) for part in gradients[1:]]

    def put(values: Array) -> Any:
        return bench.put(values, dtype)

    bench.check(
        "linear_forward, with ReLU", size, dtype,
        lambda: kernels.linear_forward(put(x), put(weight), put(bias), activation="relu", algorithm=algorithm),
        [numpy.maximum(sums, 0)], [rounding(dtype, sums, largest, largest)], algorithm=algorithm,
    )  # fmt: skip
    bench.check(
        "linear_backward", size, dtype,
        lambda: kernels.linear_backward(
            put(dy), put(x), put(weight), y=put(opened), activation="relu", algorithm=algorithm
        ),
        gradients, [rounding(dtype, gradients[0], largest, largest), *loose], algorithm=algorithm,
    )  # fmt: skip


CHECKS = {
    "activations": check_activations,
    "pooling": check_pooling,
    "batch norm": check_batch_norm,
    "softmax": check_softmax,
    "dropout": check_dropout,
    "linear": check_linear,
}
