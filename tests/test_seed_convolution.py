"""The seed articles' convolution examples and printed tables, number by number.

Articles: the C++ series' part 5 (a 5x5 input of two channels, 3x3 kernel, stride 2, gradients written out term by
term); the CS231n-style layers in Python (im2col of a 227x227x3 image; the one-dimensional derivation); the
derivation of the filter gradient by tensordot.

The articles divide the weights' gradients by the batch size as they add them up. Here, as in PyTorch, that belongs
to the loss: a mean over the batch puts the 1 / N into dy, and the convolution only adds.
"""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from numpy.typing import NDArray

from gpucnn.ops.cpu.conv2d_data import dilate_and_pad, rotated
from gpucnn_kernels.problem import Conv2dProblem
from tests.backends import BACKENDS, CPU, CUDA, NUMPY, Backend

FORWARD = {CPU: ("auto",), NUMPY: ("im2col", "rows", "tensordot"), CUDA: ("implicit_gemm", "direct", "im2col")}
BACKWARD_DATA = {
    CPU: ("auto",),
    NUMPY: ("col2im", "dilated", "phases", "scatter"),
    CUDA: ("phases", "dilated", "col2im", "scatter"),
}
BACKWARD_FILTER = {CPU: ("auto",), NUMPY: ("im2col", "rows", "tensordot"), CUDA: ("implicit_gemm", "im2col")}


def each(algorithms: dict[Backend, tuple[str, ...]]) -> pytest.MarkDecorator:
    """A test on every backend, by every algorithm of it."""
    cases = [pytest.param(b, name, id=f"{b.name}-{name}") for b, names in algorithms.items() for name in names]
    return pytest.mark.parametrize(("backend", "algorithm"), cases)


# ---------------------------------------------------------------- part 5: 5x5, two channels, k3, s2


def one_based(array: NDArray[Any]) -> dict[tuple[int, int, int], float]:
    """The article's notation: (channel, row, column), counted from 1."""
    return {(c + 1, h + 1, w + 1): float(array[c, h, w]) for c, h, w in numpy.ndindex(array.shape)}


X = numpy.random.default_rng(5).standard_normal((1, 2, 5, 5))
WEIGHT = numpy.random.default_rng(6).standard_normal((1, 2, 3, 3))
BIAS = numpy.array([0.75])
DELTA = numpy.random.default_rng(7).standard_normal((1, 1, 2, 2))
W = one_based(WEIGHT[0])
I = one_based(X[0])  # noqa: E741 - the article's letter
D = {index[1:]: value for index, value in one_based(DELTA[0]).items()}


@each(FORWARD)
def test_the_output_is_2x2_and_its_corner_the_sum_over_the_first_window(backend: Backend, algorithm: str) -> None:
    y = backend.conv2d_forward(X, WEIGHT, BIAS, stride=2, algorithm=algorithm)
    assert y.shape == (1, 1, 2, 2)
    for row in (1, 2):
        for column in (1, 2):
            total = float(BIAS[0])
            for channel, r, s in W:
                total += W[channel, r, s] * I[channel, 2 * row - 2 + r, 2 * column - 2 + s]
            assert abs(y[0, 0, row - 1, column - 1] - total) <= 1e-14


@each(BACKWARD_FILTER)
def test_the_filter_gradient_term_by_term(backend: Backend, algorithm: str) -> None:
    gradient = backend.conv2d_backward_filter(DELTA, X, kernel_size=3, stride=2, algorithm=algorithm)
    assert gradient.shape == (1, 2, 3, 3)
    dw = one_based(gradient[0])
    # The two that the article writes out: weight 11 of channel 1, weight 32 of channel 2.
    dw11 = D[1, 1] * I[1, 1, 1] + D[1, 2] * I[1, 1, 3] + D[2, 1] * I[1, 3, 1] + D[2, 2] * I[1, 3, 3]
    dw32 = D[1, 1] * I[2, 3, 2] + D[1, 2] * I[2, 3, 4] + D[2, 1] * I[2, 5, 2] + D[2, 2] * I[2, 5, 4]
    assert abs(dw[1, 1, 1] - dw11) <= 1e-15
    assert abs(dw[2, 3, 2] - dw32) <= 1e-15
    for channel, r, s in W:
        total = sum(D[p, q] * I[channel, 2 * p - 2 + r, 2 * q - 2 + s] for p in (1, 2) for q in (1, 2))
        assert abs(dw[channel, r, s] - total) <= 1e-15


@BACKENDS
def test_the_bias_gradient(backend: Backend) -> None:
    gradient = backend.conv2d_backward_bias(DELTA)
    assert gradient.shape == (1,)
    assert abs(gradient[0] - (D[1, 1] + D[1, 2] + D[2, 1] + D[2, 2])) <= 1e-15


@each(BACKWARD_DATA)
def test_the_input_gradient_term_by_term(backend: Backend, algorithm: str) -> None:
    gradient = backend.conv2d_backward_data(DELTA, WEIGHT, input_size=(5, 5), stride=2, algorithm=algorithm)
    assert gradient.shape == (1, 2, 5, 5)
    dx = one_based(gradient[0])
    for c in (1, 2):
        assert abs(dx[c, 1, 1] - D[1, 1] * W[c, 1, 1]) <= 1e-15
        assert abs(dx[c, 1, 2] - D[1, 1] * W[c, 1, 2]) <= 1e-15
        assert abs(dx[c, 1, 3] - (D[1, 1] * W[c, 1, 3] + D[1, 2] * W[c, 1, 1])) <= 1e-15
        four = D[1, 1] * W[c, 3, 3] + D[1, 2] * W[c, 3, 1] + D[2, 1] * W[c, 1, 3] + D[2, 2] * W[c, 1, 1]
        assert abs(dx[c, 3, 3] - four) <= 1e-15


@BACKENDS
def test_the_dilated_gradient_is_7x7_and_the_kernel_turned_by_180_degrees(backend: Backend) -> None:
    """k - p - 1 = 2 rings of zeros outside and s - 1 = 1 line of zeros between."""
    problem = Conv2dProblem.from_shapes(X.shape, WEIGHT.shape, stride=2)
    spread = dilate_and_pad(DELTA, problem)
    expected = numpy.zeros((7, 7))
    expected[2, 2], expected[2, 4] = D[1, 1], D[1, 2]
    expected[4, 2], expected[4, 4] = D[2, 1], D[2, 2]
    assert spread.shape == (1, 1, 7, 7)
    assert numpy.array_equal(spread[0, 0], expected)

    turned = rotated(WEIGHT, 1)
    assert turned.shape == (2, 1, 3, 3)
    for channel in (1, 2):
        for r in (1, 2, 3):
            for s in (1, 2, 3):
                assert turned[channel - 1, 0, r - 1, s - 1] == W[channel, 4 - r, 4 - s]

    by_convolution = backend.conv2d_forward(spread, turned)
    dx = backend.conv2d_backward_data(DELTA, WEIGHT, input_size=5, stride=2)
    assert numpy.abs(by_convolution - dx).max() <= 1e-15


@pytest.mark.parametrize("stride", [2, 3])
def test_the_dilated_gradient_is_mostly_zeros(stride: int) -> None:
    """The article's count: at stride 2 at most about 25 % of the work meets a number, at stride 3 about 11 %."""
    problem = Conv2dProblem.from_shapes((1, 1, 60 * stride + 2, 60 * stride + 2), (1, 1, 3, 3), stride=stride)
    spread = dilate_and_pad(numpy.ones(problem.output_shape), problem)
    assert 0.9 / stride**2 <= numpy.count_nonzero(spread) / spread.size <= 1 / stride**2


@BACKENDS
def test_a_mean_over_the_batch_is_in_dy(backend: Backend) -> None:
    """The articles' loop adds each image's gradient divided by the batch size: so does dy / N."""
    generator = numpy.random.default_rng(8)
    x, dy = generator.standard_normal((4, 2, 5, 5)), generator.standard_normal((4, 1, 2, 2))
    mean = numpy.zeros((1, 2, 3, 3))
    for image in range(4):
        part = backend.conv2d_backward_filter(dy[image, None], x[image, None], kernel_size=3, stride=2)
        mean += part / 4
    whole = backend.conv2d_backward_filter(dy / 4, x, kernel_size=3, stride=2)
    assert numpy.abs(whole - mean).max() <= 1e-15


# ---------------------------------------------------------------- im2col: 227 x 227 x 3, 11 x 11, stride 4


@BACKENDS
def test_im2col_of_the_227_image(backend: Backend) -> None:
    generator = numpy.random.default_rng(9)
    x = generator.standard_normal((1, 3, 227, 227)).astype(numpy.float32)
    weight = generator.standard_normal((96, 3, 11, 11)).astype(numpy.float32)
    columns = backend.im2col(x, kernel_size=11, stride=4)
    assert columns.shape == (1, 363, 3025)
    # Column i * 55 + j is the receptive field that starts at row 4 i, column 4 j, stretched out.
    for i, j in [(0, 0), (0, 54), (54, 0), (54, 54), (17, 30)]:
        field = x[0, :, 4 * i : 4 * i + 11, 4 * j : 4 * j + 11]
        assert numpy.array_equal(columns[0, :, 55 * i + j], field.reshape(363))

    w_col = weight.reshape(96, 363)
    product = w_col @ columns[0]
    assert product.shape == (96, 3025)
    for algorithm in FORWARD[backend]:
        y = backend.conv2d_forward(x, weight, stride=4, algorithm=algorithm)
        assert y.shape == (1, 96, 55, 55)
        assert numpy.abs(y[0] - product.reshape(96, 55, 55)).max() <= 1e-3


@BACKENDS
def test_col2im_adds_where_receptive_fields_overlap(backend: Backend) -> None:
    """Of ones, it counts the fields that each pixel is in: up to 3 x 3 at kernel 11 and stride 4."""
    counts = backend.col2im(numpy.ones((1, 363, 3025)), input_size=227, kernel_size=11, stride=4)
    along = [sum(1 for start in range(0, 217, 4) if start <= place < start + 11) for place in range(227)]
    assert max(along) == 3
    assert numpy.array_equal(counts[0, 0], numpy.outer(along, along))
    assert numpy.array_equal(counts[0, 0], counts[0, 2])


@BACKENDS
def test_the_small_case_4x4x3(backend: Backend) -> None:
    """The article's graph: 4x4x3, one 2x2 kernel, stride 1, no padding: columns of 12 numbers, 9 of them."""
    x = numpy.arange(48.0).reshape(1, 3, 4, 4)
    columns = backend.im2col(x, kernel_size=2)
    assert columns.shape == (1, 12, 9)
    assert columns[0, :, 0].tolist() == [0, 1, 4, 5, 16, 17, 20, 21, 32, 33, 36, 37]
    assert columns[0, :, 8].tolist() == [10, 11, 14, 15, 26, 27, 30, 31, 42, 43, 46, 47]


# ---------------------------------------------------------------- one dimension


@BACKENDS
def test_the_one_dimensional_example(backend: Backend) -> None:
    """X = [x0 .. x4], W = [w0 w1 w2], no padding: Y has 3 numbers; dX, dW and db written out."""
    x0, x1, x2, x3, x4 = x = [2.0, -1.0, 0.5, 3.0, -2.5]
    w0, w1, w2 = w = [0.25, -1.5, 2.0]
    d0, d1, d2 = d = [1.0, -2.0, 0.5]
    b = 0.125
    signal, kernel, gradient = (numpy.reshape(values, (1, 1, 1, -1)) for values in (x, w, d))
    y = backend.conv2d_forward(signal, kernel, numpy.array([b]))
    expected = [
        w0 * x0 + w1 * x1 + w2 * x2 + b,
        w0 * x1 + w1 * x2 + w2 * x3 + b,
        w0 * x2 + w1 * x3 + w2 * x4 + b,
    ]
    assert y.ravel().tolist() == expected
    for algorithm in BACKWARD_DATA[backend]:
        dx = backend.conv2d_backward_data(gradient, kernel, input_size=(1, 5), algorithm=algorithm)
        assert dx.ravel().tolist() == [
            w0 * d0,
            w1 * d0 + w0 * d1,
            w2 * d0 + w1 * d1 + w0 * d2,
            w2 * d1 + w1 * d2,
            w2 * d2,
        ]
    for algorithm in BACKWARD_FILTER[backend]:
        dw = backend.conv2d_backward_filter(gradient, signal, kernel_size=(1, 3), algorithm=algorithm)
        assert dw.ravel().tolist() == [
            x0 * d0 + x1 * d1 + x2 * d2,
            x1 * d0 + x2 * d1 + x3 * d2,
            x2 * d0 + x3 * d1 + x4 * d2,
        ]
    assert backend.conv2d_backward_bias(gradient).tolist() == [d0 + d1 + d2]


@BACKENDS
def test_dx_is_the_padded_gradient_convolved_with_the_flipped_kernel(backend: Backend) -> None:
    """The article's one-dimensional remark: pad dout with k - 1 = 2 zeros a side, flip W, slide."""
    kernel, gradient = numpy.array([[[[0.25, -1.5, 2.0]]]]), numpy.array([[[[1.0, -2.0, 0.5]]]])
    dx = backend.conv2d_backward_data(gradient, kernel, input_size=(1, 5), algorithm="dilated")
    slid = backend.conv2d_forward(gradient, kernel[..., ::-1], padding=(0, 2))
    assert numpy.array_equal(dx, slid)


# ---------------------------------------------------------------- the filter gradient by tensordot


@BACKENDS
def test_the_tensordot_derivation(backend: Backend) -> None:
    """4x4 input, 2x2 kernel, 3x3 output: a weight's gradient is the dot product of eta with the input it met."""
    generator = numpy.random.default_rng(10)
    x, eta = generator.standard_normal((4, 4)), generator.standard_normal((3, 3))
    algorithm = "tensordot" if backend is NUMPY else "auto"
    dw = backend.conv2d_backward_filter(eta[None, None], x[None, None], kernel_size=2, algorithm=algorithm)
    for h in range(2):
        for w in range(2):
            total = sum(eta[i, j] * x[h + i, w + j] for i in range(3) for j in range(3))
            assert abs(dw[0, 0, h, w] - total) <= 1e-14


@BACKENDS
def test_the_tensordot_derivation_in_its_own_layout(backend: Backend) -> None:
    """The article's last program: N, H, W, C arrays, many samples, channels and kernels; here given as views."""
    generator = numpy.random.default_rng(11)
    x = generator.standard_normal((3, 6, 7, 2))
    eta = generator.standard_normal((3, 5, 5, 4))
    expected = numpy.zeros((4, 2, 3, 2))  # (d, kh, kw, c): rectangular kernels too
    for n, i, j, d in numpy.ndindex(eta.shape):
        for h, w, c in numpy.ndindex(expected.shape[1:]):
            expected[d, h, w, c] += eta[n, i, j, d] * x[n, h + i, w + j, c]
    for algorithm in BACKWARD_FILTER[backend]:
        dw = backend.conv2d_backward_filter(
            eta.transpose(0, 3, 1, 2), x.transpose(0, 3, 1, 2), kernel_size=(2, 3), algorithm=algorithm
        )
        assert numpy.abs(dw.transpose(0, 2, 3, 1) - expected).max() <= 1e-13
    db = backend.conv2d_backward_bias(eta.transpose(0, 3, 1, 2))
    assert numpy.abs(db - eta.sum(axis=(0, 1, 2))).max() <= 1e-13
