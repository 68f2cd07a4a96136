"""Softmax and the losses as compiled loops: rows of every length, extreme rows, ends of arrays, threads."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucnn.ops import cpu
from gpucnn.ops.cpu import compiled
from tests.accuracy import awkward, error_bound, max_error
from tests.guarded import guarded, guarded_empty
from tests.oracles import losses as oracle

pytestmark = pytest.mark.compiler

SHAPES = [(1, 1), (3, 2), (5, 10), (4, 15), (4, 16), (4, 17), (3, 63), (2, 64), (2, 65), (7, 100), (3, 1000)]
SIZES = [1, 2, 15, 16, 17, 31, 33, 64, 100, 32767, 32768, 32769]
EPSILON = float(numpy.finfo(numpy.float32).eps)


@pytest.fixture(autouse=True)
def _loops() -> None:
    assert compiled.available(), compiled.why_not()


def rows(shape: tuple[int, int], seed: int = 0, spread: float = 3.0) -> tuple[Any, Any]:
    random = numpy.random.default_rng(seed)
    x = random.standard_normal(shape, numpy.float32) * numpy.float32(spread)
    return x, random.integers(0, shape[1], shape[0])


def softmax(x: Any) -> Any:
    """NumPy's, in the dtype of x."""
    power = numpy.exp(x - x.max(axis=1, keepdims=True))
    return power / power.sum(axis=1, keepdims=True)


# ---------------------------------------------------------------- softmax and cross-entropy


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spread", [1e-3, 3.0, 30.0])
def test_the_digits_of_a_softmax(shape: tuple[int, int], spread: float) -> None:
    x, _ = rows(shape, 1, spread)
    dy = rows(shape, 2)[0]
    wide = softmax(x.astype("f8"))
    y = cpu.softmax_forward(x)
    assert max_error(y, wide) <= error_bound(softmax(x), wide)
    # Each probability by itself, too: four roundings, and those of the difference that exp takes.
    distance = x.astype("f8").max(axis=1, keepdims=True) - x
    assert numpy.all(abs(y - wide) <= EPSILON * wide * (4 + distance) + 2.0**-149)
    expected = wide * (dy - (dy * wide).sum(axis=1, keepdims=True))
    plain = y * (dy - (dy * y).sum(axis=1, keepdims=True))
    assert max_error(cpu.softmax_backward(dy, y), expected) <= error_bound(plain, expected, scale=abs(dy).max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_entropy_of_labels(shape: tuple[int, int]) -> None:
    x, labels = rows(shape, 3)
    wide = softmax(x.astype("f8"))
    loss, probabilities = cpu.softmax_cross_entropy_forward(x, labels)
    assert abs(float(loss) - oracle.cross_entropy(x, labels)) <= 4 * EPSILON * (1 + abs(float(loss)))
    numpy.testing.assert_array_equal(probabilities, cpu.softmax_forward(x))
    each = cpu.softmax_cross_entropy_forward(x, labels, reduction="none")[0]
    wanted = oracle.cross_entropy(x, labels, reduction="none")
    assert numpy.all(abs(each - wanted) <= 4 * EPSILON * (1 + abs(wanted)))
    gradient = wide.copy()
    gradient[numpy.arange(shape[0]), labels] -= 1
    found = cpu.softmax_cross_entropy_backward(probabilities, labels)
    assert max_error(found, gradient / shape[0]) <= 4 * EPSILON / shape[0]


def test_labels_of_any_integers_and_layout() -> None:
    x, labels = rows((40, 10), 4)
    wanted = cpu.softmax_cross_entropy_forward(x, labels)
    gradient = cpu.softmax_cross_entropy_backward(wanted[1], labels)
    for dtype in ("i1", "u1", "i4", "u8"):
        spaced = numpy.zeros(80, dtype)
        spaced[::2] = labels
        found = cpu.softmax_cross_entropy_forward(awkward(x), spaced[::2])
        numpy.testing.assert_array_equal(found[0], wanted[0])
        numpy.testing.assert_array_equal(found[1], wanted[1])
        numpy.testing.assert_array_equal(
            cpu.softmax_cross_entropy_backward(awkward(found[1]), spaced[::2]), gradient
        )


def test_extreme_rows() -> None:
    infinity, nan = math.inf, math.nan
    x = numpy.zeros((6, 20), numpy.float32)
    x[0, 3], x[1, 4], x[2, :], x[3, 18], x[4, 19] = 3e38, -infinity, -infinity, nan, infinity
    x[5, ::2] = -3e38
    labels = numpy.full(6, 4)
    with compiled.switched(False):
        plain = cpu.softmax_cross_entropy_forward(x, labels, reduction="none")
    found = cpu.softmax_cross_entropy_forward(x, labels, reduction="none")
    numpy.testing.assert_allclose(found[0], plain[0], rtol=1e-6)
    numpy.testing.assert_allclose(found[1], plain[1], rtol=1e-6)
    assert found[0][1] == infinity
    assert numpy.isnan(found[0][2:5]).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_byte_beyond_the_ends_of_rows(shape: tuple[int, int]) -> None:
    x, labels = rows(shape, 5)
    dy = rows(shape, 6)[0]
    loss, probabilities = cpu.softmax_cross_entropy_forward(x, labels)
    gradient = cpu.softmax_cross_entropy_backward(probabilities, labels)
    back = cpu.softmax_backward(dy, probabilities)
    for end in (True, False):
        out, kept = guarded_empty(shape, end=end), guarded(probabilities, end)
        numpy.testing.assert_array_equal(cpu.softmax_forward(guarded(x, end), out=out), probabilities)
        numpy.testing.assert_array_equal(cpu.softmax_backward(guarded(dy, end), kept, out=out), back)
        found = cpu.softmax_cross_entropy_forward(guarded(x, end), guarded(labels, end))
        numpy.testing.assert_array_equal(found[0], loss)
        cpu.softmax_cross_entropy_backward(kept, guarded(labels, end), out=out)
        numpy.testing.assert_array_equal(out, gradient)


def test_the_number_of_threads_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = rows((300, 700), 7)
    t = numpy.random.default_rng(8).random(x.shape, numpy.float32)
    results = []
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("GPUCNN_NUM_THREADS", threads)
        loss, probabilities = cpu.softmax_cross_entropy_forward(x, labels)
        results.append(
            (
                loss,
                probabilities,
                cpu.softmax_cross_entropy_backward(probabilities, labels),
                cpu.binary_cross_entropy_with_logits_forward(x, t),
                cpu.binary_cross_entropy_with_logits_backward(x, t),
                cpu.mean_squared_error_forward(x, t),
                cpu.mean_squared_error_backward(x, t),
            )
        )
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            numpy.testing.assert_array_equal(one, two)


# ---------------------------------------------------------------- binary cross-entropy, mean squared error


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(-90, 90, width=32), st.floats(0, 1, width=32)), min_size=1, max_size=40))
def test_binary_cross_entropy_of_any_numbers(pairs: list[tuple[float, float]]) -> None:
    x, t = numpy.array(pairs, numpy.float32).T.copy()
    expected = oracle.binary_cross_entropy_with_logits(x, t, reduction="none")
    found = cpu.binary_cross_entropy_with_logits_forward(x, t, reduction="none")
    assert numpy.all(abs(found - expected) <= 6 * EPSILON * expected + 2.0**-126)
    wide, target = x.astype("f8"), t.astype("f8")
    gate, rest = 1 / (1 + numpy.exp(-wide)), 1 / (1 + numpy.exp(wide))
    slope = (1 - target) * gate - target * rest
    size = (1 - target) * gate + target * rest
    gradient = cpu.binary_cross_entropy_with_logits_backward(x, t, reduction="sum")
    assert numpy.all(abs(gradient - slope) <= EPSILON * size * (6 + 2 * abs(wide)) + 2.0**-126)


@pytest.mark.parametrize("size", SIZES)
def test_no_byte_beyond_the_ends(size: int) -> None:
    random = numpy.random.default_rng(9)
    x, t = random.standard_normal(size, numpy.float32), random.random(size, numpy.float32)

    def run(x: Any, t: Any, out: Any) -> list[Any]:
        return [
            cpu.binary_cross_entropy_with_logits_forward(x, t),
            cpu.binary_cross_entropy_with_logits_forward(x, t, reduction="none"),
            cpu.binary_cross_entropy_with_logits_backward(x, t, out=out).copy(),
            cpu.mean_squared_error_forward(x, t),
            cpu.mean_squared_error_backward(x, t, out=out).copy(),
        ]

    wanted = run(x, t, numpy.empty_like(x))
    difference = x.astype("f8") - t
    assert abs(float(wanted[3]) - (difference**2).mean()) <= 2 * EPSILON * (difference**2).mean()
    for end in (True, False):
        found = run(guarded(x, end), guarded(t, end), guarded_empty(size, end=end))
        for one, two in zip(found, wanted, strict=True):
            numpy.testing.assert_array_equal(one, two)


def test_sums_do_not_lose_small_terms() -> None:
    """In single precision, ones added to 2^24 would vanish, each of them."""
    x = numpy.ones(1 << 22, numpy.float32)
    x[0] = 4096
    total = cpu.mean_squared_error_forward(x, numpy.zeros_like(x), reduction="sum")
    assert total == numpy.float32(4096**2 + (1 << 22) - 1)


def test_not_a_number_passes() -> None:
    x, t = numpy.zeros(70, numpy.float32), numpy.zeros(70, numpy.float32)
    x[69] = numpy.nan
    assert numpy.isnan(cpu.binary_cross_entropy_with_logits_forward(x, t))
    assert numpy.isnan(cpu.binary_cross_entropy_with_logits_backward(x, t)[69])
    assert numpy.isnan(cpu.mean_squared_error_forward(x, t))
    x[69] = numpy.inf
    assert cpu.binary_cross_entropy_with_logits_forward(x, t) == numpy.inf
    assert cpu.mean_squared_error_forward(x, t) == numpy.inf
