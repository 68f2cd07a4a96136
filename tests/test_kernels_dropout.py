"""The dropout kernels on the host runtime: exactly the masks that the Philox stream says, in every layout."""

import math

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpucnn_kernels as kernels
from gpucnn import random
from gpucnn_kernels import ArgumentError, DtypeError, LayoutError, launch, runtime
from gpucnn_kernels.runtime.host import order_independent
from tests.accuracy import awkward, channels_last
from tests.kernel_accuracy import (
    EVERY_DTYPE,
    LAYOUTS,
    assert_close,
    follows,
    normal,
    on_the_host,
    placed,
    poisoned,
)

__all__ = ["on_the_host"]

# Random123's known answer for Philox4x32-10, counter 0 and key 0.
KNOWN_WORDS = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)

SHAPES = [
    (),
    (1,),
    (7,),
    (3, 5),
    (2, 3, 5),
    (2, 3, 4, 5),
    (1, 6, 3, 3),
    (3, 2, 1, 7),
    (2, 1, 3, 3),
    (2, 2, 2, 3, 2),
]


def expected_mask(seed, offset, shape, probability):
    """By exact integers and fractions; gpucnn.random is the other implementation of the generator."""
    kept = [int(word) >= probability * 2**32 for word in random.words(seed, offset, math.prod(shape))]
    return numpy.array(kept, bool).reshape(shape)


def expected_output(x, mask, probability):
    scale = 1 / (1 - probability) if probability < 1 else 0.0
    return numpy.where(mask, x.astype(float) * scale, 0.0)


def layouts_of(x):
    return LAYOUTS.values() if x.ndim == 4 else [numpy.ascontiguousarray]


def test_the_generator_is_philox():
    x = numpy.ones(4, numpy.float32)
    for number, word in enumerate(KNOWN_WORDS):
        for probability, kept in ((word / 2**32, True), ((word + 1) / 2**32, False)):
            _, mask = kernels.dropout_forward(x, probability=probability, seed=0, offset=0)
            assert mask[number] == kept


@EVERY_DTYPE
def test_masks_and_values_of_every_shape(dtype):
    for shape in SHAPES:
        for offset in (0, 1, 6, 2**40 + 3):
            x = normal(shape, 1, dtype) if shape else numpy.array(1.5, dtype)
            expected = expected_mask(7, offset, shape, 0.4)
            for arrange in layouts_of(x):
                given = arrange(x) if shape else x
                y, mask = kernels.dropout_forward(given, probability=0.4, seed=7, offset=offset)
                assert y.dtype == dtype
                assert mask.dtype == numpy.bool_
                numpy.testing.assert_array_equal(mask, expected, f"{shape} from {offset}")
                assert_close(y, expected_output(x, expected, 0.4), 0)
                if len(shape) == 4:
                    assert follows(y, given)
                    assert follows(mask, given)
                again = kernels.dropout_backward(given, mask, probability=0.4)
                numpy.testing.assert_array_equal(again, y)


@settings(max_examples=40, deadline=None)
@given(
    probability=st.floats(0, 1),
    seed=st.integers(0, 2**64 - 1),
    offset=st.integers(0, 2**60),
    shape=st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    per_channel=st.booleans(),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
def test_the_mask_is_a_function_of_the_stream(probability, seed, offset, shape, per_channel, layout):
    x = LAYOUTS[layout](normal(shape, 0, numpy.float64))
    options = {"probability": probability, "seed": seed, "offset": offset, "per_channel": per_channel}
    with runtime.using("host"):
        y, mask = kernels.dropout_forward(x, **options)
    expected = expected_mask(seed, offset, (*shape[:2], 1, 1) if per_channel else shape, probability)
    numpy.testing.assert_array_equal(mask, expected)
    assert mask.shape == expected.shape
    assert_close(y, expected_output(x, expected, probability), 0)


@EVERY_DTYPE
def test_whole_channels(dtype):
    for shape in [(3, 5), (2, 3, 7), (2, 5, 3, 4), (2, 2, 2, 3, 2)]:
        x = normal(shape, 2, dtype)
        expected = expected_mask(9, 5, shape[:2] + (1,) * (len(shape) - 2), 0.5)
        for arrange in layouts_of(x):
            y, mask = kernels.dropout_forward(arrange(x), probability=0.5, seed=9, offset=5, per_channel=True)
            numpy.testing.assert_array_equal(mask, expected, str(shape))
            numpy.testing.assert_array_equal(y.astype(float), expected_output(x, expected, 0.5))
            dx = kernels.dropout_backward(arrange(x), mask, probability=0.5)
            numpy.testing.assert_array_equal(dx, y)


def test_in_place_and_into_given_arrays():
    x = normal((3, 4, 5, 6), 3, numpy.float32)
    options = {"probability": 0.25, "seed": 7, "offset": 12}
    y, mask = kernels.dropout_forward(x, **options)
    for arrange in LAYOUTS.values():
        for per_channel in (False, True):
            same, expected = arrange(x.copy()), kernels.dropout_forward(x, **options, per_channel=per_channel)[0]
            assert kernels.dropout_forward(same, **options, per_channel=per_channel, out=same)[0] is same
            numpy.testing.assert_array_equal(same, expected)
        same = arrange(x.copy())
        assert kernels.dropout_backward(same, arrange(mask), probability=0.25, out=same) is same
        numpy.testing.assert_array_equal(same, y)
        for other in LAYOUTS:
            out = poisoned(x.shape, x.dtype, other)
            for kept in (mask, channels_last(mask)):
                assert kernels.dropout_backward(arrange(x), kept, probability=0.25, out=out) is out
                numpy.testing.assert_array_equal(out, y)


def test_all_or_nothing():
    x = numpy.array([1.0, -2.0, numpy.inf, numpy.nan], numpy.float32)
    y, mask = kernels.dropout_forward(x, probability=0.0, seed=0, offset=0)
    assert mask.all()
    numpy.testing.assert_array_equal(y, x)
    y, mask = kernels.dropout_forward(x, probability=1.0, seed=0, offset=0)
    assert not mask.any()
    numpy.testing.assert_array_equal(y, [0, 0, 0, 0])
    numpy.testing.assert_array_equal(kernels.dropout_backward(x, mask, probability=1.0), [0, 0, 0, 0])


def test_dropped_infinities_are_zero():
    x = numpy.full(64, -numpy.inf, numpy.float32)
    y, mask = kernels.dropout_forward(x, probability=0.5, seed=0, offset=0)
    numpy.testing.assert_array_equal(y, numpy.where(mask, -numpy.inf, 0))


def test_more_elements_than_a_grid_has_threads(monkeypatch):
    monkeypatch.setattr(launch, "_MAX_BLOCKS", 2)
    x = normal((3, 7, 17, 19), 4, numpy.float32)
    expected = expected_mask(3, 2, x.shape, 0.4)
    for arrange in LAYOUTS.values():
        given = arrange(x)
        y, mask = kernels.dropout_forward(given, probability=0.4, seed=3, offset=2)
        numpy.testing.assert_array_equal(mask, expected)
        numpy.testing.assert_array_equal(y == 0, ~expected)
        numpy.testing.assert_array_equal(kernels.dropout_backward(given, mask, probability=0.4), y)
        _, mask = kernels.dropout_forward(
            normal((30, 40, 1, 2), 5, numpy.float32), probability=0.4, seed=3, offset=2, per_channel=True
        )
        numpy.testing.assert_array_equal(mask, expected_mask(3, 2, (30, 40, 1, 1), 0.4))
        assert order_independent(
            lambda given=given: kernels.dropout_forward(given, probability=0.4, seed=3, offset=2)
        )


@EVERY_DTYPE
def test_packs_and_elements_give_the_same_bits(dtype, monkeypatch):
    count = 2 * 256 * 2 * 16 // dtype.itemsize + 7
    x = normal((count,), 6, dtype)
    for blocks in (1 << 16, 2):
        monkeypatch.setattr(launch, "_MAX_BLOCKS", blocks)
        for offset in (8, 9):  # at the beginning of a block of words, or within it
            expected = expected_mask(4, offset, x.shape, 0.3)
            for where in range(3):
                given, out, gradient = (placed(x, int(where == number)) for number in range(3))
                y, mask = kernels.dropout_forward(given, probability=0.3, seed=4, offset=offset, out=out)
                numpy.testing.assert_array_equal(mask, expected)
                assert_close(y, expected_output(x, expected, 0.3), 0)
                for kept in (placed(mask), placed(mask, 1)):
                    dx = kernels.dropout_backward(gradient, kept, probability=0.3)
                    assert dx.tobytes() == y.tobytes()


def test_errors():
    x = numpy.zeros((2, 3), numpy.float32)
    for probability in (-0.1, 1.1, math.nan):
        with pytest.raises(ArgumentError, match="probability must lie between 0 and 1"):
            kernels.dropout_forward(x, probability=probability, seed=0, offset=0)
    with pytest.raises(ArgumentError, match="whole channels"):
        kernels.dropout_forward(x[0], probability=0.5, seed=0, offset=0, per_channel=True)
    with pytest.raises(DtypeError, match="x must be one of float32"):
        kernels.dropout_forward(x.astype(int), probability=0.5, seed=0, offset=0)
    with pytest.raises(LayoutError, match="neither contiguous nor channels-last"):
        kernels.dropout_forward(awkward(x), probability=0.5, seed=0, offset=0)
    with pytest.raises(LayoutError, match="neither contiguous nor channels-last"):
        kernels.dropout_forward(x.reshape(1, 1, 2, 3).transpose(0, 1, 3, 2), probability=0.5, seed=0, offset=0)
    with pytest.raises(ArgumentError, match="mask of shape"):
        kernels.dropout_backward(x, numpy.ones((2, 2), bool), probability=0.5)
    with pytest.raises(DtypeError, match="mask must be bool"):
        kernels.dropout_backward(x, numpy.ones((2, 3), numpy.uint8), probability=0.5)
    with pytest.raises(LayoutError, match="mask of shape"):
        kernels.dropout_backward(x, awkward(numpy.ones((2, 3), bool)), probability=0.5)
    with pytest.raises(ArgumentError, match="out must have shape"):
        kernels.dropout_backward(x, numpy.ones((2, 3), bool), probability=0.5, out=x[0])
    for wrong in ({"seed": -1}, {"seed": 2**64}, {"offset": -4}):
        with pytest.raises(ArgumentError, match="does not fit"):
            kernels.dropout_forward(x, **({"probability": 0.5, "seed": 0, "offset": 0} | wrong))
