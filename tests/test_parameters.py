"""Parameters and their flat buffers."""

import numpy
import pytest

from gpucnn.errors import DtypeError, ShapeError
from gpucnn.parameters import Parameter, flatten


def test_a_parameter_starts_with_a_zero_gradient_and_adds_to_it():
    parameter = Parameter(numpy.arange(6, dtype=numpy.float32).reshape(2, 3))
    assert parameter.shape == (2, 3)
    assert parameter.size == 6
    assert parameter.dtype == numpy.float32
    assert not parameter.gradient.any()
    parameter.add_gradient(numpy.ones((2, 3)))
    parameter.add_gradient(numpy.ones((2, 3)))
    assert parameter.gradient.tolist() == [[2, 2, 2], [2, 2, 2]]
    parameter.zero_grad()
    assert not parameter.gradient.any()


def test_a_frozen_parameter_keeps_its_gradient_at_zero():
    parameter = Parameter(numpy.ones(3), requires_grad=False)
    parameter.add_gradient(numpy.ones(3))
    assert not parameter.gradient.any()


def test_flatten_lays_parameters_end_to_end_as_views():
    first = Parameter(numpy.arange(6, dtype=numpy.float32).reshape(2, 3))
    second = Parameter(numpy.full((2, 2), 7, numpy.float32))
    double = Parameter(numpy.full(2, 9, numpy.float64))
    second.add_gradient(numpy.full((2, 2), 3))
    single_buffer, double_buffer = flatten([first, double, second])
    assert single_buffer.data.tolist() == [0, 1, 2, 3, 4, 5, 7, 7, 7, 7]
    assert single_buffer.gradient.tolist() == [0] * 6 + [3] * 4
    assert single_buffer.offsets == [0, 6]
    assert double_buffer.data.dtype == numpy.float64
    single_buffer.data[:] = 1
    assert first.data.tolist() == [[1, 1, 1], [1, 1, 1]]
    first.data[1, 2] = 5
    assert single_buffer.data[5] == 5
    first.add_gradient(numpy.ones((2, 3)))
    assert single_buffer.gradient[:6].tolist() == [1] * 6
    assert single_buffer.holds()
    assert double_buffer.holds()


def test_a_buffer_notices_that_it_lost_its_parameters():
    parameter = Parameter(numpy.ones(3))
    (buffer,) = flatten([parameter])
    flatten([parameter])
    assert not buffer.holds()


def test_a_fortran_ordered_parameter_keeps_its_values():
    values = numpy.asfortranarray(numpy.arange(6.0).reshape(2, 3))
    parameter = Parameter(values)
    (buffer,) = flatten([parameter])
    assert buffer.data.tolist() == [0, 1, 2, 3, 4, 5]
    assert numpy.array_equal(parameter.data, values)


def test_copy_from_checks_shape_and_kind():
    parameter = Parameter(numpy.zeros(3, numpy.float32))
    parameter.path = "fc.bias"
    view = parameter.data
    parameter.copy_from([1, 2, 3])
    assert view.tolist() == [1, 2, 3]
    with pytest.raises(ShapeError, match=r"'fc.bias' has shape \(3,\), got \(2,\)"):
        parameter.copy_from(numpy.zeros(2))
    with pytest.raises(DtypeError, match="takes real numbers, got dtype complex128"):
        parameter.copy_from(numpy.zeros(3, complex))
    assert view.tolist() == [1, 2, 3]
    assert "fc.bias" in repr(parameter)
