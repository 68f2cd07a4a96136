"""Optimizer steps on lists of Python floats, following the papers and PyTorch's documentation line by line."""

import math


def sgd(values, gradients, velocity, lr, momentum, dampening, weight_decay, nesterov, maximize, first_step):
    """(values, velocity) after a step."""
    new_values, new_velocity = [], []
    for index, value in enumerate(values):
        g = -gradients[index] if maximize else gradients[index]
        g = g + weight_decay * value
        v = velocity[index]
        if momentum:
            v = g if first_step else momentum * v + (1 - dampening) * g
            g = g + momentum * v if nesterov else v
        new_values.append(value - lr * g)
        new_velocity.append(v)
    return new_values, new_velocity


def adam(values, gradients, first, second, lr, beta1, beta2, epsilon, weight_decay, decoupled, step):
    """(values, first moment, second moment) after a step."""
    new_values, new_first, new_second = [], [], []
    for index, value in enumerate(values):
        g = gradients[index]
        if decoupled:
            value = value - lr * weight_decay * value
        else:
            g = g + weight_decay * value
        m = beta1 * first[index] + (1 - beta1) * g
        v = beta2 * second[index] + (1 - beta2) * g * g
        m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
        new_values.append(value - lr * m_hat / (math.sqrt(v_hat) + epsilon))
        new_first.append(m)
        new_second.append(v)
    return new_values, new_first, new_second


def rmsprop(values, gradients, square, velocity, average, lr, alpha, epsilon, weight_decay, momentum, centered):
    """(values, square average, velocity, gradient average) after a step."""
    result = [], [], [], []
    for index, value in enumerate(values):
        g = gradients[index] + weight_decay * value
        s = alpha * square[index] + (1 - alpha) * g * g
        a, variance = average[index], s
        if centered:
            a = alpha * a + (1 - alpha) * g
            variance = s - a * a
        change = g / (math.sqrt(variance) + epsilon)
        v = velocity[index]
        if momentum:
            v = momentum * v + change
            change = v
        for values_so_far, number in zip(result, (value - lr * change, s, v, a), strict=True):
            values_so_far.append(number)
    return result
