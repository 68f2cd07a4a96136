"""Run folders as the commands use them: where a run goes, what it was told, and its trained network."""

from __future__ import annotations

import itertools
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

import gpucnn
from gpucnn.cli.recipes import FOLDER, RECIPES
from gpucnn.cli.settings import Settings
from gpucnn.data import Dataset, DataSplits, Preprocessing, Subset, load
from gpucnn.data.folder import ImageFolder
from gpucnn.device import Device, choose_device
from gpucnn.errors import ArgumentError, CheckpointError, DataError
from gpucnn.models import Model
from gpucnn.models.saved import model_of, read_model_checkpoint
from gpucnn.training import Checkpoint, RunFolder

RUNS = Path("runs")

OF_THE_MACHINE = (
    "data-dir",
    "device",
    "workers",
    "capture",
    "checkpoint-seconds",
    "checkpoint-steps",
    "quiet",
    "config",
)
"""Options that may change when a run is resumed: they say how it is carried out, not what comes of it."""

_LEFT_TO_THE_TRAINER = ("epochs",)  # may change with some schedules; the trainer knows which
_OF_THE_CALL = ("output", "resume", "overwrite")


def requested_device(settings: Settings) -> Device:
    """The device that the settings lead to. Raises DeviceError where it cannot be used."""
    source = settings.source("device")
    return choose_device(None if source == "GPUCNN_DEVICE" else settings["device"])


def folder_for(settings: Settings) -> RunFolder:
    """Where a run with these settings goes; with --resume, the folder of the run to go on with.

    Without --output: runs/<data>-<model>, then the same with -2, -3, ...: the first that is free, or, to go on,
    the last that there is. Raises ArgumentError where --resume and --output name different folders.
    """
    resume, output = settings["resume"], settings["output"]
    if resume and output and Path(resume).resolve() != Path(output).resolve():
        raise ArgumentError(f"--resume {resume} and --output {output} are different folders; give one of them")
    if resume or output:
        return RunFolder(resume or output)
    pictures = _folder_of_images(settings)
    data = settings["data"] if pictures is None else pictures.name or FOLDER  # the root has no name
    name = f"{data}-{settings['model']}"
    folders = (RunFolder(RUNS / (name if number == 1 else f"{name}-{number}")) for number in itertools.count(1))
    taken = list(itertools.takewhile(lambda folder: folder.path.exists(), folders))
    if taken and resume is not None:
        return taken[-1]
    return RunFolder(RUNS / (f"{name}-{len(taken) + 1}" if taken else name))


def refuse_inside_data(run: RunFolder, settings: Settings) -> None:
    """Raise ArgumentError where a new run would lie in the folder of images, whose subfolders are classes."""
    pictures = _folder_of_images(settings)
    if pictures is not None and run.path.resolve().is_relative_to(pictures):
        raise ArgumentError(
            f"the run's folder {run.path} would lie inside the data folder {pictures}, whose subfolders "
            "are classes; choose a folder elsewhere with --output"
        )


def _folder_of_images(settings: Settings) -> Path | None:
    """The folder of images that the settings name, in full; None for the other data sets."""
    data = settings["data-dir"] if settings["data"] == FOLDER else settings["data"]
    return None if data is None or data in RECIPES else Path(os.path.expanduser(data)).resolve()


def of_the_run(settings: Settings, run: RunFolder) -> Settings:
    """The settings of a run that is resumed: what it was started with, but this machine's device and folders.

    Raises ArgumentError where a flag or the config file asks for something that a run under way cannot change,
    CheckpointError where the run was not started by ``gpucnn train``.
    """
    stored = stored_settings(run)
    if stored is None:
        raise CheckpointError(
            f"{run.config_path} does not say how the run was started, so gpucnn train did not start it; resume it "
            "in Python: model.fit(..., resume=True)"
        )
    kept = {}
    for name in settings.names():
        asked = not settings.is_default(name)
        if name in _OF_THE_CALL or name not in stored or (asked and name in OF_THE_MACHINE):
            continue
        from_environment = settings.source(name).startswith("GPUCNN_")
        if asked and not from_environment and not _agrees(name, settings[name], stored[name]):
            if name in _LEFT_TO_THE_TRAINER:
                continue
            raise ArgumentError(
                f"the run in {run.path} was started with {name} = {_shown(stored[name])}, and "
                f"{settings.source(name)} says {_shown(settings[name])}; leave that away to go on with the run, "
                "or start another one"
            )
        kept[name] = stored[name]
    return settings.with_values(kept, f"the run in {run.path}")


def _agrees(name: str, asked: Any, stored: Any) -> bool:
    if name == "model-option" and isinstance(stored, dict):  # it has the recipe's as well
        return all(key in stored and stored[key] == value for key, value in asked.items())
    return bool(asked == stored)


def stored_settings(run: RunFolder) -> dict[str, Any] | None:
    """What a run was started with, by option name; None where its config does not say."""
    settings = run.read_config().get("settings")
    return settings if isinstance(settings, dict) else None


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def make_config(settings: Settings, model: Model, device: Device) -> dict[str, Any]:
    """The config.json of a run: what it takes to repeat it, and what it ran on."""
    return {
        "gpucnn": gpucnn.__version__,
        "settings": {name: value for name, value in settings.values().items() if name not in _OF_THE_CALL},
        "sources": {name: source for name, source in settings.sources().items() if name not in _OF_THE_CALL},
        "model": model.architecture,
        "device": {"name": str(device), "reason": device.reason},
        "machine": {
            "python": platform.python_version(),
            "numpy": numpy.__version__,
            "platform": platform.platform(),
        },
        "command": sys.argv[1:],
    }


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A network from a run, ready to predict.

    Attributes:
        source: the folder or file that it is from.
        model: in evaluation mode, with the best epoch's weights.
        preprocessing: how an image becomes its input.
        classes: the name of each output.
        checkpoint: what else the file holds.
        settings: what the run was started with, by option name; empty where that is not known.
    """

    source: Path
    model: Model
    preprocessing: Preprocessing
    classes: list[str]
    checkpoint: Checkpoint
    settings: dict[str, Any]


def load_trained(path: str, device: Device) -> TrainedModel:
    """The network of a run folder (its best epoch) or of a checkpoint file, on ``device``.

    Raises CheckpointError where there is none, where it is damaged, or where its weights do not fit its model.
    """
    source = Path(path).expanduser()
    checkpoint = read_model_checkpoint(source)
    run = RunFolder(source if source.is_dir() else source.parent)
    if not checkpoint.architecture or checkpoint.data.get("preprocessing") is None:
        raise CheckpointError(
            f"the checkpoint in {source} does not say how to build its model or to prepare its images; load it in "
            "Python: model.load_state_dict(gpucnn.training.read_checkpoint(path).model)"
        )
    model = model_of(checkpoint, source).to(device)
    model.eval()
    assert model.preprocessing is not None, "the checkpoint has it"
    return TrainedModel(
        source=source,
        model=model,
        preprocessing=model.preprocessing,
        classes=checkpoint.classes,
        checkpoint=checkpoint,
        settings=(stored_settings(run) if run.config_path.exists() else None) or {},
    )


def read_size(trained: TrainedModel) -> tuple[int, int] | None:
    """(height, width) at which the training's images were read; None where the checkpoint does not say.

    What an image looks like to the network depends on it: a picture that is first made small and then resized to
    the network's input is blurred.
    """
    size = trained.checkpoint.data.get("source_size")
    return (int(size[0]), int(size[1])) if size else None


def load_data(settings: Settings, image_size: tuple[int, int] | None = None) -> DataSplits:
    """The data set that the settings name, in its parts; a folder's images at ``image_size``, where given."""
    return load(
        settings["data"],
        data_dir=settings["data-dir"],
        image_size=image_size
        or max(filter(None, (settings["decode-size"], settings["image-size"])), default=None),
        validation_fraction=settings["validation-fraction"],
        test_fraction=settings["test-fraction"],
        seed=settings["seed"],
        convert_grey=settings["convert-grey"],
    )


def verify_images(splits: DataSplits) -> None:
    """Read every image of a folder once, so that a damaged one shows now and not after an epoch.

    The images stay in memory as far as there is room, so the time is not lost. Raises DataError that names all
    damaged files.
    """
    folders: dict[int, ImageFolder] = {}
    for part in splits.parts().values():
        whole: Dataset = part
        while isinstance(whole, Subset):
            whole = whole.dataset
        if isinstance(whole, ImageFolder):
            folders[id(whole)] = whole
    for folder in folders.values():
        folder.verify()


def check_fits(trained: TrainedModel, splits: DataSplits) -> None:
    """Raise DataError unless the data set has the classes and the channels that the network was trained on."""
    if splits.classes != trained.classes:
        raise DataError(
            f"the network in {trained.source} knows the classes {_listed(trained.classes)}, but '{splits.name}' "
            f"has {_listed(splits.classes)}; give --data a set with the same classes"
        )
    channels = 0 if trained.model.input_shape is None else trained.model.input_shape[0]
    if splits.image_shape[2] != channels:
        raise DataError(
            f"the network in {trained.source} takes images of {channels} channels, but those of '{splits.name}' "
            f"have {splits.image_shape[2]}; give --data a set like the one that it was trained on"
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    return f"{shown} ({len(names)})"
