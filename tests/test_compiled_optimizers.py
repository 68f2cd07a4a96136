"""Optimizer steps, sums, dropout and images as compiled loops: digits, ends of arrays, threads."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucnn import random as philox
from gpucnn.ops import cpu
from gpucnn.ops.cpu import compiled
from gpucnn.ops.cpu.compiled import optimizers as loops
from tests.guarded import guarded, guarded_empty
from tests.oracles import images as image_oracle
from tests.oracles import optimizers as oracle

pytestmark = pytest.mark.compiler

SIZES = [1, 7, 15, 16, 17, 33, 100, 32767, 32768, 32769, 65553]
EPSILON = float(numpy.finfo(numpy.float32).eps)


@pytest.fixture(autouse=True)
def _loops() -> None:
    assert compiled.available(), compiled.why_not()


def buffers(size: int, count: int, seed: int = 0) -> list[Any]:
    return list(numpy.random.default_rng(seed).standard_normal((count, size), numpy.float32))


# ---------------------------------------------------------------- optimizer steps

STEPS = {
    "sgd": (cpu.sgd_step, 1, {"lr": 0.1}),
    "sgd decay": (cpu.sgd_step, 1, {"lr": 0.1, "weight_decay": 0.01, "maximize": True}),
    "sgd momentum": (cpu.sgd_step, 1, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1}),
    "sgd first": (cpu.sgd_step, 1, {"lr": 0.1, "momentum": 0.9, "first_step": True}),
    "sgd nesterov": (cpu.sgd_step, 1, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adam": (cpu.adam_step, 2, {"lr": 0.1, "step": 3, "weight_decay": 0.01}),
    "adamw": (cpu.adam_step, 2, {"lr": 0.1, "step": 1, "weight_decay": 0.01, "decoupled": True}),
    "rmsprop": (cpu.rmsprop_step, 3, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
}
NAMES = pytest.mark.parametrize("name", STEPS)


def state(name: str, size: int) -> list[Any]:
    """Parameter, gradient and buffers; averages of squares are positive, and above the averages' squares."""
    arrays = buffers(size, 2 + STEPS[name][1], 1)
    if name.startswith("adam"):
        arrays[3] = abs(arrays[3])
    if name == "rmsprop":
        arrays[2] = 1 + arrays[4] ** 2
    return arrays


@NAMES
def test_the_step_is_the_numpy_ways(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step, _, options = STEPS[name]
    loop, calls = getattr(loops, step.__name__), []
    monkeypatch.setattr(loops, step.__name__, lambda *arguments: (calls.append(1), loop(*arguments)))
    ours, theirs = state(name, 5000), state(name, 5000)
    wide = [array.astype("f8") for array in theirs]
    step(*ours, **options)
    with compiled.switched(False):
        step(*theirs, **options)
        step(*wide, **options)
    for one, other, exact in zip(ours, theirs, wide, strict=True):
        scale = float(abs(exact).max())
        assert abs(one - exact).max() <= 2 * abs(other - exact).max() + EPSILON * scale
    assert calls == [1]


@NAMES
@pytest.mark.parametrize("size", SIZES)
def test_no_byte_beyond_the_ends(name: str, size: int) -> None:
    step, _, options = STEPS[name]
    wanted = state(name, size)
    step(*wanted, **options)
    for end in (True, False):
        found = [guarded(array, end) for array in state(name, size)]
        step(*found, **options)
        for one, other in zip(found, wanted, strict=True):
            numpy.testing.assert_array_equal(one, other)


@NAMES
def test_the_number_of_threads_changes_no_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step, _, options = STEPS[name]
    results = []
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("GPUCNN_NUM_THREADS", threads)
        results.append(state(name, 150001))
        step(*results[-1], **options)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            numpy.testing.assert_array_equal(one, two)


def test_a_first_step_does_not_read_the_momentum() -> None:
    parameter, gradient = buffers(40, 2)
    velocity = numpy.full(40, numpy.nan, numpy.float32)
    values, moved = oracle.sgd(
        list(map(float, parameter)), list(map(float, gradient)), [0.0] * 40, 0.1, 0.9, 0, 0, False, False, True
    )
    cpu.sgd_step(parameter, gradient, velocity, lr=0.1, momentum=0.9, first_step=True)
    assert abs(parameter - values).max() <= 4 * EPSILON * abs(parameter).max()
    assert abs(velocity - moved).max() == 0


# ---------------------------------------------------------------- sums


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 200), st.integers(0, 60), st.integers(0, 1000))
def test_sums_over_rows(rows: int, columns: int, seed: int) -> None:
    x = numpy.random.default_rng(seed).standard_normal((rows, columns), numpy.float32)
    expected = x.sum(axis=0, dtype=numpy.float64)
    # Added in double: rounded once, to a float.
    assert numpy.all(abs(cpu.linear_backward_bias(x) - expected) <= EPSILON / 2 * abs(expected) + 1e-13)


@pytest.mark.parametrize(
    "shape", [(3, 5, 1, 1), (2, 3, 5, 7), (1, 4, 90, 91), (70, 2, 8, 8), (5, 40, 3, 3)], ids=str
)
def test_sums_over_images_and_pixels(shape: tuple[int, ...]) -> None:
    x = 1 + numpy.random.default_rng(2).random(shape, numpy.float32)
    expected = x.sum(axis=(0, 2, 3), dtype=numpy.float64)
    for end in (True, False):
        out = guarded_empty(shape[1], end=end)
        cpu.conv2d_backward_bias(guarded(x, end), out=out)
        assert numpy.all(abs(out - expected) <= 2 * EPSILON * expected)


@pytest.mark.parametrize("size", SIZES)
def test_sums_of_squares(size: int) -> None:
    x = buffers(size, 1, 3)[0]
    expected = math.fsum(float(value) ** 2 for value in x)
    for end in (True, False):
        assert abs(cpu.sum_of_squares(guarded(x, end)) - expected) <= 1e-14 * expected
        scaled = guarded(x, end)
        cpu.scale(scaled, -2.0)
        numpy.testing.assert_array_equal(scaled, -2 * x)


def test_columns_up_to_an_unreadable_page() -> None:
    for rows, columns in ((1, 1), (3, 15), (600, 17), (5, 64), (7, 129)):
        x = buffers(rows * columns, 1, 4)[0].reshape(rows, columns)
        expected = cpu.linear_backward_bias(x)
        for end in (True, False):
            out = guarded_empty(columns, end=end)
            numpy.testing.assert_array_equal(cpu.linear_backward_bias(guarded(x, end), out=out), expected)


# ---------------------------------------------------------------- dropout


@settings(max_examples=100, deadline=None)
@given(
    size=st.integers(1, 300),
    seed=st.integers(0, 2**64 - 1),
    offset=st.one_of(st.integers(0, 1000), st.integers(2**33, 2**62), st.integers(2**64 - 300, 2**65)),
    probability=st.floats(0, 1),
)
def test_masks_are_the_generators(size: int, seed: int, offset: int, probability: float) -> None:
    x = numpy.ones(size, numpy.float32)
    y, mask = cpu.dropout_forward(x, probability=probability, seed=seed, offset=offset)
    expected = philox.words(seed, offset, size).astype(numpy.uint64) >= math.ceil(probability * 2**32)
    numpy.testing.assert_array_equal(mask, expected)
    assert mask.dtype == numpy.bool_
    assert numpy.all(y[~mask] == 0)
    with numpy.errstate(all="ignore"):
        assert numpy.all(y[mask] == numpy.float32(1 / (1 - probability) if probability < 1 else 0))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 3, 7), (2, 20, 16, 16), (1, 2, 200, 201)], ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
def test_dropout_is_the_numpy_ways_bit_for_bit(shape: tuple[int, ...], per_channel: bool) -> None:
    x = buffers(math.prod(shape), 1, 5)[0].reshape(shape)
    x.flat[-1] = numpy.inf
    options = {"probability": 0.3, "seed": 9, "offset": 6, "per_channel": per_channel}
    with compiled.switched(False):
        y, mask = cpu.dropout_forward(x, **options)
        dx = cpu.dropout_backward(x, mask, probability=0.3)
    for end in (True, False):
        out = guarded_empty(shape, end=end)
        found = cpu.dropout_forward(guarded(x, end), out=out, **options)
        numpy.testing.assert_array_equal(found[0], y)
        numpy.testing.assert_array_equal(found[1], mask)
        cpu.dropout_backward(guarded(x, end), guarded(mask, end), probability=0.3, out=out)
        numpy.testing.assert_array_equal(out, dx)


# ---------------------------------------------------------------- images


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 40), st.sampled_from([1, 2, 3, 4])),
    window=st.tuples(st.integers(1, 12), st.integers(1, 45)),
    corner=st.tuples(st.integers(-50, 50), st.integers(-50, 50)),
    mirrored=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_windows_of_images(
    sizes: tuple[int, ...], window: tuple[int, int], corner: tuple[int, int], mirrored: bool, seed: int
) -> None:
    n, channels = sizes[0], sizes[3]
    images = guarded(numpy.random.default_rng(seed).integers(0, 256, sizes, numpy.uint8))
    mean, std = [0.5, 0.4, 0.3, 0.2][:channels], [0.2, 0.3, 0.25, 0.5][:channels]
    flip = guarded(numpy.arange(n) % 2 == mirrored)
    offsets = guarded(numpy.array([corner] * n, numpy.int64))
    expected = image_oracle.images_to_float(images, mean, std, flip, offsets, window)
    out = guarded_empty((n, channels, *window))
    cpu.images_to_float(images, mean=mean, std=std, flip=flip, crop_offset=offsets, crop_size=window, out=out)
    assert abs(out - expected).max() <= 1e-6
