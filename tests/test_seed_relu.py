"""The tables that the ReLU article prints, and the mask and sigmoid forms of the article on activation layers."""

import math

import numpy
import pytest

from gpucnn.layers import ReLU, Sigmoid
from tests.backends import BACKENDS

# Channel 3 of image 0: what goes in, what comes out, and the gradient that is passed back.
INPUT = """
-0.728  1.309  1.354  0.025 -0.478  3.618 -0.906
 0.379 -1.002  0.213 -0.474  0.002 -0.468 -0.243
 0.417 -0.965 -1.180 -0.805  0.425  0.152 -0.164
-0.901 -1.236 -2.054 -0.384  0.738 -0.52   1.012
-1.037  0.992 -0.992  0.780  0.690 -0.500  0.835
 0.620 -0.532  0.751 -1.225  2.221  1.129 -1.075
-1.204  1.819  0.664  0.102 -2.001  1.673 -0.180
"""
OUTPUT = """
0.000 1.309 1.354 0.025 0.000 3.618 0.000
0.379 0.000 0.213 0.000 0.002 0.000 0.000
0.417 0.000 0.000 0.000 0.425 0.152 0.000
0.000 0.000 0.000 0.000 0.738 0.000 1.012
0.000 0.992 0.000 0.780 0.690 0.000 0.835
0.620 0.000 0.751 0.000 2.221 1.129 0.000
0.000 1.819 0.664 0.102 0.000 1.673 0.000
"""
PASSED_BACK = """
 0.000 -0.435  0.555 -0.282  0.000 -0.222  0.000
-0.190  0.000  1.135  0.000  0.180  0.000  0.000
 0.763  0.000  0.000  0.000 -0.845  0.487  0.000
 0.000  0.000  0.000  0.000 -0.531  0.000 -0.972
 0.000 -1.283  0.000  1.424  1.559  0.000  0.755
 0.489  0.000  0.174  0.000 -0.606 -0.576  0.000
 0.000  0.727 -0.397 -1.032  0.000  1.712  0.000
"""


def table(text):
    return numpy.array([float(number) for number in text.split()], numpy.float32).reshape(1, 1, 7, 7)


def incoming_gradient():
    """The article shows it only as a picture: any numbers where the output is 0, the printed ones elsewhere."""
    arbitrary = (1 + numpy.arange(49, dtype=numpy.float32)).reshape(1, 1, 7, 7)
    return numpy.where(table(OUTPUT) > 0, table(PASSED_BACK), arbitrary)


@BACKENDS
def test_forward(backend):
    numpy.testing.assert_array_equal(backend.relu_forward(table(INPUT)), table(OUTPUT))


@BACKENDS
def test_backward(backend):
    assert numpy.count_nonzero(incoming_gradient()) == 49
    numpy.testing.assert_array_equal(backend.relu_backward(incoming_gradient(), table(OUTPUT)), table(PASSED_BACK))


@BACKENDS
def test_in_place(backend):
    x, gradient = table(INPUT), incoming_gradient()
    assert backend.relu_forward(x, out=x) is x
    numpy.testing.assert_array_equal(x, table(OUTPUT))
    assert backend.relu_backward(gradient, x, out=gradient) is gradient
    numpy.testing.assert_array_equal(gradient, table(PASSED_BACK))


@pytest.mark.parametrize("inplace", [False, True])
def test_layer(inplace):
    layer = ReLU(inplace=inplace)
    numpy.testing.assert_array_equal(layer(table(INPUT)), table(OUTPUT))
    numpy.testing.assert_array_equal(layer.backward(incoming_gradient()), table(PASSED_BACK))


def test_the_batch_may_grow_after_the_first_call():
    # The article's layer allocates its output once, so a later batch can only be smaller.
    layer = ReLU()
    layer(table(INPUT))
    batch = numpy.concatenate([table(INPUT)] * 3)
    numpy.testing.assert_array_equal(layer(batch), numpy.concatenate([table(OUTPUT)] * 3))


@BACKENDS
def test_the_mask_form(backend):
    x = numpy.array([[1.0, -0.5], [-2.0, 3.0]])
    dout = numpy.array([[5.0, 6.0], [7.0, 8.0]])
    mask = numpy.array([[False, True], [True, False]])  # printed by the article for x <= 0
    y = backend.relu_forward(x)
    numpy.testing.assert_array_equal(y, [[1, 0], [0, 3]])
    numpy.testing.assert_array_equal(y == 0, mask)
    numpy.testing.assert_array_equal(backend.relu_backward(dout, y), [[5, 0], [0, 8]])


@BACKENDS
def test_sigmoid_is_differentiated_through_its_output(backend):
    layer = Sigmoid()
    x = numpy.array([[-2.0, -0.5, 0.0, 1.0, 3.0]])
    dout = numpy.array([[1.0, -2.0, 3.0, 0.5, -1.0]])
    y, dx = layer(x), layer.backward(dout)
    for value, gradient, output, result in zip(x[0], dout[0], y[0], dx[0], strict=True):
        sigmoid = 1 / (1 + math.exp(-value))
        assert abs(output - sigmoid) <= 1e-15
        assert abs(result - gradient * (1.0 - sigmoid) * sigmoid) <= 1e-15
        # The first form that the article derives: y^2 exp(-x).
        assert abs(result - gradient * sigmoid**2 * math.exp(-value)) <= 1e-15
    numpy.testing.assert_array_equal(backend.sigmoid_backward(dout, y), dx)


@BACKENDS
def test_sigmoid_where_the_article_overflows(backend):
    y = backend.sigmoid_forward(numpy.array([-1000.0, 1000.0]))
    numpy.testing.assert_array_equal(y, [0, 1])
