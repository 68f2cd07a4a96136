"""Memory formats: every number keeps its place in the array and gets another in memory, bit for bit."""

import numpy
import pytest

import gpucnn_kernels as kernels
from gpucnn_kernels import ArgumentError, DtypeError, LayoutError, launch
from gpucnn_kernels.runtime.host import order_independent
from tests.accuracy import awkward, channels_last
from tests.kernel_accuracy import EVERY_DTYPE, LAYOUTS, normal, on_the_host, poisoned

__all__ = ["on_the_host"]

# Tiles that fit, that stick out on either side, thin images on either side, and nothing.
SHAPES = [
    (2, 32, 8, 8),
    (1, 33, 5, 13),
    (3, 31, 7, 9),
    (2, 70, 1, 9),
    (1, 8, 40, 3),
    (2, 3, 17, 19),
    (2, 19, 1, 3),
    (4, 1, 5, 6),
    (4, 6, 1, 1),
    (0, 40, 6, 6),
    (2, 0, 3, 3),
]


@EVERY_DTYPE
def test_there_and_back(dtype):
    for shape in SHAPES:
        x = normal(shape, 1, dtype)
        if x.size:
            x.flat[0], x.flat[-1] = numpy.nan, -numpy.inf
        last = kernels.to_channels_last(x)
        assert last.dtype == dtype
        assert last.transpose(0, 2, 3, 1).flags.c_contiguous
        assert last.tobytes() == x.tobytes(), shape  # in C order of the logical array
        back = kernels.to_contiguous(last)
        assert back.flags.c_contiguous
        assert back.tobytes() == x.tobytes(), shape


def test_an_image_that_is_so_already_comes_back_itself():
    x = normal((2, 3, 4, 5), 2, numpy.float32)
    last = channels_last(x)
    assert kernels.to_contiguous(x) is x
    assert kernels.to_channels_last(last) is last
    one = normal((2, 1, 4, 5), 3, numpy.float32)  # is both
    assert kernels.to_contiguous(one) is one
    assert kernels.to_channels_last(one) is one


@pytest.mark.parametrize("given", LAYOUTS)
@pytest.mark.parametrize("wanted", LAYOUTS)
def test_into_given_arrays(given, wanted):
    convert = {"contiguous": kernels.to_contiguous, "channels_last": kernels.to_channels_last}[wanted]
    for shape in SHAPES:
        x = LAYOUTS[given](normal(shape, 4, numpy.float32))
        out = poisoned(shape, numpy.float32, wanted)
        assert convert(x, out=out) is out
        numpy.testing.assert_array_equal(out, x, str(shape))


def test_more_elements_than_a_grid_has_threads(monkeypatch):
    monkeypatch.setattr(launch, "_MAX_BLOCKS", 2)
    x = normal((5, 3, 20, 11), 5, numpy.float32)
    numpy.testing.assert_array_equal(kernels.to_channels_last(x), x)
    out = poisoned(x.shape, x.dtype)
    kernels.to_contiguous(x, out=out)
    numpy.testing.assert_array_equal(out, x)


def test_the_order_of_threads_does_not_show():
    x = normal((2, 41, 6, 7), 6, numpy.float16)
    assert order_independent(lambda: [kernels.to_channels_last(x), kernels.to_contiguous(channels_last(x))])


def test_errors():
    x = normal((2, 9, 4, 5), 7, numpy.float32)
    with pytest.raises(LayoutError, match="neither contiguous nor channels-last"):
        kernels.to_contiguous(awkward(x))
    with pytest.raises(LayoutError, match="out must be channels-last, but has shape"):
        kernels.to_channels_last(x, out=numpy.empty_like(x))
    with pytest.raises(LayoutError, match="out must be contiguous, but has shape"):
        kernels.to_contiguous(x, out=channels_last(x))
    with pytest.raises(ArgumentError, match="out must have shape"):
        kernels.to_channels_last(x, out=channels_last(x[:1]))
    with pytest.raises(ArgumentError, match="out shares memory with x"):
        kernels.to_contiguous(x, out=x)
    with pytest.raises(ArgumentError, match="4 dimensions"):
        kernels.to_contiguous(x[0])
    with pytest.raises(DtypeError, match="x must be one of float32"):
        kernels.to_channels_last(numpy.zeros((1, 2, 3, 4), numpy.uint8))
