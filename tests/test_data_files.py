"""Published sets in files: IDX and CIFAR-10, where they are looked for, and how they are downloaded."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest

from gpucnn.data import NAMES, load
from gpucnn.data import idx as idx_module
from gpucnn.data.cifar10 import CLASSES
from gpucnn.data.idx import read_idx
from gpucnn.data.locations import cache_folder, download
from gpucnn.errors import ArgumentError, DataError, StorageError

IDX_NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


@pytest.fixture(autouse=True)
def nothing_on_this_machine(monkeypatch, tmp_path):
    """No data set of the machine's owner is found, nor anything written there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GPUCNN_DATA", raising=False)
    unpublished = {name: replace(source, system=(), addresses=()) for name, source in idx_module.SOURCES.items()}
    monkeypatch.setattr(idx_module, "SOURCES", unpublished)


def idx_bytes(values) -> bytes:
    header = bytes((0, 0, 8, values.ndim)) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return header + values.astype(numpy.uint8).tobytes()


def write_idx(folder: Path, compress: bool = False, train: int = 48, test: int = 20, classes: int = 4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", train), ("test", test)):
        images = numpy.arange(count * 30).reshape(count, 6, 5) % 256
        for name, values in zip(IDX_NAMES[part], (images, numpy.arange(count) % classes), strict=True):
            content = idx_bytes(values)
            path = folder / (f"{name}.gz" if compress else name)
            path.write_bytes(gzip.compress(content) if compress else content)
    return folder


@pytest.mark.parametrize("compress", [False, True])
def test_mnist_style_files(tmp_path, compress):
    splits = load("mnist", data_dir=write_idx(tmp_path / "data", compress))
    assert splits.name == "mnist"
    assert splits.image_shape == (6, 5, 1)
    assert splits.classes == ["0", "1", "2", "3"]
    assert [len(part) for part in splits.parts().values()] == [44, 4, 20]
    assert splits.test.images([1])[0, ..., 0].tolist() == numpy.arange(30, 60).reshape(6, 5).tolist()
    assert splits.test.labels[:5].tolist() == [0, 1, 2, 3, 0]
    whole = load("mnist", data_dir=str(tmp_path / "data"), validation_fraction=0)
    assert whole.validation is None
    assert len(whole.train) == 48


def test_fashion_mnist_has_names(tmp_path):
    splits = load("fashion-mnist", data_dir=write_idx(tmp_path / "data" / "fashion-mnist", classes=10).parent)
    assert splits.classes[0] == "T-shirt/top"
    assert splits.classes[9] == "Ankle boot"


def test_labels_out_of_range(tmp_path):
    with pytest.raises(DataError, match="label 10 of image 10 is out of range: with 10 classes"):
        load("fashion-mnist", data_dir=write_idx(tmp_path / "data", classes=12))


def test_places_are_searched_in_order(tmp_path, monkeypatch):
    def count(**options) -> int:
        return len(load("mnist", validation_fraction=0, download=False, **options).train)

    system = write_idx(tmp_path / "system", train=41)
    monkeypatch.setitem(idx_module.SOURCES, "mnist", replace(idx_module.SOURCES["mnist"], system=(str(system),)))
    assert count() == 41
    write_idx(tmp_path / "cache" / "gpucnn" / "mnist", train=42)
    assert count() == 42
    monkeypatch.setenv(
        "GPUCNN_DATA", str(write_idx(tmp_path / "environment" / "MNIST" / "raw", train=43).parents[1])
    )
    assert count() == 43
    assert count(data_dir=write_idx(tmp_path / "given", train=44)) == 44
    (tmp_path / "without").mkdir()
    assert count(data_dir=tmp_path / "without") == 43


def test_other_spelling_of_the_names(tmp_path):
    write_idx(tmp_path / "data")
    for names in IDX_NAMES.values():
        for name in names:
            (tmp_path / "data" / name).rename(tmp_path / "data" / name.replace("-idx", ".idx"))
    assert len(load("mnist", data_dir=tmp_path / "data").test) == 20


def test_a_missing_data_folder(tmp_path):
    with pytest.raises(DataError, match="missing does not exist"):
        load("mnist", data_dir=tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is not a folder"):
        load("cifar10", data_dir=tmp_path / "file")


def test_a_missing_file(tmp_path):
    write_idx(tmp_path / "data")
    (tmp_path / "data" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"has some of mnist's files but lacks t10k-labels-idx1-ubyte; add them"):
        load("mnist", data_dir=tmp_path / "data")


def test_downloading_is_off(tmp_path):
    with pytest.raises(
        DataError, match="fashion-mnist is not on this machine and downloading is off; put train-im"
    ):
        load("fashion-mnist", download=False)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: b"\0\0\x08\x01" + content[4:], "0x00000801, expected the magic number 0x00000803"),
        (lambda content: b"\x89PNG" + content[4:], "0x89504e47"),
        (lambda content: content[:-1], r"wrong length: 1455 bytes, .* \(48, 6, 5\), 1456 bytes"),
        (lambda content: content + b"x", "wrong length: 1457 bytes"),
        (lambda content: content[:9], "wrong length: 9 bytes"),
        (lambda content: b"", "it begins with 0x,"),
        (lambda content: gzip.compress(content)[:-20], "is damaged: .*; delete it and get it again"),
        (lambda content: gzip.compress(content)[:12] + b"\xff" * 50, "is damaged"),
        (lambda content: b"\x1f\x8bno", "is damaged"),
    ],
)
def test_damaged_idx_files(tmp_path, damage, words):
    path = write_idx(tmp_path / "data") / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=words) as caught:
        load("mnist", data_dir=tmp_path / "data")
    assert str(path) in str(caught.value)


def test_idx_files_that_do_not_fit_each_other(tmp_path):
    folder = write_idx(tmp_path / "data")
    labels = folder / "train-labels-idx1-ubyte"
    labels.write_bytes(idx_bytes(numpy.zeros(40)))
    with pytest.raises(DataError, match=r"holds 48 images but .* 40 labels; the two are not of the same set"):
        load("mnist", data_dir=folder)
    write_idx(folder)
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(numpy.zeros((20, 7, 5))))
    with pytest.raises(DataError, match=r"different sizes: \(6, 5\) and \(7, 5\)"):
        load("mnist", data_dir=folder)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read: Is a directory|Permission denied"):
        read_idx(tmp_path, 1)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A "server" with mnist's files, and their checksums in the table."""
    server = write_idx(tmp_path / "server", compress=True)
    checksums = {path.stem: hashlib.md5(path.read_bytes()).hexdigest() for path in server.iterdir()}
    addresses = ((tmp_path / "nowhere").as_uri() + "/", server.as_uri() + "/")
    source = replace(idx_module.SOURCES["mnist"], addresses=addresses, checksums=checksums)
    monkeypatch.setitem(idx_module.SOURCES, "mnist", source)
    return server


def test_missing_files_are_downloaded_once(published, capsys):
    assert len(load("mnist").test) == 20
    said = capsys.readouterr().err
    assert said.count("gpucnn: downloading") == 8  # each first from the address that fails
    assert "train-images-idx3-ubyte.gz to" in said
    assert sorted(path.name for path in (cache_folder() / "mnist").iterdir()) == sorted(os.listdir(published))
    assert len(load("mnist", download=False).test) == 20
    assert capsys.readouterr().err == ""


def test_an_interrupted_download_is_completed(published, capsys):
    load("mnist")
    (cache_folder() / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    capsys.readouterr()
    assert len(load("mnist").test) == 20
    assert capsys.readouterr().err.count("gpucnn: downloading") == 2


def test_a_wrong_checksum_leaves_nothing(published):
    (published / "train-images-idx3-ubyte.gz").write_bytes(b"something else")
    with pytest.raises(DataError, match=r"cannot download .*not the published file \(MD5 .* put it into .*mnist"):
        load("mnist")
    assert list((cache_folder() / "mnist").iterdir()) == []


def test_a_failing_download_says_where_the_file_may_be_put(tmp_path):
    target = tmp_path / "into" / "file.gz"
    with pytest.raises(DataError, match=r"cannot download file\.gz .*No such file.*get the file by other means"):
        download([(tmp_path / "missing").as_uri()], target, "0" * 32)


def test_a_download_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "source").write_bytes(b"content")
    checksum = hashlib.md5(b"content").hexdigest()
    (tmp_path / "blocked").touch()
    with pytest.raises(StorageError, match="cannot make the folder"):
        download([(tmp_path / "source").as_uri()], tmp_path / "blocked" / "below" / "file", checksum)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device; make room"):
        download([(tmp_path / "source").as_uri()], tmp_path / "into" / "file", checksum)
    assert list((tmp_path / "into").iterdir()) == []


def test_the_cache_is_where_the_platform_keeps_such(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache" / "gpucnn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == Path("/home/me/.cache/gpucnn")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == Path("/home/me/Library/Caches/gpucnn")
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    assert cache_folder() == Path("/home/me/AppData/Local/gpucnn/cache")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert cache_folder() == Path("/local/gpucnn/cache")


def cifar_batches(count: int = 20):
    """(file name, planes (count, 3072), labels) of the six batches."""
    generator = numpy.random.default_rng(0)
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        yield name, generator.integers(0, 256, (count, 3072), dtype=numpy.uint8), numpy.arange(count) % 10


def write_cifar(folder: Path, binary: bool, protocol: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, planes, labels in cifar_batches():
        if binary:
            records = numpy.concatenate([labels[:, None].astype(numpy.uint8), planes], axis=1)
            (folder / f"{name}.bin").write_bytes(records.tobytes())
        else:
            batch = {b"data": planes, b"labels": labels.tolist(), b"batch_label": b"one"}
            (folder / name).write_bytes(pickle.dumps(batch, protocol))
    return folder


@pytest.mark.parametrize(
    ("subfolder", "binary", "protocol"),
    [("cifar-10-batches-bin", True, 0), ("cifar-10-batches-py", False, 2), ("", False, 4), ("cifar10", True, 0)],
)
def test_cifar10_in_both_versions(tmp_path, subfolder, binary, protocol):
    write_cifar(tmp_path / "data" / subfolder, binary, protocol)
    splits = load("cifar10", data_dir=tmp_path / "data", validation_fraction=0)
    assert splits.classes == CLASSES
    assert splits.image_shape == (32, 32, 3)
    assert (len(splits.train), len(splits.test)) == (100, 20)
    expected = {name: planes for name, planes, _ in cifar_batches()}
    image = splits.train.images([25])[0]
    for channel in range(3):
        plane = expected["data_batch_2"][5, 1024 * channel : 1024 * (channel + 1)].reshape(32, 32)
        assert (image[..., channel] == plane).all()
    assert splits.train.labels[20:25].tolist() == [0, 1, 2, 3, 4]
    assert len(load("cifar10", data_dir=tmp_path / "data").validation) == 10


def test_cifar10_missing(tmp_path):
    with pytest.raises(DataError, match=r"not on this machine; get .*cifar\.html, unpack it into .*cache"):
        load("cifar10")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar-10-binary.tar.gz").touch()
    with pytest.raises(DataError, match=r"unpack it first with tar -xzf .*cifar-10-binary\.tar\.gz"):
        load("cifar10", data_dir=tmp_path / "data")
    (write_cifar(tmp_path / "some", True) / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"lacks data_batch_3\.bin"):
        load("cifar10", data_dir=tmp_path / "some")


@pytest.mark.parametrize("content", [b"", b"x" * 3074])
def test_cifar10_binary_of_the_wrong_length(tmp_path, content):
    folder = write_cifar(tmp_path / "data", True)
    (folder / "data_batch_2.bin").write_bytes(content)
    with pytest.raises(DataError, match=rf"data_batch_2\.bin has the wrong length: {len(content)} bytes"):
        load("cifar10", data_dir=folder)


def pickled(**batch) -> bytes:
    return pickle.dumps({key.encode(): value for key, value in batch.items()}, 2)


class Mischief:
    def __reduce__(self):
        return os.getcwd, ()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no pickle", "is no CIFAR-10 file, or damaged"),
        (pickled(labels=[1]), "is no CIFAR-10 file, or damaged .*KeyError"),
        (pickled(data=numpy.zeros((2, 3072)), labels=[0, 1]), r"holds float64 data of shape \(2, 3072\)"),
        (pickled(data=numpy.zeros((2, 30), numpy.uint8), labels=[0, 1]), r"shape \(2, 30\)"),
        (pickled(data=numpy.zeros((2, 3072), numpy.uint8), labels=[0]), r"2 images but labels of shape \(1,\)"),
        (pickle.dumps(Mischief(), 2), r"asks for posix\.getcwd|asks for nt\.getcwd"),
        (pickle.dumps(io.BytesIO, 2), r"asks for _?io\.BytesIO, which no CIFAR-10 file does; do not trust it"),
    ],
)
def test_python_files_that_are_not_cifar10(tmp_path, content, words):
    folder = write_cifar(tmp_path / "data", False)
    (folder / "data_batch_4").write_bytes(content)
    with pytest.raises(DataError, match=words):
        load("cifar10", data_dir=folder)


def test_a_cifar10_file_that_cannot_be_read(tmp_path, monkeypatch):
    folder = write_cifar(tmp_path / "data", True)

    def forbidden(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(DataError, match=r"data_batch_1\.bin cannot be read: Permission denied"):
        load("cifar10", data_dir=folder)


def test_digits():
    splits = load("digits")
    assert [len(part) for part in splits.parts().values()] == [1150, 288, 359]
    assert splits.image_shape == (8, 8, 1)
    assert splits.classes == [str(number) for number in range(10)]
    images = numpy.concatenate([part.images(range(len(part))) for part in splits.parts().values()])
    labels = numpy.concatenate([part.labels for part in splits.parts().values()])
    assert numpy.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (images.min(), images.max()) == (0, 255)
    assert len(numpy.unique(images)) == 17
    whole = load("digits", validation_fraction=0, test_fraction=0)
    assert len(whole.train) == 1797
    first = [[0, 0, 5, 13, 9, 1, 0, 0], [0, 0, 13, 15, 10, 15, 5, 0]]  # the file's first rows, in sixteenths
    scaled = [[round(value * 255 / 16) for value in row] for row in first]
    assert whole.train.images([0])[0, :2, :, 0].tolist() == scaled
    assert load("digits", seed=1).test.indices.tolist() != splits.test.indices.tolist()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("digit", "unknown data set 'digit'; did you mean 'digits'"),
        ("Fashion_MNIST", "did you mean 'fashion-mnist'"),
        ("qqq", f"unknown data set 'qqq'; known are {', '.join(NAMES)}, or a folder's path"),
    ],
)
def test_unknown_names(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=words):
        load(name)


def test_fractions_that_do_not_fit(tmp_path):
    with pytest.raises(ArgumentError, match=r"validation_fraction must be from 0 to below 1, got 1\.5"):
        load("digits", validation_fraction=1.5)
    with pytest.raises(ArgumentError, match="test_fraction must be"):
        load("digits", test_fraction=-0.1)
    with pytest.raises(ArgumentError, match="leave nothing to train on"):
        load("digits", validation_fraction=0.5, test_fraction=0.5)
    with pytest.raises(ArgumentError, match="mnist has a test set of its own; leave test_fraction out"):
        load("mnist", data_dir=write_idx(tmp_path / "data"), test_fraction=0.2)


def test_importing_data_imports_numpy_alone():
    import subprocess

    program = (
        "import sys, gpucnn.data; "
        "heavy = {'PIL', 'concurrent.futures', 'urllib.request', 'gzip', 'pickle5', 'http'} & set(sys.modules); "
        "print(sorted(heavy))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
    assert result.stdout.strip() == "[]"
