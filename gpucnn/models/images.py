"""Which images a model takes: checked when it is made and again at every forward, with the size that would do."""

from __future__ import annotations

from gpucnn.errors import ArgumentError, ShapeError
from gpucnn.ops import Array


def check_image_size(model: str, image_size: int, minimum: int) -> None:
    """Raise ArgumentError unless ``image_size`` is an integer of at least ``minimum`` pixels."""
    if isinstance(image_size, bool) or not hasattr(image_size, "__index__"):
        raise ArgumentError(f"image_size must be an integer, the pixels of a square's side, got {image_size!r}")
    if image_size < minimum:
        raise ArgumentError(
            f"images of {image_size}x{image_size} are too small for {model}, which needs at least "
            f"{minimum}x{minimum}; enlarge them (image_size={minimum} or more) or choose another model"
        )


def check_at_least(x: Array, minimum: int) -> None:
    """Raise ShapeError where the images x (N, C, H, W) have fewer than ``minimum`` rows or columns."""
    shape = tuple(getattr(x, "shape", ()))
    if len(shape) == 4 and min(shape[2:]) < minimum:
        raise ShapeError(
            f"images of {shape[2]}x{shape[3]} are too small for this model, which needs at least "
            f"{minimum}x{minimum}; enlarge them"
        )


def check_exactly(x: Array, image_size: int) -> None:
    """Raise ShapeError where the images x (N, C, H, W) are not ``image_size`` squares."""
    shape = tuple(getattr(x, "shape", ()))
    if len(shape) == 4 and shape[2:] != (image_size, image_size):
        raise ShapeError(
            f"images of {shape[2]}x{shape[3]} do not fit this model, which was made for "
            f"{image_size}x{image_size}; resize them or make the model with another image_size"
        )
