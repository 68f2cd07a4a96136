"""Image files as arrays, by Pillow."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
from numpy.typing import NDArray

from gpucnn.data.resampling import centre_box
from gpucnn.errors import ArgumentError, DataError, MissingDependencyError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

_GREY_MODES = ("1", "L", "LA", "La", "I", "F")
_ORIENTATION = 0x0112  # EXIF: how the camera was held; from 5 on, height and width are exchanged
_EXIF_IN_JPEG = {"exif", "xmp"}  # where Pillow finds the orientation of a JPEG


class Header(NamedTuple):
    """What a file says of its image without being decoded."""

    height: int
    width: int
    grey: bool


def pillow() -> Any:
    """The module PIL.Image; MissingDependencyError where Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise MissingDependencyError(
            "reading image files needs Pillow, which is not installed: pip install 'gpucnn[images]'"
        ) from None
    return Image


def read_header(path: Path) -> Header:
    """Size and kind of the image in ``path``. Raises DataError where the file is no image."""
    image_module = pillow()
    try:
        with image_module.open(path) as image:
            width, height = image.size
            return Header(height, width, _is_grey(image))
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many kinds for files that are not what they seem
        raise _unreadable(path, error) from error


def read_image(path: str | Path, image_shape: tuple[int, int, int]) -> NDArray[numpy.uint8]:
    """The image in ``path`` as uint8 of shape ``image_shape``, (height, width, 1 or 3).

    Turned upright as EXIF says, scaled so that it fills the shape (bilinear, anti-aliased), the middle cut out;
    transparent parts on white; made grey or colour to fit the channels. Raises DataError where the file is
    missing, no image, or damaged, ArgumentError for other numbers of channels.
    """
    image = numpy.empty(image_shape, numpy.uint8)
    read_planes(path, image.transpose(2, 0, 1))
    return image


def read_planes(path: str | Path, planes: NDArray[numpy.uint8]) -> None:
    """Read the image in ``path`` into ``planes``, uint8 (1 or 3, height, width), as :func:`read_image` does.

    The planes are filled when nothing can fail any more.
    """
    channels, height, width = planes.shape
    if channels not in (1, 3):
        raise ArgumentError(f"image files are read with 1 channel (grey) or 3 (colour), not {channels}")
    image_module = pillow()
    mode = "L" if channels == 1 else "RGB"
    try:
        # All of the file is needed, and Pillow asks for a few bytes at a time.
        upright = _load_upright(image_module.open(io.BytesIO(_content(path))), mode, height, width)
        plain = _convert(upright, mode)
        if plain.size != (width, height):
            top, left, box_height, box_width = centre_box((plain.height, plain.width), (height, width))
            box = (left, top, left + box_width, top + box_height)
            plain = plain.resize((width, height), image_module.Resampling.BILINEAR, box=box)
        # Quicker than all bands at once and then apart: Pillow keeps four bytes a pixel.
        bands = [plain.tobytes("raw", band) for band in mode]
    except MemoryError:
        raise
    except Exception as error:  # as above; a file cut short shows only here
        raise _unreadable(Path(path), error) from error
    for plane, band in zip(planes, bands, strict=True):
        plane[...] = numpy.frombuffer(band, numpy.uint8).reshape(height, width)


def _content(path: str | Path) -> bytes:
    """The file's bytes, with as few calls of the system as it takes."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        expected = os.fstat(descriptor).st_size
        content = os.read(descriptor, expected + 1)
        if len(content) != expected:  # longer than 2 GiB, growing, or no plain file
            parts = [content]
            while parts[-1]:
                parts.append(os.read(descriptor, 1 << 20))
            content = b"".join(parts)
        return content
    finally:
        os.close(descriptor)


def _load_upright(image: Any, mode: str, height: int, width: int) -> Image:
    """The image decoded and turned; a JPEG much larger than needed is decoded at 1/2, 1/4 or 1/8 of its size."""
    from PIL import ImageOps

    orientation = 1
    if image.format != "JPEG" or _EXIF_IN_JPEG & image.info.keys():  # looking costs as much as opening the file
        orientation = image.getexif().get(_ORIENTATION, 1)
    if image.format == "JPEG":
        if orientation >= 5:
            height, width = width, height
        scale = min(image.width / width, image.height / height)
        if scale >= 2:
            image.draft(mode, (math.ceil(image.width / scale), math.ceil(image.height / scale)))
    image.load()
    if orientation != 1:
        ImageOps.exif_transpose(image, in_place=True)
    return image  # type: ignore[no-any-return]  # Image.open is typed where Pillow is installed, Any through pillow()


def _convert(image: Any, mode: str) -> Image:
    if image.mode == mode and "transparency" not in image.info:
        return image  # type: ignore[no-any-return]  # as above; convert() would copy it
    image_module = pillow()
    if image.mode == "I" or image.mode.startswith("I;"):  # 16 bits a value, which convert() would clip at 255
        image = image_module.fromarray((numpy.asarray(image) >> 8).clip(0, 255).astype(numpy.uint8))
    elif image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = image_module.alpha_composite(image_module.new("RGBA", image.size, "white"), image)
    return image.convert(mode)  # type: ignore[no-any-return]  # as above


def _is_grey(image: Any) -> bool:
    return image.mode in _GREY_MODES or image.mode.startswith("I;")


def _unreadable(path: Path, error: Exception) -> DataError:
    """A DataError that says what is wrong with the file at ``path``, which made Pillow raise ``error``."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as reason:
        return DataError(f"{path} cannot be read: {reason.strerror}")
    if not start:
        return DataError(f"{path} is empty; delete or replace it")
    if b"\0" not in start and all(byte >= 32 or byte in b"\t\n\r\f" for byte in start):
        return DataError(f"{path} is a text file, not an image; delete or replace it")
    if type(error).__name__ == "UnidentifiedImageError":
        return DataError(f"{path} is no image in a known format; delete or replace it")
    return DataError(f"{path} is damaged or cut short ({error}); delete or replace it")
