"""Optimizer steps, norms and clipping on the host runtime, against the same formulas on Python floats."""

import math

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpucnn_kernels as kernels
from gpucnn_kernels import ArgumentError, DtypeError, LayoutError, launch, optimizer_step, runtime
from gpucnn_kernels.runtime.host import order_independent
from tests.accuracy import awkward, channels_last
from tests.kernel_accuracy import DTYPES, EVERY_DTYPE, epsilon, normal, on_the_host, placed, wide
from tests.oracles import optimizers as oracle

__all__ = ["on_the_host"]

STEPS = 4


def start(dtype, size=37, seed=0):
    """(parameters, the gradients of each step)."""
    return normal(size, seed, dtype), normal((STEPS, size), seed + 100, dtype)


def assert_near(actual, expected, steps=STEPS, slack=1.0):
    """Within four roundings of the arithmetic a step and one of the storage a step, at the size of the numbers."""
    scale = 1 + max(map(abs, expected), default=0)
    roundings = 4 * epsilon(wide(actual.dtype)) + (epsilon(actual.dtype) / 2 if actual.itemsize == 2 else 0)
    error = numpy.abs(actual.astype(float) - numpy.array(expected)).max(initial=0)
    assert error <= slack * steps * roundings * scale


@EVERY_DTYPE
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"), [(0, 0, False), (0.9, 0, False), (0.8, 0.3, False), (0.9, 0, True)]
)
@pytest.mark.parametrize("weight_decay", [0, 0.05])
@pytest.mark.parametrize("maximize", [False, True])
def test_sgd(dtype, momentum, dampening, nesterov, weight_decay, maximize):
    values, gradients = start(dtype)
    # Not a number: at the first step the buffer must not be read.
    buffer = numpy.full(values.shape, numpy.nan, wide(dtype)) if momentum else None
    expected, velocity = values.astype(float).tolist(), [0.0] * values.size
    for number, gradient in enumerate(gradients):
        kept = gradient.tobytes()
        options = {
            "lr": 0.1, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov, "maximize": maximize, "first_step": number == 0,
        }  # fmt: skip
        assert kernels.sgd_step(values, gradient, buffer, **options) is None
        expected, velocity = oracle.sgd(expected, gradient.astype(float).tolist(), velocity, **options)
        assert gradient.tobytes() == kept
    assert_near(values, expected)
    if buffer is not None:
        # The velocity follows the rounded parameters through the weight decay.
        assert_near(buffer, velocity, slack=1 + weight_decay * epsilon(dtype) / epsilon(wide(dtype)))


@EVERY_DTYPE
@pytest.mark.parametrize("weight_decay", [0, 0.1])
@pytest.mark.parametrize("decoupled", [False, True])
def test_adam(dtype, weight_decay, decoupled):
    values, gradients = start(dtype, seed=1)
    first, second = numpy.zeros((2, values.size), wide(dtype))
    expected = values.astype(float).tolist(), [0.0] * values.size, [0.0] * values.size
    for number, gradient in enumerate(gradients):
        kept = gradient.tobytes()
        options = {
            "lr": 0.02, "beta1": 0.85, "beta2": 0.95, "epsilon": 1e-6, "weight_decay": weight_decay,
            "decoupled": decoupled, "step": number + 1,
        }  # fmt: skip
        kernels.adam_step(values, gradient, first, second, **options)
        expected = oracle.adam(expected[0], gradient.astype(float).tolist(), *expected[1:], **options)
        assert gradient.tobytes() == kept
    assert_near(values, expected[0])
    coupled = 1 + 2 * weight_decay * (not decoupled) * epsilon(dtype) / epsilon(wide(dtype))
    assert_near(first, expected[1], slack=coupled)
    assert_near(second, expected[2], slack=coupled)


def test_bias_corrections_and_small_decays_keep_their_digits():
    # After a million steps, and with a decay that 1 - decay in float32 would keep four bits of.
    values, gradient = numpy.array([3.0], numpy.float32), numpy.array([1e-3], numpy.float32)
    first, second = numpy.array([2e-3], numpy.float32), numpy.array([5e-6], numpy.float32)
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999999, "epsilon": 1e-8, "weight_decay": 1e-3}
    for decoupled, step in ((True, 1_000_000), (True, 1), (False, 3)):
        given = [array.copy() for array in (values, gradient, first, second)]
        kernels.adam_step(*given, **options, decoupled=decoupled, step=step)
        expected = oracle.adam(
            values.tolist(), gradient.tolist(), first.tolist(), second.tolist(),
            **options, decoupled=decoupled, step=step,
        )  # fmt: skip
        for actual, wanted in zip((given[0], given[2], given[3]), expected, strict=True):
            assert abs(actual[0] - wanted[0]) <= 2 * epsilon(values.dtype) * abs(wanted[0])


@EVERY_DTYPE
@pytest.mark.parametrize("weight_decay", [0, 0.1])
@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("centered", [False, True])
def test_rmsprop(dtype, weight_decay, momentum, centered):
    values, gradients = start(dtype, seed=2)
    state = wide(dtype)
    square = numpy.zeros(values.shape, state)
    velocity = numpy.zeros(values.shape, state) if momentum else None
    average = numpy.zeros(values.shape, state) if centered else None
    expected = [values.astype(float).tolist(), *([0.0] * values.size for _ in range(3))]
    for gradient in gradients:
        options = {"lr": 0.02, "alpha": 0.9, "epsilon": 1e-4, "weight_decay": weight_decay, "momentum": momentum}
        kernels.rmsprop_step(values, gradient, square, velocity, average, **options)
        gradient_list = gradient.astype(float).tolist()
        expected = oracle.rmsprop(expected[0], gradient_list, *expected[1:], **options, centered=centered)
    # Where the centered variance nearly cancels, its root amplifies the rounding.
    slack = 64 if centered else 4
    assert_near(values, expected[0], slack=slack)
    slack *= 1 + weight_decay * epsilon(dtype) / epsilon(state)
    for result, wanted in zip((square, velocity, average), expected[1:], strict=True):
        if result is not None:
            assert_near(result, wanted, slack=slack)


def test_a_centered_variance_never_drops_below_zero():
    values, square, average = numpy.zeros((3, 100), numpy.float32)
    gradient = normal(100, 3, numpy.float32) * 100
    for _ in range(500):
        kernels.rmsprop_step(values, gradient, square, None, average, lr=1e-3, alpha=0.9)
    assert numpy.isfinite(values).all()


def test_a_gradient_that_is_no_number_shows_in_the_parameters():
    values, gradient = numpy.ones((2, 3), numpy.float32)
    gradient[1] = numpy.nan
    state = numpy.zeros((6, 3), numpy.float32)
    for step in (
        lambda: kernels.sgd_step(values, gradient, state[0], lr=0.1, momentum=0.9),
        lambda: kernels.adam_step(values, gradient, state[1], state[2], lr=0.1),
        lambda: kernels.rmsprop_step(values, gradient, state[3], state[4], state[5], lr=0.1),
    ):
        values[...] = 1
        step()
        assert numpy.isnan(values).tolist() == [False, True, False]


@pytest.mark.parametrize("size", [0, 1, 3001])
def test_any_size(monkeypatch, size):
    monkeypatch.setattr(launch, "_MAX_BLOCKS", 2)  # threads take several elements each
    values, gradients = start(numpy.float32, size, 4)
    buffers = numpy.zeros((3, size), numpy.float32)
    expected = values.astype("f8") - 0.5 * gradients[0]
    kernels.sgd_step(values, gradients[0], None, lr=0.5)
    assert numpy.abs(values - expected).max(initial=0) <= 1e-6
    kernels.sgd_step(values, gradients[1], buffers[0], lr=0.5, momentum=0.5, first_step=True)
    numpy.testing.assert_array_equal(buffers[0], gradients[1])
    before = values.copy()
    kernels.adam_step(values, gradients[2], buffers[1], buffers[2], lr=0.25, epsilon=0.0)
    # The first step of Adam moves every parameter by the learning rate, against the gradient's sign.
    assert numpy.abs(before - values - 0.25 * numpy.sign(gradients[2])).max(initial=0) <= 1e-5
    before, square = values.copy(), numpy.zeros_like(values)
    kernels.rmsprop_step(values, gradients[3], square, None, None, lr=0.1, alpha=0.75, epsilon=0.0)
    assert numpy.abs(before - values - 0.2 * numpy.sign(gradients[3])).max(initial=0) <= 1e-5


@EVERY_DTYPE
@pytest.mark.parametrize("blocks", [1 << 16, 1])
def test_packs_and_elements_give_the_same_bits(dtype, blocks, monkeypatch):
    monkeypatch.setattr(launch, "_MAX_BLOCKS", blocks)
    size = 2 * 1024 + 5  # two tiles of packs, or four, and a part of one
    random = numpy.random.default_rng(2)
    given = [random.standard_normal(size).astype(dtype) for _ in range(2)]
    state = [abs(random.standard_normal(size)).astype(wide(dtype)) for _ in range(3)]
    sgd = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    steps = {
        "sgd": (1, lambda *arrays: kernels.sgd_step(*arrays, **sgd)),
        "first": (1, lambda *arrays: kernels.sgd_step(*arrays, **sgd, nesterov=True, first_step=True)),
        "plain": (0, lambda *arrays: kernels.sgd_step(*arrays, None, lr=0.1, maximize=True)),
        "adam": (2, lambda *arrays: kernels.adam_step(*arrays, lr=0.1, weight_decay=0.01, step=3)),
        "rmsprop": (3, lambda *arrays: kernels.rmsprop_step(*arrays, lr=0.1, momentum=0.9)),
    }
    for name, (states, step) in steps.items():
        arrays = [*given, *state[:states]]
        results = []
        for off in range(-1, len(arrays)):
            placed_arrays = [placed(array, int(number == off)) for number, array in enumerate(arrays)]
            step(*placed_arrays)
            results.append([array.tobytes() for array in placed_arrays])
        alone = [numpy.array(array[-7:]) for array in arrays]  # a few elements are moved one by one
        step(*alone)
        assert all(result == results[0] for result in results), name
        tails = [memory[-array.nbytes :] for memory, array in zip(results[0], alone, strict=True)]
        assert tails == [array.tobytes() for array in alone], name


# ---------------------------------------------------------------- norms


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False), max_size=50))
def test_sum_of_squares(numbers):
    x = numpy.array(numbers, numpy.float32)
    expected = math.fsum(float(value) ** 2 for value in x)
    with runtime.using("host"):
        total = kernels.sum_of_squares(x)
    assert type(total) is float
    assert abs(total - expected) <= 1e-14 * expected


@EVERY_DTYPE
def test_sum_of_squares_of_any_dense_array(dtype):
    for size in (0, 1, 255, 4096, 4097, 50_000):
        x = normal(size, 6, dtype)
        expected = math.fsum(float(value) ** 2 for value in x)
        assert abs(kernels.sum_of_squares(x) - expected) <= 1e-13 * expected
    x = normal((3, 4, 5, 6), 7, dtype)
    expected = math.fsum(float(value) ** 2 for value in x.flat)
    for view in (x, channels_last(x), x.transpose(2, 0, 3, 1), numpy.asfortranarray(x)):
        assert abs(kernels.sum_of_squares(view) - expected) <= 1e-13 * expected


def test_sums_of_many_blocks(monkeypatch):
    monkeypatch.setattr(optimizer_step, "_ELEMENTS_A_THREAD", 1)
    x = normal(100_001, 8, numpy.float32)  # 391 blocks: the second pass takes two each
    expected = math.fsum(float(value) ** 2 for value in x)
    assert abs(kernels.sum_of_squares(x) - expected) <= 1e-13 * expected
    monkeypatch.setattr(optimizer_step, "_MOST_SUMS", 3)
    assert abs(kernels.sum_of_squares(x) - expected) <= 1e-13 * expected
    assert order_independent(lambda: numpy.array(kernels.sum_of_squares(x[:3000])))


def test_sum_of_squares_of_non_finite_and_extreme_numbers():
    assert kernels.sum_of_squares(numpy.array([1, numpy.inf], numpy.float32)) == math.inf
    assert math.isnan(kernels.sum_of_squares(numpy.array([1, numpy.nan, numpy.inf], numpy.float32)))
    assert kernels.sum_of_squares(numpy.array([1e300, 1e300])) == math.inf
    # Squares that float32 could not hold.
    assert kernels.sum_of_squares(numpy.array([2.0**100, 2.0**101], numpy.float32)) == 5 * 2.0**200
    assert kernels.sum_of_squares(numpy.array([2.0**-100] * 3, numpy.float32)) == 3 * 2.0**-200


@EVERY_DTYPE
def test_scale(dtype):
    x = normal((3, 4, 5, 6), 9, dtype)
    for view in (x.copy(), channels_last(x)):
        assert kernels.scale(view, 0.5) is None
        numpy.testing.assert_array_equal(view.astype(float), x.astype(float) / 2)
    third = x.copy()
    kernels.scale(third, numpy.float64(1 / 3))
    assert (numpy.abs(third.astype(float) - x.astype(float) / 3) <= epsilon(dtype) * numpy.abs(third)).all()
    kernels.scale(x[:0], 3)


@EVERY_DTYPE
def test_clip_by_norm(dtype, monkeypatch):
    monkeypatch.setattr(launch, "_MAX_BLOCKS", 2)
    for size in (1, 37, 2000):
        x = normal(size, 10, dtype)
        norm = math.sqrt(math.fsum(float(value) ** 2 for value in x))
        clipped = x.copy()
        answer = kernels.clip_by_norm(clipped, max_norm=norm / 4)
        assert type(answer) is float
        assert abs(answer - norm) <= 1e-13 * norm
        expected = x.astype(float) * ((norm / 4) / (norm + 1e-6))
        assert (numpy.abs(clipped.astype(float) - expected) <= epsilon(dtype) * numpy.abs(expected)).all()
        for bound in (norm * 1.1, math.inf):
            kept = x.copy()
            assert kernels.clip_by_norm(kept, max_norm=bound) == answer
            assert kept.tobytes() == x.tobytes()
    assert kernels.clip_by_norm(numpy.zeros(5, dtype), max_norm=1.0) == 0
    assert kernels.clip_by_norm(numpy.zeros(0, dtype), max_norm=1.0) == 0


def test_an_infinite_or_undefined_norm_changes_nothing():
    for odd in (math.inf, -math.inf, math.nan):
        x = numpy.array([1, odd, 2], numpy.float32)
        norm = kernels.clip_by_norm(x, max_norm=1.0)
        assert not math.isfinite(norm)
        numpy.testing.assert_array_equal(x, numpy.array([1, odd, 2], numpy.float32))


def test_errors():
    values = numpy.zeros(3, numpy.float32)
    with pytest.raises(ArgumentError, match="needs a momentum_buffer, got None"):
        kernels.sgd_step(values, values, None, lr=0.1, momentum=0.9)
    with pytest.raises(ArgumentError, match="needs a momentum_buffer, got None"):
        kernels.rmsprop_step(values, values, values, None, None, lr=0.1, momentum=0.9)
    with pytest.raises(ArgumentError, match="counts from 1, got 0"):
        kernels.adam_step(values, values, values, values, lr=0.1, step=0)
    with pytest.raises(ArgumentError, match=r"gradient must have shape \(3,\), got \(4,\)"):
        kernels.sgd_step(values, numpy.zeros(4, numpy.float32), None, lr=0.1)
    with pytest.raises(ArgumentError, match="flat buffer of 1 dimension"):
        kernels.sgd_step(values.reshape(1, 3), values.reshape(1, 3), None, lr=0.1)
    with pytest.raises(DtypeError, match="gradient must be one of float32"):
        kernels.adam_step(values, values.astype(int), values, values, lr=0.1)
    with pytest.raises(DtypeError, match="gradient is float64, but parameter is float32"):
        kernels.sgd_step(values, values.astype(float), None, lr=0.1)
    with pytest.raises(DtypeError, match="second_moment must be an array, got None"):
        kernels.adam_step(values, values, values, None, lr=0.1)
    with pytest.raises(DtypeError, match="square_average must be an array, got None"):
        kernels.rmsprop_step(values, values, None, None, None, lr=0.1)
    for name in ("float16", "bfloat16"):
        half = values.astype(DTYPES[name])
        with pytest.raises(DtypeError, match=f"momentum_buffer must be float32, got {name}"):
            kernels.sgd_step(half, half, half, lr=0.1, momentum=0.9)
    with pytest.raises(LayoutError, match="gradient of shape"):
        kernels.sgd_step(values, awkward(values), None, lr=0.1)
    with pytest.raises(DtypeError, match="x must be one of float32"):
        kernels.scale(numpy.arange(3), 2)
    with pytest.raises(LayoutError, match="gaps or overlaps"):
        kernels.sum_of_squares(numpy.zeros((4, 6), numpy.float32)[:, ::2])
    with pytest.raises(DtypeError, match="x"):
        kernels.sum_of_squares([1.0])
    with pytest.raises(ArgumentError, match="max_norm must be above 0"):
        kernels.clip_by_norm(values, max_norm=0)
    read_only = numpy.zeros(3, numpy.float32)
    read_only.flags.writeable = False
    with pytest.raises(DtypeError, match="read-only"):
        kernels.scale(read_only, 2.0)
