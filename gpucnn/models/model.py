"""What makes a layer a model: a name that rebuilds it, and fit, evaluate, predict, save and load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpucnn.layers import Layer

if TYPE_CHECKING:
    pass


class Model(Layer):
    """A network that is trained as a whole.

    Attributes:
        name: its name in the registry, or its class's.
        input_shape: (C, H, W) of one input image, or None where any will do.
        num_classes: the width of its output, or None where unknown.
        options: what else the registry needs to build it again.
    """

    name: str = ""
    input_shape: tuple[int, int, int] | None = None
    num_classes: int | None = None
    options: dict[str, Any]

    def __init__(
        self,
        *,
        name: str = "",
        input_shape: tuple[int, int, int] | None = None,
        num_classes: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.name = name or type(self).__name__
        self.input_shape, self.num_classes = input_shape, num_classes
        self.options = dict(options or {})

    @property
    def architecture(self) -> dict[str, Any]:
        """What ``gpucnn.models.create(**architecture)`` takes to build this model again, fit for JSON."""
        channels, size = None, None
        if self.input_shape is not None:
            channels, size = self.input_shape[0], self.input_shape[1]
        return {
            "name": self.name,
            "num_classes": self.num_classes,
            "in_channels": channels,
            "image_size": size,
            **self.options,
        }
