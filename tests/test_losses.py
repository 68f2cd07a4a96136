"""Losses as layers use them; their formulas are checked in the ops' tests and here against central differences."""

import math

import numpy
import pytest

from gpucnn.errors import ArgumentError, DtypeError, ShapeError, StateError
from gpucnn.losses import BCEWithLogitsLoss, CrossEntropyLoss, Loss, MSELoss


def data(seed=0):
    random = numpy.random.default_rng(seed)
    return random.standard_normal((5, 4)) * 3, numpy.array([0, 3, 2, 2, 1]), random


def softmax_row(row):
    top = max(row)
    exponentials = [math.exp(value - top) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def test_cross_entropy_value_by_hand():
    logits, labels, _ = data()
    weight = [0.5, 1.0, 2.0, 3.0]
    smoothing = 0.1
    total, weights = 0.0, 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        logs = [math.log(p) for p in softmax_row(row)]
        target = [smoothing / 4 + (1 - smoothing) * (c == label) for c in range(4)]
        total -= sum(t * w * log for t, w, log in zip(target, weight, logs, strict=True))
        weights += weight[label]
    loss = CrossEntropyLoss(weight=weight, label_smoothing=smoothing)
    value = loss(logits, labels)
    assert isinstance(value, float)
    assert abs(value - total / weights) < 1e-12
    assert abs(CrossEntropyLoss(weight, smoothing, reduction="sum")(logits, labels) - total) < 1e-11
    assert CrossEntropyLoss(reduction="none")(logits, labels).shape == (5,)


def test_cross_entropy_ignores_as_pytorch_does():
    logits, labels, _ = data()
    some = labels.copy()
    some[[1, 4]] = -100
    loss = CrossEntropyLoss([0.5, 1.0, 2.0, 3.0], 0.1)
    value = loss(logits, some)
    gradient = loss.backward()
    kept = [0, 2, 3]
    assert abs(value - loss(logits[kept], labels[kept])) <= 1e-14
    numpy.testing.assert_allclose(gradient[kept], loss.backward(), rtol=1e-14)
    assert not gradient[[1, 4]].any()
    every = CrossEntropyLoss(ignore_index=None)
    with pytest.raises(ArgumentError, match="label -100 at position 1 is out of range"):
        every(logits, some)
    assert math.isnan(CrossEntropyLoss(ignore_index=7)(logits, numpy.full(5, 7)))
    with pytest.raises(ArgumentError, match=r"ignore_index must be an integer or None, got 0\.5"):
        CrossEntropyLoss(ignore_index=0.5)


def losses():
    _, labels, random = data()
    soft = random.random((5, 4))
    soft /= soft.sum(1, keepdims=True)
    binary = (random.random((5, 4)) > 0.5).astype(float)
    for reduction in ("mean", "sum", "none"):
        yield CrossEntropyLoss(reduction=reduction), labels
        yield CrossEntropyLoss([1.0, 2.0, 0.5, 0.0], 0.2, reduction), labels
        yield CrossEntropyLoss([1.0, 2.0, 0.5, 0.0], 0.2, reduction), soft
        yield BCEWithLogitsLoss(reduction=reduction), binary
        yield BCEWithLogitsLoss([1.0, 2.0, 0.5, 0.0], [3.0], reduction), soft
        yield MSELoss(reduction), soft


@pytest.mark.parametrize(("loss", "target"), list(losses()))
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_against_central_differences(loss, target, transposed):
    logits, _, random = data(1)
    if transposed:
        logits = numpy.asfortranarray(logits)
    direction, step = random.standard_normal(logits.shape), 1e-6
    plus = numpy.sum(loss(logits + step * direction, target))
    minus = numpy.sum(loss(logits - step * direction, target))
    loss(logits, target)
    gradient = loss.backward()
    assert gradient.shape == logits.shape
    assert abs((plus - minus) / (2 * step) - (gradient * direction).sum()) <= 1e-7


def test_extreme_logits_stay_finite():
    logits = numpy.array([[1e4, -1e4], [-1e4, 1e4]], numpy.float32)
    loss = CrossEntropyLoss()
    assert loss(logits, numpy.array([0, 1])) == 0
    assert loss(logits, numpy.array([1, 0])) == 2e4
    assert numpy.isfinite(loss.backward()).all()
    binary = BCEWithLogitsLoss()
    assert binary(logits, numpy.eye(2, dtype=numpy.float32)) == 0
    assert binary(logits, 1 - numpy.eye(2, dtype=numpy.float32)) == 1e4
    assert numpy.isfinite(binary.backward()).all()


def test_class_weights_follow_the_predictions_dtype():
    logits, labels, _ = data()
    loss = CrossEntropyLoss(numpy.ones(4))
    loss(logits.astype(numpy.float32), labels)
    assert loss.backward().dtype == numpy.float32


def test_bad_arguments_and_targets_are_named():
    logits, labels, _ = data()
    with pytest.raises(ArgumentError, match="reduction must be 'mean', 'sum' or 'none', got 'avg'"):
        MSELoss("avg")
    with pytest.raises(ArgumentError, match="label_smoothing must be between 0 and 1, got 2"):
        CrossEntropyLoss(label_smoothing=2)
    with pytest.raises(ArgumentError, match="one non-negative number a class"):
        CrossEntropyLoss(weight=[1, -1])
    with pytest.raises(ArgumentError, match="label 4 at position 0 is out of range"):
        CrossEntropyLoss()(logits, labels + 4)
    with pytest.raises(ShapeError, match=r"prediction \(5, 4\) and target \(5,\) must have the same shape"):
        MSELoss()(logits, labels)
    with pytest.raises(DtypeError, match="target must be an array, got list"):
        BCEWithLogitsLoss()(logits, [1, 2])
    with pytest.raises(StateError, match="backward needs a forward"):
        MSELoss().backward()
    with pytest.raises(TypeError, match="Loss does not define forward"):
        Loss()(logits, labels)
