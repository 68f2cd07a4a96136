"""Data sets in memory, their parts, and what they say of arrays that they cannot take."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucnn.data import ArrayDataset, DataSplits, Subset, TensorDataset, load, split
from gpucnn.errors import ArgumentError, DataError, DtypeError, ShapeError


def pictures(count: int = 6, height: int = 4, width: int = 5, channels: int = 3) -> Any:
    values = numpy.arange(count * height * width * channels) % 251
    return values.astype(numpy.uint8).reshape(count, height, width, channels)


def test_array_dataset_gives_the_images_asked_for():
    images = pictures()
    dataset = ArrayDataset(images, [0, 1, 2, 0, 1, 2], ["cat", "dog", "owl"], "pets")
    assert len(dataset) == 6
    assert dataset.image_shape == (4, 5, 3)
    assert dataset.labels.dtype == numpy.int64
    assert dataset.classes == ["cat", "dog", "owl"]
    assert not dataset.preprocessed
    chosen = dataset.images([4, 0])
    assert chosen.dtype == numpy.uint8
    assert (chosen[0] == images[4]).all()
    assert (chosen[1] == images[0]).all()
    assert repr(dataset) == "ArrayDataset(pets: 6 colour images of 4x5 in 3 classes)"


def test_grey_images_without_a_channel_axis_get_one():
    dataset = ArrayDataset(pictures(channels=1)[..., 0], numpy.zeros(6, numpy.uint8))
    assert dataset.image_shape == (4, 5, 1)
    assert dataset.images([1]).shape == (1, 4, 5, 1)
    assert "6 grey images of 4x5" in repr(dataset)


def test_two_channels_are_described_by_their_number():
    assert "2-channel" in repr(ArrayDataset(pictures(channels=2), [0] * 6))


@pytest.mark.parametrize("dtype", [numpy.uint8, numpy.int8, numpy.uint16, numpy.int32, numpy.uint64])
def test_labels_of_any_integer_type(dtype):
    dataset = ArrayDataset(pictures(), numpy.array([0, 1, 2, 3, 0, 1], dtype))
    assert dataset.labels.tolist() == [0, 1, 2, 3, 0, 1]
    assert dataset.classes == ["0", "1", "2", "3"]


def test_lists_and_wider_integers_are_taken():
    dataset = ArrayDataset([[[0, 255], [3, 4]], [[5, 6], [7, 8]]], [1, 0])
    assert dataset.images([0]).tolist() == [[[[0], [255]], [[3], [4]]]]


@pytest.mark.parametrize(
    ("images", "labels", "error", "words"),
    [
        (pictures() / 255, [0] * 6, DtypeError, r"uint8.*float64.*\* 255.*TensorDataset"),
        (pictures().astype(bool), [0] * 6, DtypeError, "got bool"),
        (pictures().astype(int) + 200, [0] * 6, DataError, "from 0 to 255, got 200 to"),
        (pictures().astype(int) - 1, [0] * 6, DataError, "got -1 to"),
        (pictures()[0, 0], [0] * 5, ShapeError, r"\(count, height, width, channels\), got \(5, 3\)"),
        (pictures(height=0), [0] * 6, ShapeError, "got"),
        (pictures().transpose(0, 3, 1, 2), [0] * 6, ShapeError, r"transpose\(0, 2, 3, 1\)"),
        (pictures()[:0], [], DataError, "at least one image"),
        ([[[1, 2]], [[1]]], [0, 0], ShapeError, "same shape"),
        (pictures(), [0] * 5, ShapeError, "6 images but 5 labels"),
        (pictures(), numpy.zeros(6), DtypeError, "labels must be integers.*float64"),
        (pictures(), ["cat"] * 6, DtypeError, "return_inverse"),
        (pictures(), numpy.eye(6, dtype=int), ShapeError, r"argmax\(axis=1\)"),
        (pictures(), [0, 1, -1, 0, 0, 0], DataError, "label -1 of image 2 is out of range"),
    ],
)
def test_unfit_arrays_are_refused(images, labels, error, words):
    with pytest.raises(error, match=words):
        ArrayDataset(images, labels)


def test_a_label_beyond_the_classes_is_refused():
    with pytest.raises(DataError, match=r"label 3 of image 1 .* 2 classes labels go from 0 to 1 \(2 of 6"):
        ArrayDataset(pictures(), [0, 3, 0, 1, 2, 0], ["a", "b"])


def test_tensor_dataset_hands_inputs_on():
    x = numpy.linspace(-1, 1, 2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    dataset = TensorDataset(x, [1, 0])
    assert dataset.preprocessed
    assert dataset.image_shape == (4, 5, 3)
    assert dataset.images([1]).dtype == numpy.float64
    assert (dataset.images([1])[0] == x[1]).all()
    assert dataset.labels.dtype == numpy.int64
    assert dataset.classes == ["0", "1"]


@pytest.mark.parametrize(
    ("given", "kept"), [("float16", "float32"), ("float32", "float32"), (">f4", "float32"), (">f8", "float64")]
)
def test_tensor_dataset_keeps_the_precision(given, kept):
    x = numpy.array([0.5, -0.25, 1.0, 2.0]).reshape(1, 1, 2, 2)
    dataset = TensorDataset(x.astype(given), numpy.array([0.75], given))
    assert dataset.images([0]).dtype == kept
    assert (dataset.images([0]) == x).all()
    assert dataset.labels.dtype == kept
    assert dataset.labels.tolist() == [0.75]


def test_class_names_are_plain_strings():
    names = numpy.unique(["dog", "cat"])
    made = [
        ArrayDataset(pictures(), [0, 1, 0, 1, 0, 1], names),
        TensorDataset(numpy.zeros((1, 1, 2, 2)), [1], names),
        TensorDataset(numpy.zeros((1, 1, 2, 2)), [0.5], names),
    ]
    for dataset in made:
        assert dataset.classes == ["cat", "dog"]
        assert {type(name) for name in dataset.classes} == {str}


def test_tensor_dataset_with_float_targets():
    dataset = TensorDataset(numpy.zeros((3, 1, 2, 2), numpy.float32), numpy.ones((3, 4)))
    assert dataset.labels.shape == (3, 4)
    assert dataset.labels.dtype == numpy.float32
    assert dataset.classes == []
    assert repr(dataset) == "TensorDataset(tensors: 3 grey images of 2x2)"


@pytest.mark.parametrize(
    ("x", "y", "error", "words"),
    [
        (pictures(), [0] * 6, DtypeError, "use ArrayDataset"),
        (numpy.zeros((6, 4)), [0] * 6, ShapeError, r"got \(6, 4\)"),
        (numpy.zeros((0, 1, 2, 2)), [], DataError, "at least one sample"),
        (numpy.zeros((2, 1, 2, 2)), [0.5], ShapeError, "2 inputs but 1 targets"),
        (numpy.zeros((2, 1, 2, 2)), [0], ShapeError, "2 images but 1 labels"),
    ],
)
def test_unfit_tensors_are_refused(x, y, error, words):
    with pytest.raises(error, match=words):
        TensorDataset(x, y)


def test_subset_numbers_its_images_from_zero():
    images = pictures()
    dataset = ArrayDataset(images, [0, 1, 2, 0, 1, 2])
    part = Subset(dataset, [5, 3])
    assert part.labels.tolist() == [2, 0]
    assert (part.images([1])[0] == images[3]).all()
    assert part.classes == dataset.classes
    nested = Subset(part, [1], name="one")
    assert nested.labels.tolist() == [0]
    assert (nested.images([0])[0] == images[3]).all()
    assert nested.name == "one"


@pytest.mark.parametrize(
    ("indices", "error", "words"),
    [
        ([], DataError, "at least one"),
        ([[0]], ShapeError, "one-dimensional"),
        ([True, False], DtypeError, "flatnonzero"),
        ([0, 6], DataError, "index 6 is outside 'arrays', which has 6 images"),
        ([-1], DataError, "index -1"),
    ],
)
def test_unfit_indices_are_refused(indices, error, words):
    with pytest.raises(error, match=words):
        Subset(ArrayDataset(pictures(), [0] * 6), indices)


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(8, 40), min_size=1, max_size=4), seed=st.integers(0, 2**32))
def test_split_is_a_stratified_partition(counts, seed):
    labels = numpy.concatenate([numpy.full(count, label) for label, count in enumerate(counts)])
    dataset = ArrayDataset(numpy.zeros((len(labels), 1, 1), numpy.uint8), labels)
    shares = [0.5, 0.25, 0.25]
    parts = split(dataset, shares, seed)
    together = numpy.concatenate([part.indices for part in parts])
    assert sorted(together.tolist()) == list(range(len(labels)))
    for part, share in zip(parts, shares, strict=True):
        assert (numpy.diff(part.indices) > 0).all()
        for label, count in enumerate(counts):
            assert abs(int((part.labels == label).sum()) - share * count) <= 2
        assert abs(len(part) - share * len(labels)) <= 1


def test_split_depends_on_the_seed_and_nothing_else():
    dataset = load("digits").train
    first, again, other = (split(dataset, [0.7, 0.3], seed)[1].indices.tolist() for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_split_of_float_targets():
    dataset = TensorDataset(numpy.zeros((10, 1, 2, 2)), numpy.linspace(0, 1, 10))
    parts = split(dataset, [0.8, 0.2])
    assert [len(part) for part in parts] == [8, 2]


@pytest.mark.parametrize("fractions", [[], [0.5, 0.4], [1.2, -0.2], [1.0, 0.0], [float("nan"), 0.5]])
def test_split_fractions_must_sum_to_one(fractions):
    with pytest.raises(ArgumentError, match="sum to 1"):
        split(ArrayDataset(pictures(), [0] * 6), fractions)


def test_split_of_small_classes_fills_every_part():
    parts = split(ArrayDataset(pictures(), [0, 1, 2, 3, 4, 5]), [0.5, 0.3, 0.2])
    assert [len(part) for part in parts] == [3, 2, 1]


def test_split_refuses_an_empty_part():
    with pytest.raises(DataError, match="6 images, too few"):
        split(ArrayDataset(pictures(), [0, 1, 2, 3, 4, 5]), [0.95, 0.05])


def test_data_splits_describe_themselves():
    dataset = ArrayDataset(pictures(), [0, 1] * 3)
    splits = DataSplits("pets", dataset, None, dataset, dataset.classes, dataset.image_shape)
    assert list(splits.parts()) == ["train", "test"]
    assert repr(splits) == "DataSplits(pets: train 6, test 6 images of 4x5x3, 2 classes)"
