"""Changes to pictures on both backends: against loops in float64, and against each other bit for bit."""

import numpy
import pytest
from hypothesis import given, settings

from gpucnn.errors import ArgumentError, DtypeError, ShapeError
from tests.accuracy import awkward, max_error
from tests.augmentation_cases import MEAN, NAMES, STD, cases, changes_of, in_planes, pictures, size_of_terms
from tests.backends import BACKENDS, CPU, CUDA
from tests.oracles import augmentation as oracle

EPSILON = float(numpy.finfo(numpy.float32).eps)


@BACKENDS
@settings(max_examples=60, deadline=None)
@given(cases(most_channels=4))
def test_every_combination(backend, case):
    images, options = case
    expected = oracle.augment_images(images, **options)
    for layout in (numpy.ascontiguousarray, in_planes, awkward):
        single = backend.augment_images(layout(images), **options)
        assert single.dtype == numpy.float32
        assert single.shape == expected.shape
        assert max_error(single, expected) <= 8 * EPSILON * size_of_terms(options, expected.shape)
    out = awkward(numpy.full(expected.shape, 7.0))
    assert backend.augment_images(images, **options, dtype="float64", out=out) is out
    numpy.testing.assert_array_equal(out, single)
    numpy.testing.assert_array_equal(
        backend.augment_images(images, **options, dtype="float16"), single.astype(numpy.float16)
    )


def exact(options) -> bool:
    """Whether the contract promises the same bits: there is no mean over pixels that are not whole bytes."""
    interpolated = {"rows", "columns", "rotation"} & options.keys()
    return "colour" not in options or not interpolated


@settings(max_examples=150, deadline=None)
@given(cases(most_channels=4))
def test_both_backends_have_the_same_bits(case):
    images, options = case
    ours, theirs = (backend.augment_images(images, **options) for backend in (CPU, CUDA))
    if exact(options):
        numpy.testing.assert_array_equal(ours, theirs)
    else:
        assert max_error(theirs, ours) <= 4 * EPSILON * size_of_terms(options, ours.shape)


@pytest.mark.parametrize("names", [NAMES, NAMES[2:3], NAMES[4:], NAMES[:2]], ids="-".join)
@pytest.mark.parametrize("channels", [1, 3])
def test_large_images_and_batches_have_the_same_bits(names, channels):
    for shape in ((1, 300, 310, channels), (70, 33, 40, channels)):
        images = pictures(shape)
        options = {"mean": MEAN[:channels], "std": STD[:channels]}
        options |= changes_of(numpy.random.default_rng(2), names, *shape[:3])
        ours, theirs = (backend.augment_images(images, **options) for backend in (CPU, CUDA))
        if exact(options):
            numpy.testing.assert_array_equal(ours, theirs)
        else:
            assert max_error(theirs, ours) <= 4 * EPSILON * size_of_terms(options, ours.shape)


@BACKENDS
def test_an_image_does_not_depend_on_its_batch(backend):
    images = pictures((9, 40, 52, 3))
    options = changes_of(numpy.random.default_rng(4), NAMES, 9, 40, 52)
    together = backend.augment_images(images, mean=MEAN[:3], std=STD[:3], **options)

    def own(value, number):
        if isinstance(value, tuple):
            return tuple(table if len(table) == 1 else table[number : number + 1] for table in value)
        return value[number : number + 1] if isinstance(value, numpy.ndarray) else value

    for number in range(9):
        mine = {name: own(value, number) for name, value in options.items()}
        alone = backend.augment_images(images[number : number + 1], mean=MEAN[:3], std=STD[:3], **mine)
        numpy.testing.assert_array_equal(alone[0], together[number])


@BACKENDS
def test_errors(backend):
    images = pictures((2, 4, 4, 3))
    options = {"mean": MEAN[:3], "std": STD[:3]}

    def refused(kind, words, given=images, **changes):
        with pytest.raises(kind, match=words):
            backend.augment_images(given, **options | changes)

    refused(DtypeError, "images must be a numpy.ndarray of uint8, got float64", images / 255)
    refused(ShapeError, r"images must have 4 dimensions \(N, H, W, C\)", images[0])
    refused(ShapeError, "3 channels, but mean has 1 values and std 3", mean=[0.5])
    refused(ArgumentError, "std must be positive", std=[1, 0, 1])
    first, weights = numpy.zeros((2, 5), numpy.int32), numpy.zeros((2, 3, 5), numpy.float32)
    refused(ArgumentError, "rows must be a pair of arrays", rows=first)
    refused(DtypeError, "first of rows must hold integers, got dtype float64", rows=(first.astype(float), weights))
    refused(ShapeError, "columns must have 1 table or one for each of 2 images, got 3", columns=(
        numpy.zeros((3, 5), numpy.int32), weights))  # fmt: skip
    refused(ShapeError, r"weights of columns must have shape \(2, 3, 5\)", columns=(first, weights[:1]))
    refused(ShapeError, r"weights of columns must have 3 dimensions", columns=(first, weights[:, 0]))
    refused(ShapeError, "weights of rows must have at least one tap", rows=(first, weights[:, :0]))
    refused(ShapeError, r"flip must have shape \(2,\)", flip=numpy.ones(3, bool))
    refused(ShapeError, r"flip must have shape \(3,\)", index=numpy.zeros(3, int), flip=numpy.ones(2, bool))
    refused(DtypeError, "index must hold integers", index=numpy.zeros(3))
    refused(ShapeError, r"index must have 1 dimensions \(N,\)", index=numpy.zeros((3, 1), int))
    refused(DtypeError, "flip must hold booleans", flip=numpy.ones(2, numpy.uint8))
    refused(DtypeError, "shift must hold integers", shift=numpy.ones((2, 2)))
    refused(ShapeError, r"rotation must have shape \(2, 2\)", rotation=numpy.ones(2, "f"))
    refused(
        ArgumentError, "rotation needs .* 2x2 pixels, got 1x4", images[:, :1], rotation=numpy.ones((2, 2), "f")
    )
    refused(DtypeError, "colour must hold floating-point numbers", colour=numpy.ones((2, 3), int))
    refused(ArgumentError, "cutout_size must be 0 or more, got -1", cutout_size=-1)
    refused(DtypeError, "cutout must hold integers", cutout=numpy.ones((2, 2)))
    refused(ShapeError, "out must have the result's shape", out=numpy.zeros((2, 3, 4, 5), numpy.float32))
