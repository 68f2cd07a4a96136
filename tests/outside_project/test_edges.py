"""Tests of the project, on the host runtime: GPUCNN_KERNELS_RUNTIME=host python -m pytest."""

import sys

import edges
import numpy
import pytest

import gpucnn_kernels

FILTERS = numpy.array(edges.SOBEL, numpy.float32)[:, None]


def test_a_bright_square_has_its_left_and_its_upper_edge():
    image = numpy.zeros((1, 1, 8, 8), numpy.float32)
    image[:, :, 2:6, 2:6] = 1
    found = edges.strongest(image, FILTERS)
    assert found.shape == (1, 2, 4, 4)
    right, down = found[0]
    assert right.tolist() == [[1, 1, 0, 0], [4, 4, 0, 0], [4, 4, 0, 0], [1, 1, 0, 0]]
    assert numpy.array_equal(down, right.T)  # the square is the same in both directions


def test_random_images_against_plain_loops():
    images = numpy.random.default_rng(1).random((2, 1, 6, 8), numpy.float32)
    found = edges.strongest(images, FILTERS)
    padded = numpy.zeros((2, 8, 10))
    padded[:, 1:-1, 1:-1] = images[:, 0]
    for n in range(2):
        for k in range(2):
            for p in range(3):
                for q in range(4):
                    rises = [
                        max(0.0, float((padded[n, h : h + 3, w : w + 3] * FILTERS[k, 0]).sum()))
                        for h in (2 * p, 2 * p + 1)
                        for w in (2 * q, 2 * q + 1)
                    ]
                    assert abs(found[n, k, p, q] - max(rises)) <= 1e-5


def test_images_that_do_not_fit_are_named():
    with pytest.raises(gpucnn_kernels.DtypeError, match="float64"):
        edges.strongest(numpy.zeros((1, 1, 8, 8)), FILTERS)


def test_only_the_kernels_were_loaded():
    assert "gpucnn" not in sys.modules
    assert "cupy" not in sys.modules


def test_the_package_called_kernels_is_another():
    import kernels

    assert kernels.__file__ is not None
    assert "gpucnn" not in kernels.__file__
    assert not hasattr(kernels, "conv2d_forward")
