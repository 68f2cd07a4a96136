"""Takes the arguments apart, by the table of options; what they mean is for ``settings`` to say."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

import gpucnn
from gpucnn.cli.options import OPTIONS, Option
from gpucnn.errors import ArgumentError
from gpucnn.names import unknown

_DESCRIPTIONS = {
    "train": "Train a network; without any option, LeNet-5 on handwritten digits.",
    "evaluate": "Measure a trained network on a data set.",
    "predict": "Say what is on images.",
    "info": "Say what this machine has, and which device would be chosen and why.",
    "warm-up": "Compile the GPU's kernels or the CPU's loops now, so that no training waits, and keep them.",
}
_POSITIONALS: dict[str, tuple[tuple[str, str, str | None], ...]] = {
    "train": (),
    "evaluate": (("run", "run folder, or a checkpoint file", None),),
    "predict": (("run", "run folder, or a checkpoint file", None), ("image", "image file", "+")),
    "info": (),
    "warm-up": (),
}
_EPILOG = (
    "Each option is also read from the environment (--batch-size from GPUCNN_BATCH_SIZE, but --data from "
    "GPUCNN_DATASET and --data-dir from GPUCNN_DATA) and from the file given by --config (batch-size = 64). The "
    "flag beats the environment, the environment the file, the file the default."
)


class _Parser(argparse.ArgumentParser):
    """Raises ArgumentError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(f"{message}; see {self.prog} --help")


def parse(argv: Sequence[str]) -> tuple[str, tuple[Option, ...], dict[str, Any], dict[str, Any]]:
    """(command, its options, the flags given by option name, the other arguments by name).

    Raises ArgumentError for what is unknown (with the nearest match) or misplaced; --help and --version print and
    raise SystemExit.
    """
    if argv and not argv[0].startswith("-") and argv[0] not in OPTIONS:
        raise ArgumentError(unknown("command", argv[0], OPTIONS))
    parser, commands = build_parser()
    found, rest = parser.parse_known_args(argv)
    command: str = found.command
    options = OPTIONS[command]
    if rest:
        flags = [f"--{option.name}" for option in options]
        if rest[0].startswith("-"):
            raise ArgumentError(unknown(f"option of gpucnn {command}", rest[0].partition("=")[0], flags))
        commands[command].error(f"unexpected argument '{rest[0]}'")
    values = vars(found)
    given = {option.name: values[option.key] for option in options if option.key in values}
    return command, options, given, {name: values[name] for name, _, _ in _POSITIONALS[command]}


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """(the parser, the parser of each command)."""
    parser = _Parser(prog="gpucnn", description=gpucnn.__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"gpucnn {gpucnn.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(OPTIONS))
    commands: dict[str, argparse.ArgumentParser] = {}
    for command, options in OPTIONS.items():
        description = _DESCRIPTIONS[command]
        subparser = subparsers.add_parser(
            command, help=description, description=description, epilog=_EPILOG, allow_abbrev=False
        )
        for name, meaning, count in _POSITIONALS[command]:
            subparser.add_argument(name, help=meaning, metavar=name.upper(), nargs=count)
        for option in options:
            _add(subparser, option)
        commands[command] = subparser
    return parser, commands


def _add(parser: argparse.ArgumentParser, option: Option) -> None:
    flag, default = f"--{option.name}", argparse.SUPPRESS
    if option.is_switch:
        parser.add_argument(
            flag, dest=option.key, action=argparse.BooleanOptionalAction, default=default, help=option.help
        )
        return
    shown = "" if option.default in (None, {}) else f" (default: {option.default})"
    meaning = (option.help + shown).replace("%", "%%")
    names = ("-o", flag) if option.name == "output" else (flag,)
    extra: dict[str, Any] = {"action": "append"} if option.repeatable else {}
    if option.optional_value:
        extra = {"nargs": "?", "const": ""}
    parser.add_argument(*names, dest=option.key, default=default, metavar=option.metavar, help=meaning, **extra)
