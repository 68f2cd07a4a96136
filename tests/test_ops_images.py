"""Bytes to normalized floats against a loop over pixels."""

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucnn.errors import ArgumentError, DtypeError, ShapeError
from gpucnn.ops import cpu
from tests.accuracy import awkward, max_error
from tests.backends import BACKENDS
from tests.oracles import images as oracle

MEAN, STD = (0.49, 0.1, 0.9), (0.25, 0.1, 1.5)


def pictures(shape, seed=0):
    return numpy.random.default_rng(seed).integers(0, 256, shape, numpy.uint8)


@BACKENDS
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_combination(backend, data):
    count, channels = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3))
    height, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    images = pictures((count, height, width, channels), data.draw(st.integers(0, 9)))
    mean, std = MEAN[:channels], STD[:channels]
    flip = numpy.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)), bool)
    flip = data.draw(st.sampled_from([None, flip]))
    crop_size = data.draw(st.sampled_from([None, (3, 4), (height + 2, width), (1, 9)]))
    offset = data.draw(
        st.none() | st.lists(st.tuples(st.integers(-8, 8), st.integers(-8, 8)), min_size=count, max_size=count)
    )
    offset = None if offset is None else numpy.array(offset, numpy.int64).reshape(count, 2)
    expected = oracle.images_to_float(images, mean, std, flip, offset, crop_size)
    options = {"mean": mean, "std": std, "flip": flip, "crop_offset": offset, "crop_size": crop_size}
    for layout in (numpy.ascontiguousarray, awkward):
        single = backend.images_to_float(layout(images), **options)
        assert single.dtype == numpy.float32
        assert single.shape == expected.shape
        assert max_error(single, expected) <= 2e-6
    out = awkward(numpy.full(expected.shape, 7.0))
    assert backend.images_to_float(images, **options, dtype="float64", out=out) is out
    assert max_error(out, expected) <= 1e-14


def test_large_batches_on_any_number_of_threads(monkeypatch):
    images = pictures((70, 32, 32, 3))
    flip = numpy.arange(70) % 2 == 0
    offset = pictures((70, 2)).astype(numpy.int64) % 9 - 4
    for options in ({}, {"flip": flip}, {"crop_offset": offset, "crop_size": (32, 32), "flip": flip}):
        results = []
        for threads in ("1", "3"):
            monkeypatch.setenv("GPUCNN_NUM_THREADS", threads)
            results.append(cpu.images_to_float(images, mean=MEAN, std=STD, **options))
        numpy.testing.assert_array_equal(*results)
        few = {
            name: value[:5] if isinstance(value, numpy.ndarray) else value for name, value in options.items()
        }  # fmt: skip
        numpy.testing.assert_array_equal(
            results[0][:5], cpu.images_to_float(images[:5], mean=MEAN, std=STD, **few)
        )


@BACKENDS
def test_half_precision(backend):
    images = pictures((2, 4, 4, 3))
    result = backend.images_to_float(images, mean=MEAN, std=STD, dtype="float16")
    assert result.dtype == numpy.float16
    assert max_error(result, oracle.images_to_float(images, MEAN, STD, None, None, None)) <= 1e-2


@BACKENDS
def test_errors(backend):
    images = pictures((2, 4, 4, 3))
    with pytest.raises(DtypeError, match="uint8, got float64"):
        backend.images_to_float(images / 255, mean=MEAN, std=STD)
    with pytest.raises(DtypeError, match="uint8, got list"):
        backend.images_to_float([], mean=MEAN, std=STD)
    with pytest.raises(ShapeError, match=r"4 dimensions \(N, H, W, C\)"):
        backend.images_to_float(images[0], mean=MEAN, std=STD)
    with pytest.raises(ShapeError, match="3 channels, but mean has 1 values and std 3"):
        backend.images_to_float(images, mean=[0.5], std=STD)
    with pytest.raises(ArgumentError, match="std must be positive"):
        backend.images_to_float(images, mean=MEAN, std=[1, 0, 1])
    with pytest.raises(ShapeError, match="flip"):
        backend.images_to_float(images, mean=MEAN, std=STD, flip=numpy.ones(3, bool))
    with pytest.raises(ShapeError, match="crop_offset"):
        backend.images_to_float(images, mean=MEAN, std=STD, crop_offset=numpy.ones(2, int))
    with pytest.raises(DtypeError, match="out must have the result's dtype float32"):
        backend.images_to_float(images, mean=MEAN, std=STD, out=numpy.zeros((2, 3, 4, 4)))
