"""im2col as a loop: which element of an image each element of the columns is."""

import numpy


def sources(input_shape, kernel, output, geometry):
    """(N, C * R * S, P * Q) flat indices into an image of ``input_shape``, -1 where the padding is met.

    ``kernel`` is (R, S), ``output`` (P, Q), ``geometry`` a tests.oracles.convolution.Geometry.
    """
    images, channels, height, width = input_shape
    top, _, left, _ = geometry.padding
    result = []
    for n in range(images):
        for c in range(channels):
            for r in range(kernel[0]):
                for s in range(kernel[1]):
                    for p in range(output[0]):
                        for q in range(output[1]):
                            y = p * geometry.stride[0] - top + r * geometry.dilation[0]
                            x = q * geometry.stride[1] - left + s * geometry.dilation[1]
                            inside = 0 <= y < height and 0 <= x < width
                            result.append(((n * channels + c) * height + y) * width + x if inside else -1)
    return numpy.reshape(result, (images, channels * kernel[0] * kernel[1], output[0] * output[1]))
