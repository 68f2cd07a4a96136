"""Losses by their definitions, a sample (or a number) at a time, in PyTorch's sense of each option."""

import math

import numpy


def reduce(terms, reduction, divisor):
    """The terms themselves, their sum, or their sum over ``divisor``."""
    if reduction == "none":
        return numpy.array(terms)
    total = math.fsum(terms)
    return total if reduction == "sum" else total / divisor


def _log_softmax(row):
    largest = max(row)
    log_total = math.log(math.fsum(math.exp(value - largest) for value in row)) + largest
    return [value - log_total for value in row]


def cross_entropy(logits, targets, weight=None, label_smoothing=0.0, reduction="mean", ignore_index=None):
    """Class numbers (N,) or probabilities (N, C); samples of the class number ``ignore_index`` do not count."""
    count, classes = logits.shape
    weights = [1.0] * classes if weight is None else [float(value) for value in weight]
    terms, divisor = [], 0.0
    for n in range(count):
        if targets.ndim == 1 and int(targets[n]) == ignore_index:
            terms.append(0.0)
            continue
        log_probability = _log_softmax([float(value) for value in logits[n]])
        smooth = -math.fsum(w * value for w, value in zip(weights, log_probability, strict=True)) / classes
        if targets.ndim == 1:
            label = int(targets[n])
            hard = -weights[label] * log_probability[label]
            divisor += weights[label]
        else:
            hard = -math.fsum(weights[c] * float(targets[n, c]) * log_probability[c] for c in range(classes))
            divisor += 1
        terms.append((1 - label_smoothing) * hard + label_smoothing * smooth)
    return reduce(terms, reduction, divisor)


def binary_cross_entropy_with_logits(logits, targets, weight=None, positive_weight=None, reduction="mean"):
    """Every array of the logits' shape, or None."""
    terms = numpy.zeros(logits.shape)
    for index in numpy.ndindex(*logits.shape):
        x, t = float(logits[index]), float(targets[index])
        p = 1.0 if positive_weight is None else float(positive_weight[index])
        w = 1.0 if weight is None else float(weight[index])
        tail = math.log1p(math.exp(-abs(x)))
        minus_log_s, minus_log_not_s = tail + max(-x, 0.0), tail + max(x, 0.0)
        terms[index] = w * (p * t * minus_log_s + (1 - t) * minus_log_not_s)
    if reduction == "none":
        return terms
    return reduce(list(terms.reshape(-1)), reduction, terms.size)


def mean_squared_error(prediction, target, reduction="mean"):
    terms = [(float(a) - float(b)) ** 2 for a, b in zip(prediction.flat, target.flat, strict=True)]
    if reduction == "none":
        return numpy.array(terms).reshape(prediction.shape)
    return reduce(terms, reduction, len(terms))
