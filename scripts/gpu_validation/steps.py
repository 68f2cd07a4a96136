"""Losses and their gradients, optimizer steps, bytes to images, memory formats."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy

import gpucnn_kernels as kernels
from gpucnn_kernels.cross_entropy import softmax_cross_entropy_step
from scripts.gpu_validation.bench import EPSILON, Bench, accumulated, rounding
from tests.oracles import activations as activation_oracle
from tests.oracles import losses as oracle
from tests.oracles import optimizers as optimizer_oracle
from tests.oracles.images import images_to_float

Array = numpy.ndarray[Any, Any]
REDUCTIONS = ("mean", "sum", "none")


def slope(loss: Callable[[Array], Any], at: Array, step: float = 1e-4) -> Array:
    """The derivative of the sum of a loss by each number, by differences of fourth order."""
    result = numpy.zeros(at.shape)
    for index in numpy.ndindex(*at.shape):
        values = []
        for shift in (-2, -1, 1, 2):
            moved = at.copy()
            moved[index] += shift * step
            values.append(float(numpy.sum(loss(moved))))
        result[index] = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step)
    return result


# ------------------------------------------------------------ losses


def check_cross_entropy(bench: Bench) -> None:
    """Class numbers, all or some of them, and probabilities, with all options; gradients against differences."""
    cases = [(7, 5, True, 0.0), (7, 5, False, 0.1), (3, 40, True, 0.2), (70, 4, False, 0.0)]
    for numbers, (count, classes, weighted, smoothing) in product(
        bench.numbers(), cases if bench.whole else cases[:2]
    ):
        logits = numbers.uniform(-5, 5, count, classes)
        labels = numbers.random.integers(0, classes, count)
        some = numpy.where(numpy.arange(count) % 3 == 1, -100, labels)  # the others are ignored
        soft = numbers.uniform(0, 2 / classes, count, classes)
        weight = numbers.uniform(0.2, 1.2, classes) if weighted else None
        probabilities = activation_oracle.softmax(logits, 1)
        given_back = numbers.rounded(probabilities)  # what backward reads, as it is stored
        for targets, reduction in product((labels, some, soft), REDUCTIONS):
            ignored = -100 if targets is some else None
            options = {"label_smoothing": smoothing, "reduction": reduction, "ignore_index": ignored}

            def loss(
                at: Array, targets: Array = targets, reduction: str = reduction, ignored: int | None = ignored
            ) -> Any:
                return oracle.cross_entropy(at, targets, weight, smoothing, reduction, ignored)

            # As the probabilities are stored, they stand for these logits.
            at = numpy.log(numpy.maximum(given_back, 1e-300))
            gradient = slope(loss, at) if count * classes <= 60 else None
            expected = numpy.asarray(loss(logits))
            for dtype in numbers.dtypes:
                wide = accumulated(dtype)

                def put(values: Any, dtype: str | None = dtype) -> Any:
                    return None if values is None else bench.put(values, dtype)

                title = f"{count} of {classes}, {'probabilities' if targets is soft else 'classes'}, {options}"
                kind = dtype if targets is soft else None
                total = 40 * (count if reduction == "sum" else 1)
                bench.check(
                    "softmax_cross_entropy_forward", title, dtype,
                    lambda: (
                        kernels.softmax_cross_entropy_forward(
                            put(logits), put(targets, kind), weight=put(weight, wide), **options
                        )
                    ),
                    [expected, probabilities],
                    [rounding(dtype, expected, total, 4), rounding(dtype, probabilities, 1, 16)],
                )  # fmt: skip
                if targets is not soft and reduction != "none":
                    check_loss_of_a_step(bench, title, dtype, put, logits, targets, weight, options)
                # The stored probabilities do not quite add up to 1, which the definition takes for granted.
                missing = numpy.abs(1 - given_back.sum(1)).max() * (1 if weight is None else weight.max()) * 2
                bench.check(
                    "softmax_cross_entropy_backward", title, dtype,
                    lambda: (
                        kernels.softmax_cross_entropy_backward(
                            put(given_back), put(targets, kind), weight=put(weight, wide), **options
                        )
                    ),
                    [gradient],
                    [None if gradient is None else rounding(dtype, gradient, 4, 4) + 1e-10 + missing],
                )  # fmt: skip


def check_loss_of_a_step(
    bench: Bench, title: str, dtype: str, put: Any, logits: Array, labels: Array, weight: Any, options: Any
) -> None:
    """A training step's one launch, with the bits of the operations one by one."""
    given = {"weight": put(weight, accumulated(dtype)), **options}
    loss, probabilities = kernels.softmax_cross_entropy_forward(put(logits), put(labels, None), **given)
    gradient = kernels.softmax_cross_entropy_backward(probabilities, put(labels, None), **given)
    expected = [bench.get(array).astype(numpy.float64) for array in (loss, gradient)]

    def step() -> Any:
        done = bench.put([0], "int32")
        return *softmax_cross_entropy_step(put(logits), put(labels, None), **given, done=done), done

    correct = (logits.argmax(axis=1) == labels).sum()
    bench.check(
        "softmax_cross_entropy_backward, with the loss", title, dtype, step, [*expected, correct, [0]], [0.0] * 4
    )


def check_element_losses(bench: Bench) -> None:
    """Binary cross-entropy with its weights, and mean squared error."""
    for numbers, shape, reduction in product(bench.numbers(), [(6, 5), (3, 2, 4)], REDUCTIONS):
        logits, targets = numbers.uniform(-6, 6, *shape), numbers.uniform(0, 1, *shape)
        weight, positive = numbers.uniform(0.2, 1.2, *shape), numbers.uniform(0.5, 2, shape[-1])
        prediction = numbers.normal(*shape)

        def binary(at: Array) -> Any:
            return oracle.binary_cross_entropy_with_logits(
                at, targets, weight, numpy.broadcast_to(positive, shape), reduction
            )

        def squared(at: Array) -> Any:
            return oracle.mean_squared_error(at, targets, reduction)

        slopes = {"binary": slope(binary, logits), "squared": slope(squared, prediction)}
        for dtype in numbers.dtypes:
            wide = accumulated(dtype)

            def put(values: Array, dtype: str = dtype) -> Any:
                return bench.put(values, dtype)

            def weights(put: Any = put, wide: str = wide) -> dict[str, Any]:
                return {"weight": put(weight, wide), "positive_weight": put(positive, wide)}

            size = 30 * (math.prod(shape) if reduction == "sum" else 1)
            rows = {
                "binary_cross_entropy_with_logits_forward": (
                    lambda: kernels.binary_cross_entropy_with_logits_forward(
                        put(logits), put(targets), reduction=reduction, **weights()
                    ),
                    numpy.asarray(binary(logits)), size,
                ),
                "binary_cross_entropy_with_logits_backward": (
                    lambda: kernels.binary_cross_entropy_with_logits_backward(
                        put(logits), put(targets), reduction=reduction, **weights()
                    ),
                    slopes["binary"], 8,
                ),
                "mean_squared_error_forward": (
                    lambda: kernels.mean_squared_error_forward(
                        put(prediction), put(targets), reduction=reduction
                    ),
                    numpy.asarray(squared(prediction)), size,
                ),
                "mean_squared_error_backward": (
                    lambda: kernels.mean_squared_error_backward(
                        put(prediction), put(targets), reduction=reduction
                    ),
                    slopes["squared"], 8,
                ),
            }  # fmt: skip
            for operation, (run, expected, scale) in rows.items():
                bound = rounding(dtype, expected, scale, 4) + (1e-10 if "backward" in operation else 0)
                bench.check(operation, f"{shape}, {reduction}", dtype, run, [expected], [bound])


# ------------------------------------------------------------ optimizers

STEPS = 3
LENGTH = 1037


def check_optimizers(bench: Bench) -> None:
    """Three steps of each, the state along; norms, scaling and clipping."""
    for numbers in bench.numbers():
        start, gradients = numbers.normal(LENGTH), numbers.normal(STEPS, LENGTH)
        for dtype in numbers.dtypes:
            check_sgd(bench, dtype, start, gradients)
            check_adam(bench, dtype, start, gradients)
            check_rmsprop(bench, dtype, start, gradients)
            check_norms(bench, dtype, start)


def near(dtype: str, expected: Any, steps: int = STEPS) -> float:
    """Some roundings of the arithmetic a step, and one of the storage, at the size of the numbers."""
    stored = EPSILON[dtype] / 2 if dtype in ("float16", "bfloat16") else 0.0
    scale = 1 + float(numpy.abs(expected).max(initial=0.0))
    return steps * scale * (stored + 8 * EPSILON[accumulated(dtype)])


def check_state(bench: Bench, operation: str, title: str, dtype: str, run: Any, expected: Any) -> None:
    """Parameters in ``dtype``, the rest in what is computed in; that follows the rounded parameters."""
    bounds = [near(dtype, values) for values in expected]
    bench.check(operation, title, dtype, run, [numpy.array(values) for values in expected], bounds)


def check_sgd(bench: Bench, dtype: str, start: Array, gradients: Array) -> None:
    """With momentum, Nesterov's and without; the first step must not read the buffer."""
    for momentum, nesterov, maximize in ((0.0, False, False), (0.9, False, True), (0.9, True, False)):
        options = {
            "momentum": momentum,
            "nesterov": nesterov,
            "maximize": maximize,
            "weight_decay": 0.02,
            "lr": 0.1,
        }

        def run(options: dict[str, Any] = options, momentum: float = momentum) -> Any:
            values = bench.put(start, dtype)
            buffer = bench.poisoned(start.shape, accumulated(dtype)) if momentum else None
            for number, gradient in enumerate(gradients):
                kernels.sgd_step(values, bench.put(gradient, dtype), buffer, first_step=number == 0, **options)
            return (values, buffer) if momentum else values

        expected, velocity = start.tolist(), [0.0] * LENGTH
        for number, gradient in enumerate(gradients):
            expected, velocity = optimizer_oracle.sgd(
                expected, gradient.tolist(), velocity, dampening=0.0, first_step=number == 0, **options
            )
        wanted = (expected, velocity) if momentum else (expected,)
        check_state(bench, "sgd_step", f"momentum {momentum}, nesterov {nesterov}", dtype, run, wanted)


def check_adam(bench: Bench, dtype: str, start: Array, gradients: Array) -> None:
    """Adam and AdamW."""
    for decoupled in (False, True):
        options = {
            "lr": 0.02, "beta1": 0.85, "beta2": 0.95, "epsilon": 1e-6, "weight_decay": 0.1, "decoupled": decoupled
        }  # fmt: skip

        def run(options: dict[str, Any] = options) -> Any:
            values = bench.put(start, dtype)
            state = [bench.put(numpy.zeros(LENGTH), accumulated(dtype)) for _ in range(2)]
            for number, gradient in enumerate(gradients, 1):
                kernels.adam_step(values, bench.put(gradient, dtype), *state, step=number, **options)
            return (values, *state)

        expected: Any = (start.tolist(), [0.0] * LENGTH, [0.0] * LENGTH)
        for number, gradient in enumerate(gradients, 1):
            expected = optimizer_oracle.adam(expected[0], gradient.tolist(), *expected[1:], step=number, **options)
        check_state(bench, "adam_step", f"decoupled {decoupled}", dtype, run, expected)


def check_rmsprop(bench: Bench, dtype: str, start: Array, gradients: Array) -> None:
    """Plain, with momentum and centered."""
    for momentum, centered in ((0.0, False), (0.8, True)):
        options = {"lr": 0.01, "alpha": 0.9, "epsilon": 1e-3, "weight_decay": 0.05, "momentum": momentum}

        def run(options: dict[str, Any] = options, momentum: float = momentum, centered: bool = centered) -> Any:
            values = bench.put(start, dtype)
            square, velocity, average = (bench.put(numpy.zeros(LENGTH), accumulated(dtype)) for _ in range(3))
            for gradient in gradients:
                kernels.rmsprop_step(
                    values, bench.put(gradient, dtype), square, velocity if momentum else None,
                    average if centered else None, **options,
                )  # fmt: skip
            return (values, square)

        expected: Any = (start.tolist(), *([0.0] * LENGTH for _ in range(3)))
        for gradient in gradients:
            expected = optimizer_oracle.rmsprop(
                expected[0], gradient.tolist(), *expected[1:], centered=centered, **options
            )
        title = f"momentum {momentum}, centered {centered}"
        check_state(bench, "rmsprop_step", title, dtype, run, expected[:2])


def check_norms(bench: Bench, dtype: str, values: Array) -> None:
    """The sum of squares, scaling in place, clipping by the norm."""
    total = math.fsum((values * values).tolist())
    norm = math.sqrt(total)
    # Squares are made in the dtype that is computed in, and added up in float64.
    relative = 2 * EPSILON[accumulated(dtype)]
    bench.check(
        "sum_of_squares", "1037 numbers", dtype, lambda: kernels.sum_of_squares(bench.put(values, dtype)),
        [total], [relative * total],
    )  # fmt: skip

    def scaled() -> Any:
        array = bench.put(values, dtype)
        kernels.scale(array, 0.3)
        return array

    def clipped() -> Any:
        array = bench.put(values, dtype)
        return array, kernels.clip_by_norm(array, max_norm=2.0)

    less = values * min(1.0, 2.0 / (norm + 1e-6))
    bench.check("scale", "by 0.3", dtype, scaled, [values * 0.3], [rounding(dtype, values * 0.3, values)])
    bench.check(
        "clip_by_norm", "to 2", dtype, clipped, [less, norm], [rounding(dtype, less, values), relative * norm]
    )


# ------------------------------------------------------------ images and layouts


def check_images(bench: Bench) -> None:
    """Bytes (N, H, W, C) to normalized numbers, mirrored and cut."""
    for numbers, channels in product(bench.numbers(), (1, 3, 6)):
        random = numbers.random
        images = random.integers(0, 256, (5, 9, 7, channels), numpy.uint8)
        mean, std = random.uniform(0.2, 0.8, channels).tolist(), random.uniform(0.2, 0.5, channels).tolist()
        flip = random.integers(0, 2, 5).astype(bool)
        offset = random.integers(-3, 4, (5, 2))
        for crop in (None, (6, 8)):
            moved = None if crop is None else offset
            expected = images_to_float(images, mean, std, flip, moved, crop)
            for dtype, last in product(numbers.dtypes, (False, True)):
                bench.check(
                    "images_to_float", f"{channels} channels, crop {crop}, channels last {last}", dtype,
                    lambda: kernels.images_to_float(
                        bench.put(images), mean=mean, std=std, flip=bench.put(flip), dtype=dtype,
                        crop_offset=None if moved is None else bench.put(moved), crop_size=crop,
                        channels_last=last,
                    ),
                    [expected], [rounding(dtype, expected, 10)],
                )  # fmt: skip


def check_layouts(bench: Bench) -> None:
    """From contiguous to channels-last and back, every number as it is."""
    for numbers, shape in product(bench.numbers(), [(2, 3, 5, 7), (1, 70, 9, 33), (3, 1, 4, 4), (2, 33, 1, 5)]):
        x = numbers.normal(*shape)
        for dtype in numbers.dtypes:
            for operation, layout in (("to_channels_last", "contiguous"), ("to_contiguous", "channels_last")):
                same = "contiguous" if operation == "to_contiguous" else "channels_last"
                bench.check(
                    operation, f"{shape}, out of the same layout", dtype,
                    lambda: getattr(kernels, operation)(
                        bench.put(x, dtype, same), out=bench.put(numpy.full(shape, numpy.nan), dtype, same)
                    ),
                    [x], [0.0],
                )  # fmt: skip
                bench.check(
                    operation, f"{shape}", dtype,
                    lambda: getattr(kernels, operation)(
                        bench.put(x, dtype, layout)
                    ),
                    [x], [0.0],
                )  # fmt: skip


CHECKS = {
    "cross-entropy": check_cross_entropy,
    "other losses": check_element_losses,
    "optimizers": check_optimizers,
    "images": check_images,
    "layouts": check_layouts,
}
