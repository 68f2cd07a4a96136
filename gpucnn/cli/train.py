"""``gpucnn train``: from a data set's name to a run folder with the trained network and its results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, TextIO, cast

import gpucnn
from gpucnn import models
from gpucnn.cli.precision import described, input_dtype
from gpucnn.cli.recipes import RECIPES, with_recipe
from gpucnn.cli.report import describe_data, describe_model, note
from gpucnn.cli.results import CurvesCallback, finish
from gpucnn.cli.runs import (
    folder_for,
    load_data,
    make_config,
    of_the_run,
    refuse_inside_data,
    requested_device,
    verify_images,
)
from gpucnn.cli.settings import Settings
from gpucnn.cli.streams import LastingErrors
from gpucnn.data import DataSplits, Preprocessing, parse_augmentation
from gpucnn.device import Device
from gpucnn.errors import ArgumentError, CheckpointError
from gpucnn.layers.precision import check_precision
from gpucnn.models import Model
from gpucnn.training import (
    Callback,
    Progress,
    RunFolder,
    Trainer,
    TrainingInterrupted,
    TrainingOptions,
    make_progress,
)
from gpucnn.training.storage import write_json

_USED_BY = {
    "momentum": ("optimizer", ("sgd", "rmsprop")),
    "nesterov": ("optimizer", ("sgd",)),
    "step-size": ("schedule", ("step",)),
    "gamma": ("schedule", ("step",)),
}
"""Options that only some optimizers or schedules look at."""


class EpochsCallback(Callback):
    """Writes a number of epochs that differs from the config's into it, once the trainer has accepted it.

    So the run goes on to the new number when it is stopped again and resumed without saying it again.
    """

    def __init__(self, folder: RunFolder, settings: Settings) -> None:
        self._folder, self._epochs = folder, settings.get("epochs")

    def on_fit_start(self, trainer: Trainer) -> None:
        """The checkpoint is read: whatever the run cannot change has been refused."""
        config = self._folder.read_config()
        if config["settings"].get("epochs") != self._epochs.value:
            config["settings"]["epochs"] = self._epochs.value
            config.setdefault("sources", {})["epochs"] = self._epochs.source
            write_json(self._folder.config_path, config)


def run(settings: Settings, arguments: dict[str, Any]) -> int:
    """Train, evaluate the best epoch's weights, and write the results; the exit status."""
    device = requested_device(settings)
    folder, settings, resumes = _place(settings)
    if not folder.path.exists():
        return _train(settings, folder, device, resumes=resumes)
    with folder.locked():  # before the data are read: another process may be training in it
        return _train(settings, folder, device, resumes=resumes)


def _train(settings: Settings, folder: RunFolder, device: Device, *, resumes: bool) -> int:
    quiet = settings["quiet"]
    _note_without_effect(settings)
    check_precision(settings["precision"])
    models.describe(settings["model"])  # an unknown name is said before any data are read
    splits = load_data(settings)
    note(f"data: {describe_data(splits)}", quiet=quiet)
    verify_images(splits)
    gpucnn.manual_seed(settings["seed"])
    model = _make_model(settings, splits).to(device)
    note(f"model: {describe_model(model)}", quiet=quiet)
    note(f"device: {device} ({device.reason}), precision {described(settings['precision'], device)}", quiet=quiet)
    trainer = _make_trainer(settings, splits, model, folder)
    with folder.locked():
        if not resumes:
            folder.create(make_config(settings, model, device), overwrite=settings["overwrite"])
        note(f"run: {folder.path}{' (resumed)' if resumes else ''}", quiet=quiet)
        try:
            trainer.fit(resume=resumes)
        except TrainingInterrupted:
            note(f"go on with: gpucnn train --resume {folder.path}")
            raise
        return finish(settings, splits, model, trainer, folder)


def _place(settings: Settings) -> tuple[RunFolder, Settings, bool]:
    """(the run's folder, its settings complete, whether it goes on with what is there)."""
    complete = with_recipe(settings)
    folder, resume = folder_for(complete), settings["resume"]
    if resume is None:
        if folder.holds_run() and not settings["overwrite"]:
            raise ArgumentError(
                f"{folder.path} already holds a run; add --resume to go on with it or --overwrite to replace it, "
                "or choose another --output"
            )
        return folder, _checked(complete, folder), False
    if folder.config_path.exists():
        return folder, with_recipe(of_the_run(_with_absolute_paths(settings), folder)), True
    if resume or folder.holds_run():
        raise CheckpointError(
            f"{folder.path} holds no run to resume; check the path, or start one without --resume"
        )
    note(f"nothing to resume in {folder.path}: starting there")
    return folder, _checked(complete, folder), False


def _checked(settings: Settings, folder: RunFolder) -> Settings:
    """The settings of a run that begins, fit to be stored. Raises ArgumentError where they cannot go together."""
    decode, image = settings["decode-size"], settings["image-size"]
    if decode is not None and image is not None and decode < image:
        raise ArgumentError(
            f"{settings.source('decode-size')}: expected at least the image size, {image}, got {decode}; images "
            "that are kept smaller than the network sees them lose detail"
        )
    refuse_inside_data(folder, settings)
    return _with_absolute_paths(settings)


def _note_without_effect(settings: Settings) -> None:
    for name, (chosen, users) in _USED_BY.items():
        given = settings.source(name).startswith("--") and settings[name] is not False
        if given and settings[chosen] not in users:
            note(
                f"note: --{name} has no effect with the {chosen} {settings[chosen]}, only with "
                f"{' and '.join(users)}",
                quiet=settings["quiet"],
            )


def _with_absolute_paths(settings: Settings) -> Settings:
    """The same, with paths that also hold when the run is resumed from another folder."""
    for name in ("data", "data-dir"):
        value = settings[name]
        if value is not None and (name == "data-dir" or Path(value).is_dir()) and value not in RECIPES:
            settings = settings.with_values({name: str(Path(value).resolve())}, settings.source(name))
    return settings


def _make_model(settings: Settings, splits: DataSplits) -> Model:
    options = dict(settings["model-option"])
    if settings["width"] is not None:
        options["width"] = settings["width"]
    for name in ("name", "num_classes", "in_channels", "image_size"):
        if name in options:
            raise ArgumentError(
                f"--model-option {name} is decided by --model, --image-size and the data; leave it away"
            )
    return models.create(
        settings["model"],
        num_classes=len(splits.classes),
        in_channels=splits.image_shape[2],
        image_size=settings["image-size"],
        **options,
    )


def _make_trainer(settings: Settings, splits: DataSplits, model: Model, folder: RunFolder) -> Trainer:
    shape = model.input_shape
    assert shape is not None, "models of the registry know their input"
    preprocessing = Preprocessing.for_dataset(splits.train, shape[1:], input_dtype(settings["precision"]))
    augmentation = parse_augmentation(settings["augment"], (shape[1], shape[2], shape[0]))
    options = TrainingOptions(
        epochs=settings["epochs"],
        batch_size=settings["batch-size"],
        optimizer=settings["optimizer"],
        lr=settings["lr"],
        momentum=settings["momentum"],
        nesterov=settings["nesterov"],
        weight_decay=settings["weight-decay"],
        schedule=settings["schedule"],
        warmup_epochs=settings["warmup-epochs"],
        step_size=settings["step-size"],
        gamma=settings["gamma"],
        label_smoothing=settings["label-smoothing"],
        class_weights=settings["class-weights"],
        clip_norm=settings["clip-norm"],
        ema_decay=settings["ema"],
        early_stopping=settings["early-stopping"],
        monitor=settings["monitor"],
        seed=settings["seed"],
        checkpoint_seconds=settings["checkpoint-seconds"],
        checkpoint_steps=settings["checkpoint-steps"],
        workers=settings["workers"],
        capture=settings["capture"],
        autotune=settings["autotune"],
    )
    return Trainer(
        model,
        splits.train,
        splits.validation,
        options=options,
        preprocessing=preprocessing,
        augmentation=augmentation,
        run=folder,
        callbacks=[EpochsCallback(folder, settings), CurvesCallback(folder)],
        progress=_progress(quiet=settings["quiet"]),
        precision=settings["precision"],
    )


def _progress(*, quiet: bool) -> Progress:
    if sys.stderr is not None and sys.stderr.isatty():
        return make_progress(quiet=quiet)
    return make_progress(cast(TextIO, LastingErrors()), quiet=quiet)
