"""The 1,797 handwritten digits that ship with the package; DIGITS.md says where they are from."""

from __future__ import annotations

from importlib.resources import files

import numpy

from gpucnn.data.dataset import ArrayDataset


def load_digits() -> ArrayDataset:
    """All 1,797 digits, 8x8 grey; the file's values 0 .. 16 become 0 .. 255."""
    with files("gpucnn.data").joinpath("digits.npz").open("rb") as file, numpy.load(file) as arrays:
        sixteenths, labels = arrays["images"], arrays["labels"]
    images = (sixteenths.astype(numpy.uint16) * 255 + 8) // 16
    return ArrayDataset(images, labels, name="digits")
