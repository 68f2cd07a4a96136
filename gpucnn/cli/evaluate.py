"""``gpucnn evaluate``: how a trained network does on a data set."""

from __future__ import annotations

from typing import Any

from gpucnn.cli.options import SPLITS, TRAIN_OPTIONS
from gpucnn.cli.report import describe_data, describe_model, describe_result, note, print_json
from gpucnn.cli.runs import check_fits, load_data, load_trained, read_size, requested_device
from gpucnn.cli.settings import DEFAULT, Setting, Settings
from gpucnn.errors import ArgumentError
from gpucnn.training import evaluate

_OF_THE_IMAGES = ("image-size", "decode-size", "seed")
_OF_THE_DATA = ("data", "data-dir", "convert-grey", "validation-fraction", "test-fraction", *_OF_THE_IMAGES)


def run(settings: Settings, arguments: dict[str, Any]) -> int:
    """Evaluate on the run's own data set, or on the one given; the exit status."""
    device = requested_device(settings)
    trained = load_trained(arguments["run"], device)
    settings = _with_data_of(settings, trained.settings, arguments["run"])
    quiet = settings["quiet"] or settings["json"]
    splits = load_data(settings, read_size(trained))
    check_fits(trained, splits)
    note(f"data: {describe_data(splits)}", quiet=quiet)
    note(f"model: {describe_model(trained.model)}, from {trained.source}", quiet=quiet)
    note(f"device: {device} ({device.reason})", quiet=quiet)
    parts = splits.parts()
    split = settings["split"] or next(name for name in SPLITS if name in parts)
    if split not in parts:
        raise ArgumentError(f"'{splits.name}' has no {split} part; choose one of {', '.join(parts)} with --split")
    result = evaluate(
        trained.model,
        parts[split],
        trained.preprocessing,
        settings["batch-size"],
        workers=settings["workers"],
    )
    if settings["json"]:
        print_json({"data": splits.name, "split": split, "model": trained.model.name, **result.to_dict()})
    else:
        print(describe_result(split, result))
    return 0


def _with_data_of(settings: Settings, stored: dict[str, Any], run: str) -> Settings:
    """The settings with all that decides the data: as in the run, unless another data set is asked for."""
    own = {
        option.name: Setting(option.default, DEFAULT) for option in TRAIN_OPTIONS if option.name in _OF_THE_DATA
    }
    settings = Settings({**own, **{name: settings.get(name) for name in settings.names()}})
    if settings["data"] is not None and settings["data"] != stored.get("data"):
        # The fractions and the folder were for the run's own data; the seed and the sizes stay the network's.
        stored = {name: stored[name] for name in _OF_THE_IMAGES if name in stored}
    settings = settings.with_defaults(
        {name: stored[name] for name in _OF_THE_DATA if name in stored}, f"of the run {run}"
    )
    if settings["data"] is None:
        raise ArgumentError(f"{run} does not say which data it was trained on; name the data set with --data")
    return settings
