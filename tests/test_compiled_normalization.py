"""Batch norm as compiled loops: pieces and tasks of every size, ends of arrays, threads, digits."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucnn.ops import cpu
from gpucnn.ops.cpu import compiled
from tests.accuracy import awkward, channels_last, error_bound, max_error
from tests.guarded import guarded, guarded_empty
from tests.test_ops_normalization import EPSILON, inputs, plain_backward, plain_batch_norm

pytestmark = pytest.mark.compiler

# Rows shorter than a vector, between vectors, of one piece of statistics (1024 numbers) and of several;
# images that make up a piece together, and a rest of them.
SHAPES = [
    (2, 3),
    (37, 70),
    (5, 3, 1, 3),
    (3, 2, 3, 5),
    (4, 5, 4, 4),
    (2, 3, 17, 1),
    (7, 2, 8, 8),
    (40, 3, 12, 12),
    (3, 2, 32, 32),
    (2, 2, 45, 45),
    (2, 2, 90, 91),
    (1, 2, 91, 181),
]


@pytest.fixture(autouse=True)
def _loops() -> None:
    assert compiled.available(), compiled.why_not()


def reference(x: Any, weight: Any, bias: Any) -> tuple[Any, Any, Any]:
    """NumPy's two passes in float64, whose own error does not show here."""
    return plain_batch_norm(x.astype("f8"), weight.astype("f8"), bias.astype("f8"))


def run(x: Any, weight: Any, bias: Any, dy: Any) -> tuple[Any, ...]:
    """Every result of the three operations."""
    running = [numpy.zeros(x.shape[1], numpy.float32), numpy.ones(x.shape[1], numpy.float32)]
    y, mean, inverse_std = cpu.batch_norm_forward(x, weight, bias, *running, epsilon=EPSILON)
    gradients = cpu.batch_norm_backward(dy, x, weight, mean, inverse_std)
    inference = cpu.batch_norm_inference(x, weight, bias, *running, epsilon=EPSILON)
    return y, mean, inverse_std, *running, *gradients, inference


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mean", [0.3, -50.0])
def test_the_digits(shape: tuple[int, ...], mean: float) -> None:
    x, weight, bias, dy = inputs(shape, "float32", 1, mean)
    y, found_mean, inverse_std, _, _, dx, dweight, dbias, _ = run(x, weight, bias, dy)
    expected, simple = reference(x, weight, bias), plain_batch_norm(x, weight, bias)
    for result, wanted, plain in zip((y, found_mean, inverse_std), expected, simple, strict=True):
        # A mean may be small beside the numbers that it is of.
        scale = float(abs(x).max()) if wanted.ndim == 1 else 0.0
        assert max_error(result, wanted) <= error_bound(plain, wanted, scale)
    wide = plain_backward(dy.astype("f8"), x.astype("f8"), weight.astype("f8"))
    scale = float(abs(dy).max() * abs(weight).max() * inverse_std.max())
    count = 4 * (x.size // shape[1]) ** 0.5  # the size of sums of so many terms of either sign
    for result, wanted, plain, size in zip(
        (dx, dweight, dbias), wide, plain_backward(dy, x, weight), (scale, count, count), strict=True
    ):
        assert max_error(result, wanted) <= error_bound(plain, wanted, size)


def test_they_are_used() -> None:
    arguments = inputs((16, 4, 20, 20), "float32", 2)
    ours = run(*arguments)
    with compiled.switched(False):
        theirs = run(*arguments)
    assert any(not numpy.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for a, b in zip(ours, theirs, strict=True):
        assert max_error(a, b) <= 1e-4 * (1 + float(abs(b).max()))


def test_statistics_of_a_million_numbers_a_channel() -> None:
    """No error that grows with the count: single sums of so many would be off by a thousand roundings."""
    x = (7 + numpy.random.default_rng(3).random((64, 1, 128, 128))).astype(numpy.float32)
    _, mean, inverse_std = cpu.batch_norm_forward(x, epsilon=EPSILON)
    wide = x.astype("f8")
    assert abs(mean[0] - wide.mean()) <= 2**-22
    assert abs(inverse_std[0] * numpy.sqrt(wide.var() + EPSILON) - 1) <= 2**-22


def test_images_of_different_means() -> None:
    """Each piece has a mean of its own; only their differences make the variance."""
    x = numpy.random.default_rng(4).standard_normal((50, 2, 10, 10), numpy.float32)
    x += numpy.linspace(-1000, 1000, 50, dtype=numpy.float32)[:, None, None, None]
    zeros, ones = numpy.zeros(2, numpy.float32), numpy.ones(2, numpy.float32)
    expected = reference(x, ones, zeros)
    y, mean, inverse_std = cpu.batch_norm_forward(x, epsilon=EPSILON)
    for result, wanted in zip((y, mean, inverse_std), expected, strict=True):
        size = max(float(abs(wanted).max()), float(abs(x).max()) if result is mean else 0.0)
        assert max_error(result, wanted) <= 4e-7 * size


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_byte_beyond_the_ends(shape: tuple[int, ...]) -> None:
    x, weight, bias, dy = inputs(shape, "float32", 5)
    y, mean, inverse_std, running_mean, running_var, dx, dweight, dbias, z = run(x, weight, bias, dy)
    for end in (True, False):
        xs, ws, bs, gs = (guarded(each, end) for each in (x, weight, bias, dy))
        out = guarded_empty(shape, end=end)
        moved = [guarded(numpy.full(shape[1], value, numpy.float32), end) for value in (0, 1)]
        found = cpu.batch_norm_forward(xs, ws, bs, *moved, epsilon=EPSILON, out=out)
        for result, wanted in zip(
            (*found, *moved), (y, mean, inverse_std, running_mean, running_var), strict=True
        ):
            numpy.testing.assert_array_equal(result, wanted)
        found = cpu.batch_norm_backward(gs, xs, ws, guarded(mean, end), guarded(inverse_std, end), out=out)
        for result, wanted in zip(found, (dx, dweight, dbias), strict=True):
            numpy.testing.assert_array_equal(result, wanted)
        cpu.batch_norm_inference(xs, ws, bs, *moved, epsilon=EPSILON, out=out)
        numpy.testing.assert_array_equal(out, z)


@pytest.mark.parametrize("shape", [(16, 70, 7, 7), (4, 5, 60, 70), (64, 33)], ids=str)
def test_threads_and_layouts_change_nothing(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, dy = inputs(shape, "float32", 6)
    results = []
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("GPUCNN_NUM_THREADS", threads)
        results.append(run(x, weight, bias, dy))
    layouts = (awkward, channels_last if x.ndim == 4 else numpy.asfortranarray)
    results += [run(layout(x), weight, bias, layout(dy)) for layout in layouts]
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            numpy.testing.assert_array_equal(one, two)


def test_infinities_are_their_channels_alone() -> None:
    x, weight, bias, dy = inputs((3, 3, 5, 5), "float32", 7)
    clean = run(x, weight, bias, dy)
    x[1, 1, 2, 2] = numpy.inf
    found = run(x, weight, bias, dy)
    assert numpy.isnan(found[0][:, 1]).all()
    assert found[1][1] == numpy.inf or numpy.isnan(found[1][1])
    for one, two in zip(clean, found, strict=True):
        axis = 1 if one.ndim == 4 else 0
        numpy.testing.assert_array_equal(numpy.delete(one, 1, axis), numpy.delete(two, 1, axis))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 40), st.integers(1, 40)),
    mean=st.floats(-100, 100),
    seed=st.integers(0, 1000),
)
def test_any_shape(shape: tuple[int, ...], mean: float, seed: int) -> None:
    if shape[0] * shape[2] * shape[3] < 8:
        shape = (8, *shape[1:])
    x, weight, bias, dy = inputs(shape, "float32", seed, mean)
    results = run(x, weight, bias, dy)
    expected = reference(x, weight, bias)
    for result, wanted, plain in zip(results[:3], expected, plain_batch_norm(x, weight, bias), strict=True):
        assert max_error(result, wanted) <= error_bound(plain, wanted, scale=float(abs(x).max()) + 1)
    wide = plain_backward(dy.astype("f8"), x.astype("f8"), weight.astype("f8"))
    scale = float(abs(dy).sum()) * (1 + float(results[2].max()))
    for result, wanted, plain in zip(results[5:8], wide, plain_backward(dy, x, weight), strict=True):
        assert max_error(result, wanted) <= error_bound(plain, wanted, scale=scale)
