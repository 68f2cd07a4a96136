"""What convolutions end with before their sums are stored: activations, scales, shortcuts, max pooling."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy

import gpucnn_kernels as kernels
from gpucnn_kernels import conv2d_max_pool
from gpucnn_kernels.arrays import numpy_dtype
from scripts.gpu_validation.bench import EPSILON, LAYOUTS, Bench, rounding
from scripts.gpu_validation.convolution import ATOMIC, Array, Expectations, takes
from tests.oracles import activations as activation_oracle
from tests.oracles import convolution as oracle
from tests.oracles import pooling as pooling_oracle
from tests.problems import ALL, geometry, options

FUNCTIONS = {
    "relu": activation_oracle.relu,
    "relu6": activation_oracle.relu6,
    "leaky_relu": lambda x: activation_oracle.leaky_relu(x, 0.2),
    "sigmoid": activation_oracle.sigmoid,
    "tanh": numpy.tanh,
    "gelu": activation_oracle.gelu,
    "gelu_tanh": activation_oracle.gelu_tanh,
    "silu": activation_oracle.silu,
}


def check_epilogue(bench: Bench) -> None:
    """Activations made before the sum is stored, by every algorithm."""
    for numbers in bench.numbers():
        for name in ("k3-same", "depthwise-s2"):
            wanted = Expectations(name, ALL[name], numbers)
            for function, by_definition in FUNCTIONS.items():
                expected = activation_oracle.elementwise(by_definition, wanted.truth("forward"))
                for dtype, algorithm in product(numbers.dtypes, kernels.conv2d_algorithms("forward")):
                    if not takes(algorithm, wanted.problem):
                        continue
                    bench.check(
                        "conv2d_forward, activation", f"{name}, {function}", dtype,
                        lambda: (
                            kernels.conv2d_forward(
                                *(bench.put(part, dtype) for part in (wanted.x, wanted.weight, wanted.bias)),
                                algorithm=algorithm, activation=function, negative_slope=0.2,
                                **options(wanted.problem),
                            )
                        ),
                        [expected],
                        # No activation is steeper than 1.13; its own rounding is that of its result.
                        [1.2 * wanted.bound("forward", dtype) + rounding(dtype, expected, 1 + abs(expected), 8)],
                        algorithm=algorithm,
                    )  # fmt: skip


def check_shortcut(bench: Bench) -> None:
    """relu(scale * sum + bias + residual), by every algorithm, tensor cores among them."""
    for numbers in bench.numbers():
        for name in ("k3-same", "depthwise-s2", "k1", "resnet-down"):
            wanted = Expectations(name, ALL[name], numbers)
            scale, bias = numbers.uniform(0.5, 1.5, wanted.problem.K), wanted.bias[:, None, None]
            residual = wanted.dy
            product_of_sums = scale[:, None, None] * (wanted.truth("forward") - bias)
            expected = numpy.maximum(product_of_sums + bias + residual, 0)
            size = numpy.abs(product_of_sums) + numpy.abs(bias) + numpy.abs(residual)
            ways = [
                (algorithm, dtype)
                for algorithm in kernels.conv2d_algorithms("forward")
                for dtype in numbers.dtypes
            ]
            ways += [("tensor", dtype) for dtype in numbers.dtypes if dtype != "float64"]
            for (algorithm, dtype), layout in product(ways, LAYOUTS):
                if not takes(algorithm, wanted.problem):
                    continue
                # A tensor core cuts off where float32 arithmetic rounds, once for each 8 products of a sum.
                cut = (
                    wanted.terms("forward") / 8 * EPSILON["float32"] * float(size.max()) * (algorithm == "tensor")
                )
                bound = 1.5 * (wanted.bound("forward", dtype) + cut) + rounding(dtype, expected, size, 8)
                bench.check(
                    "conv2d_forward, scale and residual", f"{name}, {layout}", dtype,
                    lambda: (
                        kernels.conv2d_forward(
                            *(bench.put(part, dtype, layout) for part in (wanted.x, wanted.weight)),
                            bench.put(wanted.bias, dtype), scale=bench.put(scale, dtype),
                            residual=bench.put(residual, dtype, layout), activation="relu", algorithm=algorithm,
                            **options(wanted.problem),
                        )
                    ),
                    [expected], [bound], algorithm=algorithm,
                )  # fmt: skip


def check_second_gradient(bench: Bench) -> None:
    """An input gradient plus another, by every algorithm; also into the other gradient's own memory."""
    for numbers in bench.numbers():
        for name in ("k3-same", "depthwise-s2", "k1", "resnet-down"):
            wanted = Expectations(name, ALL[name], numbers)
            problem, residual = wanted.problem, wanted.x
            expected = wanted.truth("data") + residual
            size = numpy.abs(wanted.truth("data")) + numpy.abs(residual)
            ways = [
                (algorithm, dtype)
                for algorithm in kernels.conv2d_algorithms("backward_data")
                for dtype in numbers.dtypes
            ]
            ways += [("tensor", dtype) for dtype in numbers.dtypes if dtype != "float64"]
            for (algorithm, dtype), layout, in_place in product(ways, LAYOUTS, (False, True)):
                if not takes(algorithm, problem):
                    continue
                cut = wanted.terms("data") / 8 * EPSILON["float32"] * float(size.max()) * (algorithm == "tensor")

                def added(
                    algorithm: str = algorithm, dtype: str = dtype, layout: str = layout, in_place: bool = in_place
                ) -> Any:
                    other = bench.put(residual, dtype, layout)
                    return kernels.conv2d_backward_data(
                        *(bench.put(part, dtype, layout) for part in (wanted.dy, wanted.weight)),
                        input_size=(problem.H, problem.W), residual=other, out=other if in_place else None,
                        algorithm=algorithm, **options(problem),
                    )  # fmt: skip

                bench.check(
                    "conv2d_backward_data, residual", f"{name}, {layout}{', in place' * in_place}", dtype, added,
                    [expected], [wanted.bound("data", dtype) + cut + rounding(dtype, expected, size, 8)],
                    algorithm=algorithm, repeatable=algorithm not in ATOMIC,
                )  # fmt: skip


POOLINGS: dict[str, dict[str, Any]] = {
    "lenet-1": {"size": (2, 2), "stride": (2, 2)},
    "lenet-2": {"size": (2, 2), "stride": (2, 2)},
    "animalnet-1": {"size": (2, 2), "stride": (2, 2)},
    "resnet-stem": {"size": (3, 3), "stride": (2, 2), "padding": (1, 1)},
    "k3-same": {"size": (2, 2), "stride": (2, 2), "ceil_mode": True},
    "groups-2": {"size": (2, 3), "stride": (3, 1), "padding": (1, 1), "dilation": (2, 1)},
    "depthwise-multiplier-2": {"size": (2, 2), "stride": (1, 1)},
}
_SMALL_POOLINGS = ("lenet-2", "k3-same", "groups-2", "depthwise-multiplier-2")


def _planned(usual: Any, width: str) -> Any:
    """A plan with the kernel of this width for 2 x 2 windows; of other windows there is one."""

    def plan(problem: Any, pool: Any, dtype: str, gpu: Any) -> Any:
        every = conv2d_max_pool.kernels_for(pool, dtype)
        return usual(problem, pool, dtype, gpu, tuple(k for k in every if k.name.endswith(width)) or every)

    return plan


def check_max_pool(bench: Bench) -> None:
    """Convolution, ReLU and max pooling as one kernel, of integers: sums are exact, and so must be all results."""
    usual = conv2d_max_pool.plan
    try:
        for numbers, name in product(bench.numbers(), POOLINGS if bench.whole else _SMALL_POOLINGS):
            problem, window = (
                ALL[name],
                {"padding": (0, 0), "dilation": (1, 1), "ceil_mode": False, **POOLINGS[name]},
            )
            x, weight, bias = (
                numpy.round(numbers.normal(*shape))
                for shape in (problem.input_shape, problem.weight_shape, (problem.K,))
            )
            sums = numpy.maximum(oracle.plain_forward(x, weight, geometry(problem), bias, "float64"), 0)
            given = {
                ("ceil_mode" if key == "ceil_mode" else f"pool_{key}"): value for key, value in window.items()
            }
            for dtype, layout, width in product(numbers.dtypes, LAYOUTS, ("wide", "medium", "narrow")):
                vars(conv2d_max_pool)["plan"] = _planned(usual, width)
                stored: Array = sums.astype(numpy_dtype(dtype)).astype("float64")
                expected = pooling_oracle.max_pool(
                    stored,
                    window["size"],
                    window["stride"],
                    window["padding"],
                    window["dilation"],
                    window["ceil_mode"],
                )
                bench.check(
                    "conv2d_max_pool2d_forward", f"{name}, {layout}, {width}", dtype,
                    lambda: (
                        kernels.conv2d_max_pool2d_forward(
                            *(bench.put(part, dtype, layout) for part in (x, weight)), bench.put(bias, dtype),
                            activation="relu", **given, **options(problem),
                        )
                    ),
                    expected, [0.0, 0.0],
                )  # fmt: skip
    finally:
        vars(conv2d_max_pool)["plan"] = usual


CHECKS = {
    "convolution with activation": check_epilogue,
    "convolution with shortcut": check_shortcut,
    "input gradient with another": check_second_gradient,
    "convolution with pooling": check_max_pool,
}
