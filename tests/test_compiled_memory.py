"""The compiled loops' results do not depend on what their memory held before: scratch memory, recycled results."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy
import pytest
from numpy.typing import NDArray

from gpucnn.ops import cpu
from gpucnn.recycling import memory

pytestmark = pytest.mark.compiler

Make = Callable[..., NDArray[Any]]
"""From a shape, an array of float32."""


def convolutions(make: Make, direction: str, algorithm: str) -> list[NDArray[Any]]:
    """The direction's results for problems that differ in what they lay out."""
    groups = 24 if algorithm == "depthwise" else 1
    found = []
    for n, c, h, w, k, kernel, options in (
        (1, 40, 60, 60, 24, 3, {"padding": 1}),  # which fills what the others use in part
        (2, 24, 37, 33, 48, 3, {"padding": 1}),
        (2, 24, 26, 21, 20, 3, {}),
        (3, 24, 7, 5, 24, 3, {"padding": 1}),
        (1, 72, 18, 18, 96, 5, {"padding": 2}),
        (2, 24, 41, 23, 24, 3, {"stride": 2, "padding": 1}),
        (2, 24, 30, 31, 24, 5, {"stride": (3, 4), "padding": (2, 3)}),
        (2, 24, 19, 21, 24, 3, {"dilation": 2, "padding": 3}),
        (2, 24, 14, 14, 48, 1, {}),
    ):
        if algorithm == "winograd" and (kernel == 1 or "stride" in options or "dilation" in options):
            continue
        if groups > 1 and (c != groups or k % groups):
            continue
        x, weight = make(n, c, h, w), make(k, c // groups, kernel, kernel)
        shape = {"algorithm": algorithm, "groups": groups, **options}
        dy = make(*numpy.shape(cpu.conv2d_forward(numpy.ones_like(x), numpy.ones_like(weight), **shape)))
        if direction == "forward":
            found.append(cpu.conv2d_forward(x, weight, make(k), **shape))
        elif direction == "backward_data":
            found.append(cpu.conv2d_backward_data(dy, weight, input_size=(h, w), **shape))
        else:
            found.append(cpu.conv2d_backward_filter(dy, x, kernel_size=kernel, **shape))
    return found


def pooling(make: Make) -> list[NDArray[Any]]:
    """Maxima and means of windows, and back."""
    found = []
    for size, kernel, stride, padding in (
        ((2, 40, 35, 29), 2, 2, 0),
        ((2, 40, 30, 30), 3, 2, 1),
        ((1, 40, 50, 47), 5, 3, 2),
        ((1, 9, 90, 64), 3, 1, 1),
    ):
        options = {"kernel_size": kernel, "stride": stride, "padding": padding}
        x = make(*size)
        y, places = cpu.max_pool2d_forward(x, **options)
        mean = cpu.avg_pool2d_forward(x, **options)
        back = {"input_size": size[2:], **options}
        dy = make(*y.shape)
        found += [
            y,
            places,
            mean,
            cpu.max_pool2d_backward(dy, places, **back),
            cpu.avg_pool2d_backward(dy, **back),
        ]
    return found


def others(make: Make) -> list[NDArray[Any]]:
    """Batch norm, activations, softmax and losses."""
    x, dy, weight = make(4, 33, 31, 29), make(4, 33, 31, 29), make(33)
    y, mean, inverse_std = cpu.batch_norm_forward(x, weight, weight)
    labels = numpy.arange(500) % 101
    loss, probabilities = cpu.softmax_cross_entropy_forward(make(500, 101), labels)
    return [
        *(y, mean, inverse_std, loss, probabilities),
        *cpu.batch_norm_backward(dy, x, weight, mean, inverse_std),
        cpu.gelu_forward(x),
        cpu.softmax_forward(x),
        cpu.softmax_backward(dy, cpu.softmax_forward(x)),
        cpu.softmax_cross_entropy_backward(probabilities, labels),
        cpu.conv2d_backward_bias(dy),
        cpu.dropout_forward(x, probability=0.4, seed=3, offset=5)[0],
    ]


CASES: dict[str, Callable[[Make], list[NDArray[Any]]]] = {
    f"{algorithm}, {direction}": lambda make, d=direction, a=algorithm: convolutions(make, d, a)  # type: ignore[misc]
    for algorithm in ("direct", "winograd", "depthwise")
    for direction in ("forward", "backward_data", "backward_filter")
} | {"pooling": pooling, "others": others}


def numbers() -> Make:
    """The same arrays on every call."""
    random = numpy.random.default_rng(11)
    return lambda *shape: random.standard_normal(shape).astype("f4")


def in_a_thread_of_its_own(case: Callable[[Make], list[NDArray[Any]]]) -> list[NDArray[Any]]:
    """The results with scratch memory that nobody has used."""
    found: list[NDArray[Any]] = []
    memory.clear()
    worker = threading.Thread(target=lambda: found.extend(case(numbers())))
    worker.start()
    worker.join()
    assert found
    return found


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("left", [numpy.nan, 1e-40], ids=["nan", "subnormal"])
def test_what_memory_held_before(
    case: Callable[[Make], list[NDArray[Any]]], left: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUCNN_NUM_THREADS", "1")
    expected = in_a_thread_of_its_own(case)
    for other in CASES.values():  # each leaves other slots, and other sizes of results
        other(lambda *shape: numpy.full(shape, left, "f4"))
    for found, right in zip(case(numbers()), expected, strict=True):
        assert numpy.isfinite(right).all()
        numpy.testing.assert_array_equal(found, right, strict=True)
