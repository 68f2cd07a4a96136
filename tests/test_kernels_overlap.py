"""An ``out`` that is an input by a shift, or in another order: refused, as its elements would be lost unread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest

import gpucnn_kernels as kernels
from gpucnn_kernels.errors import ArgumentError
from gpucnn_kernels.runtime import using

pytestmark = pytest.mark.compiler

SHAPE = (2, 4, 3, 2)
SIZE = 48

Array = Any
Function = Callable[[Array, Array, Array], Any]
"""Of an input, another array of its form, and an ``out``."""


def channels(value: float) -> Array:
    return numpy.full(4, value, numpy.float32)


def batch_norm_backward(dy: Array, x: Array, out: Array) -> Any:
    return kernels.batch_norm_backward(dy, x, channels(1), channels(0), channels(1), out=out)


def dropout_backward(dy: Array, x: Array, out: Array) -> Any:
    return kernels.dropout_backward(dy, x > 0, probability=0.5, out=out)


def cross_entropy_backward(probabilities: Array, x: Array, out: Array) -> Any:
    form = (-1, 4)
    targets = numpy.arange(SIZE // 4) % 4
    given = probabilities.reshape(form), targets
    return kernels.softmax_cross_entropy_backward(*given, out=out.reshape(form))


FUNCTIONS: dict[str, Function] = {
    "relu_forward": lambda x, _, out: kernels.relu_forward(x, out=out),
    "sigmoid_backward of dy": lambda dy, y, out: kernels.sigmoid_backward(dy, y, out=out),
    "sigmoid_backward of y": lambda y, dy, out: kernels.sigmoid_backward(dy, y, out=out),
    "dropout_forward": lambda x, _, out: kernels.dropout_forward(x, probability=0.5, seed=1, offset=0, out=out),
    "dropout_backward": dropout_backward,
    "softmax_forward": lambda x, _, out: kernels.softmax_forward(x, out=out),
    "softmax_backward": lambda y, dy, out: kernels.softmax_backward(dy, y, out=out),
    "softmax_cross_entropy_backward": cross_entropy_backward,
    "mean_squared_error_backward": lambda x, y, out: kernels.mean_squared_error_backward(x, y, out=out),
    "binary_cross_entropy_with_logits_backward": (
        lambda x, y, out: kernels.binary_cross_entropy_with_logits_backward(x, y, out=out)
    ),
    "batch_norm_forward": lambda x, _, out: kernels.batch_norm_forward(x, channels(1), channels(0), out=out),
    "batch_norm_backward of dy": batch_norm_backward,
    "batch_norm_backward of x": lambda x, dy, out: batch_norm_backward(dy, x, out),
    "batch_norm_inference_backward of dy": (
        lambda dy, x, out: kernels.batch_norm_inference_backward(
            dy, x, channels(1), channels(0), channels(1), out=out
        )
    ),
    "batch_norm_inference_backward of x": (
        lambda x, dy, out: kernels.batch_norm_inference_backward(
            dy, x, channels(1), channels(0), channels(1), out=out
        )
    ),
    "batch_norm_inference": (
        lambda x, _, out: kernels.batch_norm_inference(
            x, channels(1), channels(0), channels(0), channels(1), out=out
        )
    ),
}


@pytest.fixture(autouse=True)
def host() -> Iterator[None]:
    with using("host"):
        yield


def numbers(seed: int) -> Array:
    return numpy.random.default_rng(seed).uniform(0.1, 0.9, 2 * SIZE).astype(numpy.float32)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_shifted_out_is_refused_and_the_array_itself_is_not(name: str) -> None:
    function, memory, other = FUNCTIONS[name], numbers(1), numbers(2)[:SIZE].reshape(SHAPE)
    for start, begin in ((0, 1), (1, 0), (0, SIZE - 1), (8, 0)):
        x, out = (memory[first : first + SIZE].reshape(SHAPE) for first in (start, begin))
        before = memory.copy()
        with pytest.raises(ArgumentError, match=r"out shares memory with .*, but shifted or in another order"):
            function(x, other, out)
        assert (memory == before).all()
    x = memory[:SIZE].reshape(SHAPE)
    apart = function(x, other, numpy.empty_like(x))
    inside = function(x, other, x)
    first = (result[0] if isinstance(result, tuple) else result for result in (apart, inside))
    assert numpy.array_equal(*first)


def test_an_array_in_another_order_is_not_itself() -> None:
    memory = numbers(1)[:SIZE]
    dy, last = memory.reshape(SHAPE), memory.reshape(2, 3, 2, 4).transpose(0, 3, 1, 2)
    with pytest.raises(ArgumentError, match="out shares memory with dy, but shifted or in another order"):
        kernels.dropout_backward(dy, numpy.ones(SHAPE, bool), probability=0.5, out=last)


def test_two_results_need_two_places() -> None:
    x, dy, y = (numbers(seed)[:SIZE].reshape(SHAPE) for seed in (1, 2, 3))
    place = numpy.empty_like(x)
    with pytest.raises(ArgumentError, match="out_residual shares memory with out"):
        kernels.batch_norm_backward(
            dy, x, channels(1), channels(0), channels(1), y=y, activation="relu", out=place, out_residual=place
        )


def test_nothing_meets_nothing() -> None:
    memory = numpy.empty(0, numpy.float32)
    assert kernels.relu_forward(memory, out=memory[:0]).size == 0
