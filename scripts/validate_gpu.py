#!/usr/bin/env python3
"""Does it work on my GPU? Runs every kernel on it beside loops in float64, trains two networks, reports.

    python3 scripts/validate_gpu.py                                   the whole, at most 8 minutes
    python3 scripts/validate_gpu.py --output docs/gpu/NAME.json       and keep the report
    python3 scripts/validate_gpu.py --runtime host                    rehearse a part of it without a GPU

It runs from a bare checkout, on Python 3.11 or newer with NumPy and CuPy. Exit status: 0 all passed; 1 something
failed; 2 there is no GPU to run on, for the reason given; 3 nothing failed, but the time was over before
everything had run.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# In place of this script's folder, whose modules are other programs' parts.
sys.path[:1] = [str(ROOT), str(ROOT / "kernels")]
_FOR_TRAINING_SECONDS = 90.0
_FOR_SANITIZER_SECONDS = 90.0
_GRACE_SECONDS = 120.0


def options(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after this time (default 8)")
    parser.add_argument("--output", type=Path, help="write the report to this file, as JSON")
    parser.add_argument("--seed", type=int, help="repeat the random numbers of a run (default: new ones)")
    parser.add_argument("--runtime", choices=("cuda", "host"), default="cuda", help="host: rehearse without a GPU")
    parser.add_argument("--reduced", action="store_true", help="a few problems of each family, a few steps")
    parser.add_argument("--whole", action="store_true", help="with --runtime host: all problems")
    parser.add_argument("--dtypes", help="some of float32,float16,bfloat16,float64 (default: all)")
    parser.add_argument("--families", help="some families by name, with commas (default: all; ? lists them)")
    parser.add_argument("--no-training", action="store_true", help="leave the training runs out")
    parser.add_argument("--no-sanitizer", action="store_true", help="leave compute-sanitizer out")
    parser.add_argument("--exact-allocations", action="store_true", help="no memory pool: for compute-sanitizer")
    return parser.parse_args(arguments)


def say(*words: Any) -> None:
    """Print at once."""
    print(*words, flush=True)


def requirements(runtime: str) -> str | None:
    """What is missing, in words, or None."""
    if sys.version_info < (3, 11):  # noqa: UP036
        return "this needs Python 3.11 or newer, and is {}.{}".format(*sys.version_info[:2])
    set_up = "set it up with: python3 scripts/run.py setup; then: .venv/bin/python scripts/validate_gpu.py"
    try:
        import numpy
    except ImportError:
        return f"NumPy is not installed for {sys.executable}; {set_up}"
    del numpy
    if runtime == "cuda":
        from gpucnn_kernels.runtime.cuda import status

        usable, reason = status()
        if not usable:
            return f"no GPU can be used: {reason}. From this checkout: {set_up}"
    return None


def families() -> dict[str, Any]:
    """The checks by name, in their order."""
    from scripts.gpu_validation import (
        augmentation,
        captured,
        convolution,
        convolution_ends,
        layers,
        memory_format,
        planned,
        steps,
        surroundings,
    )

    checks = (
        layers, steps, augmentation, captured, convolution, convolution_ends, memory_format, planned, surroundings
    )  # fmt: skip
    return {name: check for module in checks for name, check in module.CHECKS.items()}


def chosen(wanted: str | None, known: Any, what: str) -> list[str]:
    """Some of the known names, in their order; all where none is asked for."""
    if wanted is None:
        return list(known)
    names = [name.strip() for name in wanted.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"validate_gpu.py: unknown {what} {', '.join(unknown)}; there are {', '.join(known)}")
    return [name for name in known if name in names]


def available_dtypes(names: list[str]) -> tuple[list[str], list[str]]:
    """(those that can be used here, what is not run for the others)."""
    try:
        import ml_dtypes
    except ImportError:
        kept = [name for name in names if name != "bfloat16"]
        return kept, ["bfloat16: the package ml_dtypes is not installed"] if kept != names else []
    del ml_dtypes
    return names, []


def validate(given: argparse.Namespace) -> dict[str, Any]:
    """Run everything, and report."""
    began = time.monotonic()
    deadline = began + 60 * given.minutes
    watch(60 * given.minutes)
    from gpucnn_kernels import catalog, runtime
    from scripts.gpu_validation import machine
    from scripts.gpu_validation.bench import DTYPES, Bench, OutOfTimeError, poison_all

    seed = int.from_bytes(os.urandom(4), "little") if given.seed is None else given.seed
    dtypes, not_run = available_dtypes(chosen(given.dtypes, DTYPES, "dtype"))
    whole = not given.reduced and (given.runtime == "cuda" or given.whole)
    facts = machine.facts(given.runtime)
    for name, value in facts.items():
        say(f"{name.replace('_', ' '):<20} {value}")
    say(f"{'seed':<20} {seed}\n")

    wanted = chosen(given.families, families(), "family")
    partial = given.families is not None
    compiled: dict[str, float] = {}
    if given.runtime == "cuda" and not partial and whole:
        say("compiling all kernels ...")
        from_here = time.monotonic()
        compiled = {"modules": catalog.warm_up(dtypes), "seconds": 0.0}
        compiled["seconds"] = time.monotonic() - from_here
        say(f"  {compiled['modules']} modules, {compiled['seconds']:.0f} s")
    poison_all(runtime.current())
    reserved = 0.0 if given.no_training else _FOR_TRAINING_SECONDS
    sanitizer = machine.find_sanitizer() if given.runtime == "cuda" and not given.no_sanitizer else None
    reserved += _FOR_SANITIZER_SECONDS if sanitizer else 0.0
    bench = Bench(given.runtime, seed, dtypes, whole, max(began + 1, deadline - reserved))
    for name in wanted:
        bench.family = name
        from_here = time.monotonic()
        say(f"checking {name} ...")
        try:
            families()[name](bench)
        except OutOfTimeError:
            not_run.append(f"{name}: the time was over")
            continue
        rows = [row for row in bench.outcomes.values() if row.family == name]
        failed = sum(row.failed for row in rows)
        runs = sum(row.runs for row in rows)
        said = f"{failed} of {runs} FAILED" if failed else f"{runs} runs passed"
        say(f"  {said}, {time.monotonic() - from_here:.1f} s")

    training = [] if given.no_training else train(given.runtime, whole, seed, deadline, not_run)
    graphs = [] if given.no_training else capture(given.runtime, whole, seed, deadline, not_run)
    checks = []
    if sanitizer:
        say("compute-sanitizer ...")
        checks = machine.sanitize(seed, deadline - time.monotonic())
        not_run += [
            f"compute-sanitizer {check['tool']}: {check['output']}" for check in checks if not check["finished"]
        ]
    elif given.runtime == "cuda" and not given.no_sanitizer:
        say("compute-sanitizer is not installed (it comes with the CUDA toolkit): left out")
    operations = [outcome.record() for outcome in bench.outcomes.values()]
    failed = any(row["failed"] for row in operations) or not all(run["passed"] for run in [*training, *graphs])
    failed = failed or any(check["finished"] and not check["passed"] for check in checks)
    return {
        "verdict": "failed" if failed else "not finished" if not_run else "passed",
        "runtime": given.runtime,
        "when": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "seed": seed,
        "whole": whole and not partial and len(dtypes) == len(DTYPES),
        "seconds": time.monotonic() - began,
        "machine": facts,
        "compiled": compiled,
        "operations": operations,
        "training": training,
        "captured": graphs,
        "sanitizer": checks,
        "not_run": not_run,
    }


def watch(seconds: float) -> None:
    """End the process where a kernel never ends, and nothing else can."""

    def give_up() -> None:
        print(
            f"validate_gpu.py: still busy {_GRACE_SECONDS:.0f} s after its time: given up",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(seconds + _GRACE_SECONDS, give_up)
    timer.daemon = True
    timer.start()


def train(runtime: str, whole: bool, seed: int, deadline: float, not_run: list[str]) -> list[dict[str, Any]]:
    """The training runs; one that breaks off is a failure with its last line."""
    from scripts.gpu_validation import training

    results = []
    for run in training.WHOLE if whole and runtime == "cuda" else training.REHEARSED:
        if time.monotonic() > deadline:
            not_run.append(f"training {run.name}: the time was over")
            continue
        say(f"training {run.name}, on the CPU too ...")
        try:
            results.append(training.compare(run, seed))
        except Exception as error:  # reported as any failure is
            traceback.print_exc()
            results.append(
                {"network": run.name, "passed": False, "failures": [f"{type(error).__name__}: {error}"]}
            )
        say(f"  {'passed' if results[-1]['passed'] else 'FAILED'}, {results[-1].get('seconds', 0):.1f} s")
    return results


def capture(runtime: str, whole: bool, seed: int, deadline: float, not_run: list[str]) -> list[dict[str, Any]]:
    """Training runs by CUDA graphs beside the same ones kernel by kernel; one that breaks off is a failure."""
    from scripts.gpu_validation import captured

    results = []
    for recipe in captured.RECIPES if whole and runtime == "cuda" else captured.REHEARSED:
        if time.monotonic() > deadline:
            not_run.append(f"captured {recipe.title}: the time was over")
            continue
        say(f"training {recipe.title}, by graphs and kernel by kernel ...")
        try:
            results.append(captured.compare(recipe, seed, whole and runtime == "cuda"))
        except Exception as error:  # reported as any failure is
            traceback.print_exc()
            failures = [f"{type(error).__name__}: {error}"]
            results.append({"recipe": recipe.title, "passed": False, "failures": failures})
        say(f"  {'passed' if results[-1]['passed'] else 'FAILED'}, {results[-1].get('seconds', 0):.1f} s")
    return results


def main(arguments: list[str]) -> int:
    """Validate; the exit status."""
    given = options(arguments)
    os.environ["GPUCNN_KERNELS_RUNTIME"] = given.runtime
    missing = requirements(given.runtime)
    if missing is not None:
        print(f"validate_gpu.py: {missing}", file=sys.stderr)
        return 2
    if given.families == "?":
        say("\n".join(families()))
        return 0
    if given.exact_allocations and given.runtime == "cuda":
        import cupy

        cupy.cuda.set_allocator(None)
    from scripts.gpu_validation import report

    found = validate(given)
    say(f"\n{report.table(found)}\n\n{report.summary(found)}")
    if given.output is not None:
        report.write(found, given.output)
        say(f"written: {given.output}")
        if given.output.resolve().parent == ROOT / "docs" / "gpu":
            (ROOT / "docs" / "gpu" / "README.md").write_text(report.page(ROOT / "docs" / "gpu"), encoding="utf-8")
    return {"passed": 0, "failed": 1, "not finished": 3}[found["verdict"]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
