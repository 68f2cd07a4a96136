"""What ``gpucnn train`` does where nobody says otherwise: the defaults of each data set."""

from __future__ import annotations

from typing import Any

from gpucnn.cli.settings import Settings

DEFAULT_DATA = "digits"
FOLDER = "folder"

RECIPES: dict[str, dict[str, Any]] = {
    "digits": {
        "model": "lenet5",
        "image-size": 28,
        "epochs": 30,
        "batch-size": 32,
        "lr": 2e-3,
        "augment": "light",
    },
    "mnist": {
        "model": "lenet5",
        "image-size": 28,
        "epochs": 10,
        "batch-size": 128,
        "lr": 3e-3,
        "augment": "light",
    },
    "fashion-mnist": {
        "model": "lenet5",
        "image-size": 28,
        "epochs": 15,
        "batch-size": 128,
        "lr": 3e-3,
        "augment": "flip",
    },
    "cifar10": {
        "model": "vgg-small",
        "image-size": 32,
        "epochs": 20,
        "batch-size": 128,
        "lr": 3e-3,
        "augment": "standard",
    },
    FOLDER: {
        "model": "animalnet",
        "image-size": 224,
        "epochs": 40,
        "batch-size": 32,
        "lr": 2e-3,
        "augment": "standard",
    },
}
"""By data set; a folder of images takes "folder"."""

PAIRS: dict[tuple[str, str], dict[str, Any]] = {
    ("fashion-mnist", "vgg-small"): {"epochs": 12, "augment": "flip,shift=2", "label-smoothing": 0.05},
}
"""By data set and model: goes before what ``RECIPES`` says."""


def with_recipe(settings: Settings) -> Settings:
    """The settings of ``train``, with the data set's defaults in place of the general ones."""
    settings = settings.with_defaults({"data": DEFAULT_DATA}, "")
    data = settings["data"] if settings["data"] in RECIPES else FOLDER
    recipe = RECIPES[data]
    model = recipe["model"] if settings["model"] is None else settings["model"]
    return settings.with_defaults({**recipe, **PAIRS.get((data, model), {})}, f"for {data}")
