"""The command line's options: one table that the parser, the environment and the config file all read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpucnn.device import split_name
from gpucnn.errors import ArgumentError
from gpucnn.names import unknown
from gpucnn.optimizers import OPTIMIZERS
from gpucnn.schedules import SCHEDULES

Converter = Callable[[object], Any]
"""Turns what a flag or variable (always text) or a config file (text, number, boolean, list, table) gives into
the option's value; raises ValueError with what was expected."""

PRECISIONS = ("float32", "float64", "tf32", "bfloat16", "float16")
SPLITS = ("test", "validation", "train")


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    Attributes:
        name: as in the flag: "batch-size" is --batch-size, GPUCNN_BATCH_SIZE, and batch-size in a file.
        help: what it does, for --help.
        convert: from text or a config file's value to the option's own.
        metavar: stands for the value in --help; empty for a switch.
        default: where nothing else says so; None where it is worked out, as ``help`` says.
        variable: the environment variable, where it is not the usual one.
        repeatable: whether the flag may be given more than once.
        optional_value: whether the flag may stand without a value, which then is "".
    """

    name: str
    help: str
    convert: Converter
    metavar: str = ""
    default: Any = None
    variable: str = ""
    repeatable: bool = False
    optional_value: bool = False

    @property
    def key(self) -> str:
        """The name as a Python identifier."""
        return self.name.replace("-", "_")

    @property
    def environment(self) -> str:
        """The environment variable."""
        return self.variable or f"GPUCNN_{self.key.upper()}"

    @property
    def is_switch(self) -> bool:
        """Whether the flag takes no value (and has a --no- form)."""
        return not self.metavar


def text(value: object) -> str:
    """Any text but the empty one."""
    if not isinstance(value, str) or not value:
        raise ValueError("expected a text")
    return value


def path(value: object) -> str:
    """A path, with ~ for the home folder."""
    try:
        return str(Path(text(value)).expanduser())
    except RuntimeError as error:  # there is no home folder to put in its place
        raise ValueError(f"expected a path ({error})") from error


def switch(value: object) -> bool:
    """A boolean, or a word for one."""
    if isinstance(value, bool):
        return value
    words = {
        "1": True,
        "true": True,
        "yes": True,
        "on": True,
        "0": False,
        "false": False,
        "no": False,
        "off": False,
    }
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError("expected true or false")


def whole_number(least: int, most: int | None = None) -> Converter:
    """An integer in a range."""
    expected = f"expected a whole number of at least {least}" + ("" if most is None else f" and at most {most}")

    def convert(value: object) -> int:
        try:
            number = int(value.replace("_", " ")) if isinstance(value, str) else value
        except ValueError:
            raise ValueError(expected) from None
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(expected)
        if most is not None and number > most:
            raise ValueError(expected)
        return number

    return convert


def number(*, least: float | None = None, above: float | None = None, below: float | None = None) -> Converter:
    """A finite number in a range."""
    limits = [f"at least {least:g}"] if least is not None else []
    limits += [f"above {above:g}"] if above is not None else []
    limits += [f"below {below:g}"] if below is not None else []
    expected = "expected a number " + " and ".join(limits)

    def convert(value: object) -> float:
        try:
            is_number = isinstance(value, (str, int, float)) and not isinstance(value, bool)
            given = float(value) if is_number else math.nan  # type: ignore[arg-type]  # is_number has just said it
        except (ValueError, OverflowError):
            given = math.nan
        fits = (
            math.isfinite(given)
            and (least is None or given >= least)
            and (above is None or given > above)
            and (below is None or given < below)
        )
        if not fits:
            raise ValueError(expected)
        return given

    return convert


def choice(kind: str, names: tuple[str, ...]) -> Converter:
    """One of a few names; the error offers the nearest."""

    def convert(value: object) -> str:
        if isinstance(value, str) and value in names:
            return value
        raise ValueError(unknown(kind, value, names))

    return convert


def device_name(value: object) -> str:
    """auto, cpu, cuda, or cuda:1 and so on."""
    split_name(value)  # type: ignore[arg-type]  # it says what it does not take
    return str(value)


def or_none(convert: Converter) -> Converter:
    """Also takes "none", for switching something off that a file or the environment switched on."""

    def convert_or_none(value: object) -> Any:
        if isinstance(value, str) and value.lower() == "none":
            return None
        try:
            return convert(value)
        except ValueError as error:
            raise ValueError(f"{error}, or none") from None

    return convert_or_none


def class_weights(value: object) -> str | list[float]:
    """The word balanced, or one weight a class."""
    if value == "balanced":
        return "balanced"
    parts = value.split(",") if isinstance(value, str) else value
    try:
        if not isinstance(parts, list):
            raise ValueError
        return [number(least=0)(part) for part in parts]
    except ValueError:
        raise ValueError("expected 'balanced', or one number a class with commas between them") from None


def model_options(value: object) -> dict[str, Any]:
    """KEY=VALUE texts, or a table."""
    if isinstance(value, dict):
        return {key.replace("-", "_"): entry for key, entry in value.items()}
    given = value if isinstance(value, list) else [value]
    items = [part for item in given for part in (item.split(",") if isinstance(item, str) else [item])]
    options: dict[str, Any] = {}
    for item in items:
        key, equals, entry = item.partition("=") if isinstance(item, str) else ("", "", "")
        if not (key.strip() and equals and entry.strip()):
            raise ValueError("expected KEY=VALUE")
        options[key.strip().replace("-", "_")] = _value_of(entry.strip())
    return options


def _value_of(entry: str) -> Any:
    for convert in (int, float, switch):
        try:
            return convert(entry)
        except ValueError:
            continue
    return entry


_DATA_OPTIONS = (
    Option("data", "data set: digits, mnist, fashion-mnist, cifar10, folder, or a folder of images", text, "NAME",
           variable="GPUCNN_DATASET"),
    Option("data-dir", "folder that holds the data set's files", path, "DIR", variable="GPUCNN_DATA"),
    Option("convert-grey", "turn grey images among colour ones into colour", switch, default=False),
)  # fmt: skip

_DEVICE = Option(
    "device", "auto, cpu, cuda, or cuda:N for one of several GPUs", device_name, "NAME", default="auto"
)
_RUNNING_OPTIONS = (
    _DEVICE,
    Option("workers", "threads that prepare images", whole_number(0, 256), "N", default=2),
    Option("config", "TOML file with any of these options, or a run's config.json; flags and variables beat it",
           path, "FILE"),
    Option("quiet", "print results and errors only", switch, default=False),
)  # fmt: skip

TRAIN_OPTIONS = (
    *_DATA_OPTIONS,
    Option("validation-fraction", "share of the training images kept for validation",
           number(least=0, below=1), "X"),
    Option("test-fraction", "share kept for the test, where the data set has no test part of its own",
           number(least=0, below=1), "X"),
    Option("augment", "none, light, standard or strong, or a list such as flip,shift=2,rotate=10", text, "TEXT"),
    Option("model", "network; gpucnn info lists them", text, "NAME"),
    Option("model-option", "an option of the network; may be repeated", model_options, "KEY=VALUE", default={},
           repeatable=True),
    Option("width", "short for --model-option width=N", whole_number(1), "N"),
    Option("image-size", "side of the images as the network sees them", whole_number(1), "N"),
    Option("decode-size", "side at which a folder's images are kept; larger than --image-size, random crops keep "
           "more detail", whole_number(1), "N"),
    Option("epochs", "passes over the training images", whole_number(1), "N"),
    Option("batch-size", "images a step", whole_number(1), "N", default=64),
    Option("optimizer", "sgd, adam, adamw or rmsprop", choice("optimizer", tuple(OPTIMIZERS)), "NAME",
           default="adamw"),
    Option("lr", "highest learning rate (default: the optimizer's)", number(above=0), "X"),
    Option("momentum", "of sgd and rmsprop", number(least=0, below=1), "X", default=0.9),
    Option("nesterov", "Nesterov momentum, for sgd", switch, default=False),
    Option("weight-decay", "on weights, not on biases or batch norm (default: the optimizer's)",
           or_none(number(least=0)), "X"),
    Option("schedule", "of the learning rate: constant, step, cosine or one-cycle",
           choice("schedule", tuple(SCHEDULES)), "NAME", default="one-cycle"),
    Option("warmup-epochs", "linear rise of the learning rate at the start", number(least=0), "X", default=0.0),
    Option("step-size", "epochs between falls, for the step schedule", number(above=0), "X"),
    Option("gamma", "factor of a fall, for the step schedule", number(above=0), "X", default=0.1),
    Option("label-smoothing", "share of the target spread over all classes", number(least=0, below=1), "X",
           default=0.0),
    Option("class-weights", "balanced, or one weight a class with commas between them", or_none(class_weights),
           "TEXT"),
    Option("clip-norm", "largest norm of the gradient", or_none(number(above=0)), "X"),
    Option("ema", "decay of an average of the weights, which is then evaluated: 0.999, say",
           or_none(number(above=0, below=1)), "X"),
    Option("early-stopping", "stop after this many epochs without improvement", or_none(whole_number(1)), "N"),
    Option("monitor", "what improvement means: accuracy or loss of the validation",
           choice("monitor", ("accuracy", "loss")), "NAME", default="accuracy"),
    Option("seed", "decides the weights, splits, order, augmentation and dropout", whole_number(0, 2**64 - 1), "N",
           default=0),
    Option("precision", "float32 or float64; for GPUs tf32, bfloat16 or float16",
           choice("precision", PRECISIONS), "NAME", default="float32"),
    Option("capture", "launch steps on a GPU as one CUDA graph: auto, on (layers of your own too) or off",
           choice("capture", ("auto", "on", "off")), "NAME", default="auto"),
    Option("autotune", "measure the ways of each convolution on a GPU, once, and take the fastest", switch,
           default=False),
    Option("output", "run folder (default: runs/DATA-MODEL, numbered)", path, "DIR"),
    Option("resume", "go on with a run that was stopped: the one in RUN, or in --output", path, "RUN",
           optional_value=True),
    Option("overwrite", "replace the run that is in --output", switch, default=False),
    Option("checkpoint-seconds", "time between checkpoints, besides one an epoch", or_none(number(above=0)), "X",
           default=60.0),
    Option("checkpoint-steps", "steps between checkpoints", or_none(whole_number(1)), "N"),
    *_RUNNING_OPTIONS,
)  # fmt: skip

EVALUATE_OPTIONS = (
    *_DATA_OPTIONS,
    Option("split", "test, validation or train (default: the first of these that there is)",
           choice("split", SPLITS), "NAME"),
    Option("batch-size", "images at a time", whole_number(1), "N", default=64),
    *_RUNNING_OPTIONS,
    Option("json", "print JSON", switch, default=False),
)  # fmt: skip

PREDICT_OPTIONS = (
    Option("top", "classes to show", whole_number(1), "K", default=3),
    Option("convert-grey", "turn grey images into colour where the network was trained on colour", switch,
           default=False),
    Option("batch-size", "images at a time", whole_number(1), "N", default=64),
    *(option for option in _RUNNING_OPTIONS if option.name != "workers"),
    Option("json", "print JSON", switch, default=False),
)  # fmt: skip

INFO_OPTIONS = (
    Option("data-dir", "folder to look for data sets in", path, "DIR", variable="GPUCNN_DATA"),
    _DEVICE,
    Option("json", "print JSON", switch, default=False),
)

WARM_UP_OPTIONS = (
    Option("device", "cuda, cuda:N for one of several GPUs, or cpu", device_name, "NAME", default="cuda"),
    Option(
        "precision",
        "float32 or float64; for GPUs tf32, bfloat16 or float16",
        choice("precision", PRECISIONS),
        "NAME",
        default="float32",
    ),
    Option(
        "processes",
        "processes that compile for a GPU at a time (default: one a core, 16 at most)",
        whole_number(1),
        "N",
    ),
    Option("quiet", "print results and errors only", switch, default=False),
)

OPTIONS = {
    "train": TRAIN_OPTIONS,
    "evaluate": EVALUATE_OPTIONS,
    "predict": PREDICT_OPTIONS,
    "info": INFO_OPTIONS,
    "warm-up": WARM_UP_OPTIONS,
}
"""The options of each command."""


def known_names() -> list[str]:
    """The names of all options of all commands: what a config file may hold."""
    return sorted({option.name for options in OPTIONS.values() for option in options} - {"config", "json"})


def convert(option: Option, value: object, source: str) -> Any:
    """The option's value; ArgumentError that names the source, what came and what was expected."""
    if option.optional_value and value == "":
        return ""
    try:
        return option.convert(value)
    except ValueError as error:
        given = f", got {value!r}" if "unknown" not in str(error) else ""
        raise ArgumentError(f"{source}: {error}{given}") from None
