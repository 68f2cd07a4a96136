"""Small data sets on disk and a way to call the command line, for the tests of the latter."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from gpucnn.cli import main

ROOT = Path(__file__).resolve().parent.parent
IDX_FILES = {"train": "train", "test": "t10k"}


class Answer:
    """What a command said: its exit status, standard output and standard error."""

    def __init__(self, status: int, output: str, errors: str) -> None:
        self.status, self.output, self.errors = status, output, errors


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> Answer:
    """Run a command in this process."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return Answer(status, captured.out, captured.err)


def call_process(folder: Path, *arguments: object, **variables: str) -> subprocess.Popen[str]:
    """Start a command in a process of its own, in ``folder``."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GPUCNN_")}
    return subprocess.Popen(
        [sys.executable, "-m", "gpucnn", *map(str, arguments)],
        cwd=folder,
        env={**inherited, "PYTHONPATH": path, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def striped(count: int, side: int, seed: int) -> tuple[Any, Any]:
    """Grey images of two classes that any network tells apart: bright above, bright below; with noise."""
    generator = numpy.random.default_rng(seed)
    labels = numpy.arange(count) % 2
    images = generator.integers(0, 80, (count, side, side))
    images[labels == 0, : side // 2] += 150
    images[labels == 1, side // 2 :] += 150
    return images.astype(numpy.uint8), labels.astype(numpy.uint8)


def idx_bytes(array: Any) -> bytes:
    """An IDX file: magic number, sizes, values."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, *, train: int = 48, test: int = 16, side: int = 14) -> Path:
    """The four files of a set in MNIST's form."""
    folder.mkdir(parents=True, exist_ok=True)
    for (part, prefix), count in zip(IDX_FILES.items(), (train, test), strict=True):
        images, labels = striped(count, side, seed=len(part))
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return folder


def write_images(
    folder: Path, classes: Sequence[str] = ("above", "below"), count: int = 10, side: int = 40
) -> Path:
    """A folder of colour PNGs, one subfolder a class."""
    images, labels = striped(count * len(classes), side, seed=5)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = folder / classes[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numpy.stack([image, image // 2, image // 3], axis=-1)).save(place / f"{number:03d}.png")
    return folder


SMALL = (
    "--data", "mnist", "--model", "lenet5", "--image-size", "12", "--epochs", "2", "--batch-size", "8",
    "--validation-fraction", "0.25", "--augment", "none", "--lr", "0.01", "--workers", "0", "--output", "run",
)  # fmt: skip
"""A training of a tenth of a second, on :func:`write_idx`'s files in $GPUCNN_DATA, into the folder "run"."""
