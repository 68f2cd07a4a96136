"""Transposed convolution by the kernels, on the host runtime, against a loop that spreads every input pixel."""

from __future__ import annotations

import numpy
import pytest

from gpucnn_kernels import (
    ArgumentError,
    DtypeError,
    LayoutError,
    ProblemError,
    conv2d_algorithms,
    conv_transpose2d_backward_data,
    conv_transpose2d_backward_filter,
    conv_transpose2d_forward,
)
from gpucnn_kernels.runtime.host import order_independent
from tests.accuracy import awkward, max_error
from tests.kernel_accuracy import on_the_host
from tests.kernel_arrays import DTYPES, EPSILON, LAYOUTS, cast, wide

__all__ = ["on_the_host"]

CASES = {
    "plain": {},
    "stride-2": {"stride": 2},
    "stride-2-padding-1": {"stride": 2, "padding": 1},
    "output-padding": {"stride": 2, "padding": 1, "output_padding": 1},
    "output-padding-by-side": {"stride": (2, 3), "padding": (1, 0), "output_padding": (0, 2)},
    "dilation": {"dilation": 2, "padding": 1},
    "dilation-stride": {"dilation": (1, 2), "stride": (3, 2), "output_padding": (2, 1)},
    "groups": {"groups": 2, "stride": 2},
    "depthwise": {"groups": 4, "stride": 2, "padding": 1},
}
KERNELS = [(3, 3), (2, 3), (4, 4)]


def pair_of(value):
    return (value, value) if isinstance(value, int) else value


def loops(x, weight, stride=1, padding=0, output_padding=0, dilation=1, groups=1):
    """(y, dy, dx, dw), dy being random numbers and dx and dw the gradients of the sum of dy * y.

    Pixel (h, w) times weight (r, s) lands at h * stride + r * dilation - padding, if that is in the output.
    """
    images, channels, height, width = x.shape
    outputs, (kernel_height, kernel_width) = weight.shape[1], weight.shape[2:]
    (sy, sx), (py, px), (ey, ex), (ty, tx) = map(pair_of, (stride, padding, output_padding, dilation))
    rows = (height - 1) * sy - 2 * py + ty * (kernel_height - 1) + ey + 1
    columns = (width - 1) * sx - 2 * px + tx * (kernel_width - 1) + ex + 1
    y = numpy.zeros((images, outputs * groups, rows, columns))
    dy = numpy.random.default_rng(12).integers(-8, 9, y.shape).astype(numpy.float64)
    dx, dw = numpy.zeros(x.shape), numpy.zeros(weight.shape)
    for n, c, h, w in numpy.ndindex(images, channels, height, width):
        group = c // (channels // groups)
        for k, r, s in numpy.ndindex(outputs, kernel_height, kernel_width):
            p, q = h * sy + r * ty - py, w * sx + s * tx - px
            if 0 <= p < rows and 0 <= q < columns:
                place = n, group * outputs + k, p, q
                y[place] += x[n, c, h, w] * weight[c, k, r, s]
                dx[n, c, h, w] += dy[place] * weight[c, k, r, s]
                dw[c, k, r, s] += dy[place] * x[n, c, h, w]
    return y, dy, dx, dw


def draw(kernel=(3, 3), groups=1):
    """(x, weight, bias): integers, whose products and sums are exact in float32; results are only rounded."""
    generator = numpy.random.default_rng(11)
    outputs = 3 if groups < 4 else 1
    shapes = (2, 4, 4, 5), (4, outputs, *kernel), (outputs * groups,)
    return tuple(generator.integers(-8, 9, shape).astype(numpy.float64) for shape in shapes)


def assert_rounded(result, truth, dtype, label, roundings=1):
    """Nothing but the rounding to the dtype of the result, or of ``roundings`` of it."""
    assert result.shape == truth.shape, label
    assert str(result.dtype) == dtype, label
    bound = roundings * EPSILON[dtype] / 2 * float(numpy.abs(truth).max())
    assert max_error(wide(result), truth) <= bound, label


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients(dtype):
    for name, case in CASES.items():
        for kernel in KERNELS:
            groups = case.get("groups", 1)
            x, weight, bias = draw(kernel, groups)
            y, dy, dx, dw = loops(x, weight, **case)
            rest = {key: value for key, value in case.items() if key != "output_padding"}
            x, weight, bias, dy = (cast(array, dtype) for array in (x, weight, bias, dy))
            y = y + wide(bias)[:, None, None]
            for layout, arrange in LAYOUTS.items():
                label = f"{name}, {kernel}, {layout}"
                given, filters, gradient = arrange(x), arrange(weight), arrange(dy)
                for algorithm in ("auto", *conv2d_algorithms("backward_data")):
                    if algorithm != "depthwise" or groups == 4:
                        made = conv_transpose2d_forward(given, filters, bias, algorithm=algorithm, **case)
                        # By columns, the sum is rounded before the bias is added.
                        twice = algorithm in ("col2im", "scatter")
                        assert_rounded(made, y, dtype, f"{label}, {algorithm}", 2 if twice else 1)
                for algorithm in ("auto", *conv2d_algorithms("forward")):
                    if algorithm != "depthwise" or groups == 4:
                        made = conv_transpose2d_backward_data(gradient, filters, algorithm=algorithm, **rest)
                        assert_rounded(made, dx, dtype, f"{label}, {algorithm}, dx")
                for algorithm in ("auto", *conv2d_algorithms("backward_filter")):
                    if algorithm != "depthwise" or groups == 4:
                        made = conv_transpose2d_backward_filter(
                            gradient, given, kernel_size=kernel, algorithm=algorithm, **rest
                        )
                        assert_rounded(made, dw, dtype, f"{label}, {algorithm}, dw")


def test_out_and_no_bias():
    x, weight, bias = (cast(array, "float32") for array in draw())
    y, dy, dx, dw = loops(wide(x), wide(weight), stride=2)
    for arrange in LAYOUTS.values():
        out = arrange(numpy.full(y.shape, numpy.nan, numpy.float32))
        assert conv_transpose2d_forward(x, weight, stride=2, out=out) is out
        assert_rounded(out, y, "float32", "y")
        assert conv_transpose2d_forward(x, weight, bias, stride=2, out=out) is out
        assert_rounded(out, y + wide(bias)[:, None, None], "float32", "y with bias")
        dy = cast(dy, "float32")
        out = arrange(numpy.full(dx.shape, numpy.nan, numpy.float32))
        assert conv_transpose2d_backward_data(dy, weight, stride=2, out=out) is out
        assert_rounded(out, dx, "float32", "dx")
        out = arrange(numpy.full(dw.shape, numpy.nan, numpy.float32))
        assert conv_transpose2d_backward_filter(dy, x, kernel_size=3, stride=2, out=out) is out
        assert_rounded(out, dw, "float32", "dw")


def test_the_order_of_threads_does_not_matter():
    x, weight, bias = (cast(array, "float32") for array in draw())
    assert order_independent(lambda: conv_transpose2d_forward(x, weight, bias, stride=2, padding=1))


def test_what_does_not_fit():
    x, weight, bias = (cast(array, "float32") for array in draw())
    with pytest.raises(ProblemError, match="expects 4"):
        conv_transpose2d_forward(x[:, :3], weight)
    with pytest.raises(ProblemError, match="output_padding"):
        conv_transpose2d_forward(x, weight, output_padding=1)
    with pytest.raises(ProblemError, match="integer"):
        conv_transpose2d_backward_data(x, weight.transpose(1, 0, 2, 3), padding="same")
    with pytest.raises(ArgumentError, match=r"bias must have shape \(3,\), got \(2,\)"):
        conv_transpose2d_forward(x, weight, bias[:2])
    with pytest.raises(ArgumentError, match="phases, direct, dilated, col2im, scatter, depthwise"):
        conv_transpose2d_forward(x, weight, algorithm="im2col")
    with pytest.raises(ArgumentError, match="'depthwise' needs as many groups"):
        conv_transpose2d_forward(x, weight, algorithm="depthwise")
    with pytest.raises(DtypeError, match="weight is float64, but x is float32"):
        conv_transpose2d_forward(x, weight.astype(numpy.float64))
    with pytest.raises(LayoutError, match="x of shape"):
        conv_transpose2d_forward(awkward(x), weight)
