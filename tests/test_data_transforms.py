"""Preprocessing and every random change, against plain loops in float64."""

from __future__ import annotations

import math

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucnn.data import ArrayDataset, Augmentation, Preprocessing, TensorDataset, channel_statistics
from gpucnn.data.resampling import centre_box, tables, taps
from gpucnn.errors import ArgumentError, DtypeError, ShapeError
from gpucnn.ops.cpu import resampling

EPSILON = float(numpy.finfo(numpy.float32).eps)


def noise(*shape: int, seed: int = 0):
    return numpy.random.default_rng(seed).integers(0, 256, shape, dtype=numpy.uint8)


def resize(planar, out) -> None:
    """Both axes of ``planar`` (..., height, width) to those of ``out``, as preprocessing has it done."""
    (height, width), (new_height, new_width) = planar.shape[-2:], out.shape[-2:]
    rows = None if height == new_height else taps(height, new_height)
    columns = None if width == new_width else taps(width, new_width)
    resampling.resize(planar, rows, columns, out)


def rotate(planar, degrees):
    angles = numpy.deg2rad(degrees).astype(numpy.float32)
    return resampling.rotate(planar, numpy.stack([numpy.cos(angles), numpy.sin(angles)], axis=1))


def plain(height: int, width: int, channels: int = 3) -> Preprocessing:
    """Preprocessing whose output is the pixel value itself."""
    return Preprocessing((height, width), (0.0,) * channels, (1 / 255,) * channels)


def resize_loops(image, height: int, width: int):
    """Triangle filter of the scale's width (at least a pixel's), axis by axis, over all source pixels."""

    def along(values, target: int):
        source, scale = len(values), len(values) / target
        support = max(1.0, scale)
        result = []
        for place in range(target):
            centre, total, weight_sum = (place + 0.5) * scale, 0.0, 0.0
            for pixel in range(source):
                weight = max(0.0, 1.0 - abs(pixel + 0.5 - centre) / support)
                total = total + weight * values[pixel]
                weight_sum += weight
            result.append(total / weight_sum)
        return numpy.array(result)

    rows = along(numpy.asarray(image, numpy.float64), height)
    return along(rows.T, width).T


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 14), st.integers(1, 14))
def test_resize_is_the_triangle_filter(height, width, new_height, new_width):
    image = noise(2, height, width, seed=height * 13 + width)
    result = numpy.empty((2, new_height, new_width), numpy.float32)
    resize(image, result)
    for plane, expected in zip(result, image, strict=True):
        error = numpy.abs(plane - resize_loops(expected, new_height, new_width)).max()
        assert error <= 255 * 24 * EPSILON


def test_resize_of_large_and_strided_images():
    image = noise(1, 150, 160, 3).transpose(0, 3, 1, 2)[..., ::-1]
    result = numpy.empty((1, 3, 40, 170), numpy.float32)
    resize(image, result)
    for plane, source in zip(result[0], image[0], strict=True):
        assert numpy.abs(plane - resize_loops(source, 40, 170)).max() <= 255 * 24 * EPSILON


def test_resize_agrees_with_pillow():
    image_module = pytest.importorskip("PIL.Image")
    image = noise(61, 47)
    result = numpy.empty((1, 30, 90), numpy.float32)
    resize(image[None], result)
    theirs = image_module.fromarray(image).resize((90, 30), image_module.Resampling.BILINEAR)
    assert numpy.abs(result[0] - numpy.asarray(theirs)).max() <= 1.01  # Pillow rounds after each axis


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300))
def test_tap_weights_sum_to_one_and_stay_inside(source, target):
    first, weights = taps(source, target)
    assert numpy.abs(weights.sum(axis=0, dtype=numpy.float64) - 1).max() <= 1e-6
    assert first.min() >= 0
    assert first.max() + len(weights) <= source


def test_an_axis_that_keeps_its_length_has_one_tap():
    first, weights = taps(7, 7)
    assert first.tolist() == list(range(7))
    assert weights.tolist() == [[1.0] * 7]


def test_tables_of_several_stretches_are_filled_up_with_nothing():
    first, weights = tables([3, 0, 5], [4, 9, 2], 4)
    assert first.dtype == numpy.int32
    assert weights.shape == (3, len(taps(9, 4)[1]), 4)
    image = noise(12)
    for number, (start, length) in enumerate([(3, 4), (0, 9), (5, 2)]):
        expected = numpy.zeros(4)
        places, shares = taps(length, 4)
        for tap, weight in enumerate(shares):
            expected += weight * image[start : start + length][places + tap]
        found = numpy.zeros(4)
        for tap, weight in enumerate(weights[number]):
            found += weight * image[numpy.minimum(first[number] + tap, 11)]
        numpy.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("source", "target", "box"),
    [
        ((10, 20), (5, 5), (0, 5, 10, 10)),
        ((20, 10), (5, 5), (5, 0, 10, 10)),
        ((10, 10), (10, 5), (0, 2, 10, 5)),
        ((7, 9), (7, 9), (0, 0, 7, 9)),
        ((1, 100), (100, 1), (0, 49, 1, 1)),
    ],
)
def test_centre_box(source, target, box):
    assert centre_box(source, target) == box


def test_normalization():
    images = noise(3, 4, 5, 3)
    preprocessing = Preprocessing((4, 5), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    result = preprocessing.apply(images)
    assert result.dtype == numpy.float32
    assert result.shape == (3, 3, 4, 5)
    assert result.flags.c_contiguous
    expected = (images.astype(numpy.float64) / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    assert numpy.abs(result - expected.transpose(0, 3, 1, 2)).max() <= 8 * EPSILON * numpy.abs(expected).max()


def test_images_of_another_size_are_cut_and_resized():
    images = noise(2, 12, 20, 3)
    result = plain(6, 6).apply(images)
    for image, planes in zip(images, result, strict=True):
        for channel in range(3):
            expected = resize_loops(image[:, 4:16, channel], 6, 6)
            assert numpy.abs(planes[channel] - expected).max() <= 255 * 24 * EPSILON


def test_no_images_make_no_inputs():
    assert plain(4, 4).apply(noise(0, 4, 4, 3)).shape == (0, 3, 4, 4)


def test_shift_and_flip():
    images = noise(40, 6, 5, 3)
    augmentation = Augmentation(horizontal_flip=True, shift=2)
    result = plain(6, 5).apply(images, augmentation, seed=1, epoch=2)
    drawn = augmentation.draw(1, 2, range(40))
    shifts = set()
    for number, image in enumerate(images):
        if drawn["flip"][number] < 0.5:
            image = image[:, ::-1]
        down, right = (math.floor(drawn[name][number] * 5) - 2 for name in ("shift_y", "shift_x"))
        shifts.add((down, right))
        for y in range(6):
            for x in range(5):
                inside = 0 <= y - down < 6 and 0 <= x - right < 5
                expected = image[y - down, x - right] if inside else numpy.zeros(3)
                assert numpy.abs(result[number, :, y, x] - expected).max() <= 255 * 4 * EPSILON
    assert len(shifts) > 10
    assert {down for down, _ in shifts} == {-2, -1, 0, 1, 2}


def test_flip_alone_mirrors_about_half():
    images = noise(60, 4, 4, 1)
    result = plain(4, 4, 1).apply(images, Augmentation(horizontal_flip=True))
    planar = images.transpose(0, 3, 1, 2)
    mirrored = numpy.abs(result - planar[..., ::-1]).max(axis=(1, 2, 3)) <= 1e-3
    same = numpy.abs(result - planar).max(axis=(1, 2, 3)) <= 1e-3
    assert (mirrored ^ same).all()
    assert 15 <= mirrored.sum() <= 45


def test_resized_crop():
    images = noise(12, 20, 24, 3)
    augmentation = Augmentation(resized_crop=0.2, horizontal_flip=True)
    result = plain(10, 12).apply(images, augmentation, seed=4)
    drawn = augmentation.draw(4, 0, range(12))
    for number, image in enumerate(images):
        area = 20 * 24 * (0.2 + 0.8 * drawn["crop_area"][number])
        ratio = (4 / 3) ** (2 * drawn["crop_ratio"][number] - 1)
        width = min(24, max(1, round(math.sqrt(area * ratio))))
        height = min(20, max(1, round(math.sqrt(area / ratio))))
        top = math.floor(drawn["crop_y"][number] * (20 - height + 1))
        left = math.floor(drawn["crop_x"][number] * (24 - width + 1))
        box = image[top : top + height, left : left + width]
        if drawn["flip"][number] < 0.5:
            box = box[:, ::-1]
        for channel in range(3):
            expected = resize_loops(box[..., channel], 10, 12)
            assert numpy.abs(result[number, channel] - expected).max() <= 255 * 24 * EPSILON


def rotate_loops(plane, degrees: float):
    height, width = plane.shape
    angle = math.radians(degrees)
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    result = numpy.empty(plane.shape)
    for y in range(height):
        for x in range(width):
            source_y = math.cos(angle) * (y - middle_y) + math.sin(angle) * (x - middle_x) + middle_y
            source_x = math.cos(angle) * (x - middle_x) - math.sin(angle) * (y - middle_y) + middle_x
            source_y, source_x = min(max(source_y, 0), height - 1), min(max(source_x, 0), width - 1)
            top, left = math.floor(source_y), math.floor(source_x)
            total = 0.0
            for row, row_weight in ((top, 1 - (source_y - top)), (top + 1, source_y - top)):
                for column, weight in ((left, 1 - (source_x - left)), (left + 1, source_x - left)):
                    total += row_weight * weight * plane[min(row, height - 1), min(column, width - 1)]
            result[y, x] = total
    return result


def test_rotation_is_bilinear_with_repeated_edges():
    images = noise(4, 2, 9, 7)
    degrees = numpy.array([0.0, 10.0, -33.0, 180.0])
    result = rotate(images, degrees).copy()
    for turned, image, angle in zip(result, images, degrees, strict=True):
        for plane, source in zip(turned, image, strict=True):
            assert numpy.abs(plane - rotate_loops(source, angle)).max() <= 255 * 64 * EPSILON


def test_a_quarter_turn_is_counter_clockwise():
    image = noise(1, 1, 5, 5)
    turned = rotate(image, numpy.array([90.0]))
    assert numpy.abs(turned[0, 0] - numpy.rot90(image[0, 0])).max() <= 255 * 16 * EPSILON


def test_rotation_within_preprocessing():
    images = noise(5, 8, 8, 3)
    augmentation = Augmentation(rotation=20.0)
    result = plain(8, 8).apply(images, augmentation)
    angles = (2 * augmentation.draw(0, 0, range(5))["rotation"] - 1) * 20
    assert numpy.abs(angles).max() > 5
    for number, angle in enumerate(angles):
        expected = rotate_loops(images[number, :, :, 1], angle)
        assert numpy.abs(result[number, 1] - expected).max() <= 255 * 64 * EPSILON


def test_a_row_of_pixels_does_not_turn():
    images = noise(3, 1, 6, 3)
    assert (plain(1, 6).apply(images, Augmentation(rotation=20.0)) == plain(1, 6).apply(images)).all()


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_colour_changes_one_after_the_other(channels):
    images = noise(6, 5, 4, channels)
    augmentation = Augmentation(brightness=0.4, contrast=0.5, saturation=0.6)
    mean, std = (0.5, 0.4, 0.3)[:channels], (0.2, 0.3, 0.4)[:channels]
    result = Preprocessing((5, 4), mean, std).apply(images, augmentation, seed=9)
    drawn = augmentation.draw(9, 0, range(6))
    grey_weights = [0.299, 0.587, 0.114] if channels == 3 else [1.0, 0.0][:channels]
    for number, image in enumerate(images.astype(numpy.float64)):
        brightness, contrast, saturation = (
            1 + amount * (2 * drawn[name][number] - 1)
            for name, amount in (("brightness", 0.4), ("contrast", 0.5), ("saturation", 0.6))
        )
        image = image * brightness
        image = contrast * image + (1 - contrast) * (image @ grey_weights).mean()
        if channels == 3:
            image = saturation * image + (1 - saturation) * (image @ grey_weights)[..., None]
        expected = ((image / 255 - mean) / std).transpose(2, 0, 1)
        assert numpy.abs(result[number] - expected).max() <= 1e-5


def test_contrast_of_a_grey_image_keeps_its_mean():
    images = noise(3, 6, 6, 1)
    result = plain(6, 6, 1).apply(images, Augmentation(contrast=1.0))
    assert numpy.abs(result.mean(axis=(1, 2, 3)) - images.mean(axis=(1, 2, 3))).max() <= 1e-3
    assert (numpy.abs(result.std(axis=(1, 2, 3)) / images.std(axis=(1, 2, 3)) - 1) > 0.01).any()


def test_cutout_is_a_square_of_the_mean():
    images = noise(50, 9, 8, 3) // 2 + 120  # never the mean of 0
    augmentation = Augmentation(cutout=3)
    result = plain(9, 8).apply(images, augmentation)
    drawn = augmentation.draw(0, 0, range(50))
    for number in range(50):
        top = math.floor(drawn["cutout_y"][number] * 9) - 1
        left = math.floor(drawn["cutout_x"][number] * 8) - 1
        for y in range(9):
            for x in range(8):
                cut = top <= y < top + 3 and left <= x < left + 3
                assert ((result[number, :, y, x] == 0) == cut).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sample_does_not_depend_on_its_batch(channels):
    images = noise(9, 20, 20, channels)
    strong = Augmentation(True, 2, 0.3, 15.0, 0.3, 0.3, 0.3, 4)
    preprocessing = Preprocessing((16, 16), (0.4,) * channels, (0.2,) * channels)
    together = preprocessing.apply(images, strong, seed=2, epoch=1, indices=range(100, 109))
    for number in (0, 4, 8):
        alone = preprocessing.apply(images[number : number + 1], strong, seed=2, epoch=1, indices=[100 + number])
        assert (alone[0] == together[number]).all()
    other = preprocessing.apply(images, strong, seed=2, epoch=2, indices=range(100, 109))
    assert (other != together).any(axis=(1, 2, 3)).all()


def test_large_images_go_one_by_one():
    images = noise(2, 200, 220, 3)
    augmentation = Augmentation(horizontal_flip=True, resized_crop=0.5, brightness=0.2)
    preprocessing = Preprocessing((300, 320), (0.4,) * 3, (0.2,) * 3)
    together = preprocessing.apply(images, augmentation)
    alone = preprocessing.apply(images[1:], augmentation, indices=[1])
    assert (together[1] == alone[0]).all()


def test_preprocessing_survives_a_dictionary():
    preprocessing = Preprocessing((4, 5), (0.1, 0.2), (0.3, 0.4))
    fields = {"image_size": [4, 5], "mean": [0.1, 0.2], "std": [0.3, 0.4], "dtype": "float32"}
    assert preprocessing.to_dict() == fields
    assert Preprocessing(**preprocessing.to_dict()) == preprocessing
    assert hash(Preprocessing(**preprocessing.to_dict())) == hash(preprocessing)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((4,), (0.0,), (1.0,)), "image_size"),
        (((4, 0), (0.0,), (1.0,)), "image_size"),
        (((4, 4), (), ()), "one number a channel"),
        (((4, 4), (0.0,), (1.0, 1.0)), "one number a channel"),
        (((4, 4), (0.0,), (0.0,)), "std positive"),
        (((4, 4), (float("nan"),), (1.0,)), "mean must be finite"),
    ],
)
def test_unfit_preprocessing_is_refused(arguments, words):
    with pytest.raises(ArgumentError, match=words):
        Preprocessing(*arguments)


def test_unfit_images_are_refused():
    with pytest.raises(DtypeError, match="uint8 array, got float64"):
        plain(4, 4).apply(numpy.zeros((1, 4, 4, 3)))
    with pytest.raises(DtypeError, match="got list"):
        plain(4, 4).apply([1])  # type: ignore[arg-type]  # what is tested
    with pytest.raises(ShapeError, match=r"\(count, height, width, 3\).*got \(1, 4, 4, 1\)"):
        plain(4, 4).apply(noise(1, 4, 4, 1))
    with pytest.raises(ShapeError, match="2 images need as many indices"):
        plain(4, 4).apply(noise(2, 4, 4, 3), indices=[1])
    with pytest.raises(ArgumentError, match="shift=4 leaves nothing"):
        plain(4, 4).apply(noise(2, 4, 4, 3), Augmentation(shift=4))


def test_channel_statistics():
    images = noise(50, 6, 7, 3)
    images[..., 2] = 17
    mean, std = channel_statistics(ArrayDataset(images, [0] * 50))
    scaled = images.reshape(-1, 3) / 255
    for channel in range(2):
        values = [float(value) for value in scaled[:, channel]]
        expected = math.fsum(values) / len(values)
        spread = math.sqrt(math.fsum((value - expected) ** 2 for value in values) / len(values))
        assert abs(mean[channel] - expected) <= 1e-12
        assert abs(std[channel] - spread) <= 1e-9
    assert abs(mean[2] - 17 / 255) <= 1e-12
    assert std[2] == 1  # constant


@pytest.mark.parametrize("size", [(1, 1), (255, 3), (256, 2), (257, 2), (700, 5)])
@pytest.mark.parametrize("planes", [False, True])
def test_channel_statistics_are_exact(size, planes):
    """White images are the most that sums of float32 have to hold; noise shows what would be left out."""
    for images in (numpy.full((3, *size, 3), 255, numpy.uint8), noise(3, *size, 3)):
        if planes:  # as a folder gives them
            images = numpy.ascontiguousarray(images.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
        mean, std = channel_statistics(ArrayDataset(images, [0] * 3))
        for channel in range(3):
            values = images[..., channel].reshape(-1).astype(object)
            expected = sum(values) / len(values) / 255
            assert mean[channel] == expected
            variance = sum(value * value for value in values) / len(values) / 255**2 - expected**2
            assert abs(std[channel] - (math.sqrt(variance) if variance > 1e-12 else 1)) <= 1e-12


def test_channel_statistics_do_not_depend_on_the_threads(monkeypatch):
    dataset = ArrayDataset(noise(40, 200, 210, 3), [0] * 40)
    found = set()
    for count in (1, 2, 5):
        monkeypatch.setattr("gpucnn.data.parallel.cpu_count", lambda count=count: count)
        found.add(channel_statistics(dataset))
    assert len(found) == 1


def test_images_in_planes_become_the_same_input():
    images = noise(5, 12, 10, 3)
    planes = numpy.ascontiguousarray(images.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    strong = Augmentation(True, 2, 0.3, 15.0, 0.3, 0.3, 0.3, 4)
    for augmentation in (None, Augmentation(horizontal_flip=True, shift=3), strong):
        for size in ((12, 10), (9, 11)):
            preprocessing = Preprocessing(size, (0.4,) * 3, (0.2,) * 3)
            first, second = (preprocessing.apply(given, augmentation) for given in (images, planes))
            assert (first == second).all()


def test_channel_statistics_of_a_sample():
    images = numpy.repeat(numpy.arange(100, dtype=numpy.uint8), 4).reshape(100, 2, 2)
    mean, _ = channel_statistics(ArrayDataset(images, [0] * 100), maximum_images=10)
    assert abs(mean[0] * 255 - 45) <= 1e-9  # images 0, 10, ..., 90


def test_statistics_of_preprocessed_data_are_refused():
    with pytest.raises(DtypeError, match="preprocessed"):
        channel_statistics(TensorDataset(numpy.zeros((2, 1, 2, 2)), [0, 1]))


def test_preprocessing_for_a_dataset():
    dataset = ArrayDataset(noise(30, 8, 8, 3), [0] * 30)
    result = Preprocessing.for_dataset(dataset).apply(dataset.images(range(30)))
    assert numpy.abs(result.mean(axis=(0, 2, 3), dtype=numpy.float64)).max() <= 1e-5
    assert numpy.abs(result.std(axis=(0, 2, 3), dtype=numpy.float64) - 1).max() <= 1e-5
    assert Preprocessing.for_dataset(dataset, (4, 6)).image_size == (4, 6)
