"""Pooling by visiting every window and every place in it."""

import math

import numpy


def output_length(size, kernel, stride, padding, dilation, ceil_mode):
    """How many windows there are along one axis, by placing them one after the other."""
    count, start = 0, -padding
    while start + dilation * (kernel - 1) < size + padding:
        count, start = count + 1, start + stride
    last_end = start - stride + dilation * (kernel - 1)
    # In ceil mode one more window covers what is left, if it starts before the right padding.
    if ceil_mode and last_end < size + padding - 1 and start < size:
        count += 1
    return count


def _windows(shape, kernel, stride, padding, dilation, ceil_mode):
    """Yield (n, c, p, q, list of (place, h, w) inside the image)."""
    n_count, c_count, height, width = shape
    p_count = output_length(height, kernel[0], stride[0], padding[0], dilation[0], ceil_mode)
    q_count = output_length(width, kernel[1], stride[1], padding[1], dilation[1], ceil_mode)
    for n in range(n_count):
        for c in range(c_count):
            for p in range(p_count):
                for q in range(q_count):
                    inside = []
                    for r in range(kernel[0]):
                        for s in range(kernel[1]):
                            h = p * stride[0] - padding[0] + r * dilation[0]
                            w = q * stride[1] - padding[1] + s * dilation[1]
                            if 0 <= h < height and 0 <= w < width:
                                inside.append((r * kernel[1] + s, h, w))
                    yield n, c, p, q, inside


def _output(shape, kernel, stride, padding, dilation, ceil_mode):
    return numpy.zeros(
        (
            *shape[:2],
            output_length(shape[2], kernel[0], stride[0], padding[0], dilation[0], ceil_mode),
            output_length(shape[3], kernel[1], stride[1], padding[1], dilation[1], ceil_mode),
        )
    )


def max_pool(x, kernel, stride, padding=(0, 0), dilation=(1, 1), ceil_mode=False):
    """(y, argmax): the first largest value of each window, or its first NaN.

    A dilated window may have every place in the padding: it gives minus infinity and place 0.
    """
    y = _output(x.shape, kernel, stride, padding, dilation, ceil_mode)
    argmax = numpy.zeros(y.shape, numpy.int64)
    for n, c, p, q, inside in _windows(x.shape, kernel, stride, padding, dilation, ceil_mode):
        best, best_place = None, None
        for place, h, w in inside:
            value = float(x[n, c, h, w])
            if best is None or value > best or (math.isnan(value) and not math.isnan(best)):
                best, best_place = value, place
        y[n, c, p, q], argmax[n, c, p, q] = (-math.inf, 0) if best is None else (best, best_place)
    return y, argmax


def max_pool_backward(dy, argmax, shape, kernel, stride, padding=(0, 0), dilation=(1, 1), ceil_mode=False):
    """Each dy added to the pixel that its window's argmax names."""
    dx = numpy.zeros(shape)
    for n, c, p, q, inside in _windows(shape, kernel, stride, padding, dilation, ceil_mode):
        for place, h, w in inside:
            if place == argmax[n, c, p, q]:
                dx[n, c, h, w] += float(dy[n, c, p, q])
    return dx


def _divisor(shape, kernel, stride, padding, p, q, inside, count_include_pad):
    if not count_include_pad:
        return len(inside)
    counted = 0
    for r in range(kernel[0]):
        for s in range(kernel[1]):
            h, w = p * stride[0] - padding[0] + r, q * stride[1] - padding[1] + s
            if h < shape[2] + padding[0] and w < shape[3] + padding[1]:
                counted += 1
    return counted


def avg_pool(x, kernel, stride, padding=(0, 0), ceil_mode=False, count_include_pad=True):
    """The mean of each window; places beyond the padded input never count."""
    y = _output(x.shape, kernel, stride, padding, (1, 1), ceil_mode)
    for n, c, p, q, inside in _windows(x.shape, kernel, stride, padding, (1, 1), ceil_mode):
        divisor = _divisor(x.shape, kernel, stride, padding, p, q, inside, count_include_pad)
        y[n, c, p, q] = math.fsum(float(x[n, c, h, w]) for _, h, w in inside) / divisor
    return y


def avg_pool_backward(dy, shape, kernel, stride, padding=(0, 0), ceil_mode=False, count_include_pad=True):
    """Dy over its window's divisor, added to every pixel of the window."""
    dx = numpy.zeros(shape)
    for n, c, p, q, inside in _windows(shape, kernel, stride, padding, (1, 1), ceil_mode):
        divisor = _divisor(shape, kernel, stride, padding, p, q, inside, count_include_pad)
        for _, h, w in inside:
            dx[n, c, h, w] += float(dy[n, c, p, q]) / divisor
    return dx


def _adaptive_window(index, size, count):
    return range(math.floor(index * size / count), math.ceil((index + 1) * size / count))


def adaptive_avg_pool(x, output_size):
    """Means over windows floor(i size / count) .. ceil((i + 1) size / count)."""
    n_count, c_count, height, width = x.shape
    y = numpy.zeros((n_count, c_count, *output_size))
    for n, c, p, q in numpy.ndindex(*y.shape):
        rows, columns = _adaptive_window(p, height, output_size[0]), _adaptive_window(q, width, output_size[1])
        total = math.fsum(float(x[n, c, h, w]) for h in rows for w in columns)
        y[n, c, p, q] = total / (len(rows) * len(columns))
    return y


def adaptive_avg_pool_backward(dy, input_size):
    """The adjoint of the above."""
    dx = numpy.zeros((*dy.shape[:2], *input_size))
    for n, c, p, q in numpy.ndindex(*dy.shape):
        rows = _adaptive_window(p, input_size[0], dy.shape[2])
        columns = _adaptive_window(q, input_size[1], dy.shape[3])
        for h in rows:
            for w in columns:
                dx[n, c, h, w] += float(dy[n, c, p, q]) / (len(rows) * len(columns))
    return dx
