"""Bytes to normalized floats, one pixel at a time."""

import numpy


def images_to_float(images, mean, std, flip, crop_offset, crop_size):
    """``flip`` and ``crop_offset`` may be None."""
    count, height, width, channels = images.shape
    h, w = crop_size or (height, width)
    result = numpy.zeros((count, channels, h, w))
    for n, c, i, j in numpy.ndindex(*result.shape):
        top, left = (0, 0) if crop_offset is None else (int(value) for value in crop_offset[n])
        column_in_window = w - 1 - j if flip is not None and flip[n] else j
        row, column = i + top, column_in_window + left
        if 0 <= row < height and 0 <= column < width:
            result[n, c, i, j] = (int(images[n, row, column, c]) / 255 - mean[c]) / std[c]
    return result
