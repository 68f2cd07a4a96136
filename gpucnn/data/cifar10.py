"""CIFAR-10, from its binary files or from its Python files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.data.dataset import ArrayDataset
from gpucnn.data.locations import cache_folder, search_folders
from gpucnn.errors import DataError

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

_BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
_SUBFOLDERS = ("cifar10", "cifar-10", "cifar-10-batches-bin", "cifar-10-batches-py")
_PLANE_BYTES = 3 * 32 * 32
_HOME = "https://www.cs.toronto.edu/~kriz/cifar.html"


def load_cifar10(data_dir: Path | None) -> tuple[ArrayDataset, ArrayDataset]:
    """(train, test), from data_dir, $GPUCNN_DATA or the user's cache. Raises DataError: missing, damaged files."""
    folder, suffix = _find(data_dir)
    read = _read_binary if suffix else _read_python
    parts = []
    for names in _BATCHES.values():
        batches = [read(folder / f"{name}{suffix}") for name in names]
        planes = numpy.concatenate([values for values, _ in batches]).reshape(-1, 3, 32, 32)
        labels = numpy.concatenate([labels for _, labels in batches])
        images = numpy.ascontiguousarray(planes.transpose(0, 2, 3, 1))
        parts.append(ArrayDataset(images, labels, CLASSES, "cifar10"))
    return parts[0], parts[1]


def _find(data_dir: Path | None) -> tuple[Path, str]:
    """The folder and the ending of the files' names: ".bin" for the binary version, "" for the Python version."""
    folders = search_folders(data_dir, _SUBFOLDERS)
    names = [name for part in _BATCHES.values() for name in part]
    for folder in folders:
        for suffix in (".bin", ""):
            present = [name for name in names if (folder / f"{name}{suffix}").is_file()]
            if len(present) == len(names):
                return folder, suffix
            if present:
                missing = [f"{name}{suffix}" for name in names if name not in present]
                raise DataError(f"{folder} has some of CIFAR-10's files but lacks {', '.join(missing)}; add them")
    archives = [archive for folder in folders for archive in sorted(folder.glob("cifar-10-*.tar.gz"))]
    if archives:
        raise DataError(f"CIFAR-10 is still packed: unpack it first with tar -xzf {archives[0]}")
    where = data_dir or cache_folder()
    raise DataError(
        f"CIFAR-10 is not on this machine; get the binary or the Python version from {_HOME}, unpack it "
        f"into {where}, or give its folder as data_dir"
    )


def _read_binary(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """Records of one label byte and 3,072 bytes of red, green and blue planes."""
    content = numpy.frombuffer(_content(path), numpy.uint8)
    if content.size == 0 or content.size % (1 + _PLANE_BYTES):
        raise DataError(
            f"{path} has the wrong length: {content.size} bytes, not a multiple of {1 + _PLANE_BYTES}, "
            "the size of one label and image; get it again"
        )
    records = content.reshape(-1, 1 + _PLANE_BYTES)
    return records[:, 1:], records[:, 0]


def _read_python(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """A pickled dictionary with the arrays "data", uint8 (count, 3072), and "labels"."""
    import pickle

    class ArraysOnly(pickle.Unpickler):
        """Makes NumPy arrays and nothing else: a pickle from elsewhere can run any program."""

        def find_class(self, module: str, name: str) -> Any:
            plain = {"ndarray": numpy.ndarray, "dtype": numpy.dtype}
            if module == "numpy" and name in plain:
                return plain[name]
            if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
                return numpy._core.multiarray._reconstruct  # type: ignore[attr-defined]
            if (module, name) == ("_codecs", "encode"):  # how protocol 2 spells bytes
                import codecs

                return codecs.encode
            raise DataError(f"{path} asks for {module}.{name}, which no CIFAR-10 file does; do not trust it")

    content = _content(path)
    try:
        batch = ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        values, labels = numpy.asarray(batch[b"data"]), numpy.asarray(batch[b"labels"])
    except DataError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise DataError(f"{path} is no CIFAR-10 file, or damaged ({type(error).__name__}: {error})") from error
    if values.dtype != numpy.uint8 or values.ndim != 2 or values.shape[1] != _PLANE_BYTES:
        raise DataError(f"{path} holds {values.dtype} data of shape {values.shape}, expected uint8 (count, 3072)")
    if labels.shape != (len(values),):
        raise DataError(f"{path} holds {len(values)} images but labels of shape {labels.shape}")
    return values, labels


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
