"""Writes docs/command-line.md from the table of options; with --check only says whether it is up to date.

Run it with the environment's Python: .venv/bin/python scripts/document_options.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from gpucnn.cli.options import OPTIONS, Option
from gpucnn.cli.recipes import PAIRS, RECIPES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "command-line.md"
USAGE = {
    "train": "gpucnn train [options]",
    "evaluate": "gpucnn evaluate RUN [options]",
    "predict": "gpucnn predict RUN IMAGE... [options]",
    "info": "gpucnn info [options]",
    "warm-up": "gpucnn warm-up [options]",
}
INTRODUCTION = """# Command line

`gpucnn`, or `python -m gpucnn`. This page is written by `scripts/document_options.py`.

Each option can be given in four ways; the first of these that says something wins:

1. the flag: `--batch-size 32`
2. the environment: `GPUCNN_BATCH_SIZE=32`
3. the file given by `--config`: `batch-size = 32` in TOML (or the `config.json` of a run)
4. the default, which for `train` depends on the data set

- A switch has two flags: `--nesterov` and `--no-nesterov`.
- `none` switches off what a file or a variable switched on: `--clip-norm none`.
- In a file, `model-option` may be a table: `model-option = { width = 16 }`.
- A file may hold options of all commands; each takes its own.
- Unknown flags and keys of a file are errors that offer the nearest one.
- Unknown variables `GPUCNN_...` get a note, for they may be another program's.

`GPUCNN_NUM_THREADS` is the number of threads that work on one operation; by default all cores. With
`GPUCNN_WINOGRAD=0` the CPU sums every convolution plainly, and never takes Winograd's algorithm, whose rounding
errors in float32 are some four times as large.

Results are printed on standard output, everything else on standard error. Exit status:

- 0: done.
- 1: whoever read the output stopped reading.
- 2: something is wrong with what was asked for or found, said in one line.
- 130: stopped by Ctrl-C (143: by SIGTERM).
"""


def render() -> str:
    """The page."""
    parts = [INTRODUCTION]
    for command, options in OPTIONS.items():
        rows = "\n".join(row(option) for option in options)
        parts.append(
            f"## {command}\n\n`{USAGE[command]}`\n\n"
            f"| Option | Variable | Meaning | Default |\n|---|---|---|---|\n{rows}\n"
        )
    parts.append(recipes())
    return "\n".join(parts)


def recipes() -> str:
    """The defaults of train that depend on the data set."""
    named = {f"`{data}`": recipe for data, recipe in RECIPES.items()}
    named |= {f"`{data}` with `{model}`": recipe for (data, model), recipe in PAIRS.items()}
    rows = "\n".join(f"| {name} | {', '.join(flags(recipe))} |" for name, recipe in named.items())
    return (
        "## What train does where nothing is said\n\n"
        "The data set is `digits`; a path takes what stands for `folder`.\n\n"
        f"| Data set | Defaults |\n|---|---|\n{rows}\n"
    )


def flags(recipe: dict[str, Any]) -> list[str]:
    """The flags that say the same as a recipe."""
    written = []
    for option, value in recipe.items():
        values = [f"{key}={entry}" for key, entry in value.items()] if isinstance(value, dict) else [value]
        written += [f"`--{option} {entry}`" for entry in values]
    return written


def row(option: Option) -> str:
    """An option's row in its table."""
    value = f"[{option.metavar}]" if option.optional_value else option.metavar
    default = "" if option.default in (None, {}) else "off" if option.default is False else f"{option.default}"
    return (
        f"| `--{option.name}{' ' + value if value else ''}` | `{option.environment}` | {option.help} | {default} |"
    )


def main(arguments: list[str]) -> int:
    """Write the page, or with --check compare it; the exit status."""
    if arguments == ["--check"]:
        return 0 if PAGE.read_text(encoding="utf-8") == render() else 1
    PAGE.write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
