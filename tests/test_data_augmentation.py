"""The text form of augmentations, their presets, their limits, and what each sample draws."""

from __future__ import annotations

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucnn.data import Augmentation, parse_augmentation
from gpucnn.errors import ArgumentError

SHAPE = (28, 28, 1)


def test_every_word_has_its_effect():
    parsed = parse_augmentation("flip, shift=2,resized-crop=0.35,rotate=10,COLOR=0.3,cutout=8", (32, 32, 3))
    assert parsed == Augmentation(
        horizontal_flip=True, shift=2, resized_crop=0.35, rotation=10.0,
        brightness=0.3, contrast=0.3, saturation=0.3, cutout=8,
    )  # fmt: skip
    assert parsed.changes_colour


def test_what_comes_later_replaces_what_came_before():
    assert parse_augmentation("light,shift=5,flip", SHAPE) == Augmentation(shift=5, horizontal_flip=True)
    assert parse_augmentation("color=0.3,saturation=0", SHAPE) == Augmentation(brightness=0.3, contrast=0.3)
    assert parse_augmentation("rotation=3,resized_crop=1,colour=0.1", SHAPE).rotation == 3


@pytest.mark.parametrize(
    ("text", "shape", "expected"),
    [
        ("none", SHAPE, Augmentation()),
        ("light", SHAPE, Augmentation(shift=2)),
        ("light", (8, 8, 1), Augmentation(shift=1)),
        ("standard", (32, 32, 3), Augmentation(horizontal_flip=True, shift=4)),
        ("standard", (224, 300, 3), Augmentation(horizontal_flip=True, resized_crop=0.35)),
        (
            "strong",
            (224, 224, 3),
            Augmentation(
                horizontal_flip=True, resized_crop=0.35, rotation=10.0,
                brightness=0.3, contrast=0.3, saturation=0.3, cutout=56,
            ),
        ),
    ],
)  # fmt: skip
def test_presets(text, shape, expected):
    assert parse_augmentation(text, shape) == expected


fractions = st.floats(0, 1, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        Augmentation, horizontal_flip=st.booleans(), shift=st.integers(0, 27), cutout=st.integers(0, 27),
        resized_crop=st.none() | st.floats(0.01, 1), rotation=st.floats(0, 180),
        brightness=fractions, contrast=fractions, saturation=fractions,
    )
)  # fmt: skip
def test_text_and_back(augmentation):
    assert parse_augmentation(augmentation.to_text(), SHAPE) == augmentation


def test_short_texts():
    assert Augmentation().to_text() == "none"
    assert not Augmentation()
    assert Augmentation(horizontal_flip=True)
    assert (
        Augmentation(True, 2, brightness=0.2, contrast=0.2, saturation=0.2).to_text() == "flip,shift=2,color=0.2"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("flipp", "unknown augmentation 'flipp'; did you mean 'flip'"),
        ("xyzzy", "unknown augmentation 'xyzzy'; known are none"),
        ("", "unknown augmentation ''"),
        ("flip=1", "'flip' takes no value"),
        ("light=1", "'light' takes no value"),
        ("flip,light", "preset and must come first"),
        ("shift", "'shift' takes a whole number of pixels, as in 'shift=2'"),
        ("shift=1.5", "whole number"),
        ("rotate=ten", "'rotate' takes a number, as in 'rotate=0.3'"),
        ("shift=28", "shift=28 leaves nothing of images of 28x28 pixels; take less than 28"),
        ("cutout=40", "cutout=40 leaves nothing"),
        ("shift=-1", "shift must be"),
        ("rotate=200", "rotate must be from 0 to 180"),
        ("rotate=nan", "rotate must be"),
        ("resized-crop=0", "above 0 and up to 1"),
        ("color=1.5", "brightness must be from 0 to 1"),
    ],
)
def test_errors_say_what_is_wrong(text, words):
    with pytest.raises(ArgumentError, match=words):
        parse_augmentation(text, SHAPE)


def test_pixels_are_whole_numbers():
    with pytest.raises(ArgumentError, match="cutout must be a whole number"):
        Augmentation(cutout=True)


def test_draws_are_a_function_of_seed_epoch_and_index():
    augmentation = Augmentation(horizontal_flip=True)
    together = augmentation.draw(3, 5, numpy.arange(20))
    alone = augmentation.draw(3, 5, [7])
    other_epoch, other_seed = augmentation.draw(3, 6, [7]), augmentation.draw(4, 5, [7])
    with_more = Augmentation(horizontal_flip=True, shift=3, rotation=5.0).draw(3, 5, [7])
    for name, column in together.items():
        assert column[7] == alone[name][0] == with_more[name][0]
        assert column[7] != other_epoch[name][0]
        assert column[7] != other_seed[name][0]
    assert len({float(column[7]) for column in together.values()}) == len(together)
