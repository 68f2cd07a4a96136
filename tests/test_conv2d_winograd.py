"""Winograd's algorithm: its rounding against the plain sum's, where "auto" takes it, and the switch."""

import numpy
import pytest

from gpucnn.errors import ArgumentError
from gpucnn.ops import cpu
from gpucnn.ops.cpu import compiled
from gpucnn_kernels.problem import Conv2dProblem
from tests.oracles import convolution as oracle
from tests.problems import arrays, geometry, options

WIDE = Conv2dProblem.from_shapes((2, 128, 20, 18), (96, 128, 3, 3), padding=1)
WIDE_5 = Conv2dProblem.from_shapes((2, 128, 19, 16), (96, 128, 5, 5), padding=2)

# Too many filters for all of them to be kept transformed; tiles that reach over the edge; 260 is no multiple of a
# task's channels.
WIDEST = Conv2dProblem.from_shapes((2, 264, 7, 6), (260, 264, 3, 3), padding=1)
PLAIN = {"forward": "im2col", "backward_data": "col2im", "backward_filter": "im2col"}


def run(direction, problem, dtype, algorithm):
    x, weight, _, dy = arrays(problem, dtype)
    more = {"algorithm": algorithm, **options(problem)}
    if direction == "forward":
        return cpu.conv2d_forward(x, weight, **more)
    if direction == "backward_data":
        return cpu.conv2d_backward_data(dy, weight, input_size=(problem.H, problem.W), **more)
    return cpu.conv2d_backward_filter(dy, x, kernel_size=(problem.R, problem.S), **more)


def truth(direction, problem):
    """In float64, from the very numbers that float32 holds."""
    x, weight, _, dy = (array.astype("float64") for array in arrays(problem, "float32"))
    if direction == "forward":
        return oracle.plain_forward(x, weight, geometry(problem))
    if direction == "backward_data":
        return oracle.plain_backward_data(dy, weight, problem.input_shape, geometry(problem))
    return oracle.plain_backward_filter(dy, x, problem.weight_shape, geometry(problem))


@pytest.mark.parametrize("problem", [WIDE, WIDE_5, WIDEST], ids=["3x3", "5x5", "widest"])
@pytest.mark.parametrize("direction", PLAIN)
def test_rounding_is_at_most_twenty_times_the_plain_sums_and_eight_in_the_mean(direction, problem):
    expected = truth(direction, problem)
    error = numpy.abs(run(direction, problem, "float32", "winograd") - expected)
    plain = numpy.abs(run(direction, problem, "float32", PLAIN[direction]) - expected)
    assert error.max() <= 20 * plain.max()
    assert numpy.sqrt((error**2).mean()) <= 8 * numpy.sqrt((plain**2).mean())


@pytest.mark.parametrize("direction", PLAIN)
def test_auto_takes_it_for_wide_convolutions_in_float32_and_never_in_float64(direction, monkeypatch):
    everywhere = compiled.available()  # NumPy's transforms of 5x5 pay forward alone
    assert (cpu.conv2d_choose(direction, WIDE_5, "float32") == "winograd") == (
        everywhere or direction == "forward"
    )
    assert cpu.conv2d_choose(direction, WIDE_5, "float64") != "winograd"
    assert cpu.conv2d_choose(direction, WIDE, "float32") == "winograd"
    assert cpu.conv2d_choose(direction, WIDE, "float16") == "winograd"
    assert cpu.conv2d_choose(direction, WIDE, "float64") != "winograd"
    narrow = Conv2dProblem.from_shapes((2, 8, 20, 18), (8, 8, 3, 3), padding=1)
    assert cpu.conv2d_choose(direction, narrow, "float32") != "winograd"
    monkeypatch.setenv("GPUCNN_WINOGRAD", "0")
    assert cpu.conv2d_choose(direction, WIDE, "float32") != "winograd"


@pytest.mark.parametrize(
    ("kernel", "settings"),
    [
        ((3, 3), {"stride": 2}),
        ((3, 3), {"dilation": 2}),
        ((3, 3), {"groups": 2}),
        ((5, 5), {"stride": 2}),
        ((7, 7), {}),
        ((3, 1), {}),
    ],
)
def test_what_it_cannot_do_is_an_error(kernel, settings):
    x = numpy.ones((1, 4, 9, 9), numpy.float32)
    weight = numpy.ones((4, 4 // settings.get("groups", 1), *kernel), numpy.float32)
    with pytest.raises(ArgumentError, match=r"needs a 3x3 or 5x5 kernel .* choose auto or one of im2col"):
        cpu.conv2d_forward(x, weight, algorithm="winograd", **settings)


def test_the_input_gradient_with_padding_beyond_the_kernel_is_an_error():
    weight = numpy.ones((4, 4, 3, 3), numpy.float32)
    dy = numpy.ones((1, 4, 13, 13), numpy.float32)
    with pytest.raises(ArgumentError, match=r"padding below the kernel's size"):
        cpu.conv2d_backward_data(dy, weight, input_size=(9, 9), padding=3, algorithm="winograd")


@pytest.mark.parametrize("direction", PLAIN)
def test_the_widest_give_the_same_bits_with_any_number_of_threads(direction, monkeypatch):
    monkeypatch.setenv("GPUCNN_NUM_THREADS", "1")
    alone = run(direction, WIDEST, "float32", "winograd")
    monkeypatch.setenv("GPUCNN_NUM_THREADS", "3")
    assert numpy.array_equal(run(direction, WIDEST, "float32", "winograd"), alone)


def test_the_widest_add_their_bias():
    x, weight, bias, _ = arrays(WIDEST, "float32")
    plain = cpu.conv2d_forward(x, weight, algorithm="winograd", padding=1)
    biased = cpu.conv2d_forward(x, weight, bias, algorithm="winograd", padding=1)
    assert numpy.abs(biased - plain - bias[:, None, None]).max() <= 1e-5
