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


def test_the_first_gradient_after_clearing_is_computed_where_it_belongs():
    parameter, given = Parameter(numpy.full(4, 2.0)), []
    parameter.gradient[...] = numpy.nan

    def twice(dy, more, *, out=None):
        given.append(out)
        return numpy.multiply(dy, more, out=out)

    parameter.zero_grad()
    parameter.add_gradient_by(twice, numpy.ones(4), 2)
    assert given == [parameter.gradient]
    parameter.add_gradient_by(twice, numpy.ones(4), more=3)
    assert parameter.gradient.tolist() == [5, 5, 5, 5]
    assert given[1] is None
    parameter.zero_grad()
    parameter.add_gradient_by(twice, numpy.ones(4, numpy.float32), 4)  # of another dtype: converted, then added
    assert given[2] is None
    assert parameter.gradient.tolist() == [4, 4, 4, 4]
    parameter.requires_grad = False
    parameter.zero_grad()
    parameter.add_gradient_by(twice, numpy.ones(4), 5)
    assert len(given) == 3
    assert parameter.gradient.tolist() == [0, 0, 0, 0]


def test_what_was_cleared_is_zero_wherever_it_is_looked_at():
    def failing(dy, *, out=None):
        out[0] = 77
        raise FloatingPointError

    parameters = [Parameter(numpy.ones(3)), Parameter(numpy.ones(3)), Parameter(numpy.ones(2))]
    (buffer,) = flatten(parameters)
    optimizer = SGD(parameters, lr=1.0)
    buffer = optimizer.slabs[0].buffer
    for parameter in parameters:
        parameter.gradient[...] = 9
    optimizer.zero_grad()
    parameters[0].add_gradient(numpy.array([1.0, 2.0, 3.0]))
    with pytest.raises(FloatingPointError):
        parameters[2].add_gradient_by(failing, numpy.ones(2))
    assert optimizer.gradient_norm() == pytest.approx(14**0.5)
    assert buffer.gradient.tolist() == [1, 2, 3, *[0] * 13, 0, 0, 0, 0, 0, 0, 0, 0]
    optimizer.step()
    assert [parameter.data.tolist() for parameter in parameters] == [[0, -1, -2], [1, 1, 1], [1, 1]]
    parameters[1].zero_grad()
    parameters[1].gradient += 4
    assert parameters[1].gradient.tolist() == [4, 4, 4]


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
