"""What batch norm kernels refuse, and in which words; what they make of batches of nothing."""

from __future__ import annotations

import numpy
import pytest

import gpucnn_kernels as kernels
from gpucnn_kernels.errors import ArgumentError, DtypeError, LayoutError
from gpucnn_kernels.problem import ProblemError
from tests.accuracy import awkward, channels_last
from tests.kernel_accuracy import on_the_host

__all__ = ["on_the_host"]


def test_empty_batches():
    for shape in ((0, 3), (0, 3, 4, 5), (2, 3, 0, 5)):
        x = numpy.zeros(shape, numpy.float16)
        three = numpy.ones(3, numpy.float32)
        assert kernels.batch_norm_inference(x, None, None, three, three).shape == shape
        dx, dweight, dbias = kernels.batch_norm_backward(x, x, three, three, three)
        assert dx.shape == shape
        numpy.testing.assert_array_equal(dweight, [0, 0, 0])
        numpy.testing.assert_array_equal(dbias, [0, 0, 0])
        with pytest.raises(ProblemError, match="at least two values a channel, got 0"):
            kernels.batch_norm_forward(x)
    nothing = numpy.zeros((4, 0, 2, 2), numpy.float32)
    y, mean, inverse_std = kernels.batch_norm_forward(nothing)
    assert (y.shape, mean.shape, inverse_std.shape) == ((4, 0, 2, 2), (0,), (0,))


def test_errors():
    x, three = numpy.zeros((1, 3, 1, 1), numpy.float32), numpy.ones(3, numpy.float32)
    with pytest.raises(ProblemError, match=r"at least two values a channel, got 1 .*batch of one"):
        kernels.batch_norm_forward(x)
    with pytest.raises(ProblemError, match=r"\(N, C\) or \(N, C, H, W\), got x of shape \(2, 3, 4\)"):
        kernels.batch_norm_forward(numpy.zeros((2, 3, 4)))
    with pytest.raises(ArgumentError, match=r"weight must have shape \(3,\), got \(2,\)"):
        kernels.batch_norm_forward(numpy.zeros((2, 3), numpy.float32), three[:2])
    half = numpy.zeros((2, 3), numpy.float16)
    with pytest.raises(DtypeError, match=r"bias must be float32 where x is float16: .*got float16, convert it"):
        kernels.batch_norm_forward(half, None, half[0])
    with pytest.raises(DtypeError, match="running_var must be float64 where x is float64"):
        kernels.batch_norm_inference(numpy.zeros((2, 3)), None, None, numpy.ones(3), three)
    with pytest.raises(DtypeError, match=r"x must be one of .*, got int32"):
        kernels.batch_norm_forward(numpy.zeros((2, 3), numpy.int32))
    images = numpy.zeros((2, 3, 4, 4), numpy.float32)
    for wrong in (awkward(images), images.transpose(0, 1, 3, 2), numpy.asfortranarray(numpy.zeros((4, 3), "f4"))):
        with pytest.raises(LayoutError, match="x of shape"):
            kernels.batch_norm_forward(wrong)
    with pytest.raises(LayoutError, match=r"running_mean of shape \(3,\)"):
        kernels.batch_norm_forward(images, running_mean=numpy.zeros(6, numpy.float32)[::2])
    with pytest.raises(LayoutError, match="out has strides"):
        kernels.batch_norm_forward(images, out=channels_last(images))
    with pytest.raises(LayoutError, match="dy has strides"):
        kernels.batch_norm_backward(channels_last(images), images, None, three, three)
    with pytest.raises(ArgumentError, match=r"dy has shape \(1, 3, 1, 1\), but x has shape \(2, 3, 4, 4\)"):
        kernels.batch_norm_backward(x, images, None, three, three)
    with pytest.raises(DtypeError, match="out is float64, but x is float32"):
        kernels.batch_norm_inference(images, None, None, three, three, out=numpy.zeros((2, 3, 4, 4)))
    with pytest.raises(DtypeError, match="mean must be an array, got None"):
        kernels.batch_norm_backward(images, images, None, None, three)
    with pytest.raises(ArgumentError, match=r"activation must be one of identity, relu, .*, got 'softmax'"):
        kernels.batch_norm_forward(images, activation="softmax")
    with pytest.raises(ArgumentError, match=r"goes back through identity, relu, leaky_relu, relu6, got .*'tanh'"):
        kernels.batch_norm_backward(images, images, None, three, three, y=images, activation="tanh")
    with pytest.raises(ArgumentError, match="goes back through relu by its result: give it as y"):
        kernels.batch_norm_backward(images, images, None, three, three, activation="relu")
    level = {"activation": "leaky_relu", "negative_slope": 0}
    with pytest.raises(ArgumentError, match="where negative_slope is above 0, got 0"):
        kernels.batch_norm_backward(images, images, None, three, three, y=images, **level)
    bits = numpy.zeros(96 * 4 // 16, numpy.uint8)
    for mask, error in (
        (bits[:-1], r"mask must have shape \(24,\), got \(23,\)"),
        (bits.astype("i4"), "mask must be uint8"),
    ):
        with pytest.raises((ArgumentError, DtypeError), match=error):
            kernels.batch_norm_backward(images, images, None, three, three, y=images, mask=mask, activation="relu")
    with pytest.raises(LayoutError, match="residual has strides"):
        kernels.batch_norm_forward(images, residual=channels_last(images))
    with pytest.raises(ArgumentError, match=r"out_bias must have shape \(3,\), got \(2,\)"):
        kernels.batch_norm_backward(images, images, None, three, three, out_bias=three[:2].copy())
    # A larger image is read twice: written between, x would be the gradient.
    for wrong, name in (
        ({"out_residual": images}, "x"),
        ({"out_weight": three}, "mean"),
        ({"out_bias": three}, "mean"),
    ):
        with pytest.raises(ArgumentError, match=f"shares memory with {name}"):
            kernels.batch_norm_backward(images + 0, images, None, three, three, **wrong)
    both = three.copy()
    with pytest.raises(ArgumentError, match="out_bias shares memory with out_weight"):
        kernels.batch_norm_backward(images, images, None, three, three, out_weight=both, out_bias=both)
    three.flags.writeable = False
    with pytest.raises(DtypeError, match="running_mean is read-only"):
        kernels.batch_norm_forward(images, running_mean=three)
