"""The models by name: which there are, what they take, and how to make one."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpucnn.errors import ArgumentError
from gpucnn.models.animalnet import AnimalNet
from gpucnn.models.lenet5 import LeNet5
from gpucnn.models.mobilenet import MobileNetV2
from gpucnn.models.model import Model
from gpucnn.models.resnet import resnet18, resnet50
from gpucnn.models.vgg import VGGSmall
from gpucnn.names import look_up, unknown


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What there is to know of a model before it is made.

    Attributes:
        name: what :func:`create` takes.
        input_shape: (C, H, W) unless in_channels or image_size say otherwise.
        parameter_count: trainable values with that input, 10 classes and the default options.
        description: one line.
        options: further arguments of :func:`create`, with their defaults.
    """

    name: str
    input_shape: tuple[int, int, int]
    parameter_count: int
    description: str
    options: dict[str, Any]


_RESNET_OPTIONS = {"stem": "auto", "zero_init_residual": False, "width": 64}

_MODELS: dict[str, tuple[Callable[..., Model], ModelInfo]] = {
    info.name: (make, info)
    for make, info in (
        (
            LeNet5,
            ModelInfo(
                "lenet5",
                (1, 28, 28),
                61_706,
                "LeNet-5 (LeCun et al. 1998) with ReLU and max pooling, for digits and other small images",
                {},
            ),
        ),
        (
            AnimalNet,
            ModelInfo(
                "animalnet",
                (3, 224, 224),
                143_770,
                "four strided convolutions and one linear layer, the articles' classifier of photographs",
                {"batch_norm": True, "dropout": 0.0},
            ),
        ),
        (
            VGGSmall,
            ModelInfo(
                "vgg-small",
                (1, 28, 28),
                288_170,
                "pairs of 3x3 convolutions with batch norm, doubling channels (after Simonyan and Zisserman 2015)",
                {"width": 32, "stages": 3, "dropout": 0.0, "stem": "small"},
            ),
        ),
        (
            resnet18,
            ModelInfo(
                "resnet18",
                (3, 224, 224),
                11_181_642,
                "18-layer residual network (He et al. 2016), torchvision's structure and names",
                _RESNET_OPTIONS,
            ),
        ),
        (
            resnet50,
            ModelInfo(
                "resnet50",
                (3, 224, 224),
                23_528_522,
                "50-layer residual network of bottlenecks (He et al. 2016), torchvision's structure and names",
                _RESNET_OPTIONS,
            ),
        ),
        (
            MobileNetV2,
            ModelInfo(
                "mobilenet_v2",
                (3, 224, 224),
                2_236_682,
                "inverted residuals with depthwise convolutions (Sandler et al. 2018), torchvision's names",
                {"stem": "auto", "width": 1.0, "dropout": 0.2},
            ),
        ),
    )
}


def available() -> tuple[str, ...]:
    """The names that :func:`create` takes."""
    return tuple(_MODELS)


def describe(name: str) -> ModelInfo:
    """What there is to know of the model called ``name``.

    Raises ArgumentError for an unknown name, with the nearest match.
    """
    return look_up("model", name, _MODELS)[1]


def create(
    name: str,
    *,
    num_classes: int = 10,
    in_channels: int | None = None,
    image_size: int | None = None,
    **options: Any,
) -> Model:
    """A new model with random weights, drawn from the default generator (see ``gpucnn.manual_seed``).

    Args:
        name: one of :func:`available`.
        num_classes: width of the output.
        in_channels: channels of the images; by default those of the model's ``input_shape``.
        image_size: rows and columns of the images, likewise.
        **options: the model's own, listed by :func:`describe`.

    ``create(**model.architecture)`` makes a model of the same structure again. Raises ArgumentError for an
    unknown name or option (with the nearest match), a value of the wrong type and an image too small.

    Example:
        >>> model = create("resnet18", num_classes=3, image_size=32)
        >>> model.options["stem"], model(numpy.zeros((2, 3, 32, 32), numpy.float32)).shape
        ('small', (2, 3))
    """
    make, info = look_up("model", name, _MODELS)
    channels = info.input_shape[0] if in_channels is None else in_channels
    size = info.input_shape[1] if image_size is None else image_size
    _check_type("num_classes", num_classes, 1)
    _check_type("in_channels", channels, 1)
    _check_type("image_size", size, 1)
    if num_classes < 1 or channels < 1:
        raise ArgumentError(
            f"num_classes and in_channels must be at least 1, got {num_classes!r} and {channels!r}"
        )
    for option, value in options.items():
        if option not in info.options:
            raise ArgumentError(unknown(f"option of the model {name}", option, info.options))
        _check_type(option, value, info.options[option])
    numbers = operator.index(num_classes), operator.index(channels), operator.index(size)
    return make(*numbers, **(info.options | options))


def _check_type(name: str, value: Any, default: Any) -> None:
    """Raise ArgumentError unless ``value`` is of the kind of ``default``: true/false, a number or a word."""
    if isinstance(default, bool):
        right, expected = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        right, expected = hasattr(value, "__index__") and not isinstance(value, bool), "an integer"
    elif isinstance(default, float):
        right, expected = hasattr(value, "__float__") and not isinstance(value, bool), "a number"
    else:
        right, expected = isinstance(value, str), "a word"
    if not right:
        raise ArgumentError(f"{name} must be {expected}, got {value!r}")
