"""Transposed convolution against a loop that spreads every input pixel over its window of the output."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from numpy.typing import NDArray

from gpucnn.errors import ArgumentError, ShapeError
from gpucnn_kernels.problem import ProblemError, conv_transpose2d_problem
from tests.backends import BACKENDS, Backend
from tests.problems import can_do

CASES: dict[str, dict[str, Any]] = {
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
KERNELS = [(3, 3), (2, 3), (4, 4), (1, 1)]


def pair_of(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def loops(
    x: NDArray[Any],
    weight: NDArray[Any],
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """(y, dy, dx, dw), dy being random numbers and dx and dw the gradients of the sum of dy * y.

    Pixel (h, w) times weight (r, s) lands at h * stride + r * dilation - padding, if that is in the output.
    """
    images, channels, height, width = x.shape
    outputs, (kernel_height, kernel_width) = weight.shape[1], weight.shape[2:]
    (sy, sx), (py, px), (ey, ex), (ty, tx) = map(pair_of, (stride, padding, output_padding, dilation))
    rows = (height - 1) * sy - 2 * py + ty * (kernel_height - 1) + ey + 1
    columns = (width - 1) * sx - 2 * px + tx * (kernel_width - 1) + ex + 1
    y = numpy.zeros((images, outputs * groups, rows, columns))
    dy = numpy.random.default_rng(12).standard_normal(y.shape)
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


def draw(kernel: tuple[int, int], groups: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    generator = numpy.random.default_rng(11)
    outputs = 3 if groups < 4 else 1
    return (
        generator.standard_normal((2, 4, 4, 5)),
        generator.standard_normal((4, outputs, *kernel)),
        generator.standard_normal(outputs * groups),
    )


@BACKENDS
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(backend: Backend, name: str, kernel: tuple[int, int]) -> None:
    case = CASES[name]
    if kernel == (1, 1) and name == "dilation-stride":
        case = {**case, "padding": 0}
    x, weight, bias = draw(kernel, case.get("groups", 1))
    expected, dy, expected_dx, expected_dw = loops(x, weight, **case)
    problem = conv_transpose2d_problem(x.shape, weight.shape, **case)
    for algorithm in ("auto", *backend.conv2d_algorithms("backward_data")):
        if not can_do(algorithm, "backward_data", problem, backend.name, x.dtype):
            continue
        y = backend.conv_transpose2d_forward(x, weight, bias, algorithm=algorithm, **case)
        assert y.shape == expected.shape
        assert numpy.abs(y - expected - bias[:, None, None]).max() <= 1e-13

    rest = {key: value for key, value in case.items() if key != "output_padding"}
    dx = backend.conv_transpose2d_backward_data(dy, weight, **rest)
    assert dx.shape == expected_dx.shape
    assert numpy.abs(dx - expected_dx).max() <= 1e-13
    dw = backend.conv_transpose2d_backward_filter(dy, x, kernel_size=kernel, **rest)
    assert dw.shape == expected_dw.shape
    assert numpy.abs(dw - expected_dw).max() <= 1e-12


@BACKENDS
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_types_and_out(backend: Backend, dtype: str) -> None:
    x, weight, bias = (array.astype(dtype) for array in draw((3, 3), 1))
    y = backend.conv_transpose2d_forward(x, weight, bias, stride=2)
    assert y.dtype == numpy.dtype(dtype)
    truth = loops(*(array.astype(numpy.float64) for array in (x, weight)), stride=2)[0] + bias[:, None, None]
    assert numpy.abs(y - truth).max() <= 4 * numpy.finfo(dtype).eps * numpy.abs(truth).max()
    out = numpy.full_like(y, numpy.nan)
    assert backend.conv_transpose2d_forward(x, weight, bias, stride=2, out=out) is out
    assert numpy.array_equal(out, y)


@BACKENDS
def test_what_does_not_fit(backend: Backend) -> None:
    x, weight, _ = draw((3, 3), 1)
    with pytest.raises(ProblemError, match="expects 4"):
        backend.conv_transpose2d_forward(x[:, :3], weight)
    with pytest.raises(ProblemError, match="output_padding"):
        backend.conv_transpose2d_forward(x, weight, output_padding=1)
    with pytest.raises(ShapeError, match=r"bias must have shape \(3,\)"):
        backend.conv_transpose2d_forward(x, weight, numpy.zeros(4))
    with pytest.raises(ArgumentError, match=", ".join(backend.conv2d_algorithms("backward_data"))):
        backend.conv_transpose2d_forward(x, weight, algorithm="im2col")
    with pytest.raises(ProblemError, match="integer"):
        backend.conv_transpose2d_backward_data(x, weight.transpose(1, 0, 2, 3), padding="same")
