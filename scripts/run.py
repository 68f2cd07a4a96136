#!/usr/bin/env python3
"""Sets up gpucnn in this checkout, then runs a command of it.

    python3 scripts/run.py train [options]      train; with no option, LeNet-5 on handwritten digits
    python3 scripts/run.py evaluate | predict | info [options]
    python3 scripts/run.py test [--coverage] [pytest options]
    python3 scripts/run.py lint                 ruff: rules and format
    python3 scripts/run.py types                mypy
    python3 scripts/run.py setup                what train needs, and nothing more

It needs Python 3.11 or newer and nothing else. The first run makes the virtual environment .venv and installs
into it what the command needs; later runs start at once, until pyproject.toml or the Python changes.

Where there is an NVIDIA driver, it is asked for its version and the GPU for its compute capability, and the
extra of the two, cuda12 or cuda13, that fits is installed as well:
    --gpu auto               as said; the default
    --gpu cuda12 | cuda13    that one, whatever is found
    --gpu none               neither; later runs keep to it until told otherwise
"""

import os
import shutil
import subprocess
import sys

if sys.version_info < (3, 11):  # noqa: UP036 (it speaks to those who start it with an older one)
    print(
        "gpucnn needs Python 3.11 or newer; this is {}.{}.{}, {}.".format(*sys.version_info[:3], sys.executable),
        file=sys.stderr,
    )
    for newer in filter(None, (shutil.which("python3.{}".format(minor)) for minor in (14, 13, 12, 11))):  # noqa: UP032
        print("Found {}: start this script with it.".format(newer), file=sys.stderr)  # noqa: UP032
        break
    sys.exit(2)

from environment import (
    GPU_CHOICES,
    ROOT,
    Lock,
    SetupError,
    environment_python,
    say,
    set_up,
)

FOR_USERS = ("images", "plot")
FOR_DEVELOPERS = (*FOR_USERS, "test")
COMMANDS = {
    "train": FOR_USERS,
    "evaluate": FOR_USERS,
    "predict": FOR_USERS,
    "info": FOR_USERS,
    "setup": FOR_USERS,
    "test": FOR_DEVELOPERS,
    "lint": FOR_DEVELOPERS,
    "types": FOR_DEVELOPERS,
}


def hand_over(arguments: list[str]) -> int:
    """Go on as the environment's Python; signals and the exit status are then its own."""
    python = str(environment_python())
    if os.name != "nt":
        sys.stdout.flush()
        os.execv(python, [python, *arguments])
    process = subprocess.Popen([python, *arguments])
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # the command has had it too, and ends in its own way


def in_checkout(*commands: list[str]) -> int:
    """Run each in the checkout with the environment's Python; 0, or the status of the last one that failed."""
    status = 0
    for arguments in commands:
        status = subprocess.call([str(environment_python()), *arguments], cwd=ROOT) or status
    return status


def run_tests(arguments: list[str]) -> int:
    """Run pytest in the checkout; with --coverage its threshold counts too."""
    os.chdir(ROOT)
    if "--coverage" not in arguments:
        return hand_over(["-m", "pytest", *arguments])
    arguments = [argument for argument in arguments if argument != "--coverage"]
    status = in_checkout(["-m", "coverage", "erase"], ["-m", "coverage", "run", "-m", "pytest", *arguments])
    if status != 0:
        return status
    return in_checkout(["-m", "coverage", "combine", "--quiet"], ["-m", "coverage", "report"])


def run(command: str, arguments: list[str]) -> int:
    """Run a command in the environment, which is set up."""
    if command == "setup":
        say(f"Set up. {environment_python()} is its Python.")
        return 0
    if command == "test":
        return run_tests(arguments)
    if command == "lint":
        return in_checkout(["-m", "ruff", "check"], ["-m", "ruff", "format", "--check"])
    if command == "types":
        return in_checkout(["-m", "mypy"])
    return hand_over(["-P", "-m", "gpucnn", command, *arguments])


def take_gpu_option(arguments: list[str]) -> "tuple[str | None, list[str]]":
    """(the value of --gpu, the other arguments)."""
    gpu, others = None, []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--":
            others.extend([argument, *remaining])
        elif argument == "--gpu":
            gpu = next(remaining, "")
        elif argument.startswith("--gpu="):
            gpu = argument.partition("=")[2]
        else:
            others.append(argument)
    if gpu is not None and gpu not in GPU_CHOICES:
        raise SetupError(f"--gpu takes one of {', '.join(GPU_CHOICES)}, got '{gpu}'")
    return gpu, others


def main(arguments: list[str]) -> int:
    """Set up, then run the command; the exit status."""
    try:
        gpu, arguments = take_gpu_option(arguments)
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(__doc__)
            return 0 if arguments else 2
        command, *rest = arguments
        if command not in COMMANDS:
            raise SetupError(f"unknown command '{command}'; choose one of {', '.join(COMMANDS)}, or --help")
        with Lock():
            set_up(COMMANDS[command], gpu)
        return run(command, rest)
    except SetupError as error:
        say(f"run.py: {error}")
        return 2
    except KeyboardInterrupt:
        say("\nInterrupted.")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
