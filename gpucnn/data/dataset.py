"""What a data set is: images by number, with their labels; in memory, as a part of another, or split."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import ArrayLike, NDArray

from gpucnn.device import to_cpu
from gpucnn.errors import ArgumentError, DataError, DtypeError, ShapeError
from gpucnn.random import permutation

_SPLIT_STREAM = 3 << 32  # one stream a class; shuffling and augmentation own 1 << 32 and 2 << 32


class Dataset(ABC):
    """Images by number, each with a label.

    Attributes:
        name: what the data set is called in messages and reports.
        classes: the name of each class; label i means ``classes[i]``. Empty where the labels are not classes.
        image_shape: (height, width, channels) of every image.
        labels: one label an image, int64 (or float targets in a :class:`TensorDataset`).
        preprocessed: whether :meth:`images` gives floats NCHW, ready for the model, instead of uint8 NHWC.
    """

    name: str
    classes: list[str]
    image_shape: tuple[int, int, int]
    labels: NDArray[Any]
    preprocessed: bool = False

    @abstractmethod
    def images(self, indices: ArrayLike) -> NDArray[Any]:
        """The images with these numbers, (len(indices), height, width, channels) uint8. Threads may call it."""

    def in_memory(self) -> tuple[NDArray[numpy.uint8], NDArray[numpy.int64]] | None:
        """The one array in memory, uint8 (M, H, W, C), that has the images as they are, and their numbers in it.

        None where there is no such array, as in a data set that makes its images or reads them from files.
        """
        return None

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        height, width, channels = self.image_shape
        form = "grey" if channels == 1 else "colour" if channels == 3 else f"{channels}-channel"
        kinds = f" in {len(self.classes)} classes" if self.classes else ""
        return f"{type(self).__name__}({self.name}: {len(self):,} {form} images of {height}x{width}{kinds})"


class ArrayDataset(Dataset):
    """Images that are in memory.

    Args:
        images: uint8, (count, height, width) for grey or (count, height, width, channels); nested lists and other
            integer types are taken where every value is in 0 .. 255.
        labels: one integer an image, 0 .. number of classes - 1, of any integer type; or a list.
        classes: the names of the classes; without it "0", "1", ... up to the largest label.
        name: what to call the data set.

    Raises:
        ShapeError: the images have no such shape, or images and labels differ in number.
        DtypeError: the images are not integers, or the labels are not.
        DataError: there are no images, a value is outside 0 .. 255, or a label is out of range.
    """

    def __init__(
        self, images: ArrayLike, labels: ArrayLike, classes: Sequence[str] | None = None, name: str = "arrays"
    ) -> None:
        self._images = _checked_images(images)
        self.labels, self.classes = checked_labels(labels, len(self._images), classes)
        _, height, width, channels = self._images.shape
        self.image_shape = (height, width, channels)
        self.name = name

    def images(self, indices: ArrayLike) -> NDArray[numpy.uint8]:
        """The images with these numbers, (len(indices), height, width, channels) uint8."""
        return self._images[numpy.asarray(indices, numpy.int64)]

    def in_memory(self) -> tuple[NDArray[numpy.uint8], NDArray[numpy.int64]] | None:
        """All images, and their numbers; None where a derived class gives other ones."""
        if type(self).images is not ArrayDataset.images:
            return None
        return self._images, numpy.arange(len(self._images))


class TensorDataset(Dataset):
    """Inputs that are ready for the model: the loader hands them on as they are, without augmentation.

    Args:
        x: float32 or float64 (count, channels, height, width), kept as it is; float16 becomes float32.
            ``Trainer`` and ``evaluate`` convert each batch to the dtype of the model.
        y: one integer label a sample, or float targets of shape (count, ...), kept in the dtype of the inputs.
        classes: the names of the classes; without it "0", "1", ... to the largest label; none for float targets.
        name: what to call the data set.

    Raises:
        ShapeError, DtypeError, DataError: as :class:`ArrayDataset`.
    """

    preprocessed = True

    def __init__(
        self, x: ArrayLike, y: ArrayLike, classes: Sequence[str] | None = None, name: str = "tensors"
    ) -> None:
        inputs = _as_array(x, "inputs")
        if inputs.dtype.kind != "f":
            raise DtypeError(
                f"inputs of a TensorDataset are floats, got {inputs.dtype}; "
                "for uint8 images of shape (count, height, width, channels) use ArrayDataset"
            )
        if inputs.ndim != 4 or 0 in inputs.shape[1:]:
            raise ShapeError(f"inputs must have shape (count, channels, height, width), got {inputs.shape}")
        if len(inputs) == 0:
            raise DataError("a data set needs at least one sample, got none")
        dtype = numpy.float32 if inputs.dtype.itemsize < 8 else numpy.float64
        self._inputs = inputs.astype(dtype, copy=False)
        targets = _as_array(y, "targets")
        if targets.dtype.kind == "f":
            if len(targets) != len(inputs):
                raise ShapeError(f"{len(inputs)} inputs but {len(targets)} targets; each input needs one")
            self.labels = targets.astype(dtype, copy=False)
            self.classes = [] if classes is None else [str(name) for name in classes]
        else:
            self.labels, self.classes = checked_labels(targets, len(inputs), classes)
        _, channels, height, width = inputs.shape
        self.image_shape = (height, width, channels)
        self.name = name

    def images(self, indices: ArrayLike) -> NDArray[Any]:
        """The inputs with these numbers, (len(indices), channels, height, width) float32 or float64."""
        return self._inputs[numpy.asarray(indices, numpy.int64)]


class Subset(Dataset):
    """The images of ``dataset`` whose numbers are ``indices``, in that order, numbered from 0.

    Raises ShapeError where ``indices`` is not one-dimensional, DtypeError where they are no integers, DataError
    where there are none or one is outside the data set.
    """

    def __init__(self, dataset: Dataset, indices: ArrayLike, name: str | None = None) -> None:
        chosen = _as_array(indices, "indices")
        if chosen.ndim != 1:
            raise ShapeError(f"indices must be one-dimensional, got shape {chosen.shape}")
        if len(chosen) == 0:
            raise DataError(f"a part of '{dataset.name}' needs at least one image, got no indices")
        if chosen.dtype.kind not in "iu":
            raise DtypeError(
                f"indices must be integers, got {chosen.dtype}; for a mask use numpy.flatnonzero(mask)"
            )
        outside = chosen[(chosen < 0) | (chosen >= len(dataset))]
        if len(outside):
            raise DataError(f"index {outside[0]} is outside '{dataset.name}', which has {len(dataset)} images")
        self.dataset, self.indices = dataset, chosen.astype(numpy.int64)
        self.labels, self.classes = dataset.labels[self.indices], dataset.classes
        self.image_shape, self.preprocessed = dataset.image_shape, dataset.preprocessed
        self.name = name or dataset.name

    def images(self, indices: ArrayLike) -> NDArray[Any]:
        """The images with these numbers within the subset, as ``dataset.images`` gives them."""
        return self.dataset.images(self.indices[numpy.asarray(indices, numpy.int64)])

    def in_memory(self) -> tuple[NDArray[numpy.uint8], NDArray[numpy.int64]] | None:
        """The array of the whole data set, and the numbers of these images in it."""
        found = None if type(self).images is not Subset.images else self.dataset.in_memory()
        return None if found is None else (found[0], found[1][self.indices])


@dataclass(frozen=True)
class DataSplits:
    """A data set in its parts: ``train``, and ``validation`` and ``test`` where there are any."""

    name: str
    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    classes: list[str]
    image_shape: tuple[int, int, int]

    def __repr__(self) -> str:
        height, width, channels = self.image_shape
        sizes = ", ".join(f"{part} {len(dataset):,}" for part, dataset in self.parts().items())
        return (
            f"DataSplits({self.name}: {sizes} images of {height}x{width}x{channels}, {len(self.classes)} classes)"
        )

    def parts(self) -> dict[str, Dataset]:
        """The parts that there are, by name."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: dataset for name, dataset in named.items() if dataset is not None}


def split(dataset: Dataset, fractions: Sequence[float], seed: int = 0) -> list[Subset]:
    """Divide ``dataset`` at random into disjoint parts that together are all of it.

    Each class is divided by the same ``fractions`` (which sum to 1), so every part has the mixture of the whole to
    within two images a class, and the size asked for; float targets are divided as one class. The parts depend on
    the labels, the fractions and ``seed`` alone; within a part the images keep their order.

    Raises ArgumentError for fractions that are not positive or do not sum to 1, DataError for an empty part.
    """
    shares = [float(fraction) for fraction in fractions]
    if not shares or not all(share > 0 for share in shares) or not abs(sum(shares) - 1.0) <= 1e-6:
        raise ArgumentError(f"split fractions must be positive and sum to 1, got {list(fractions)}")
    if dataset.labels.dtype.kind == "f":
        groups = [numpy.arange(len(dataset))]
    else:
        groups = [numpy.flatnonzero(dataset.labels == label) for label in numpy.unique(dataset.labels)]
    limits = numpy.cumsum(shares)[:-1]
    parts: list[list[NDArray[numpy.int64]]] = [[] for _ in shares]
    divided, given = 0, numpy.zeros(len(limits))
    for stream, members in enumerate(groups):
        shuffled = members[permutation(seed, _SPLIT_STREAM | stream, len(members))]
        # Each class makes up for how the ones before it were rounded; so small classes do not leave a part empty.
        divided += len(members)
        wanted = numpy.floor(limits * divided + 0.5) - given
        cuts = numpy.maximum.accumulate(numpy.clip(wanted, 0, len(members))).astype(int)
        given += cuts
        for part, chosen in zip(parts, numpy.split(shuffled, cuts), strict=True):
            part.append(chosen)
    subsets = []
    for share, part in zip(shares, parts, strict=True):
        indices = numpy.sort(numpy.concatenate(part))
        if len(indices) == 0:
            raise DataError(
                f"'{dataset.name}' has {len(dataset)} images, too few for a part of {share:.3g} of them; "
                "use a larger fraction or more images"
            )
        subsets.append(Subset(dataset, indices))
    return subsets


def checked_labels(
    labels: ArrayLike, count: int, classes: Sequence[str] | None
) -> tuple[NDArray[numpy.int64], list[str]]:
    """``labels`` as int64 and the class names, checked against each other and against ``count`` images."""
    given = _as_array(labels, "labels")
    if given.dtype.kind not in "iu":
        raise DtypeError(
            f"labels must be integers from 0 to the number of classes - 1, got {given.dtype}; "
            "turn class names into numbers with numpy.unique(names, return_inverse=True)"
        )
    if given.ndim != 1:
        raise ShapeError(
            f"labels must be one-dimensional, one number an image, got shape {given.shape}; "
            "turn one-hot rows into numbers with labels.argmax(axis=1)"
        )
    if len(given) != count:
        raise ShapeError(f"{count} images but {len(given)} labels; each image needs one")
    # Plain str: names from numpy.unique are NumPy's.
    names = [str(name) for name in (range(int(given.max()) + 1) if classes is None else classes)]
    outside = numpy.flatnonzero((given < 0) | (given >= len(names)))
    if len(outside):
        raise DataError(
            f"label {given[outside[0]]} of image {outside[0]} is out of range: with {len(names)} classes labels "
            f"go from 0 to {len(names) - 1} ({len(outside)} of {count} labels are outside)"
        )
    return given.astype(numpy.int64), names


def _as_array(values: ArrayLike, what: str) -> NDArray[Any]:
    try:
        array: NDArray[Any] = to_cpu(values)
    except ValueError as error:  # nested lists of unequal lengths
        raise ShapeError(f"{what} do not form one array: {error}; all must have the same shape") from None
    return array


def _checked_images(images: ArrayLike) -> NDArray[numpy.uint8]:
    array = _as_array(images, "images")
    if array.dtype.kind not in "iu":
        raise DtypeError(
            f"images must be uint8 with values 0 to 255, got {array.dtype}; scale them "
            "((images * 255).round().astype('uint8') for values from 0 to 1), or pass inputs that are already "
            "normalized to TensorDataset as float32 of shape (count, channels, height, width)"
        )
    if array.ndim not in (3, 4) or 0 in array.shape[1:]:
        raise ShapeError(
            f"images must have shape (count, height, width) or (count, height, width, channels), got {array.shape}"
        )
    if len(array) == 0:
        raise DataError("a data set needs at least one image, got none")
    if array.ndim == 3:
        array = array[..., None]
    elif array.shape[3] > 4 and array.shape[1] in (1, 3, 4):
        raise ShapeError(
            f"images of shape {array.shape} look like (count, channels, height, width); "
            "put the channels last with images.transpose(0, 2, 3, 1)"
        )
    if array.dtype != numpy.uint8:
        low, high = array.min(), array.max()
        if low < 0 or high > 255:
            raise DataError(f"images must have values from 0 to 255, got {low} to {high}; scale them first")
    return array.astype(numpy.uint8, copy=False)
