"""Activations of one number, and their derivatives; softmax of one row."""

import math

import numpy


def elementwise(function, *arrays):
    """``function`` of the arrays' numbers, one place at a time."""
    result = numpy.zeros(arrays[0].shape)
    for index in numpy.ndindex(*result.shape):
        result[index] = function(*(float(array[index]) for array in arrays))
    return result


def relu(x):
    return x if math.isnan(x) or x > 0 else 0.0


def relu_derivative(x):
    return 1.0 if x > 0 else 0.0


def relu6(x):
    return x if math.isnan(x) else min(max(x, 0.0), 6.0)


def relu6_derivative(x):
    return 1.0 if 0 < x < 6 else 0.0


def leaky_relu(x, slope=0.01):
    return x if x > 0 else slope * x


def leaky_relu_derivative(x, slope=0.01):
    return 1.0 if x > 0 else slope


def sigmoid(x):
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    power = math.exp(x)
    return power / (1 + power)


def sigmoid_derivative(x):
    return sigmoid(x) * sigmoid(-x)


def tanh_derivative(x):
    return 1 / math.cosh(x) ** 2 if abs(x) < 300 else 0.0


def silu(x):
    return x * sigmoid(x)


def silu_derivative(x):
    return sigmoid(x) + x * sigmoid(x) * sigmoid(-x)


def normal_distribution(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


def gelu(x):
    return x * normal_distribution(x)


def gelu_derivative(x):
    return normal_distribution(x) + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _tanh_argument(x):
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


def gelu_tanh(x):
    """0.5 x (1 + tanh u), with (1 + tanh u) / 2 as sigmoid(2 u): 1 + tanh u cancels for negative u."""
    return x * sigmoid(2 * _tanh_argument(x))


def gelu_tanh_derivative(x):
    s, rest = sigmoid(2 * _tanh_argument(x)), sigmoid(-2 * _tanh_argument(x))
    return s + x * s * rest * 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)


def softmax_row(row):
    largest = max(row)
    powers = [math.exp(value - largest) for value in row]
    total = math.fsum(powers)
    return [power / total for power in powers]


def softmax(x, axis):
    rows = numpy.moveaxis(x.astype(numpy.float64), axis, -1)
    result = numpy.zeros(rows.shape)
    for index in numpy.ndindex(*rows.shape[:-1]):
        result[index] = softmax_row([float(value) for value in rows[index]])
    return numpy.moveaxis(result, -1, axis)


def softmax_backward(dy, x, axis):
    """The full Jacobian p_i (delta_ij - p_j) applied to each row of dy."""
    rows, gradients = numpy.moveaxis(softmax(x, axis), axis, -1), numpy.moveaxis(dy, axis, -1)
    result = numpy.zeros(rows.shape)
    for index in numpy.ndindex(*rows.shape[:-1]):
        p, g = rows[index], gradients[index]
        for j in range(len(p)):
            result[(*index, j)] = math.fsum(
                float(g[i]) * p[i] * ((1.0 if i == j else 0.0) - p[j]) for i in range(len(p))
            )
    return numpy.moveaxis(result, -1, axis)
