"""``gpucnn predict``: the classes that a trained network gives to images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.cli.report import note, print_json
from gpucnn.cli.runs import TrainedModel, load_trained, read_size, requested_device
from gpucnn.cli.settings import Settings
from gpucnn.data.image_files import read_header, read_image
from gpucnn.device import on_device, to_cpu, to_device
from gpucnn.errors import DataError
from gpucnn.layers import Softmax


def run(settings: Settings, arguments: dict[str, Any]) -> int:
    """Print the most probable classes of each image; the exit status."""
    device = requested_device(settings)
    trained = load_trained(arguments["run"], device)
    note(f"device: {device} ({device.reason})", quiet=settings["quiet"] or settings["json"])
    files = arguments["image"]
    probabilities = predict(trained, files, settings["batch-size"], convert_grey=settings["convert-grey"])
    best = [most_probable(row, trained.classes, settings["top"]) for row in probabilities]
    if settings["json"]:
        shown = [
            {"file": file, "classes": [{"class": name, "probability": share} for name, share in classes]}
            for file, classes in zip(files, best, strict=True)
        ]
        print_json({"model": trained.model.name, "predictions": shown})
        return 0
    width = max(len(name) for classes in best for name, _ in classes)
    for file, classes in zip(files, best, strict=True):
        print(file)
        for name, share in classes:
            print(f"  {name:{width}}  {share:7.2%}")
    return 0


def predict(
    trained: TrainedModel, files: Sequence[str], batch_size: int, *, convert_grey: bool = False
) -> NDArray[Any]:
    """The probabilities (files, classes) of images in files.

    Raises DataError for a file that is no image, and, without ``convert_grey``, for a grey one where the network
    was trained on colour; a colour image becomes grey where it was trained on grey ones.
    """
    assert trained.model.input_shape is not None, "models of the registry know their input"
    channels = trained.model.input_shape[0]
    height, width = read_size(trained) or trained.model.input_shape[1:]
    softmax = Softmax(dim=1).eval()
    parts = []
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        for file in batch:
            if channels == 3 and not convert_grey and read_header(Path(file)).grey:
                raise DataError(
                    f"{file} is a grey image, and the network was trained on colour; --convert-grey takes it so"
                )
        images = numpy.stack([read_image(file, (height, width, channels)) for file in batch])
        inputs = to_device(trained.preprocessing.apply(images), trained.model.device)
        with on_device(trained.model.device):
            parts.append(to_cpu(softmax(trained.model(inputs))))
    return numpy.concatenate(parts)


def most_probable(probabilities: NDArray[Any], classes: Sequence[str], count: int) -> list[tuple[str, float]]:
    """The ``count`` classes with the largest probabilities, the largest first; of equals the first comes first."""
    order = numpy.argsort(-probabilities, kind="stable")[:count]
    return [(classes[index], float(probabilities[index])) for index in order]
