"""Changes to pictures on the host runtime: against float64 loops, in every dtype, layout and order of threads."""

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpucnn_kernels as kernels
from gpucnn_kernels import ArgumentError, DtypeError, LayoutError, runtime
from gpucnn_kernels import images as images_module
from gpucnn_kernels.runtime.host import order_independent
from tests.accuracy import awkward
from tests.augmentation_cases import MEAN, NAMES, STD, cases, changes_of, in_planes, pictures, size_of_terms
from tests.kernel_accuracy import DTYPES, LAYOUTS, assert_close, on_the_host, poisoned
from tests.oracles import augmentation as oracle

__all__ = ["on_the_host"]


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from(sorted(DTYPES)), st.booleans(), st.sampled_from(sorted(LAYOUTS)))
def test_every_combination(case, dtype, last, layout):
    images, options = case
    expected = oracle.augment_images(images, **options)
    with runtime.using("host"):
        y = kernels.augment_images(images, **options, dtype=dtype, channels_last=last)
        assert y.dtype == DTYPES[dtype]
        assert y.transpose((0, 2, 3, 1) if last else (0, 1, 2, 3)).flags.c_contiguous
        single = kernels.augment_images(images, **options)
        assert_close(single, expected, size_of_terms(options, expected.shape))
        # One rounding, of the numbers that float32 has: no dtype computes anything else.
        numpy.testing.assert_array_equal(y, single.astype(DTYPES[dtype]))
        out = poisoned(expected.shape, DTYPES[dtype], layout)
        assert kernels.augment_images(in_planes(images), **options, dtype=dtype, out=out) is out
        numpy.testing.assert_array_equal(out, y)


@pytest.mark.parametrize("name", [(), *((name,) for name in NAMES), NAMES], ids=lambda names: "-".join(names))
@pytest.mark.parametrize("channels", [1, 3])
def test_each_change_by_itself_on_images_larger_than_a_block(name, channels):
    images = pictures((2, 19, 71, channels))
    options = {"mean": MEAN[:channels], "std": STD[:channels]}
    options |= changes_of(numpy.random.default_rng(5), name, 2, 19, 71)
    expected = oracle.augment_images(images, **options)
    assert_close(kernels.augment_images(images, **options), expected, size_of_terms(options, expected.shape))
    assert order_independent(lambda: kernels.augment_images(images, **options))


def test_more_images_and_rows_than_a_grid_has_blocks(monkeypatch):
    monkeypatch.setattr(images_module, "_MOST_BLOCKS", 2)
    images = pictures((5, 33, 5, 3))
    options = {"mean": MEAN[:3], "std": STD[:3]} | changes_of(numpy.random.default_rng(1), NAMES[2:], 5, 33, 5)
    expected = oracle.augment_images(images, **options)
    assert_close(kernels.augment_images(images, **options), expected, size_of_terms(options, expected.shape))


def test_a_thread_has_several_rows_where_blocks_are_enough(monkeypatch):
    blocks = images_module.pixel_blocks
    assert blocks(256, 224, 224) == (7, 7, 256)
    assert blocks(512, 32, 32) == (1, 2, 512)
    assert blocks(1, 224, 224) == (7, 28, 1)
    assert blocks(0, 5, 5) == (1, 1, 0)
    images = pictures((3, 70, 5, 3))
    options = {"mean": MEAN[:3], "std": STD[:3]} | changes_of(numpy.random.default_rng(1), NAMES, 3, 70, 5)
    expected = kernels.augment_images(images, **options)
    for enough in (1, 10):  # four rows a thread, and two: 70 are no multiple of either
        monkeypatch.setattr(images_module, "_ENOUGH_BLOCKS", enough)
        numpy.testing.assert_array_equal(kernels.augment_images(images, **options), expected)


@pytest.mark.parametrize("far", [2**31 - 1, -(2**31)])
def test_shifts_and_cutouts_far_outside(far):
    images = pictures((1, 4, 3, 1))
    place = numpy.array([[far, 0]], numpy.int32)
    black = kernels.augment_images(images, mean=[0.5], std=[0.25], shift=place)
    assert (black == -2).all()
    for places in (place, place[:, ::-1].copy()):
        whole = kernels.augment_images(images, mean=[0], std=[1], cutout=places, cutout_size=3)
        numpy.testing.assert_array_equal(whole, kernels.augment_images(images, mean=[0], std=[1]))


def test_the_mean_grey_is_exact_whatever_the_order_of_its_terms():
    """Of whole bytes every partial sum is a double, so the CPU's mean and the kernel's are the same."""
    images = pictures((1, 61, 83, 3), 3)
    weights = numpy.array([0.299, 0.587, 0.114], numpy.float32)
    planes = images[0].transpose(2, 0, 1).astype(numpy.float32)
    grey = planes[0] * weights[0] + planes[1] * weights[1] + planes[2] * weights[2]
    shuffled = numpy.random.default_rng(0).permutation(grey.reshape(-1).astype(float))
    middle = sum(shuffled.tolist()) / shuffled.size
    y = kernels.augment_images(
        images, mean=[0] * 3, std=[1 / 255] * 3, colour=numpy.array([[1.0, 0.0, 1.0]]), dtype="float32"
    )
    assert (y == numpy.float32(middle)).all()


def test_errors():
    images = pictures((2, 4, 4, 3))
    options = {"mean": MEAN[:3], "std": STD[:3]}

    def refused(kind, words, given=images, **changes):
        with pytest.raises(kind, match=words):
            kernels.augment_images(given, **options | changes)

    refused(DtypeError, "images must be uint8, got float64", images / 255)
    refused(ArgumentError, r"4 dimensions \(N, H, W, C\)", images[0])
    refused(LayoutError, "images of shape .* neither pixel by pixel nor plane by plane", awkward(images))
    refused(ArgumentError, "3 channels, but mean has 1 values and std 3", mean=[0.5])
    refused(ArgumentError, "std must be positive", std=[1, 0, 1])
    refused(ArgumentError, "rows must be a pair of arrays", rows=numpy.zeros((1, 4), numpy.int32))
    first, weights = numpy.zeros((2, 5), numpy.int32), numpy.zeros((2, 3, 5), numpy.float32)
    refused(DtypeError, "row_first must be int32, got int64", rows=(first.astype(numpy.int64), weights))
    refused(ArgumentError, r"row_first must have shape \(1 or 2, ", rows=(numpy.zeros((3, 5), "int32"), weights))
    refused(ArgumentError, r"column_weights must have shape \(2, 3, 5\)", columns=(first, weights[:1]))
    refused(ArgumentError, r"column_weights must have shape", columns=(first, weights[:, 0].copy()))
    refused(DtypeError, "column_weights must be float32", columns=(first, weights.astype(float)))
    refused(ArgumentError, "flip must have shape", flip=numpy.ones(3, bool))
    refused(ArgumentError, r"flip must have shape \(3,\)", index=numpy.zeros(3, int), flip=numpy.ones(2, bool))
    refused(DtypeError, "index must be int64, got int32", index=numpy.zeros(3, numpy.int32))
    refused(ArgumentError, r"index must have 1 dimension", index=numpy.zeros((3, 1), int))
    refused(DtypeError, "flip must be bool", flip=numpy.ones(2, numpy.uint8))
    refused(DtypeError, "shift must be int32, got int64", shift=numpy.ones((2, 2), int))
    refused(ArgumentError, r"rotation must have shape \(2, 2\)", rotation=numpy.ones(2, "f"))
    refused(
        ArgumentError,
        "rotation needs .* 2x2 pixels, got 1x4",
        images[:, :1].copy(),
        rotation=numpy.ones((2, 2), "f"),
    )
    refused(DtypeError, "colour must be float64", colour=numpy.ones((2, 3), "f"))
    refused(ArgumentError, "cutout_size must be 0 or more, got -1", cutout_size=-1)
    refused(DtypeError, "cutout must be int32", cutout=numpy.ones((2, 2), int))
    refused(LayoutError, "shift of shape", shift=awkward(numpy.ones((2, 2), numpy.int32)))
    refused(DtypeError, r"dtype must be one of float32, .*, got int8", dtype="int8")
    refused(DtypeError, "out must be float32, got float64", out=numpy.zeros((2, 3, 4, 4)))
    shared = numpy.zeros(4 * 2 * 3 * 4 * 4, numpy.uint8)
    inside = shared[:96].reshape(2, 4, 4, 3)
    refused(ArgumentError, "out shares memory with images", inside, out=shared.view("f").reshape(2, 3, 4, 4))
