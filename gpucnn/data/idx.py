"""MNIST and sets of its form: images and labels in four IDX files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy
from numpy.typing import NDArray

from gpucnn.data.dataset import ArrayDataset
from gpucnn.data.locations import cache_folder, download, search_folders
from gpucnn.errors import DataError

_FILES = {
    "train images": "train-images-idx3-ubyte",
    "train labels": "train-labels-idx1-ubyte",
    "test images": "t10k-images-idx3-ubyte",
    "test labels": "t10k-labels-idx1-ubyte",
}


@dataclass(frozen=True)
class Source:
    """A published set: the folders where it tends to lie, its addresses, its files' MD5 sums, its classes."""

    subfolders: tuple[str, ...]
    system: tuple[str, ...]
    addresses: tuple[str, ...]
    checksums: dict[str, str]
    classes: tuple[str, ...] | None


SOURCES = {
    "mnist": Source(
        subfolders=("mnist", "MNIST/raw"),
        system=("/usr/share/datasets/mnist",),
        addresses=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        checksums={
            "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
        },
        classes=None,  # from the labels, so that other sets in MNIST's form can be loaded by this name
    ),
    "fashion-mnist": Source(
        subfolders=("fashion-mnist", "FashionMNIST/raw"),
        system=("/usr/share/datasets/fashion-mnist",),  # Debian's package dataset-fashion-mnist
        addresses=(
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        ),
        checksums={
            "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
        },
        classes=(
            "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
            "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
        ),
    ),
}  # fmt: skip


def load_idx(name: str, data_dir: Path | None, may_download: bool) -> tuple[ArrayDataset, ArrayDataset]:
    """(train, test) of the set ``name`` in :data:`SOURCES`: found on this machine, or downloaded to the cache.

    Raises DataError where a file is missing, damaged, or does not fit the others.
    """
    source = SOURCES[name]
    paths = find_idx_files(name, data_dir)
    if paths is None:
        if not may_download:
            raise DataError(
                f"{name} is not on this machine and downloading is off; put {', '.join(_FILES.values())} "
                f"(each may end in .gz) into {cache_folder() / name} or give their folder as data_dir"
            )
        paths = {}
        for part, file_name in _FILES.items():
            paths[part] = cache_folder() / name / f"{file_name}.gz"
            if not paths[part].exists():
                addresses = [f"{address}{file_name}.gz" for address in source.addresses]
                download(addresses, paths[part], source.checksums[file_name])
    classes = source.classes
    parts = []
    for part in ("train", "test"):
        images_path, labels_path = paths[f"{part} images"], paths[f"{part} labels"]
        images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
        if len(images) != len(labels):
            raise DataError(
                f"{images_path} holds {len(images)} images but {labels_path} {len(labels)} labels; "
                "the two are not of the same set"
            )
        dataset = ArrayDataset(images, labels, classes, name)
        classes = tuple(dataset.classes)
        parts.append(dataset)
    if parts[0].image_shape != parts[1].image_shape:
        raise DataError(
            f"{paths['train images']} and {paths['test images']} hold images of different sizes: "
            f"{parts[0].image_shape[:2]} and {parts[1].image_shape[:2]}"
        )
    return parts[0], parts[1]


def find_idx_files(name: str, data_dir: Path | None) -> dict[str, Path] | None:
    """The four files of the set ``name`` on this machine, plain or compressed; None where there are none.

    Raises DataError where the first folder that has any of them lacks others.
    """
    source = SOURCES[name]
    for folder in search_folders(data_dir, source.subfolders, source.system):
        found = {}
        for part, file_name in _FILES.items():
            for form in (file_name, f"{file_name}.gz", file_name.replace("-idx", ".idx")):
                if (folder / form).is_file():
                    found[part] = folder / form
                    break
        if len(found) == len(_FILES):
            return found
        if found and folder.resolve() != (cache_folder() / name).resolve():  # there a download was cut short
            missing = [file_name for part, file_name in _FILES.items() if part not in found]
            raise DataError(f"{folder} has some of {name}'s files but lacks {', '.join(missing)}; add them")
    return None


def read_idx(path: Path, dimensions: int) -> NDArray[numpy.uint8]:
    """The uint8 array in an IDX file (Y. LeCun's format: magic number, sizes, values), plain or gzip-compressed.

    Raises DataError where the magic number is not that of uint8 with ``dimensions`` axes, or the length is wrong.
    """
    import gzip
    import zlib

    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}; delete it and get it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    magic = bytes((0, 0, 8, dimensions))
    if content[:4] != magic:
        raise DataError(
            f"{path} is no IDX file of {dimensions}-dimensional uint8 values: it begins with "
            f"0x{content[:4].hex()}, expected the magic number 0x{magic.hex()}"
        )
    header = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(content[start : start + 4], "big") for start in range(4, header, 4))
    expected = header + math.prod(shape)
    if len(content) < header or len(content) != expected:
        raise DataError(
            f"{path} has the wrong length: {len(content)} bytes, but its header announces {shape}, "
            f"{expected} bytes; it was cut short or is no IDX file"
        )
    return numpy.frombuffer(content, numpy.uint8, offset=header).reshape(shape)
