"""Which value each option has, and where from: flag, then environment, then config file, then default."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpucnn.cli.options import OPTIONS, Option, convert, known_names
from gpucnn.cli.streams import write_error
from gpucnn.errors import ArgumentError
from gpucnn.names import unknown

DEFAULT = "default"
OTHER_VARIABLES = (
    "GPUCNN_COMPILED",
    "GPUCNN_NUM_THREADS",
    "GPUCNN_KERNELS_CACHE",
    "GPUCNN_KERNELS_HOST_ORDER",
    "GPUCNN_KERNELS_HOST_PTX",
    "GPUCNN_KERNELS_HOST_SANITIZE",
    "GPUCNN_KERNELS_RUNTIME",
    "GPUCNN_WINOGRAD",
)
"""Variables of this program that no option stands for."""

OF_ONE_RUN = ("output", "resume", "overwrite", "config", "quiet")
"""Options that a run's config.json does not hand on to the next run."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A value and who said so: "--epochs", "GPUCNN_EPOCHS", a file's name, or "default ..."."""

    value: Any
    source: str

    @property
    def is_default(self) -> bool:
        """Whether nobody asked for it."""
        return self.source.startswith(DEFAULT)


class Settings:
    """The settings of one command, read by option name: ``settings["batch-size"]``."""

    def __init__(self, settings: Mapping[str, Setting]) -> None:
        self._settings = dict(settings)

    def __getitem__(self, name: str) -> Any:
        return self._settings[name].value

    def get(self, name: str) -> Setting:
        """The value with its source."""
        return self._settings[name]

    def source(self, name: str) -> str:
        """Where the value is from."""
        return self._settings[name].source

    def is_default(self, name: str) -> bool:
        """Whether nobody asked for this value."""
        return self._settings[name].is_default

    def names(self) -> list[str]:
        """The names of the options."""
        return list(self._settings)

    def with_defaults(self, defaults: Mapping[str, Any], reason: str) -> Settings:
        """Other settings, in which ``defaults`` take the place of what nobody asked for."""
        settings = dict(self._settings)
        for name, value in defaults.items():
            if settings[name].is_default:
                settings[name] = Setting(value, f"{DEFAULT} {reason}")
        return Settings(settings)

    def with_values(self, values: Mapping[str, Any], source: str) -> Settings:
        """Other settings, in which ``values`` take the place of whatever was there."""
        return Settings({**self._settings, **{name: Setting(value, source) for name, value in values.items()}})

    def values(self) -> dict[str, Any]:
        """All values by name."""
        return {name: setting.value for name, setting in self._settings.items()}

    def sources(self) -> dict[str, str]:
        """All sources by name."""
        return {name: setting.source for name, setting in self._settings.items()}


def resolve(
    options: Sequence[Option], flags: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> Settings:
    """The settings of a command.

    Args:
        options: the command's options.
        flags: what the parser found, by option name: text, a list of texts, or a boolean; only what was given.
        environment: variables; os.environ unless given. An empty one counts as not set.

    Raises ArgumentError for a value that does not fit, naming its source, and for a config file that cannot be
    read or has a key that no option has. A variable GPUCNN_... that nothing reads gets a note on standard error.
    """
    environment = os.environ if environment is None else environment
    file = flags.get("config") or environment.get("GPUCNN_CONFIG")
    config = read_config(Path(str(file)).expanduser()) if file else {}
    settings: dict[str, Setting] = {}
    for option in options:
        flag, variable = f"--{option.name}", option.environment
        if option.name in flags:
            settings[option.name] = Setting(convert(option, flags[option.name], flag), flag)
        elif environment.get(variable):
            settings[option.name] = Setting(convert(option, environment[variable], variable), variable)
        elif option.name in config:
            source, value = f"{file}: {option.name}", config[option.name]
            # null, in the config.json of a run, is an option that was not given or switched off
            settings[option.name] = Setting(None if value is None else convert(option, value, source), source)
        else:
            settings[option.name] = Setting(option.default, DEFAULT)
    found = Settings(settings)
    if not ("quiet" in settings and found["quiet"]):
        _note_unknown_variables(environment)
    return found


def _note_unknown_variables(environment: Mapping[str, str]) -> None:
    """Say on standard error which GPUCNN_ variables nothing here reads: misspelt, or another program's."""
    known = {option.environment for options in OPTIONS.values() for option in options} | {*OTHER_VARIABLES}
    unread = sorted(name for name in environment if name.startswith("GPUCNN_") and name not in known)
    if not unread:
        return
    import difflib  # only then is it needed

    for name in unread:
        nearest = difflib.get_close_matches(name, sorted(known), n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        write_error(f"gpucnn: note: the variable {name} has no effect{hint}\n")


def read_config(file: Path) -> dict[str, Any]:
    """The options in a TOML file, or in the config.json of a run; every command's are allowed in both.

    Raises ArgumentError where the file is missing, cannot be parsed or has an unknown key.
    """
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ArgumentError(f"cannot read the config file {file}: {reason}") from error
    try:
        if file.suffix == ".json":
            given = json.loads(content)["settings"]
            given = {name: value for name, value in given.items() if name not in OF_ONE_RUN}
        else:
            given = tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise ArgumentError(f"the config file {file} is not valid TOML: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(f"{file} is not the config.json of a run: {error!r}") from error
    known = known_names()
    config: dict[str, Any] = {}
    for key, value in given.items():
        name = key.replace("_", "-")
        if name not in known:
            raise ArgumentError(f"{file}: {unknown('option', name, known)}")
        config[name] = value
    return config
