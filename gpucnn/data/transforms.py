"""From uint8 images to the float32 arrays that a model takes: augment, resize, normalize."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy
from numpy.typing import ArrayLike, NDArray

from gpucnn.data.augmentation import PRESETS, Augmentation, check_fits, parse_augmentation, preset
from gpucnn.data.dataset import Dataset
from gpucnn.data.parallel import in_parallel
from gpucnn.data.recycling import Recycler
from gpucnn.data.resampling import centre_box, resize, rotate
from gpucnn.data.scratch import scratch
from gpucnn.errors import ArgumentError, DtypeError, ShapeError

__all__ = ["PRESETS", "Augmentation", "Preprocessing", "channel_statistics", "parse_augmentation", "preset"]

_GREY = numpy.array([0.299, 0.587, 0.114], numpy.float32)  # luma of ITU-R BT.601
_VALUES_AT_A_TIME = 1 << 18  # a part of the batch that stays in the second-level cache from step to step
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
        recycler: Recycler | None = None,
    ) -> NDArray[Any]:
        """The model's input for ``images``.

        Args:
            images: uint8 (count, height, width, channels).
            augmentation: random changes to make; None makes none.
            seed: with ``epoch`` and an image's number in ``indices`` decides all that is random about it.
            epoch: see ``seed``.
            indices: the images' numbers in their data set; 0, 1, ... without it.
            recycler: where the memory of the result comes from; fresh without it.

        Returns:
            (count, channels, *image_size) of ``dtype``, contiguous.

        Where the images have another aspect ratio than ``image_size``, the largest box in the middle that has it
        is used. Raises DtypeError or ShapeError for other arrays, ArgumentError where augmentation does not fit.
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
        draws = None
        if augmentation:
            check_fits(augmentation, self.image_size)
            draws = augmentation.draw(seed, epoch, numbers)
        shape = (len(images), len(self.mean), *self.image_size)
        out = numpy.empty(shape, numpy.float32) if recycler is None else recycler.empty(shape, numpy.float32)
        step = max(1, _VALUES_AT_A_TIME // out[0].size) if len(out) else 1
        for start in range(0, len(images), step):
            part = slice(start, start + step)
            if augmentation is None or draws is None:
                self._normalize(self._resized(images[part]), out[part])
            else:
                drawn = {name: column[part] for name, column in draws.items()}
                planar = self._change_geometry(images[part], augmentation, drawn)
                self._change_colour_and_normalize(planar, augmentation, drawn, out[part])
                _cut_out(out[part], augmentation.cutout, drawn)
        return out.astype(self.dtype, copy=False)

    def _resized(self, images: NDArray[numpy.uint8]) -> NDArray[Any]:
        source = (images.shape[1], images.shape[2])
        planar = images.transpose(0, 3, 1, 2)
        if source == self.image_size:
            return planar
        top, left, height, width = centre_box(source, self.image_size)
        resized = scratch.get("resized", (*planar.shape[:2], *self.image_size))
        resize(planar[:, :, top : top + height, left : left + width], resized)
        return resized

    def _change_geometry(
        self, images: NDArray[numpy.uint8], augmentation: Augmentation, drawn: dict[str, NDArray[Any]]
    ) -> NDArray[Any]:
        flip = drawn["flip"] < 0.5 if augmentation.horizontal_flip else numpy.zeros(len(images), bool)
        if augmentation.resized_crop is not None:
            planar = scratch.get("cropped", (len(images), len(self.mean), *self.image_size))
            boxes = _crop_boxes(images.shape[1:3], augmentation.resized_crop, drawn)
            for image, box, mirrored, target in zip(images, boxes, flip.tolist(), planar, strict=True):
                top, left, height, width = box
                part = image[top : top + height, left : left + width].transpose(2, 0, 1)
                resize(part[:, :, ::-1] if mirrored else part, target)
        else:
            planar = self._resized(images)
            if flip.any():
                planar = _mirrored(planar, flip)
        if augmentation.rotation and min(self.image_size) > 1:
            planar = rotate(planar, (2 * drawn["rotation"] - 1) * augmentation.rotation)
        if augmentation.shift:
            choices = 2 * augmentation.shift + 1
            down = (drawn["shift_y"] * choices).astype(int) - augmentation.shift
            right = (drawn["shift_x"] * choices).astype(int) - augmentation.shift
            planar = _shifted(planar, down, right)
        return planar

    def _normalize(self, planar: NDArray[Any], out: NDArray[numpy.float32]) -> None:
        factor, offset = self._factor_and_offset
        out[...] = planar  # by itself: a product of bytes and floats converts them in small pieces
        out *= factor[:, None, None]
        out += offset[:, None, None]

    @cached_property
    def _factor_and_offset(self) -> tuple[NDArray[numpy.float32], NDArray[numpy.float32]]:
        std = numpy.array(self.std)
        return (1 / (255 * std)).astype(numpy.float32), (-numpy.array(self.mean) / std).astype(numpy.float32)

    def _change_colour_and_normalize(
        self,
        planar: NDArray[Any],
        augmentation: Augmentation,
        drawn: dict[str, NDArray[Any]],
        out: NDArray[numpy.float32],
    ) -> None:
        """Brightness, contrast, saturation and normalization as one linear map an image.

        With b, c, s the three factors, g a pixel's grey and m the image's mean grey, a value v becomes
        b c s v + b c (1 - s) g + b (1 - c) m; the normalization's factor and offset are folded in.
        """
        if not augmentation.changes_colour:
            self._normalize(planar, out)
            return
        factor, offset = self._factor_and_offset
        colour = planar.shape[1] == 3
        for number, image in enumerate(planar):
            brightness, contrast, saturation = (
                1 + getattr(augmentation, name) * (2 * drawn[name][number] - 1)
                for name in ("brightness", "contrast", "saturation")
            )
            grey, term = scratch.get("grey", self.image_size), scratch.get("coloured", self.image_size)
            if colour:
                numpy.multiply(image[0], _GREY[0], out=grey)
                for channel in (1, 2):
                    grey += numpy.multiply(image[channel], _GREY[channel], out=term)
            else:
                grey[:], saturation = image[0], 1.0
            # Each image's mean by itself: a sum over a batch would depend on who else is in it.
            middle = float(grey.mean(dtype=numpy.float64))
            added = (offset + factor * numpy.float32(brightness * (1 - contrast) * middle)).astype(numpy.float32)
            own = factor * numpy.float32(brightness * contrast * saturation)
            numpy.multiply(image, own[:, None, None], out=out[number])
            out[number] += added[:, None, None]
            if saturation != 1.0:
                grey *= numpy.float32(brightness * contrast * (1 - saturation))
                for channel, target in enumerate(out[number]):
                    target += numpy.multiply(grey, factor[channel], out=term)


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


def _mirrored(planar: NDArray[Any], flip: NDArray[Any]) -> NDArray[Any]:
    """The images, those where ``flip`` is true mirrored left to right."""
    result = scratch.get("mirrored", planar.shape, planar.dtype)
    for image, target, backwards in zip(planar, result, flip.tolist(), strict=True):
        target[:] = image[:, :, ::-1] if backwards else image
    return result


def _shifted(planar: NDArray[Any], down: NDArray[Any], right: NDArray[Any]) -> NDArray[Any]:
    """Each image moved by its ``down`` and ``right`` pixels over zeros."""
    height, width = planar.shape[2:]
    moved = scratch.get("moved", planar.shape, planar.dtype)
    moved[:] = 0
    for image, target, y, x in zip(planar, moved, down.tolist(), right.tolist(), strict=True):
        part = image[:, max(0, -y) : height - max(0, y), max(0, -x) : width - max(0, x)]
        target[:, max(0, y) : height - max(0, -y), max(0, x) : width - max(0, -x)] = part
    return moved


def _cut_out(out: NDArray[numpy.float32], side: int, drawn: dict[str, NDArray[Any]]) -> None:
    """Set a square of each normalized image to 0, which is the mean colour."""
    if not side:
        return
    height, width = out.shape[2:]
    tops = (drawn["cutout_y"] * height).astype(int) - side // 2
    lefts = (drawn["cutout_x"] * width).astype(int) - side // 2
    for image, top, left in zip(out, tops.tolist(), lefts.tolist(), strict=True):
        image[:, max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = 0


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
            values = scratch.get("values", rows.shape)
            values[...] = rows
            result[0] += values.sum(axis=(0, 2)).sum(axis=1, dtype=numpy.float64)
            values *= values
            result[1] += values.sum(axis=(0, 2)).sum(axis=1, dtype=numpy.float64)
    return result
