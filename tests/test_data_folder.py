"""Folders of image files: what is read, how, and what is said of files that cannot be."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import numpy
import pytest

from gpucnn.data import ImageFolder, Loader, Preprocessing, load, read_image
from gpucnn.data.image_files import read_header, read_planes
from gpucnn.errors import ArgumentError, DataError, MissingDependencyError

image_module = pytest.importorskip("PIL.Image")


def gradient(height: int, width: int, channels: int = 3):
    """A smooth picture, which survives JPEG."""
    y, x = numpy.mgrid[0:height, 0:width]
    planes = [255 * y / height, 255 * x / width, 255 * (y + x) / (height + width)]
    return numpy.stack(planes[:channels], axis=-1).astype(numpy.uint8)


def save(path: Path, pixels, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image_module.fromarray(pixels.squeeze()).save(path, **options)
    return path


@pytest.fixture
def pets(tmp_path):
    """Two classes, files of several kinds and sizes, and a few things to overlook."""
    root = tmp_path / "pets"
    for number in range(6):
        save(root / "cat" / f"{number}.png", gradient(20 + number, 30))
        save(root / "dog" / f"{number}.JPG", gradient(30, 20 + number) // 2)
    save(root / "dog" / "a.webp", gradient(16, 16) // 2)
    save(root / "dog" / "b.bmp", gradient(16, 16) // 2)
    (root / "notes.txt").write_text("overlooked")
    (root / "cat" / "Thumbs.db").write_bytes(b"overlooked")
    (root / "cat" / ".hidden.png").write_bytes(b"overlooked")
    (root / ".cache").mkdir()
    (root / "__MACOSX").mkdir()
    return root


def test_classes_are_subfolders(pets):
    dataset = ImageFolder(pets, (16, 12))
    assert dataset.classes == ["cat", "dog"]
    assert dataset.labels.tolist() == [0] * 6 + [1] * 8
    assert [file.name for file in dataset.files[6:]] == [f"{n}.JPG" for n in range(6)] + ["a.webp", "b.bmp"]
    assert dataset.image_shape == (16, 12, 3)
    assert dataset.name == "pets"
    images = dataset.images(range(14))
    assert images.shape == (14, 16, 12, 3)
    assert images.dtype == numpy.uint8
    assert repr(dataset) == "ImageFolder(pets: 14 colour images of 16x12 in 2 classes)"


def test_images_are_scaled_to_fill_and_cut_in_the_middle(tmp_path):
    pixels = gradient(40, 60)
    path = save(tmp_path / "a.png", pixels)
    result = read_image(path, (20, 20, 3)).astype(float)
    middle = pixels[:, 10:50].astype(float).reshape(20, 2, 20, 2, 3).mean(axis=(1, 3))
    assert numpy.abs(result - middle)[1:-1, 1:-1].max() <= 2


def test_images_of_the_right_size_are_untouched(tmp_path):
    pixels = numpy.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=numpy.uint8)
    assert (read_image(save(tmp_path / "a.png", pixels), (9, 7, 3)) == pixels).all()


@pytest.mark.parametrize("size", [(900, 1200), (1200, 900)])
def test_large_jpegs_decoded_small_look_the_same(tmp_path, size):
    pixels = gradient(*size)
    jpeg = read_image(save(tmp_path / "a.jpg", pixels, quality=95), (100, 100, 3)).astype(float)
    png = read_image(save(tmp_path / "a.png", pixels), (100, 100, 3)).astype(float)
    assert numpy.abs(jpeg - png).max() <= 6


def test_jpegs_are_decoded_small_only_where_nothing_is_lost(tmp_path, monkeypatch):
    from PIL.JpegImagePlugin import JpegImageFile

    drafts = []
    draft = JpegImageFile.draft
    monkeypatch.setattr(JpegImageFile, "draft", lambda *given: drafts.append(given) or draft(*given))
    path = save(tmp_path / "a.jpg", gradient(64, 80))
    for size, count in (((64, 64), 0), ((33, 40), 0), ((64, 10), 0), ((32, 40), 1), ((8, 8), 2)):
        read_image(path, (*size, 3))
        assert len(drafts) == count


def test_a_turned_jpeg_is_not_decoded_too_small(tmp_path):
    stripes = numpy.zeros((200, 800, 3), numpy.uint8)
    stripes[::8] = stripes[1::8] = stripes[2::8] = stripes[3::8] = 255
    exif = image_module.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "a.jpg", stripes, exif=exif, quality=95)
    upright = numpy.rot90(stripes, -1)
    result = read_image(path, (100, 200, 3)).astype(int)
    assert numpy.abs(result - upright[350:450]).max() <= 24


def test_a_jpeg_is_turned_as_xmp_says(tmp_path):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    path = save(tmp_path / "a.jpg", gradient(30, 40), xmp=xmp, quality=95)
    with image_module.open(path) as image:
        if "xmp" not in image.info:
            pytest.skip("Pillow before 11 neither writes nor reads it")
    upright = numpy.rot90(gradient(30, 40), -1).astype(int)
    assert numpy.abs(read_image(path, (40, 30, 3)) - upright).max() <= 16


def test_a_file_that_gives_its_bytes_in_parts(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", gradient(9, 7))
    whole, read = read_image(path, (9, 7, 3)), os.read
    monkeypatch.setattr(os, "read", lambda descriptor, count: read(descriptor, min(count, 10)))
    assert (read_image(path, (9, 7, 3)) == whole).all()


@pytest.mark.parametrize("kind", ["jpg", "png"])
@pytest.mark.parametrize(("orientation", "turn"), [(3, 2), (6, -1), (8, 1)])
def test_images_are_turned_as_exif_says(tmp_path, kind, orientation, turn):
    pixels = gradient(300, 400)
    exif = image_module.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"a.{kind}", pixels, exif=exif)
    upright = numpy.rot90(pixels, turn)
    height, width = upright.shape[0] // 10, upright.shape[1] // 10
    result = read_image(path, (height, width, 3)).astype(float)
    expected = upright.astype(float).reshape(height, 10, width, 10, 3).mean(axis=(1, 3))
    assert numpy.abs(result - expected)[1:-1, 1:-1].max() <= 8


def test_colour_to_grey_and_grey_to_colour(tmp_path):
    colour = save(tmp_path / "colour.png", gradient(8, 8))
    grey = save(tmp_path / "grey.png", gradient(8, 8, 1))
    assert read_image(colour, (8, 8, 1)).shape == (8, 8, 1)
    luma = gradient(8, 8).astype(float) @ [0.299, 0.587, 0.114]
    assert numpy.abs(read_image(colour, (8, 8, 1))[..., 0] - luma).max() <= 1
    assert (read_image(grey, (8, 8, 3)) == gradient(8, 8, 1)).all()


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    values = numpy.linspace(0, 65535, 64).astype(numpy.uint16).reshape(8, 8)
    path = save(tmp_path / "deep.png", values)
    assert (read_image(path, (8, 8, 1))[..., 0] == values // 256).all()
    assert read_header(path).grey


def test_transparent_parts_become_white(tmp_path):
    pixels = numpy.zeros((4, 4, 4), numpy.uint8)
    pixels[:2] = (200, 10, 20, 255)
    result = read_image(save(tmp_path / "a.png", pixels), (4, 4, 3))
    assert (result[:2] == (200, 10, 20)).all()
    assert (result[2:] == 255).all()
    palette = image_module.fromarray(gradient(4, 4)).quantize(8)
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((0, 0)))
    assert (read_image(tmp_path / "p.png", (4, 4, 3))[0, 0] == 255).all()


def test_cmyk_jpegs_become_rgb(tmp_path):
    image = image_module.new("CMYK", (8, 8), (0, 255, 255, 0))
    image.save(tmp_path / "a.jpg", quality=95)
    red, green, blue = read_image(tmp_path / "a.jpg", (8, 8, 3))[4, 4].tolist()
    assert red >= 240
    assert max(green, blue) <= 15


def test_a_folder_of_grey_images_has_one_channel(tmp_path):
    for number in range(3):
        save(tmp_path / "a" / f"{number}.png", gradient(8, 8, 1))
    dataset = ImageFolder(tmp_path, (8, 8))
    assert dataset.image_shape == (8, 8, 1)
    assert (dataset.images([0])[0] == gradient(8, 8, 1)).all()


def test_a_grey_image_in_a_colour_set(pets):
    strange = save(pets / "dog" / "grey.png", gradient(8, 8, 1))
    with pytest.raises(
        DataError, match=r"grey\.png is a grey image in a set of colour ones \(1 of 15 are grey\)"
    ) as e:
        ImageFolder(pets)
    assert "--convert-grey" in str(e.value)
    dataset = ImageFolder(pets, (8, 8), convert_grey=True)
    assert (dataset.images([dataset.files.index(strange)])[0] == gradient(8, 8, 1)).all()


def test_colour_among_grey_where_grey_is_expected(tmp_path):
    save(tmp_path / "a" / "1.png", gradient(8, 8))
    with pytest.raises(DataError, match=r"1\.png is a colour image in a set of grey ones"):
        ImageFolder(tmp_path, channels=1)


@pytest.fixture
def decoded(monkeypatch):
    """The names of files as they are decoded."""
    names = []

    def noting(path, planes):
        names.append(path.name)
        read_planes(path, planes)

    monkeypatch.setattr("gpucnn.data.folder.read_planes", noting)
    return names


def test_decoded_images_are_kept(pets, decoded):
    dataset = ImageFolder(pets, (8, 8))
    first = dataset.images([3, 0, 3])
    again = dataset.images([0, 3])
    assert (again == first[[1, 0]]).all()
    assert (first[0] == first[2]).all()
    assert sorted(set(decoded)) == ["0.png", "3.png"]
    everything = dataset.images(range(14))
    assert (everything[[0, 3]] == again).all()
    count = len(decoded)
    assert (dataset.images(range(14)) == everything).all()
    assert len(decoded) == count


def test_the_cache_stays_within_its_budget(pets, decoded):
    dataset = ImageFolder(pets, (8, 8), cache_bytes=5 * 8 * 8 * 3 + 7)
    everything = dataset.images(range(14))
    decoded.clear()
    assert (dataset.images(range(14)) == everything).all()
    assert len(decoded) == 9
    decoded.clear()
    without = ImageFolder(pets, (8, 8), cache_bytes=0)
    assert (without.images(range(14)) == everything).all()
    assert (without.images(range(14)) == everything).all()
    assert len(decoded) == 28


@pytest.mark.parametrize("cache_bytes", [2 << 30, 5 * 8 * 8 * 3])
def test_what_was_given_out_stays_as_it_was(pets, cache_bytes):
    dataset = ImageFolder(pets, (8, 8), cache_bytes=cache_bytes)
    first = dataset.images(range(7))
    copy = first.copy()
    first_again = dataset.images(range(7))
    for _ in range(4):
        dataset.images(range(7, 14))
    assert (first == copy).all()
    first[:] = 0
    assert (first_again == copy).all()
    assert (dataset.images(range(7)) == copy).all()


def test_images_lie_in_planes(pets):
    dataset = ImageFolder(pets, (8, 6))
    for _ in range(2):  # decoded, and from the cache
        assert dataset.images([0, 9]).transpose(0, 3, 1, 2).flags.c_contiguous


def test_threads_share_a_folder(pets):
    expected = ImageFolder(pets, (8, 8)).images(range(14))
    dataset = ImageFolder(pets, (8, 8), cache_bytes=9 * 8 * 8 * 3)
    wrong = []

    def work(seed: int) -> None:
        for _ in range(5):
            order = numpy.random.default_rng(seed).permutation(14)
            if (dataset.images(order) != expected[order]).any():
                wrong.append(seed)

    before = set(threading.enumerate())
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert set(threading.enumerate()) <= before, "threads that decode end with their work"


def test_one_processor_decodes_without_threads(pets, monkeypatch):
    monkeypatch.setattr("gpucnn.data.parallel.cpu_count", lambda: 1)
    assert ImageFolder(pets, (8, 8)).images(range(14)).shape == (14, 8, 8, 3)


def test_processors_are_counted_where_affinity_is_unknown(monkeypatch):
    from gpucnn.data import parallel

    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert parallel.cpu_count() == 1


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_a_truncated_image_is_found_when_it_is_decoded(pets, kind):
    noise = numpy.random.default_rng(1).integers(0, 256, (60, 60, 3), dtype=numpy.uint8)
    bad = truncate(save(pets / "cat" / f"bad.{kind}", noise))
    dataset = ImageFolder(pets, (8, 8))
    loader = Loader(dataset, 4, preprocessing=Preprocessing((8, 8), (0.0,) * 3, (1.0,) * 3))
    with pytest.raises(DataError, match=rf"bad\.{kind} is damaged or cut short .*delete or replace it"):
        list(loader)
    with pytest.raises(DataError, match=rf"1 of 15 images in .*pets: .*bad\.{kind}"):
        dataset.verify()
    bad.unlink()
    ImageFolder(pets, (8, 8)).verify()


def test_verify_names_every_bad_file(pets):
    for name in ("x.png", "y.png"):
        truncate(save(pets / "dog" / name, gradient(50, 50)))
    with pytest.raises(DataError, match=r"2 of 16 images .*x\.png is .*; .*y\.png is "):
        ImageFolder(pets, (8, 8)).verify()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"this is text\r\n" * 50, "is a text file, not an image"),
        (b"", "is empty"),
        (b"\x00\x01\x02" * 99, "is no image in a known format"),
    ],
)
def test_files_that_are_no_images_are_found_at_once(pets, content, words):
    (pets / "cat" / "zzz.png").write_bytes(content)
    with pytest.raises(DataError, match=rf"zzz\.png {words}"):
        ImageFolder(pets)


def test_a_file_that_vanishes(pets):
    dataset = ImageFolder(pets, (8, 8))
    dataset.files[2].unlink()
    with pytest.raises(DataError, match=r"2\.png cannot be read: No such file"):
        dataset.images([2])


@pytest.mark.parametrize("reader", [read_header, lambda path: read_image(path, (8, 8, 3))])
def test_want_of_memory_is_not_the_files_fault(tmp_path, monkeypatch, reader):
    path = save(tmp_path / "a.png", gradient(8, 8))

    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(image_module, "open", no_memory)
    with pytest.raises(MemoryError):
        reader(path)


def test_without_pillow_the_message_says_how_to_get_it(pets, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'gpucnn\[images\]'"):
        ImageFolder(pets)


def test_channels_that_no_file_has(tmp_path):
    with pytest.raises(ArgumentError, match="not 2"):
        read_image(save(tmp_path / "a.png", gradient(8, 8)), (8, 8, 2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": (8,)}, "image_size"),
        ({"image_size": (8, 0)}, "image_size"),
        ({"cache_bytes": -1}, "cache_bytes"),
    ],
)
def test_unfit_options_are_refused(pets, options, words):
    with pytest.raises(ArgumentError, match=words):
        ImageFolder(pets, **options)


def test_folders_without_images(tmp_path, pets, monkeypatch):
    with pytest.raises(DataError, match="missing does not exist"):
        ImageFolder(tmp_path / "missing")
    with pytest.raises(DataError, match="is not a folder"):
        ImageFolder(pets / "notes.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty is empty; put each class's images into a subfolder"):
        ImageFolder(tmp_path / "empty")
    with pytest.raises(DataError, match="has 7 images but no subfolders"):
        ImageFolder(pets / "cat")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a")
    with pytest.raises(DataError, match="has no subfolders"):
        ImageFolder(tmp_path / "text")
    (pets / "owl").mkdir()
    with pytest.raises(DataError, match=r"class 'owl' has no images: .*\.jpg, \.jpeg"):
        ImageFolder(pets)

    (pets / "owl").rmdir()

    def forbidden(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", forbidden)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        ImageFolder(pets)


def test_load_splits_a_folder(pets):
    splits = load(pets, image_size=8, seed=3)
    assert splits.name == "pets"
    assert splits.image_shape == (8, 8, 3)
    assert splits.classes == ["cat", "dog"]
    assert (len(splits.train), len(splits.validation), splits.test) == (11, 3, None)
    same = load("folder", data_dir=pets, image_size=(8, 8), seed=3)
    assert same.validation.labels.tolist() == splits.validation.labels.tolist()
    assert (same.validation.images([0, 1]) == splits.validation.images([0, 1])).all()
    three = load(str(pets), image_size=8, validation_fraction=0.25, test_fraction=0.25)
    assert [len(part) for part in three.parts().values()] == [7, 4, 3]


def test_load_takes_the_folder_from_the_environment(pets, monkeypatch):
    monkeypatch.delenv("GPUCNN_DATA", raising=False)
    with pytest.raises(ArgumentError, match="needs data_dir"):
        load("folder")
    monkeypatch.setenv("GPUCNN_DATA", str(pets))
    assert load("folder", image_size=8).name == "pets"


def test_given_parts_are_recognized(tmp_path):
    for part, count in (("train", 5), ("val", 2), ("test", 3)):
        for kind in ("cat", "dog"):
            for number in range(count):
                save(tmp_path / part / kind / f"{number}.png", gradient(8, 8))
    splits = load(tmp_path, image_size=8)
    assert [len(part) for part in splits.parts().values()] == [10, 4, 6]
    with pytest.raises(ArgumentError, match="validation folder of its own; leave validation_fraction out"):
        load(tmp_path, validation_fraction=0.1)
    with pytest.raises(ArgumentError, match="test folder of its own"):
        load(tmp_path, test_fraction=0.1)
    (tmp_path / "val").rename(tmp_path / "elsewhere")
    # now "elsewhere" makes all three classes, and none of them has images of its own
    with pytest.raises(DataError, match="class 'elsewhere' has no images"):
        load(tmp_path)


def test_given_parts_without_validation(tmp_path):
    for part, kinds in (("train", ("cat", "dog")), ("test", ("dog",))):
        for kind in kinds:
            for number in range(10):
                save(tmp_path / part / kind / f"{number}.png", gradient(8, 8))
    splits = load(tmp_path, image_size=8)
    assert [len(part) for part in splits.parts().values()] == [16, 4, 10]
    assert set(splits.test.labels.tolist()) == {1}
    save(tmp_path / "test" / "owl" / "1.png", gradient(8, 8))
    with pytest.raises(DataError, match="class 'owl' that the training images lack; they have cat, dog"):
        load(tmp_path)


def test_a_grey_image_in_the_validation_part_of_a_colour_set(tmp_path):
    for part in ("train", "val"):
        save(tmp_path / part / "cat" / "1.png", gradient(8, 8))
    save(tmp_path / "val" / "cat" / "2.png", gradient(8, 8, 1))
    with pytest.raises(DataError, match=r"2\.png is a grey image"):
        load(tmp_path, test_fraction=0)


def test_a_path_that_does_not_exist():
    with pytest.raises(DataError, match="does not exist"):
        load("no/such/folder")
    with pytest.raises(DataError, match="does not exist"):
        load(Path("missing"))
