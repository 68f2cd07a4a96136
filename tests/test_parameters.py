"""Parameters and their flat buffers."""

import numpy
import pytest

from gpucnn.errors import DtypeError, ShapeError
from gpucnn.optimizers import SGD, Adam, AdamW, RMSprop
from gpucnn.parameters import Parameter, flatten, refresh_narrow_copies
from gpucnn_kernels.runtime import using
from gpucnn_kernels.runtime.host_array import host_arrays


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
    assert single_buffer.data.tolist() == [0, 1, 2, 3, 4, 5, 0, 0, 7, 7, 7, 7, 0, 0, 0, 0]
    assert single_buffer.gradient.tolist() == [0] * 8 + [3] * 4 + [0] * 4
    assert single_buffer.offsets == [0, 8]
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


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        lambda parameters: Adam(parameters, lr=0.1),
        lambda parameters: AdamW(parameters, lr=0.1, weight_decay=0.1),
        lambda parameters: RMSprop(parameters, lr=0.1, momentum=0.5),
    ],
    ids=["SGD", "Adam", "AdamW", "RMSprop"],
)
def test_steps_leave_what_lies_between_parameters_at_zero(make):
    generator = numpy.random.default_rng(0)
    parameters = [Parameter(generator.standard_normal(size).astype("f4")) for size in (3, 8, 1)]
    optimizer = make(parameters)
    buffer = parameters[0].buffer
    between = numpy.ones(buffer.data.size, bool)
    for parameter, start in zip(parameters, buffer.offsets, strict=True):
        between[start : start + parameter.size] = False
    assert between.sum() == 5 + 7
    for frozen in (False, True, False):
        parameters[1].requires_grad = not frozen
        optimizer.zero_grad()
        for parameter in parameters:
            parameter.add_gradient(generator.standard_normal(parameter.size))
        optimizer.clip_gradient_norm(0.5)
        optimizer.step()
        assert not buffer.data[between].any()
        assert not buffer.gradient[between].any()
        assert all(buffer.data[~between])


def test_sixteen_bit_copies_begin_at_sixteen_bytes():
    """Where tensor cores' kernels read them without a copy."""
    with using("host"):
        parameters = [Parameter(host_arrays.ones(size, "f4")) for size in (3, 9, 8, 1)]
        flatten(parameters)
        refresh_narrow_copies(parameters, "float16")
        first, *others = (parameter.narrow_copy.ctypes.data for parameter in parameters)
    assert [other - first for other in others] == [16, 48, 64]


def test_a_fortran_ordered_parameter_keeps_its_values():
    values = numpy.asfortranarray(numpy.arange(6.0).reshape(2, 3))
    parameter = Parameter(values)
    (buffer,) = flatten([parameter])
    assert buffer.data.tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
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
