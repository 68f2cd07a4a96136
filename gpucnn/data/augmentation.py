"""Which random changes training makes to its images, written as one line of text, and what each sample draws."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from gpucnn.errors import ArgumentError
from gpucnn.random import sample_uniform

_AUGMENTATION_STREAM = 2 << 32  # the epoch is added; shuffling owns 1 << 32 and splitting 3 << 32

DRAWS = (
    "flip", "shift_y", "shift_x", "crop_area", "crop_ratio", "crop_y", "crop_x", "rotation",
    "brightness", "contrast", "saturation", "cutout_y", "cutout_x",
)  # fmt: skip
"""What :meth:`Augmentation.draw` draws. All of it always: switching one change on or off leaves the others'
draws as they were."""

PRESETS = ("none", "light", "standard", "strong")


@dataclass(frozen=True)
class Augmentation:
    """Random changes to training images, in the order in which they are made.

    Attributes:
        resized_crop: the least share of the image's area, in (0, 1], that a random box keeps; its aspect ratio is
            between 3/4 and 4/3, and it is resized to the full image. None: no crop.
        rotation: degrees; each image turns about its centre by an angle from -rotation to rotation. What comes
            into view repeats the nearest pixel of the edge.
        shift: pixels; each image moves by up to this many, up or down and left or right, over black. The same as
            padding by ``shift`` and cropping at random.
        horizontal_flip: mirror one image in two, left to right.
        brightness: factor from 1 - brightness to 1 + brightness on all values.
        contrast: factor from 1 - contrast to 1 + contrast on the distance to the image's mean grey.
        saturation: factor from 1 - saturation to 1 + saturation on the distance of each pixel to its grey; nothing
            happens to grey images. The three do not clip: what leaves 0 .. 255 stays outside.
        cutout: pixels; a square with this side, centred anywhere and cut at the edges, becomes the mean colour
            (DeVries and Taylor, "Improved regularization of convolutional neural networks with Cutout", 2017).
    """

    horizontal_flip: bool = False
    shift: int = 0
    resized_crop: float | None = None
    rotation: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    cutout: int = 0

    def __post_init__(self) -> None:
        for name in ("shift", "cutout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ArgumentError(f"{name} must be a whole number of pixels, 0 or more, got {value!r}")
        if self.resized_crop is not None and not 0 < self.resized_crop <= 1:
            raise ArgumentError(f"resized-crop must be an area share above 0 and up to 1, got {self.resized_crop}")
        if not 0 <= self.rotation <= 180:
            raise ArgumentError(f"rotate must be from 0 to 180 degrees, got {self.rotation}")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ArgumentError(f"{name} must be from 0 to 1, got {getattr(self, name)}")

    def __bool__(self) -> bool:
        return self != Augmentation()

    @property
    def changes_colour(self) -> bool:
        """Whether brightness, contrast or saturation is on."""
        return bool(self.brightness or self.contrast or self.saturation)

    def draw(self, seed: int, epoch: int, indices: NDArray[Any] | Sequence[int]) -> dict[str, NDArray[Any]]:
        """Uniforms in (0, 1) for each of :data:`DRAWS`, one a sample: a function of seed, epoch and index only."""
        columns = sample_uniform(seed, _AUGMENTATION_STREAM | epoch, indices, len(DRAWS))
        return {name: columns[:, number] for number, name in enumerate(DRAWS)}

    def to_text(self) -> str:
        """The text from which :func:`parse_augmentation` makes this again."""
        words = ["flip"] if self.horizontal_flip else []
        colours = {self.brightness, self.contrast, self.saturation}
        together = len(colours) == 1
        for word, name in _WORDS.items():
            value = getattr(self, name)
            if value and not (together and name in _COLOURS):
                words.append(f"{word}={value!r}")
        if together and self.brightness:
            words.append(f"color={self.brightness!r}")
        return ",".join(words) or "none"


_COLOURS = ("brightness", "contrast", "saturation")
_WORDS = {
    "shift": "shift", "resized-crop": "resized_crop", "rotate": "rotation", "brightness": "brightness",
    "contrast": "contrast", "saturation": "saturation", "cutout": "cutout",
}  # fmt: skip
_WHOLE_NUMBERS = ("shift", "cutout")


def preset(name: str, image_shape: tuple[int, int, int]) -> Augmentation:
    """The augmentation called ``name``, sized for images of shape (height, width, channels).

    - none: nothing.
    - light: shift by up to a fourteenth of the side; right for digits and others that must not be mirrored.
    - standard: flip; from 64 pixels on a resized crop of at least 0.35 of the area, below a shift by an eighth.
    - strong: standard, rotation by 10 degrees, colour by 0.3, cutout of a quarter of the side.
    """
    side = min(image_shape[:2])
    if name == "none":
        return Augmentation()
    if name == "light":
        return Augmentation(shift=max(1, side // 14))
    if side >= 64:
        standard = Augmentation(horizontal_flip=True, resized_crop=0.35)
    else:
        standard = Augmentation(horizontal_flip=True, shift=max(1, side // 8))
    if name == "standard":
        return standard
    return replace(standard, rotation=10.0, brightness=0.3, contrast=0.3, saturation=0.3, cutout=max(1, side // 4))


def parse_augmentation(text: str, image_shape: tuple[int, int, int]) -> Augmentation:
    """The augmentation that ``text`` describes for images of shape (height, width, channels).

    ``text`` is a list with commas: at most one of none, light, standard and strong (see :func:`preset`), any of
    flip, shift=PIXELS, resized-crop=SHARE, rotate=DEGREES, color=AMOUNT (all three of brightness=, contrast=,
    saturation=), cutout=PIXELS; what is said later replaces what was said before.

    Raises ArgumentError for an unknown word, with the nearest known one, and for values out of range.
    """
    result = Augmentation()
    known = [*PRESETS, "flip", *_WORDS, "color"]
    for position, item in enumerate(part.strip() for part in text.lower().split(",")):
        word, equals, number = (piece.strip() for piece in item.partition("="))
        word = {"colour": "color", "resized_crop": "resized-crop", "rotation": "rotate"}.get(word, word)
        if word not in known:
            nearest = difflib.get_close_matches(word, known, 1)
            hint = f"did you mean '{nearest[0]}'? " if nearest else ""
            raise ArgumentError(f"unknown augmentation '{item}'; {hint}known are {', '.join(known)}")
        if word in PRESETS or word == "flip":
            if equals:
                raise ArgumentError(f"augmentation '{word}' takes no value, got '{item}'")
            if word == "flip":
                result = replace(result, horizontal_flip=True)
            elif position:
                raise ArgumentError(f"augmentation '{word}' is a preset and must come first in '{text}'")
            else:
                result = preset(word, image_shape)
            continue
        value = _number(item, word, number)
        names = _COLOURS if word == "color" else (_WORDS[word],)
        result = replace(result, **dict.fromkeys(names, value))  # type: ignore[arg-type]  # checked by the class
    check_fits(result, image_shape)
    return result


def check_fits(augmentation: Augmentation, image_shape: tuple[int, ...]) -> None:
    """Raise ArgumentError where a shift or cutout is not smaller than images of shape (height, width, ...)."""
    side = min(image_shape[:2])
    for name in _WHOLE_NUMBERS:
        if getattr(augmentation, name) >= side:
            raise ArgumentError(
                f"{name}={getattr(augmentation, name)} leaves nothing of images of "
                f"{image_shape[0]}x{image_shape[1]} pixels; take less than {side}"
            )


def _number(item: str, word: str, number: str) -> int | float:
    kind = int if word in _WHOLE_NUMBERS else float
    try:
        return kind(number)
    except ValueError:
        whole = "a whole number of pixels" if kind is int else "a number"
        raise ArgumentError(
            f"augmentation '{item}': '{word}' takes {whole}, as in '{word}={'2' if kind is int else '0.3'}'"
        ) from None
