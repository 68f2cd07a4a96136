"""Data sets by name, in their train, validation and test parts."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpucnn.data.dataset import DataSplits, Dataset, Subset, split
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
    """The data set called ``name_or_path``, in parts."""
    name = str(name_or_path)
    loader = _LOADERS.get(name)
    if loader is None:
        nearest = difflib.get_close_matches(name, _LOADERS, 1)
        hint = f"did you mean '{nearest[0]}'? " if nearest else ""
        raise ArgumentError(f"unknown data set '{name}'; {hint}known are {', '.join(_LOADERS)}, or a folder's path")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    return loader(
        _Request(
            data_dir=None if data_dir is None else Path(data_dir).expanduser(),
            image_size=size or (224, 224),
            validation_fraction=validation_fraction,
            test_fraction=test_fraction,
            seed=seed,
            cache_bytes=cache_bytes,
            download=download,
            convert_grey=convert_grey,
        )
    )


def _divide(whole: Dataset, validation: float, test: float, seed: int) -> dict[str, Subset]:
    """``whole`` in its parts; parts with fraction 0 are left out."""
    for option, fraction in (("validation_fraction", validation), ("test_fraction", test)):
        if not 0 <= fraction < 1:
            raise ArgumentError(f"{option} must be from 0 to below 1, got {fraction}")
    if validation + test >= 1:
        raise ArgumentError(
            f"validation_fraction {validation} and test_fraction {test} leave nothing to train on; "
            "they must sum to less than 1"
        )
    fractions = {"train": 1 - validation - test, "validation": validation, "test": test}
    fractions = {part: fraction for part, fraction in fractions.items() if fraction > 0}
    return dict(zip(fractions, split(whole, list(fractions.values()), seed), strict=True))


def _splits(name: str, train: Dataset, validation: Dataset | None, test: Dataset | None) -> DataSplits:
    return DataSplits(name, train, validation, test, train.classes, train.image_shape)


def _value(given: float | None, default: float) -> float:
    return default if given is None else float(given)


def _load_digits(request: _Request) -> DataSplits:
    parts = _divide(
        load_digits(), _value(request.validation_fraction, 0.16), _value(request.test_fraction, 0.20), request.seed
    )
    return _splits("digits", parts["train"], parts.get("validation"), parts.get("test"))


_LOADERS: dict[str, Callable[[_Request], DataSplits]] = {"digits": _load_digits}
