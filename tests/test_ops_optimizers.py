"""Optimizer steps against the same formulas on Python floats, over several steps and every option."""

import math

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucnn.errors import ArgumentError, DtypeError, ShapeError
from gpucnn.ops import cpu
from tests.accuracy import awkward, max_error
from tests.backends import BACKENDS
from tests.oracles import optimizers as oracle

STEPS = 4


def start(dtype, size=37, seed=0):
    random = numpy.random.default_rng(seed)
    return random.standard_normal(size).astype(dtype), random.standard_normal((STEPS, size)).astype(dtype)


def tolerance(dtype, expected):
    return 16 * float(numpy.finfo(dtype).eps) * (1 + max(map(abs, expected), default=0))


@BACKENDS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"), [(0, 0, False), (0.9, 0, False), (0.8, 0.3, False), (0.9, 0, True)]
)
@pytest.mark.parametrize("weight_decay", [0, 0.05])
@pytest.mark.parametrize("maximize", [False, True])
def test_sgd(backend, dtype, momentum, dampening, nesterov, weight_decay, maximize):
    values, gradients = start(dtype)
    buffer = numpy.full_like(values, 99) if momentum else None
    expected, velocity = values.tolist(), [0.0] * values.size
    for number, gradient in enumerate(gradients):
        kept = gradient.copy()
        options = {
            "lr": 0.1, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov, "maximize": maximize, "first_step": number == 0,
        }  # fmt: skip
        backend.sgd_step(values, gradient, buffer, **options)
        expected, velocity = oracle.sgd(expected, gradient.tolist(), velocity, **options)
        numpy.testing.assert_array_equal(gradient, kept)
    assert max_error(values, numpy.array(expected)) <= tolerance(dtype, expected)
    if buffer is not None:
        assert max_error(buffer, numpy.array(velocity)) <= tolerance(dtype, velocity)


@BACKENDS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("weight_decay", [0, 0.1])
@pytest.mark.parametrize("decoupled", [False, True])
def test_adam(backend, dtype, weight_decay, decoupled):
    values, gradients = start(dtype, seed=1)
    first, second = numpy.zeros((2, values.size), dtype)
    expected = values.tolist(), [0.0] * values.size, [0.0] * values.size
    for number, gradient in enumerate(gradients):
        kept = gradient.copy()
        options = {
            "lr": 0.02, "beta1": 0.85, "beta2": 0.95, "epsilon": 1e-6, "weight_decay": weight_decay,
            "decoupled": decoupled, "step": number + 1,
        }  # fmt: skip
        backend.adam_step(values, gradient, first, second, **options)
        expected = oracle.adam(expected[0], gradient.tolist(), *expected[1:], **options)
        numpy.testing.assert_array_equal(gradient, kept)
    for result, wanted in zip((values, first, second), expected, strict=True):
        assert max_error(result, numpy.array(wanted)) <= tolerance(dtype, wanted)


@BACKENDS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("weight_decay", [0, 0.1])
@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("centered", [False, True])
def test_rmsprop(backend, dtype, weight_decay, momentum, centered):
    values, gradients = start(dtype, seed=2)
    square = numpy.zeros_like(values)
    velocity = numpy.zeros_like(values) if momentum else None
    average = numpy.zeros_like(values) if centered else None
    expected = [values.tolist(), *([0.0] * values.size for _ in range(3))]
    for gradient in gradients:
        options = {"lr": 0.02, "alpha": 0.9, "epsilon": 1e-4, "weight_decay": weight_decay, "momentum": momentum}
        backend.rmsprop_step(values, gradient, square, velocity, average, **options)
        expected = oracle.rmsprop(expected[0], gradient.tolist(), *expected[1:], **options, centered=centered)
    # Where the centered variance nearly cancels, its root amplifies the rounding.
    slack = 64 if centered else 1
    for result, wanted in zip((values, square, velocity, average), expected, strict=True):
        if result is not None:
            assert max_error(result, numpy.array(wanted)) <= slack * tolerance(dtype, wanted)


@BACKENDS
def test_a_centered_variance_never_drops_below_zero(backend):
    values, square, average = numpy.zeros((3, 1000), numpy.float32)
    gradient = numpy.random.default_rng(3).standard_normal(1000).astype(numpy.float32) * 100
    for _ in range(2000):
        backend.rmsprop_step(values, gradient, square, None, average, lr=1e-3, alpha=0.9)
    assert numpy.isfinite(values).all()


@pytest.mark.parametrize("size", [0, 1, 300_001])
@pytest.mark.parametrize("threads", ["1", "3"])
def test_any_size_on_any_number_of_threads(monkeypatch, size, threads):
    monkeypatch.setenv("GPUCNN_NUM_THREADS", threads)
    values, gradients = start("float32", size, 4)
    buffers = numpy.zeros((3, size), numpy.float32)
    expected = values.astype("f8") - 0.5 * gradients[0]
    cpu.sgd_step(values, gradients[0], None, lr=0.5)
    assert max_error(values, expected) <= 1e-6
    cpu.sgd_step(values, gradients[1], buffers[0], lr=0.5, momentum=0.5, first_step=True)
    numpy.testing.assert_array_equal(buffers[0], gradients[1])
    before = values.copy()
    cpu.adam_step(values, gradients[2], buffers[1], buffers[2], lr=0.25, epsilon=0.0)
    # The first step of Adam moves every parameter by the learning rate, against the gradient's sign.
    assert max_error(before - values, 0.25 * numpy.sign(gradients[2]).astype("f8")) <= 1e-5


@BACKENDS
def test_half_precision_parameters_are_updated_in_single(backend):
    values, gradients = start("float16", seed=5)
    state = numpy.zeros((4, values.size), numpy.float32)
    expected = values.astype("f8") - 0.1 * gradients[0]
    backend.sgd_step(values, gradients[0], state[0].astype(numpy.float16), lr=0.1, momentum=0.9, first_step=True)
    assert max_error(values, expected) <= 2e-3
    before, kept = values.copy(), gradients[1].copy()
    backend.adam_step(values, gradients[1], state[1], state[2], lr=0.01)
    assert max_error(before - values.astype("f8"), 0.01 * numpy.sign(gradients[1])) <= 2e-3
    assert state[1].any()
    numpy.testing.assert_array_equal(gradients[1], kept)
    backend.rmsprop_step(values, gradients[2], state[3], None, None, lr=0.01)
    assert state[3].any()


@BACKENDS
@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=50))
def test_sum_of_squares(backend, numbers):
    x = numpy.array(numbers, numpy.float32)
    expected = math.fsum(float(value) ** 2 for value in x)
    assert abs(backend.sum_of_squares(x) - expected) <= 1e-14 * expected


@BACKENDS
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_sum_of_squares_of_any_layout(backend, dtype):
    x = numpy.random.default_rng(6).standard_normal((40, 50, 101)).astype(dtype)
    expected = math.fsum(float(value) ** 2 for value in x.flat)
    for layout in (numpy.ascontiguousarray, numpy.asfortranarray, awkward):
        assert abs(backend.sum_of_squares(layout(x)) - expected) <= 1e-12 * expected


@BACKENDS
def test_sum_of_squares_of_non_finite_numbers(backend):
    assert backend.sum_of_squares(numpy.array([1, numpy.inf], numpy.float32)) == math.inf
    assert math.isnan(backend.sum_of_squares(numpy.array([1, numpy.nan, numpy.inf], numpy.float32)))
    assert backend.sum_of_squares(numpy.array([1e300, 1e300])) == math.inf
    assert backend.sum_of_squares(numpy.zeros(0, numpy.float32)) == 0


def test_sum_of_squares_on_any_number_of_threads(monkeypatch):
    x = numpy.random.default_rng(7).standard_normal(500_000).astype(numpy.float32)
    sums = set()
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("GPUCNN_NUM_THREADS", threads)
        sums.add(cpu.sum_of_squares(x))
    assert len(sums) == 1


@BACKENDS
def test_scale(backend):
    x = numpy.arange(12, dtype=numpy.float32).reshape(3, 4)
    view = awkward(x)
    backend.scale(view, 0.5)
    numpy.testing.assert_array_equal(view, x / 2)
    backend.scale(x[:, ::2], numpy.float64(3.0))
    assert x[1].tolist() == [12, 5, 18, 7]
    backend.scale(x, math.inf)
    assert math.isnan(x[0, 0])


@BACKENDS
def test_errors(backend):
    values = numpy.zeros(3, numpy.float32)
    with pytest.raises(ArgumentError, match="momentum_buffer"):
        backend.sgd_step(values, values, None, lr=0.1, momentum=0.9)
    with pytest.raises(ArgumentError, match="momentum_buffer"):
        backend.rmsprop_step(values, values, values, None, None, lr=0.1, momentum=0.9)
    with pytest.raises(ArgumentError, match="counts from 1, got 0"):
        backend.adam_step(values, values, values, values, lr=0.1, step=0)
    with pytest.raises(ShapeError, match=r"must have shape \(3,\), got \(4,\)"):
        backend.sgd_step(values, numpy.zeros(4, numpy.float32), None, lr=0.1)
    with pytest.raises(ShapeError, match="1 dimensions"):
        backend.sgd_step(values.reshape(1, 3), values.reshape(1, 3), None, lr=0.1)
    with pytest.raises(DtypeError, match="floating-point"):
        backend.adam_step(values, values.astype(int), values, values, lr=0.1)
    with pytest.raises(DtypeError, match="floating-point"):
        backend.scale(numpy.arange(3), 2)
    with pytest.raises(DtypeError, match="ndarray"):
        backend.sum_of_squares([1.0])
