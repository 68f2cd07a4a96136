"""Softmax kernels on the host runtime: every axis, every layout, rows for threads, warps and blocks."""

from __future__ import annotations

from functools import cache

import numpy
import pytest

import gpucnn_kernels as kernels
from gpucnn_kernels import runtime
from gpucnn_kernels.errors import ArgumentError, DtypeError, LayoutError
from gpucnn_kernels.runtime import host
from gpucnn_kernels.runtime.host_array import HostArray
from tests.accuracy import awkward, channels_last, max_error
from tests.kernel_arrays import DTYPES, EPSILON, accumulated, cast, error_bound, wide
from tests.oracles import activations as oracle

CASES = [
    # shape, axis
    ((5,), -1),
    ((1,), 0),
    ((3, 8), 1),  # short rows: a thread each
    ((3, 9), 1),  # a warp each, mostly idle
    ((19, 40), -1),  # more rows than one block's warps, more numbers than a warp's lanes
    ((6, 1), 1),
    ((5, 70), 0),
    ((2, 33, 3), 1),
    ((2, 1100), 1),  # a block each
    ((2, 3, 4, 5), 0),
    ((2, 3, 4, 5), 1),
    ((2, 3, 4, 5), -2),
    ((2, 3, 4, 12), 3),
    ((2, 19, 2, 3), 1),
    ((3, 1, 2, 1), 1),
    ((2, 5, 1, 1), 1),
    ((300, 4), -1),  # more rows than a block has threads
]


@pytest.fixture(autouse=True)
def host_runtime():
    with runtime.using("host"):
        yield


@cache
def problem(shape, axis):
    """x and dy, numbers that all four dtypes have, and the exact results."""
    random = numpy.random.default_rng(len(shape) + 7 * shape[0])
    x = wide(cast(4 * random.standard_normal(shape), "bfloat16"))
    dy = wide(cast(random.standard_normal(shape), "bfloat16"))
    return x, dy, oracle.softmax(x, axis), oracle.softmax_backward(dy, x, axis)


def layouts(array):
    """The same numbers in each layout that the array can have."""
    yield numpy.ascontiguousarray(array)
    if array.ndim == 4:
        yield channels_last(array)
    if array.ndim == 3:
        yield numpy.ascontiguousarray(array.transpose(1, 2, 0)).transpose(2, 0, 1)  # dense in an order of its own


def steps(array):
    """Its strides, but of axes of length 1, which say nothing."""
    return [stride for stride, length in zip(array.strides, array.shape, strict=True) if length > 1]


def plain_softmax(x, axis, dtype):
    x = x.astype(accumulated(dtype))
    power = numpy.exp(x - x.max(axis=axis, keepdims=True))
    return power / power.sum(axis=axis, keepdims=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(dtype):
    for shape, axis in CASES:
        x, _, expected, _ = problem(shape, axis)
        bound = error_bound(plain_softmax(x, axis, dtype), expected, dtype)
        for given in layouts(cast(x, dtype)):
            where = f"{shape} axis {axis} strides {given.strides}"
            before = given.copy()
            y = kernels.softmax_forward(given, axis=axis)
            assert y.dtype == given.dtype, where
            assert y.shape == given.shape, where
            assert steps(y) == steps(given), where
            assert max_error(wide(y), expected) <= bound, where
            numpy.testing.assert_array_equal(given, before, err_msg=where)
            out = numpy.full_like(given, numpy.nan)
            assert kernels.softmax_forward(given, axis=axis, out=out) is out, where
            numpy.testing.assert_array_equal(out, y, err_msg=where)
            out = given.copy(order="K")
            assert kernels.softmax_forward(out, axis=axis, out=out) is out, where
            numpy.testing.assert_array_equal(out, y, err_msg=where)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(dtype):
    for shape, axis in CASES:
        _, slopes, probabilities, expected = problem(shape, axis)
        y = cast(probabilities, dtype)  # the rounding of y is the plain computation's too
        p, g = y.astype(accumulated(dtype)), slopes.astype(accumulated(dtype))
        plain = p * (g - (g * p).sum(axis=axis, keepdims=True))
        bound = error_bound(plain, expected, dtype)
        for dy, saved in zip(layouts(cast(slopes, dtype)), layouts(y), strict=True):
            where = f"{shape} axis {axis} strides {dy.strides}"
            dx = kernels.softmax_backward(dy, saved, axis=axis)
            assert dx.dtype == dy.dtype, where
            assert steps(dx) == steps(dy), where
            assert max_error(wide(dx), expected) <= bound, where
            for index in (0, 1):  # in place of either input
                arguments = [dy.copy(order="K"), saved.copy(order="K")]
                out = arguments[index]
                assert kernels.softmax_backward(*arguments, axis=axis, out=out) is out, where
                numpy.testing.assert_array_equal(out, dx, err_msg=where)


@pytest.mark.parametrize("length", [3, 20, 1500])
def test_infinities_large_numbers_and_nan(length):
    x = numpy.zeros((6, length), numpy.float32)
    x[0, :3] = 1e30, -1e30, 3e38
    x[1, :] = -numpy.inf
    x[1, 2] = 5
    x[2, :] = -numpy.inf
    x[3, 1] = numpy.inf
    x[4, length - 1] = numpy.nan
    with numpy.errstate(invalid="ignore"):
        expected = plain_softmax(x, 1, "float32")
    for given, axis in ((x, 1), (numpy.ascontiguousarray(x.T), 0)):
        y = kernels.softmax_forward(given, axis=axis)
        y = y if axis == 1 else y.T
        numpy.testing.assert_array_equal(y[:2], [[*expected[0]], [*expected[1]]])
        assert y[0, 2] == 1
        assert y[1, 2] == 1
        assert numpy.isnan(y[2:5]).all()  # as on the CPU: nothing but minus infinities, infinity, NaN
        assert numpy.isnan(expected[2:5]).all()
        assert max_error(y[5], 1 / length) <= 1e-8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [20, 516, 1096])  # a part of a warp's piece, two pieces, rows for blocks
def test_where_arrays_begin_changes_no_bit(dtype, length):
    assert length % 4 == 0  # these are moved by fours where they can be
    random = numpy.random.default_rng(length)
    x, dy = (cast(random.standard_normal((10, length)), dtype) for _ in range(2))
    y = kernels.softmax_forward(x)
    dx = kernels.softmax_backward(dy, y)
    assert max_error(wide(y), oracle.softmax(wide(x), 1)) <= EPSILON[dtype]
    places = [numpy.empty(x.size + 1, x.dtype)[1:].reshape(x.shape) for _ in range(3)]
    for place, array in zip(places, (x, dy, y), strict=True):
        place[...] = array
    assert kernels.softmax_forward(places[0], out=places[0]).tobytes() == y.tobytes()
    assert kernels.softmax_backward(*places[1:], out=places[0]).tobytes() == dx.tobytes()


def test_nothing():
    for shape in ((0, 3), (3, 0), (2, 0, 3, 4)):
        empty = numpy.zeros(shape, numpy.float32)
        for axis in range(len(shape)):
            assert kernels.softmax_forward(empty, axis=axis).shape == shape
            assert kernels.softmax_backward(empty, empty, axis=axis).shape == shape


def test_the_order_of_threads_changes_nothing():
    for shape, axis in CASES:
        x, dy, probabilities, _ = (numpy.ascontiguousarray(array, numpy.float32) for array in problem(shape, axis))

        def run(x=x, dy=dy, probabilities=probabilities, axis=axis):
            forward = kernels.softmax_forward(x, axis=axis)
            return forward, kernels.softmax_backward(dy, probabilities, axis=axis)

        assert host.order_independent(run), f"{shape} axis {axis}"


def test_results_are_of_the_kind_of_the_input():
    x = numpy.ones((2, 4), numpy.float32).view(HostArray)
    y = kernels.softmax_forward(x)
    assert type(y) is HostArray
    assert (y.get() == 0.25).all()


def test_errors():
    x = numpy.zeros((2, 3), numpy.float32)
    for axis in (2, -3):
        with pytest.raises(
            ArgumentError, match=rf"softmax over axis {axis} of an array with 2 axes, shape \(2, 3\)"
        ):
            kernels.softmax_forward(x, axis=axis)
    with pytest.raises(ArgumentError, match="axis 0 of an array with 0 axes"):
        kernels.softmax_forward(numpy.zeros((), numpy.float32), axis=0)
    with pytest.raises(LayoutError, match="x of shape"):
        kernels.softmax_forward(awkward(x))
    with pytest.raises(LayoutError, match="out has strides"):
        kernels.softmax_forward(x, out=numpy.zeros((3, 2), numpy.float32).T)
    with pytest.raises(DtypeError, match="x must be one of float32, float16, bfloat16, float64, got int32"):
        kernels.softmax_forward(x.astype("int32"))
    with pytest.raises(DtypeError, match="out is float64, but x is float32"):
        kernels.softmax_forward(x, out=numpy.zeros((2, 3)))
    with pytest.raises(ArgumentError, match=r"y has shape \(3, 2\), but dy has shape \(2, 3\)"):
        kernels.softmax_backward(x, numpy.zeros((3, 2), numpy.float32))
    with pytest.raises(TypeError, match="integer"):
        kernels.softmax_forward(x, axis=1.0)
