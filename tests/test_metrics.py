"""Metrics against counts done by hand and by loops."""

from __future__ import annotations

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpucnn.errors import ArgumentError, DtypeError, ShapeError
from gpucnn.metrics import (
    accuracy,
    confusion_matrix,
    f1,
    per_class_accuracy,
    precision,
    recall,
    top_k_accuracy,
)

LOGITS = numpy.array([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0], [1.0, 2.0, 3.0], [9.0, 8.0, 7.0]], numpy.float32)
LABELS = numpy.array([0, 2, 2, 2])


def test_accuracy_by_hand():
    assert accuracy(LOGITS, LABELS) == 0.5
    assert [top_k_accuracy(LOGITS, LABELS, k) for k in (1, 2, 3)] == [0.5, 0.75, 1.0]


def top_k_oracle(logits, labels, k):
    right = 0
    for row, label in zip(logits, labels, strict=True):
        order = sorted(range(len(row)), key=lambda index: (-row[index], index))
        right += label in order[:k]
    return right / len(labels)


@given(st.integers(1, 6), st.integers(1, 20), st.integers(0, 2**32 - 1), st.data())
def test_top_k_with_ties(classes, count, seed, data):
    random = numpy.random.default_rng(seed)
    logits = random.integers(0, 4, (count, classes)).astype(numpy.float64)
    labels = random.integers(0, classes, count)
    k = data.draw(st.integers(1, classes))
    assert abs(top_k_accuracy(logits, labels, k) - top_k_oracle(logits.tolist(), labels.tolist(), k)) <= 1e-15
    share = sum(int(numpy.argmax(row) == label) for row, label in zip(logits, labels, strict=True)) / count
    assert abs(accuracy(logits, labels) - share) <= 1e-15


def test_not_a_number_is_never_right():
    logits = numpy.full((2, 3), numpy.nan)
    assert accuracy(logits, [0, 1]) == 0.0
    assert top_k_accuracy(logits, [0, 1], 3) == 0.0
    assert accuracy([[1.0, numpy.nan]], [0]) == 0.0


@pytest.mark.parametrize(
    ("logits", "labels", "k", "error", "message"),
    [
        (LOGITS, LABELS[:3], 1, ShapeError, r"got shapes \(4, 3\) and \(3,\)"),
        (LOGITS[0], LABELS, 1, ShapeError, r"expected logits \(N, C\)"),
        (LOGITS, LABELS[None], 1, ShapeError, r"labels must be class numbers of shape \(N,\)"),
        (LOGITS, LABELS.astype(float), 1, DtypeError, "labels must be integers, got dtype float64"),
        (LOGITS[:0], LABELS[:0], 1, ArgumentError, "no predictions"),
        (LOGITS, [0, 1, 2, 3], 1, ArgumentError, "from 0 to 2, got 3"),
        (LOGITS, [0, 1, 2, -1], 1, ArgumentError, "from 0 to 2, got -1"),
        (LOGITS, LABELS, 0, ArgumentError, "k must be an integer from 1 to the number of classes, 3, got 0"),
        (LOGITS, LABELS, 4, ArgumentError, "got 4"),
        (LOGITS, LABELS, 1.5, ArgumentError, "got 1.5"),
    ],
)
def test_accuracy_says_what_is_wrong(logits, labels, k, error, message):
    with pytest.raises(error, match=message):
        top_k_accuracy(logits, labels, k)


@given(st.integers(1, 5), st.integers(0, 30), st.integers(0, 2**32 - 1))
def test_confusion_matrix_counts(classes, count, seed):
    random = numpy.random.default_rng(seed)
    labels, predictions = random.integers(0, classes, (2, count))
    matrix = confusion_matrix(labels, predictions, classes)
    expected = [[0] * classes for _ in range(classes)]
    for label, prediction in zip(labels, predictions, strict=True):
        expected[label][prediction] += 1
    assert matrix.dtype == numpy.int64
    assert matrix.tolist() == expected


def test_confusion_matrix_takes_lists_and_small_integers():
    assert confusion_matrix([], [], 2).tolist() == [[0, 0], [0, 0]]
    labels = numpy.full(3, 19, numpy.uint8)  # 19 * 20 does not fit in a uint8
    assert confusion_matrix(labels, labels, 20)[19, 19] == 3


@pytest.mark.parametrize(
    ("labels", "predictions", "classes", "error", "message"),
    [
        ([0, 1], [0], 2, ShapeError, "2 labels but 1 predictions"),
        ([0, 2], [0, 1], 2, ArgumentError, "labels must be class numbers from 0 to 1, got 2"),
        ([0, 1], [0, -1], 2, ArgumentError, "predictions must be class numbers from 0 to 1, got -1"),
        ([0], [0], 0, ArgumentError, "classes must be an integer of at least 1"),
    ],
)
def test_confusion_matrix_says_what_is_wrong(labels, predictions, classes, error, message):
    with pytest.raises(error, match=message):
        confusion_matrix(labels, predictions, classes)


def test_shares_of_each_class_by_hand():
    matrix = numpy.array([[3, 1, 0, 0], [2, 4, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]])
    nan = numpy.nan
    cases = (
        (recall, [3 / 4, 4 / 6, nan, 0.0]),
        (per_class_accuracy, [3 / 4, 4 / 6, nan, 0.0]),
        (precision, [3 / 6, 4 / 6, nan, nan]),
        (f1, [2 * 3 / (4 + 6), 2 * 4 / (6 + 6), nan, 0.0]),
    )
    for function, expected in cases:
        shares = function(matrix)
        assert numpy.array_equal(numpy.isnan(shares), numpy.isnan(expected))
        known = ~numpy.isnan(expected)
        assert numpy.max(numpy.abs(shares[known] - numpy.array(expected)[known])) <= 1e-15


@pytest.mark.parametrize("function", [recall, precision, f1, per_class_accuracy])
def test_shares_need_a_square(function):
    with pytest.raises(ShapeError, match=r"square, got shape \(2, 3\)"):
        function(numpy.zeros((2, 3)))
