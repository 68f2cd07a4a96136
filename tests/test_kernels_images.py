"""Bytes to normalized floats on the host runtime, against a loop over pixels."""

import ml_dtypes
import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpucnn_kernels as kernels
from gpucnn_kernels import ArgumentError, DtypeError, LayoutError, runtime
from gpucnn_kernels import images as images_module
from gpucnn_kernels.runtime.host import order_independent
from tests.accuracy import awkward
from tests.kernel_accuracy import DTYPES, EVERY_DTYPE, LAYOUTS, assert_close, on_the_host, poisoned
from tests.oracles import images as oracle

__all__ = ["on_the_host"]

MEAN = (0.49, 0.1, 0.9, 0.0, 0.3, 0.5, 1.0, 0.2, 0.7)
STD = (0.25, 0.1, 1.5, 1.0, 0.3, 0.2, 0.5, 0.4, 0.6)
LARGEST = 10.0  # 1 / the smallest std: what the terms of a pixel come to


def pictures(shape, seed=0):
    return numpy.random.default_rng(seed).integers(0, 256, shape, numpy.uint8)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_combination(data):
    count, channels = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 9))
    height, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    images = pictures((count, height, width, channels), data.draw(st.integers(0, 9)))
    mean, std = MEAN[:channels], STD[:channels]
    flip = numpy.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)), bool)
    flip = data.draw(st.sampled_from([None, flip]))
    crop_size = data.draw(st.sampled_from([None, (3, 4), (height + 2, width), (1, 9)]))
    offset = data.draw(
        st.none() | st.lists(st.tuples(st.integers(-8, 8), st.integers(-8, 8)), min_size=count, max_size=count)
    )
    offset_dtype = data.draw(st.sampled_from([numpy.int32, numpy.int64]))
    offset = None if offset is None else numpy.array(offset, offset_dtype).reshape(count, 2)
    expected = oracle.images_to_float(images, mean, std, flip, offset, crop_size)
    options = {"mean": mean, "std": std, "flip": flip, "crop_offset": offset, "crop_size": crop_size}
    dtype = data.draw(st.sampled_from(sorted(DTYPES)))
    with runtime.using("host"):
        last = data.draw(st.booleans())
        y = kernels.images_to_float(images, **options, dtype=dtype, channels_last=last)
        assert y.dtype == DTYPES[dtype]
        assert y.transpose((0, 2, 3, 1) if last else (0, 1, 2, 3)).flags.c_contiguous
        assert_close(y, expected, LARGEST)
        out = poisoned(expected.shape, DTYPES[dtype], data.draw(st.sampled_from(sorted(LAYOUTS))))
        assert kernels.images_to_float(images, **options, dtype=dtype, out=out) is out
        numpy.testing.assert_array_equal(out, y)


@EVERY_DTYPE
def test_every_byte(dtype):
    images = numpy.arange(256, dtype=numpy.uint8).reshape(1, 16, 16, 1)
    y = kernels.images_to_float(images, mean=[0.4], std=[0.2], dtype=dtype)
    assert_close(y, (images.astype(float) / 255 - 0.4).transpose(0, 3, 1, 2) / 0.2, 5)


@pytest.mark.parametrize(
    "dtype", ["bfloat16", ml_dtypes.bfloat16, numpy.dtype(ml_dtypes.bfloat16)], ids=["name", "type", "dtype"]
)
def test_names_of_a_dtype(dtype):
    assert kernels.images_to_float(pictures((1, 2, 2, 1)), mean=[0], std=[1], dtype=dtype).dtype == "bfloat16"


@pytest.mark.parametrize("dtype", [numpy.int32, numpy.int64])
def test_offsets_far_outside_see_nothing_but_the_mean(dtype):
    images = pictures((5, 4, 3, 2))
    limits = numpy.iinfo(dtype)
    offset = numpy.array(
        [[limits.max, 0], [0, limits.min], [limits.min, limits.max], [limits.max, limits.max], [0, 0]], dtype
    )
    y = kernels.images_to_float(images, mean=MEAN[:2], std=STD[:2], crop_offset=offset)
    assert not y[:4].any()
    assert_close(y[4:], oracle.images_to_float(images[4:], MEAN, STD, None, None, None), LARGEST)


@pytest.mark.parametrize(("most", "enough"), [(2, 1024), (65535, 1), (65535, 5)])
def test_more_pixels_than_a_grid_has_threads(monkeypatch, most, enough):
    monkeypatch.setattr(images_module, "_MOST_BLOCKS", most)
    monkeypatch.setattr(images_module, "_ENOUGH_BLOCKS", enough)  # so that a thread has several rows
    images = pictures((4, 19, 17, 3))
    flip = numpy.array([True, False, True, False])
    expected = oracle.images_to_float(images, MEAN, STD, flip, None, (29, 20))
    for last in (False, True):
        y = kernels.images_to_float(
            images, mean=MEAN[:3], std=STD[:3], flip=flip, crop_size=(29, 20), channels_last=last
        )
        assert_close(y, expected, LARGEST)
        assert order_independent(
            lambda last=last: kernels.images_to_float(
                images, mean=MEAN[:3], std=STD[:3], flip=flip, channels_last=last
            )
        )


def test_errors():
    images = pictures((2, 4, 4, 3))
    options = {"mean": MEAN[:3], "std": STD[:3]}
    with pytest.raises(DtypeError, match="images must be uint8, got float64"):
        kernels.images_to_float(images / 255, **options)
    with pytest.raises(ArgumentError, match=r"4 dimensions \(N, H, W, C\)"):
        kernels.images_to_float(images[0], **options)
    with pytest.raises(LayoutError, match="images of shape"):
        kernels.images_to_float(awkward(images), **options)
    with pytest.raises(ArgumentError, match="3 channels, but mean has 1 values and std 3"):
        kernels.images_to_float(images, mean=[0.5], std=STD[:3])
    for wrong in (0, -1, float("nan")):
        with pytest.raises(ArgumentError, match="std must be positive"):
            kernels.images_to_float(images, mean=MEAN[:3], std=[1, wrong, 1])
    with pytest.raises(ArgumentError, match="flip must have shape"):
        kernels.images_to_float(images, **options, flip=numpy.ones(3, bool))
    with pytest.raises(DtypeError, match="flip must be bool, got uint8"):
        kernels.images_to_float(images, **options, flip=numpy.ones(2, numpy.uint8))
    with pytest.raises(ArgumentError, match="crop_offset must have shape"):
        kernels.images_to_float(images, **options, crop_offset=numpy.ones(2, int))
    with pytest.raises(DtypeError, match="crop_offset must be int32 or int64, got float32"):
        kernels.images_to_float(images, **options, crop_offset=numpy.ones((2, 2), numpy.float32))
    with pytest.raises(kernels.ProblemError, match="crop_size"):
        kernels.images_to_float(images, **options, crop_size=(2, 3, 4))
    with pytest.raises(DtypeError, match=r"dtype must be one of float32, .*, got int8"):
        kernels.images_to_float(images, **options, dtype="int8")
    with pytest.raises(DtypeError, match="out must be float32, got float64"):
        kernels.images_to_float(images, **options, out=numpy.zeros((2, 3, 4, 4)))
    with pytest.raises(LayoutError, match="out"):
        kernels.images_to_float(images, **options, out=awkward(numpy.zeros((2, 3, 4, 4), numpy.float32)))
