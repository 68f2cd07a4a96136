"""Changes to pictures, one after the other, one pixel at a time, in float64."""

import math

import numpy

LUMA = (0.299, 0.587, 0.114)


def resampled(image, tables, axis):
    """``image`` (H, W, C); ``tables`` are one image's (first, weights), or None."""
    if tables is None:
        return image
    first, weights = tables
    shape = list(image.shape)
    shape[axis] = len(first)
    result = numpy.zeros(shape)
    for place in numpy.ndindex(*shape):
        for tap, weight in enumerate(weights[:, place[axis]]):
            source = list(place)
            source[axis] = min(int(first[place[axis]]) + tap, image.shape[axis] - 1)
            result[place] += float(weight) * image[tuple(source)]
    return result


def turned(image, cosine, sine):
    height, width, channels = image.shape
    result = numpy.zeros(image.shape)
    for row, column, channel in numpy.ndindex(height, width, channels):
        y, x = row - (height - 1) / 2, column - (width - 1) / 2
        down = min(max(cosine * y + sine * x + (height - 1) / 2, 0), height - 1)
        right = min(max(cosine * x - sine * y + (width - 1) / 2, 0), width - 1)
        top, left = min(math.floor(down), height - 2), min(math.floor(right), width - 2)
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            share = abs(1 - i - (down - top)) * abs(1 - j - (right - left))
            result[row, column, channel] += share * image[top + i, left + j, channel]
    return result


def moved(image, down, right):
    height, width, _ = image.shape
    result = numpy.zeros(image.shape)
    for row, column in numpy.ndindex(height, width):
        if 0 <= row - int(down) < height and 0 <= column - int(right) < width:
            result[row, column] = image[row - int(down), column - int(right)]
    return result


def recoloured(image, brightness, contrast, saturation):
    """Brightness, then contrast about the mean grey, then saturation about each pixel's grey."""

    def grey(pixels):
        return pixels @ numpy.array(LUMA) if pixels.shape[-1] == 3 else pixels[..., 0]

    bright = image * brightness
    middle = grey(bright).mean()
    contrasted = middle + contrast * (bright - middle)
    if image.shape[-1] != 3:
        return contrasted
    # The luma of a shade of grey is itself, so the mean's share stays as it is.
    own = (contrasted - middle * (1 - contrast)) @ numpy.array(LUMA) + middle * (1 - contrast)
    return own[..., None] + saturation * (contrasted - own[..., None])


def augment_images(
    images, mean, std, index=None, flip=None, rows=None, columns=None, rotation=None, shift=None, colour=None,
    cutout=None, cutout_size=0,
):  # fmt: skip
    """(N, C, h, w); every argument but the first three may be None."""
    results = []
    if index is not None:
        images = numpy.array([images[number] for number in index.tolist()]).reshape(-1, *images.shape[1:])
    for n, image in enumerate(numpy.asarray(images, float)):
        for axis, tables in ((1, columns), (0, rows)):
            if tables is not None:
                first, weights = tables
                table = 0 if len(first) == 1 else n
                image = resampled(image, (first[table], weights[table]), axis)
        if flip is not None and flip[n]:
            image = image[:, ::-1]
        if rotation is not None:
            image = turned(image, float(rotation[n, 0]), float(rotation[n, 1]))
        if shift is not None:
            image = moved(image, *shift[n])
        if colour is not None:
            image = recoloured(image, *colour[n])
        image = (image / 255 - numpy.array(mean)) / numpy.array(std)
        if cutout is not None:
            top, left = (int(value) for value in cutout[n])
            for row, column in numpy.ndindex(*image.shape[:2]):
                if top <= row < top + cutout_size and left <= column < left + cutout_size:
                    image[row, column] = 0
        results.append(image.transpose(2, 0, 1))
    height = images.shape[1] if rows is None else rows[0].shape[1]
    width = images.shape[2] if columns is None else columns[0].shape[1]
    return numpy.array(results).reshape(len(images), images.shape[3], height, width)
