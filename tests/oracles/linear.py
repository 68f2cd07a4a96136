"""The fully connected layer, one output number at a time."""

import math

import numpy


def forward(x, weight, bias):
    y = numpy.zeros((x.shape[0], weight.shape[0]))
    for n, k in numpy.ndindex(*y.shape):
        y[n, k] = math.fsum(float(a) * float(b) for a, b in zip(x[n], weight[k], strict=True)) + float(bias[k])
    return y


def backward(dy, x, weight):
    """(dx, dweight, dbias)."""
    dx, dweight, dbias = numpy.zeros(x.shape), numpy.zeros(weight.shape), numpy.zeros(weight.shape[0])
    for n, i in numpy.ndindex(*x.shape):
        dx[n, i] = math.fsum(float(dy[n, k]) * float(weight[k, i]) for k in range(weight.shape[0]))
    for k, i in numpy.ndindex(*weight.shape):
        dweight[k, i] = math.fsum(float(dy[n, k]) * float(x[n, i]) for n in range(x.shape[0]))
    for k in range(weight.shape[0]):
        dbias[k] = math.fsum(float(dy[n, k]) for n in range(x.shape[0]))
    return dx, dweight, dbias
