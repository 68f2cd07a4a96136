"""From uint8 images to the float32 arrays that a model takes: augment, resize, normalize."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy
from numpy.typing import ArrayLike, NDArray

from gpucnn.data.augmentation import PRESETS, Augmentation, check_fits, parse_augmentation, preset
from gpucnn.data.dataset import Dataset
from gpucnn.data.parallel import in_parallel
from gpucnn.data.resampling import centre_box, tables
from gpucnn.errors import ArgumentError, DtypeError, ShapeError
from gpucnn.ops import backend_of
from gpucnn.ops.cpu.threads import scratch

__all__ = ["PRESETS", "Augmentation", "Preprocessing", "channel_statistics", "parse_augmentation", "preset"]

_VALUES_A_TASK = 1 << 20  # of the statistics: enough to be worth a thread, and few enough to share evenly
_ROWS_EXACT = 256  # see _sums


@dataclass(frozen=True)
class Preprocessing:
    """How images become model inputs: resized to ``image_size``, then (value / 255 - mean) / std a channel.

    Attributes:
        image_size: (height, width) that the model takes.
        mean: one number a channel, in units where 255 is 1.
        std: one number a channel, in the same units.
        dtype: "float32" or "float64": that of the inputs, which must be that of the model. Both hold the same
            numbers, which are worked out in float32.
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "float64"):
            raise ArgumentError(f"dtype must be 'float32' or 'float64', got {self.dtype!r}")
        for name in ("image_size", "mean", "std"):  # lists, as JSON gives them, are welcome
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.image_size) != 2 or not all(isinstance(side, int) and side > 0 for side in self.image_size):
            raise ArgumentError(f"image_size must be (height, width), both positive, got {self.image_size}")
        if not self.mean or len(self.mean) != len(self.std):
            raise ArgumentError(f"mean and std need one number a channel each, got {self.mean} and {self.std}")
        if not all(numpy.isfinite(self.mean)) or not all(0 < value < numpy.inf for value in self.std):
            raise ArgumentError(f"mean must be finite and std positive, got {self.mean} and {self.std}")

    def to_dict(self) -> dict[str, Any]:
        """What ``Preprocessing(**...)`` makes this again from; JSON can hold it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def for_dataset(
        cls, dataset: Dataset, image_size: tuple[int, int] | None = None, dtype: str = "float32"
    ) -> Preprocessing:
        """Normalization by ``dataset``'s own mean and standard deviation; its image size unless one is given."""
        mean, std = channel_statistics(dataset)
        return cls(image_size or dataset.image_shape[:2], mean, std, dtype)

    def apply(
        self,
        images: NDArray[numpy.uint8],
        augmentation: Augmentation | None = None,
        *,
        seed: int = 0,
        epoch: int = 0,
        indices: ArrayLike | None = None,
    ) -> NDArray[Any]:
        """The model's input for ``images``.

        Args:
            images: uint8 (count, height, width, channels).
            augmentation: random changes to make; None makes none.
            seed: with ``epoch`` and an image's number in ``indices`` decides all that is random about it.
            epoch: see ``seed``.
            indices: the images' numbers in their data set; 0, 1, ... without it.

        Returns:
            (count, channels, *image_size) of ``dtype``, contiguous.

        Where the images have another aspect ratio than ``image_size``, the largest box in the middle that has it
        is used. Raises DtypeError or ShapeError for other arrays, ArgumentError where augmentation does not fit.
        """
        changes = self.changes(images, augmentation, seed=seed, epoch=epoch, indices=indices)
        inputs: NDArray[Any] = backend_of(images).augment_images(
            images, mean=self.mean, std=self.std, dtype=self.dtype, **changes
        )
        return inputs

    def changes(
        self,
        images: NDArray[numpy.uint8],
        augmentation: Augmentation | None = None,
        *,
        seed: int = 0,
        epoch: int = 0,
        indices: ArrayLike | None = None,
    ) -> dict[str, Any]:
        """What each of ``images`` is to go through, as the arguments of ``augment_images`` beside mean and std.

        Arrays of NumPy, pairs of them, and numbers; the arguments and errors are those of :meth:`apply`.
        """
        if not isinstance(images, numpy.ndarray) or images.dtype != numpy.uint8:
            kind = getattr(images, "dtype", type(images).__name__)
            raise DtypeError(f"images to preprocess must be a uint8 array, got {kind}")
        if images.ndim != 4 or images.shape[3] != len(self.mean) or 0 in images.shape[1:]:
            raise ShapeError(
                f"images to preprocess must have shape (count, height, width, {len(self.mean)}), one channel for "
                f"each mean, got {images.shape}"
            )
        numbers = numpy.arange(len(images)) if indices is None else numpy.asarray(indices)
        if numbers.shape != (len(images),):
            raise ShapeError(f"{len(images)} images need as many indices, got shape {numbers.shape}")
        source = (images.shape[1], images.shape[2])
        if not augmentation:
            return _resizing([centre_box(source, self.image_size)], source, self.image_size)
        check_fits(augmentation, self.image_size)
        drawn = augmentation.draw(seed, epoch, numbers)
        boxes = [centre_box(source, self.image_size)]
        if augmentation.resized_crop is not None:
            boxes = _crop_boxes(source, augmentation.resized_crop, drawn)
        return _resizing(boxes, source, self.image_size) | _drawn_changes(augmentation, drawn, self.image_size)


def _resizing(
    boxes: Sequence[tuple[int, int, int, int]], source: tuple[int, int], target: tuple[int, int]
) -> dict[str, Any]:
    """``rows`` and ``columns``: from each image's box, or one for all of them, (top, left, height, width)."""
    changes: dict[str, Any] = {}
    for name, axis in (("rows", 0), ("columns", 1)):
        starts, lengths = [box[axis] for box in boxes], [box[2 + axis] for box in boxes]
        if source[axis] != target[axis] or any(length != target[axis] for length in lengths):
            changes[name] = tables(starts, lengths, target[axis])
    return changes


def _drawn_changes(
    augmentation: Augmentation, drawn: dict[str, NDArray[Any]], size: tuple[int, int]
) -> dict[str, Any]:
    """All other changes that ``augmentation`` makes, from what each image has drawn."""
    changes: dict[str, Any] = {}
    if augmentation.horizontal_flip:
        changes["flip"] = drawn["flip"] < 0.5
    if augmentation.rotation and min(size) > 1:
        angles = numpy.deg2rad((2 * drawn["rotation"] - 1) * augmentation.rotation).astype(numpy.float32)
        changes["rotation"] = numpy.stack([numpy.cos(angles), numpy.sin(angles)], axis=1)
    if augmentation.shift:
        moves = numpy.stack([drawn["shift_y"], drawn["shift_x"]], axis=1) * (2 * augmentation.shift + 1)
        changes["shift"] = moves.astype(numpy.int32) - numpy.int32(augmentation.shift)
    if augmentation.changes_colour:
        factors = [
            1 + getattr(augmentation, name) * (2 * drawn[name] - 1)
            for name in ("brightness", "contrast", "saturation")
        ]
        changes["colour"] = numpy.stack(factors, axis=1)
    if side := augmentation.cutout:
        centres = numpy.stack([drawn["cutout_y"] * size[0], drawn["cutout_x"] * size[1]], axis=1)
        changes["cutout"] = centres.astype(numpy.int32) - numpy.int32(side // 2)
        changes["cutout_size"] = side
    return changes


def _crop_boxes(
    source: Sequence[int], least_share: float, drawn: dict[str, NDArray[Any]]
) -> list[tuple[int, int, int, int]]:
    """(top, left, height, width) of each image's random box: area uniform, aspect ratio log-uniform in 3/4 .. 4/3.

    A side that would be longer than the image's is cut to it.
    """
    height, width = source
    area = height * width * (least_share + (1 - least_share) * drawn["crop_area"])
    ratio = numpy.exp(numpy.log(4 / 3) * (2 * drawn["crop_ratio"] - 1))
    box_width = numpy.clip(numpy.rint(numpy.sqrt(area * ratio)), 1, width).astype(int)
    box_height = numpy.clip(numpy.rint(numpy.sqrt(area / ratio)), 1, height).astype(int)
    top = (drawn["crop_y"] * (height - box_height + 1)).astype(int)
    left = (drawn["crop_x"] * (width - box_width + 1)).astype(int)
    return list(zip(top.tolist(), left.tolist(), box_height.tolist(), box_width.tolist(), strict=True))


def channel_statistics(
    dataset: Dataset, maximum_images: int = 5000
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, standard deviation) of each channel over ``dataset``, in units where 255 is 1, for uint8 images.

    From ``maximum_images`` images at even distances where there are more. A channel with one value everywhere gets
    standard deviation 1. Raises DtypeError for data sets whose samples are already preprocessed.
    """
    if dataset.preprocessed:
        raise DtypeError(f"'{dataset.name}' holds preprocessed floats; statistics are taken of uint8 images")
    count = min(len(dataset), maximum_images)
    chosen = numpy.arange(count) * len(dataset) // count
    height, width, channels = dataset.image_shape
    step = max(1, _VALUES_A_TASK // (height * width * channels))
    tasks = [chosen[start : start + step] for start in range(0, count, step)]
    total, squares = numpy.sum(in_parallel(lambda numbers: _sums(dataset.images(numbers)), tasks), axis=0)
    values = count * height * width
    mean = total / values / 255
    std = numpy.sqrt(numpy.maximum(squares / values / 255**2 - mean**2, 0))
    std[std < 1e-6] = 1
    return tuple(mean.tolist()), tuple(std.tolist())


def _sums(images: NDArray[numpy.uint8]) -> NDArray[numpy.float64]:
    """The sum of the values and that of their squares, (2, channels), of images (count, height, width, channels).

    Exact, so nothing depends on the order of the additions: float32 holds every whole number up to 2**24, which
    the squares of 256 bytes stay below, and float64 up to 2**53.
    """
    planar = images.transpose(0, 3, 1, 2)
    count, channels, height, _ = planar.shape
    result = numpy.zeros((2, channels))
    together = max(1, _ROWS_EXACT // height)
    for start in range(0, count, together):
        for top in range(0, height, _ROWS_EXACT):
            rows = planar[start : start + together, :, top : top + _ROWS_EXACT]
            values = scratch("channel values", rows.shape, numpy.float32)
            values[...] = rows
            result[0] += values.sum(axis=(0, 2)).sum(axis=1, dtype=numpy.float64)
            values *= values
            result[1] += values.sum(axis=(0, 2)).sum(axis=1, dtype=numpy.float64)
    return result
