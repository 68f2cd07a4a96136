"""A folder of images as a data set: one subfolder a class."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy
from numpy.typing import ArrayLike, NDArray

from gpucnn.data.dataset import Dataset
from gpucnn.data.image_files import SUFFIXES, read_header, read_planes
from gpucnn.data.parallel import in_parallel
from gpucnn.errors import ArgumentError, DataError, GpucnnError
from gpucnn.ops.cpu.threads import scratch
from gpucnn.recycling import memory

_NOT_KEPT, _BEING_KEPT = -1, -2  # in the place of an image's slot in the cache


class ImageFolder(Dataset):
    """The images in the subfolders of a folder; a subfolder's name is its class.

    Every file's header is read at once, so that what is no image shows at the start; the images are decoded, in
    parallel, when they are first asked for. Decoded images stay in memory as long as ``cache_bytes`` allows: first
    come, first kept. In an epoch each image is asked for once, so none is worth replacing by another; those that
    find no room are decoded anew each time.

    Args:
        root: the folder. Files are taken where they end in .jpg, .jpeg, .png, .bmp or .webp.
        image_size: (height, width) that images are scaled and cut to (see :func:`read_image`).
        classes: the subfolders to take, in this order; by default all, sorted. With it, missing ones are left out.
        channels: 1 or 3; by default 3, or 1 where all images are grey.
        cache_bytes: memory for decoded images.
        convert_grey: take grey images into a colour set, as colour; without it they are an error, for they often
            are there by mistake and the network can tell the classes by them.
        name: what to call the data set; by default the folder's name.

    Raises:
        DataError: a folder is missing, has no classes, a class has no images, a file is no image, or grey and
            colour images are mixed.
        MissingDependencyError: Pillow is not installed.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: tuple[int, int] = (224, 224),
        *,
        classes: Sequence[str] | None = None,
        channels: int | None = None,
        cache_bytes: int = 2 << 30,
        convert_grey: bool = False,
        name: str | None = None,
    ) -> None:
        if len(image_size) != 2 or not all(isinstance(side, int) and side > 0 for side in image_size):
            raise ArgumentError(f"image_size must be (height, width), both positive, got {image_size}")
        if cache_bytes < 0:
            raise ArgumentError(f"cache_bytes must be 0 or more, got {cache_bytes}")
        self.root = Path(root)
        self.name = name or self.root.resolve().name
        by_class = _image_files(self.root, classes)
        self.classes = list(by_class) if classes is None else list(classes)
        self.files = [file for files in by_class.values() for file in files]
        numbers = [self.classes.index(kind) for kind in by_class]
        self.labels = numpy.repeat(numbers, [len(files) for files in by_class.values()]).astype(numpy.int64)
        self.image_shape = (*image_size, self._checked_channels(channels, convert_grey))
        room = min(len(self.files), cache_bytes // math.prod(self.image_shape))
        # Planes, as the model's input has them: the bytes of a pixel are brought apart once, not every epoch.
        self._plane_shape = (self.image_shape[2], *image_size)
        # The system gives pages as they are used.
        self._cache = numpy.empty((room, *self._plane_shape), numpy.uint8)
        self._slots = numpy.full(len(self.files), _NOT_KEPT, numpy.int64)
        self._used = 0
        self._lock = threading.Lock()

    def _checked_channels(self, channels: int | None, convert_grey: bool) -> int:
        """Read every file's header, compare grey with colour, and return the number of channels."""
        grey = [header.grey for header in in_parallel(read_header, self.files)]
        if channels is None:
            channels = 1 if all(grey) else 3
        if convert_grey:
            return channels
        strange = [file for file, is_grey in zip(self.files, grey, strict=True) if is_grey == (channels == 3)]
        if strange:
            kinds = ("grey", "colour") if channels == 3 else ("colour", "grey")
            raise DataError(
                f"{strange[0]} is a {kinds[0]} image in a set of {kinds[1]} ones "
                f"({len(strange)} of {len(self.files)} are {kinds[0]}); remove them, or take them as "
                f"{kinds[1]} with convert_grey=True (--convert-grey)"
            )
        return channels

    def images(self, indices: ArrayLike) -> NDArray[numpy.uint8]:
        """The images with these numbers, (len(indices), height, width, channels) uint8; in memory, planes.

        Raises DataError naming the file where one is damaged.
        """
        numbers = numpy.asarray(indices, numpy.int64)
        images = memory.empty((len(numbers), *self._plane_shape), numpy.uint8)
        with self._lock:
            slots = self._slots[numbers]
        if (slots >= 0).all():
            numpy.take(self._cache, slots, axis=0, mode="clip", out=images)
            return images.transpose(0, 2, 3, 1)
        kept = numpy.flatnonzero(slots >= 0)
        images[kept] = self._cache[slots[kept]]  # a slot is never written twice, so no lock is needed to read it

        def decode(position: int) -> None:
            self._decode(int(numbers[position]), images[position])

        in_parallel(decode, numpy.flatnonzero(slots < 0).tolist())
        return images.transpose(0, 2, 3, 1)

    def _decode(self, number: int, planes: NDArray[numpy.uint8]) -> None:
        """Fill ``planes``, (channels, height, width), with the image, and keep it where there is room."""
        read_planes(self.files[number], planes)
        with self._lock:
            if self._slots[number] != _NOT_KEPT or self._used == len(self._cache):
                return
            slot, self._used = self._used, self._used + 1
            self._slots[number] = _BEING_KEPT
        self._cache[slot] = planes  # outside the lock: fresh pages take as long as some decoding
        with self._lock:
            self._slots[number] = slot

    def verify(self) -> None:
        """Decode every image, and name all that are damaged in one DataError."""

        def problem(number: int) -> str | None:
            try:
                self._decode(number, scratch("folder planes", self._plane_shape, numpy.uint8))
            except GpucnnError as error:
                return str(error)
            return None

        undecoded = numpy.flatnonzero(self._slots < 0).tolist()
        problems = [found for found in in_parallel(problem, undecoded) if found is not None]
        if problems:
            raise DataError(f"{len(problems)} of {len(self)} images in {self.root}: {'; '.join(problems)}")


def subfolders(folder: Path) -> list[Path]:
    """The folders in ``folder`` by name, without hidden ones. Raises DataError where it is missing or a file."""
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"image folder {folder} {what}; give a folder with one subfolder of images a class")
    try:
        return sorted(
            entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__"))
        )
    except OSError as error:
        raise DataError(f"image folder {folder} cannot be read: {error.strerror}") from error


def _image_files(root: Path, classes: Sequence[str] | None) -> dict[str, list[Path]]:
    """The image files of each class, sorted by name."""
    found = {folder.name: folder for folder in subfolders(root)}
    if classes is not None:
        if unknown := [name for name in found if name not in classes]:
            raise DataError(
                f"{root} has a class '{unknown[0]}' that the training images lack; they have {', '.join(classes)}"
            )
        found = {name: found[name] for name in classes if name in found}
    if not found:
        loose = [file for file in root.iterdir() if file.suffix.lower() in SUFFIXES]
        state = f"has {len(loose)} images but no subfolders" if loose else "has no subfolders"
        if not any(root.iterdir()):
            state = "is empty"
        raise DataError(f"image folder {root} {state}; put each class's images into a subfolder of its own")
    files = {}
    for name, folder in found.items():
        files[name] = sorted(
            file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != "."
        )
        if not files[name]:
            known = ", ".join(SUFFIXES)
            raise DataError(
                f"class '{name}' has no images: no file in {folder} ends in one of {known}; "
                "add some or remove the folder"
            )
    return files
