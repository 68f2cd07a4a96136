"""The convolution kernels' names, choice of a path, and what they refuse, in words."""

from __future__ import annotations

import numpy
import pytest

from gpucnn_kernels import (
    ArgumentError,
    DtypeError,
    LayoutError,
    ProblemError,
    conv2d_algorithms,
    conv2d_backward_data,
    conv2d_choose,
    conv2d_forward,
)
from tests.accuracy import awkward
from tests.kernel_accuracy import on_the_host
from tests.kernel_arrays import cast
from tests.problems import ALL, LARGE, SMALL, arrays

__all__ = ["on_the_host"]


def inputs(problem):
    """(x, weight, bias, dy)."""
    return tuple(cast(array, "float32") for array in arrays(problem))


def test_the_lists_of_algorithms():
    assert conv2d_algorithms("forward") == ("implicit_gemm", "direct", "depthwise", "im2col")
    assert conv2d_algorithms("backward_data") == ("phases", "direct", "dilated", "col2im", "scatter", "depthwise")
    assert "implicit_gemm" in conv2d_algorithms("backward_filter")
    with pytest.raises(ArgumentError, match="forward, backward_data, backward_filter, got 'sideways'"):
        conv2d_algorithms("sideways")


def test_choose():
    def chosen(name, dtype="float32"):
        return tuple(conv2d_choose(way, ALL[name], dtype) for way in ("forward", "backward_data"))

    assert chosen("depthwise") == ("depthwise", "depthwise")
    assert chosen("lenet-1")[0] == "direct"  # one channel, but one group: outputs share the input
    assert chosen("resnet-stem")[0] == "direct"
    assert chosen("resnet-block") == ("implicit_gemm", "phases")
    assert chosen("bottleneck") == ("im2col", "col2im")
    assert chosen("resnet-shortcut") == ("implicit_gemm", "phases")
    assert conv2d_choose("backward_filter", ALL["depthwise"], "float32") == "depthwise"


def test_what_an_algorithm_cannot_do():
    x, weight, _, dy = inputs(LARGE["resnet-block"])
    size = {"input_size": x.shape[2:], "padding": 1}
    with pytest.raises(ArgumentError, match=r"at most 8 input channels a group, got 16 .*implicit_gemm, im2col"):
        conv2d_forward(x, weight, algorithm="direct")
    with pytest.raises(ArgumentError, match="as many groups as input channels, got groups=1 for 16"):
        conv2d_forward(x, weight, algorithm="depthwise")
    with pytest.raises(ArgumentError, match="phases, dilated, col2im, scatter"):
        conv2d_backward_data(dy, weight, algorithm="depthwise", **size)
    with pytest.raises(ArgumentError, match="unknown algorithm 'winograd' for conv2d forward"):
        conv2d_forward(x, weight, algorithm="winograd")
    with pytest.raises(ArgumentError, match="unknown algorithm 'im2col' for conv2d backward_data"):
        conv2d_backward_data(dy, weight, algorithm="im2col", **size)
    with pytest.raises(ArgumentError, match=r"activation must be one of identity, relu, .*got 'swish'"):
        conv2d_forward(x, weight, activation="swish")


def test_arrays_that_do_not_fit():
    x, weight, bias, dy = inputs(SMALL["k3"])
    size = x.shape[2:]
    with pytest.raises(ProblemError, match="4 dimensions"):
        conv2d_forward(x[0], weight)
    with pytest.raises(ProblemError, match="weight"):
        conv2d_backward_data(dy, weight[0], input_size=size)
    with pytest.raises(ProblemError, match=r"gives \(2, 4, 4, 5\)"):
        conv2d_backward_data(dy[:, :, :3], weight, input_size=size)
    with pytest.raises(ArgumentError, match=r"bias must have shape \(4,\), got \(3,\)"):
        conv2d_forward(x, weight, bias[:3])
    with pytest.raises(DtypeError, match="weight is float64, but x is float32"):
        conv2d_forward(x, weight.astype(numpy.float64))
    with pytest.raises(DtypeError, match="x must be one of float32, float16, bfloat16, float64, got int32"):
        conv2d_forward(x.astype(numpy.int32), weight)
    with pytest.raises(LayoutError, match="x of shape"):
        conv2d_forward(awkward(x), weight)
    with pytest.raises(LayoutError, match="weight of shape"):
        conv2d_forward(x, awkward(weight))
    with pytest.raises(LayoutError, match="bias"):
        conv2d_forward(x, weight, numpy.repeat(bias, 2)[::2])
    with pytest.raises(LayoutError, match="dy of shape"):
        conv2d_backward_data(awkward(dy), weight, input_size=size)


def test_results_that_do_not_fit():
    x, weight, _, dy = inputs(SMALL["k3"])
    with pytest.raises(ArgumentError, match="out must have shape"):
        conv2d_forward(x, weight, out=numpy.empty_like(x))
    with pytest.raises(DtypeError, match="out is float64"):
        conv2d_forward(x, weight, out=numpy.empty(dy.shape))
    with pytest.raises(LayoutError, match="out"):
        conv2d_forward(x, weight, out=awkward(dy))
    with pytest.raises(LayoutError, match="out"):
        conv2d_forward(x, weight, out=numpy.empty(dy.shape[::-1], numpy.float32).transpose())
    read_only = numpy.empty_like(dy)
    read_only.flags.writeable = False
    with pytest.raises(DtypeError, match="read-only"):
        conv2d_forward(x, weight, out=read_only)
    square = numpy.ones((1, 1, 3, 3), numpy.float32)
    with pytest.raises(ArgumentError, match="out shares memory with x"):
        conv2d_forward(square, square.copy(), padding=1, out=square)
    with pytest.raises(ArgumentError, match="out shares memory with weight"):
        conv2d_backward_data(square.copy(), square, input_size=3, padding=1, out=square)
