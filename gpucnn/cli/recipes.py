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
        "epochs": 25,
        "batch-size": 32,
        "lr": 2e-3,
        "augment": "light,rotate=10",
        "label-smoothing": 0.1,
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
        "epochs": 10,
        "batch-size": 128,
        "lr": 4e-3,
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
        "epochs": 60,
        "batch-size": 32,
        "lr": 2e-3,
        "weight-decay": 0.05,
        "augment": "standard,color=0.2",
        "label-smoothing": 0.1,
        "ema": 0.99,
    },
}
"""By data set; a folder of images takes "folder"."""

PAIRS: dict[tuple[str, str], dict[str, Any]] = {
    ("fashion-mnist", "vgg-small"): {
        "epochs": 8,
        "lr": 4e-3,
        "weight-decay": 0.02,
        "augment": "flip,shift=2",
        "label-smoothing": 0.1,
    },
    (FOLDER, "animalnet"): {
        "epochs": 160,
        "lr": 4e-3,
        "augment": "flip,resized-crop=0.3,color=0.3",
        "model-option": {"dropout": 0.3},
    },
    (FOLDER, "vgg-small"): {
        "image-size": 96,
        "decode-size": 128,
        "augment": "flip,resized-crop=0.3,color=0.3",
        "model-option": {"stem": "strided", "dropout": 0.2},
    },
}
"""By data set and model: goes before what ``RECIPES`` says."""


def with_recipe(settings: Settings) -> Settings:
    """The settings of ``train``, with the data set's defaults in place of the general ones."""
    settings = settings.with_defaults({"data": DEFAULT_DATA}, "")
    data = settings["data"] if settings["data"] in RECIPES else FOLDER
    recipe = RECIPES[data]
    model = recipe["model"] if settings["model"] is None else settings["model"]
    defaults = {**recipe, **PAIRS.get((data, model), {})}
    options = {**defaults.get("model-option", {}), **settings["model-option"]}  # one given leaves the others be
    source = settings.source("model-option")
    settings = settings.with_defaults(defaults, f"for {data}").with_values({"model-option": options}, source)
    decode, image = settings["decode-size"], settings["image-size"]
    if decode is not None and image is not None and decode < image:  # the recipe's is for its own image size
        settings = settings.with_defaults({"decode-size": None}, f"for {data}")
    return settings
