"""Data sets by name, in their train, validation and test parts."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from gpucnn.data.dataset import Dataset, DataSplits, Subset, split
from gpucnn.data.digits import load_digits
from gpucnn.errors import ArgumentError


@dataclass(frozen=True)
class _Request:
    """What :func:`load` was asked for."""

    data_dir: Path | None
    image_size: tuple[int, int]
    validation_fraction: float | None
    test_fraction: float | None
    seed: int
    cache_bytes: int
    download: bool
    convert_grey: bool


def load(
    name_or_path: str | Path,
    *,
    data_dir: str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    validation_fraction: float | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
    cache_bytes: int = 2 << 30,
    download: bool = True,
    convert_grey: bool = False,
) -> DataSplits:
    """A data set in its train, validation and test parts.

    Args:
        name_or_path: "digits", "mnist", "fashion-mnist", "cifar10", "folder", or the path of a folder of images.
        data_dir: where the files are. "folder" needs it (or $GPUCNN_DATA); the others look there first, then in
            $GPUCNN_DATA, the user's cache and where the system's packages put them.
        image_size: side, or (height, width), to which a folder's images are scaled and cut, 224 by default. The
            other sets keep their size; Preprocessing resizes where a model takes another.
        validation_fraction: the share of the training images to set apart for validation; 0 for none. By default
            0.16 of digits, a twelfth of mnist and fashion-mnist (5,000 images), 0.1 of cifar10, 0.2 of a folder.
        test_fraction: the same for the test part, of sets that come without one: by default 0.2 of digits, none of
            a folder.
        seed: decides which images go to which part.
        cache_bytes: memory for a folder's decoded images.
        download: whether mnist and fashion-mnist may be downloaded to the user's cache where they are not found.
        convert_grey: take a folder's grey images into a colour set, as colour.

    A folder has one subfolder a class (see :class:`ImageFolder`), or the subfolders train, val (or validation) and
    test, which have those; then they are the parts.

    Raises ArgumentError for an unknown name (with the nearest known one) or fractions that do not fit, DataError
    for missing or damaged files.
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    request = _Request(
        data_dir=None if data_dir is None else Path(data_dir).expanduser(),
        image_size=sides or (224, 224),
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
        seed=seed,
        cache_bytes=cache_bytes,
        download=download,
        convert_grey=convert_grey,
    )
    name = str(name_or_path)
    if name in _LOADERS:
        return _LOADERS[name](request)
    path = Path(name_or_path).expanduser()
    if path.exists() or isinstance(name_or_path, Path) or len(path.parts) > 1:
        return _load_folder(replace(request, data_dir=path))
    nearest = difflib.get_close_matches(name.lower(), NAMES, 1)
    hint = f"did you mean '{nearest[0]}'? " if nearest else ""
    raise ArgumentError(f"unknown data set '{name}'; {hint}known are {', '.join(NAMES)}, or a folder's path")


def _divide(whole: Dataset, request: _Request, validation: float, test: float) -> dict[str, Subset]:
    """``whole`` in its parts, by the request's fractions or these defaults; parts with fraction 0 are left out."""
    validation = _fraction(request.validation_fraction, "validation_fraction", validation)
    test = _fraction(request.test_fraction, "test_fraction", test)
    if validation + test >= 1:
        raise ArgumentError(
            f"validation_fraction {validation} and test_fraction {test} leave nothing to train on; "
            "they must sum to less than 1"
        )
    fractions = {"train": 1 - validation - test, "validation": validation, "test": test}
    fractions = {part: fraction for part, fraction in fractions.items() if fraction > 0}
    return dict(zip(fractions, split(whole, list(fractions.values()), request.seed), strict=True))


def _fraction(given: float | None, option: str, default: float) -> float:
    fraction = default if given is None else float(given)
    if not 0 <= fraction < 1:
        raise ArgumentError(f"{option} must be from 0 to below 1, got {given}")
    return fraction


def _splits(name: str, train: Dataset, validation: Dataset | None, test: Dataset | None) -> DataSplits:
    return DataSplits(name, train, validation, test, train.classes, train.image_shape)


def _load_digits(request: _Request) -> DataSplits:
    parts = _divide(load_digits(), request, validation=0.16, test=0.20)
    return _splits("digits", parts["train"], parts.get("validation"), parts.get("test"))


def _with_own_test(name: str, request: _Request, train: Dataset, test: Dataset, validation: float) -> DataSplits:
    if request.test_fraction is not None:
        raise ArgumentError(f"{name} has a test set of its own; leave test_fraction out")
    parts = _divide(train, request, validation, test=0.0)
    return _splits(name, parts["train"], parts.get("validation"), test)


def _load_mnist(request: _Request, name: str = "mnist") -> DataSplits:
    from gpucnn.data.idx import load_idx

    train, test = load_idx(name, request.data_dir, request.download)
    return _with_own_test(name, request, train, test, validation=1 / 12)


def _load_fashion_mnist(request: _Request) -> DataSplits:
    return _load_mnist(request, "fashion-mnist")


def _load_cifar10(request: _Request) -> DataSplits:
    from gpucnn.data.cifar10 import load_cifar10

    train, test = load_cifar10(request.data_dir)
    return _with_own_test("cifar10", request, train, test, validation=0.1)


_PART_FOLDERS = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}


def _load_folder(request: _Request) -> DataSplits:
    from gpucnn.data.folder import ImageFolder, subfolders

    root = request.data_dir
    if root is None:
        if not (given := os.environ.get("GPUCNN_DATA")):
            raise ArgumentError("data set 'folder' needs data_dir (--data-dir), the folder with the images")
        root = Path(given).expanduser()
    name = root.resolve().name

    def image_folder(path: Path, train: ImageFolder | None = None) -> ImageFolder:
        return ImageFolder(
            path,
            request.image_size,
            classes=None if train is None else train.classes,
            channels=None if train is None else train.image_shape[2],
            cache_bytes=request.cache_bytes,
            convert_grey=request.convert_grey,
            name=name,
        )

    folders = subfolders(root)
    by_part = {_PART_FOLDERS[folder.name]: folder for folder in folders if folder.name in _PART_FOLDERS}
    if "train" not in by_part or len(by_part) < len(folders):  # then they are classes
        parts = _divide(image_folder(root), request, validation=0.2, test=0.0)
        return _splits(name, parts["train"], parts.get("validation"), parts.get("test"))
    for part, given_fraction in (("validation", request.validation_fraction), ("test", request.test_fraction)):
        if part in by_part and given_fraction is not None:
            raise ArgumentError(f"{root} has a {part} folder of its own; leave {part}_fraction out")
    whole = image_folder(by_part["train"])
    given_parts = {part: image_folder(folder, whole) for part, folder in by_part.items() if part != "train"}
    parts = _divide(whole, request, validation=0.0 if "validation" in given_parts else 0.2, test=0.0)
    return _splits(
        name,
        parts["train"],
        given_parts.get("validation", parts.get("validation")),
        given_parts.get("test", parts.get("test")),
    )


_LOADERS: dict[str, Callable[[_Request], DataSplits]] = {
    "digits": _load_digits,
    "mnist": _load_mnist,
    "fashion-mnist": _load_fashion_mnist,
    "cifar10": _load_cifar10,
    "folder": _load_folder,
}
NAMES = tuple(_LOADERS)
"""The names that :func:`load` knows."""
