"""Batch normalization, a channel at a time, with exactly rounded sums."""

import math

import numpy


def _channel(x, c):
    return [float(value) for value in x[:, c].reshape(-1)]


def statistics(x):
    """(mean, biased variance), a value a channel."""
    means, variances = [], []
    for c in range(x.shape[1]):
        values = _channel(x, c)
        mean = math.fsum(values) / len(values)
        means.append(mean)
        variances.append(math.fsum((value - mean) ** 2 for value in values) / len(values))
    return numpy.array(means), numpy.array(variances)


def batch_norm(x, weight, bias, epsilon):
    """(y, mean, inverse_std) in training."""
    mean, variance = statistics(x)
    inverse_std = numpy.array([1 / math.sqrt(v + epsilon) for v in variance])
    y = numpy.zeros(x.shape)
    for index in numpy.ndindex(*x.shape):
        c = index[1]
        y[index] = (float(x[index]) - mean[c]) * inverse_std[c] * float(weight[c]) + float(bias[c])
    return y, mean, inverse_std


def batch_norm_inference(x, weight, bias, running_mean, running_var, epsilon):
    """With given statistics."""
    y = numpy.zeros(x.shape)
    for index in numpy.ndindex(*x.shape):
        c = index[1]
        root = math.sqrt(float(running_var[c]) + epsilon)
        y[index] = (float(x[index]) - float(running_mean[c])) / root * float(weight[c]) + float(bias[c])
    return y


def batch_norm_inference_backward(dy, x, weight, running_mean, running_var, epsilon):
    """(dx, dweight, dbias) for given statistics, which are numbers."""
    dx, dweight, dbias = numpy.zeros(x.shape), numpy.zeros(x.shape[1]), numpy.zeros(x.shape[1])
    for c in range(x.shape[1]):
        root, values, gradients = math.sqrt(float(running_var[c]) + epsilon), _channel(x, c), _channel(dy, c)
        dbias[c] = math.fsum(gradients)
        distances = [value - float(running_mean[c]) for value in values]
        dweight[c] = math.fsum(g * d / root for g, d in zip(gradients, distances, strict=True))
        dx[:, c] = dy[:, c].astype(float) * float(weight[c]) / root
    return dx, dweight, dbias


def batch_norm_backward(dy, x, weight, epsilon):
    """(dx, dweight, dbias), by the chain rule over mean and variance, each step apart."""
    mean, variance = statistics(x)
    dx, dweight, dbias = numpy.zeros(x.shape), numpy.zeros(x.shape[1]), numpy.zeros(x.shape[1])
    for c in range(x.shape[1]):
        values, gradients = _channel(x, c), _channel(dy, c)
        count, root = len(values), math.sqrt(variance[c] + epsilon)
        dbias[c] = math.fsum(gradients)
        dweight[c] = math.fsum(g * (v - mean[c]) / root for g, v in zip(gradients, values, strict=True))
        scaled = [g * float(weight[c]) for g in gradients]
        dvariance = math.fsum(g * (v - mean[c]) * -0.5 / root**3 for g, v in zip(scaled, values, strict=True))
        dmean = -math.fsum(scaled) / root - 2 * dvariance * math.fsum(v - mean[c] for v in values) / count
        for index in numpy.ndindex(*x.shape):
            if index[1] == c:
                g = float(dy[index]) * float(weight[c])
                dx[index] = g / root + dvariance * 2 * (float(x[index]) - mean[c]) / count + dmean / count
    return dx, dweight, dbias
