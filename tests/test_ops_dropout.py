"""Dropout keeps exactly the elements that the Philox stream says, on any layout."""

import math

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucnn import random
from gpucnn.errors import ArgumentError, DtypeError, ShapeError
from gpucnn.ops import cpu
from tests.accuracy import awkward, channels_last
from tests.backends import BACKENDS


def kept(seed, offset, count, probability):
    """The mask, one word at a time, compared as exact integers and fractions."""
    return [int(random.words(seed, offset + i, 1)[0]) >= probability * 2**32 for i in range(count)]


@BACKENDS
@settings(max_examples=25, deadline=None)
@given(
    probability=st.floats(0, 1),
    seed=st.integers(0, 2**64 - 1),
    offset=st.integers(0, 2**40),
    shape=st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    per_channel=st.booleans(),
)
def test_the_mask_is_a_function_of_the_stream(backend, probability, seed, offset, shape, per_channel):
    x = numpy.random.default_rng(0).standard_normal(shape)
    y, mask = backend.dropout_forward(
        x, probability=probability, seed=seed, offset=offset, per_channel=per_channel
    )
    expected_shape = (*shape[:2], 1, 1) if per_channel else shape
    assert mask.dtype == numpy.bool_
    assert mask.shape == expected_shape
    assert mask.reshape(-1).tolist() == kept(seed, offset, mask.size, probability)
    for index in numpy.ndindex(*shape):
        keep = mask[index[0], index[1], 0, 0] if per_channel else mask[index]
        expected = float(x[index]) / (1 - probability) if keep else 0.0
        assert abs(float(y[index]) - expected) <= 4e-16 * abs(expected)


@BACKENDS
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_layouts_and_backward(backend, per_channel, dtype):
    x = numpy.random.default_rng(1).standard_normal((3, 4, 5, 6)).astype(dtype)
    options = {"probability": 0.25, "seed": 7, "offset": 12, "per_channel": per_channel}
    y, mask = backend.dropout_forward(x, **options)
    assert y.dtype == x.dtype
    expected = numpy.where(mask, x.astype("f8") / 0.75, 0)
    assert numpy.all(abs(y - expected) <= 2 * numpy.finfo(dtype).eps * abs(expected))
    for layout in (awkward, channels_last):
        other, other_mask = backend.dropout_forward(layout(x), **options)
        numpy.testing.assert_array_equal(other, y)
        numpy.testing.assert_array_equal(other_mask, mask)
        numpy.testing.assert_array_equal(backend.dropout_backward(layout(x), mask, probability=0.25), y)
    same = x.copy()
    assert backend.dropout_forward(same, **options, out=same)[0] is same
    numpy.testing.assert_array_equal(same, y)
    same = x.copy()
    assert backend.dropout_backward(same, mask, probability=0.25, out=same) is same
    numpy.testing.assert_array_equal(same, y)


@BACKENDS
def test_the_share_and_the_mean(backend):
    x = numpy.ones((64, 32, 32), numpy.float32)
    y, mask = backend.dropout_forward(x, probability=0.3, seed=1, offset=0)
    # Five standard deviations of a binomial share.
    assert abs(float(mask.mean()) - 0.7) <= 5 * math.sqrt(0.21 / x.size)
    assert abs(float(y.mean(dtype="f8")) - 1) <= 5 * math.sqrt(0.21 / x.size) / 0.7


@BACKENDS
def test_all_or_nothing(backend):
    x = numpy.array([1.0, -2.0, numpy.inf], numpy.float32)
    y, mask = backend.dropout_forward(x, probability=0.0, seed=0, offset=0)
    assert mask.all()
    numpy.testing.assert_array_equal(y, x)
    y, mask = backend.dropout_forward(x, probability=1.0, seed=0, offset=0)
    assert not mask.any()
    numpy.testing.assert_array_equal(y, [0, 0, 0])
    numpy.testing.assert_array_equal(backend.dropout_backward(x, mask, probability=1.0), [0, 0, 0])


@BACKENDS
def test_dropped_infinities_are_zero(backend):
    x = numpy.full(64, numpy.inf, numpy.float32)
    y, mask = backend.dropout_forward(x, probability=0.5, seed=0, offset=0)
    numpy.testing.assert_array_equal(y, numpy.where(mask, numpy.inf, 0))


def test_many_blocks_on_any_number_of_threads(monkeypatch):
    x = numpy.random.default_rng(2).standard_normal((5, 7, 90, 101)).astype(numpy.float32)
    results = []
    for threads in ("1", "3"):
        monkeypatch.setenv("GPUCNN_NUM_THREADS", threads)
        y, mask = cpu.dropout_forward(x, probability=0.4, seed=3, offset=5)
        results.append((y, mask))
        numpy.testing.assert_array_equal(mask.reshape(-1), random.words(3, 5, x.size) >= 0.4 * 2**32)
        numpy.testing.assert_array_equal(y == 0, ~mask)
    numpy.testing.assert_array_equal(results[0][0], results[1][0])


@BACKENDS
def test_errors(backend):
    x = numpy.zeros((2, 3), numpy.float32)
    for probability in (-0.1, 1.1, math.nan):
        with pytest.raises(ArgumentError, match="probability must lie between 0 and 1"):
            backend.dropout_forward(x, probability=probability, seed=0, offset=0)
    with pytest.raises(ShapeError, match="whole channels"):
        backend.dropout_forward(x[0], probability=0.5, seed=0, offset=0, per_channel=True)
    with pytest.raises(DtypeError, match="floating-point"):
        backend.dropout_forward(x.astype(int), probability=0.5, seed=0, offset=0)
    with pytest.raises(ShapeError, match="mask of shape"):
        backend.dropout_backward(x, numpy.ones((2, 2), bool), probability=0.5)
    with pytest.raises(ShapeError, match="out must have"):
        backend.dropout_backward(x, numpy.ones((2, 3), bool), probability=0.5, out=x[0])
