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
import time
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# In place of this script's folder, whose modules are other programs' parts.
sys.path[:1] = [str(ROOT), str(ROOT / "kernels")]
for _name in ("scripts", "tests"):  # no packages: one of that name that a library has installed would be taken
    if str(ROOT / _name) not in list(getattr(sys.modules.get(_name), "__path__", [])):
        sys.modules[_name] = ModuleType(_name)
        sys.modules[_name].__path__ = [str(ROOT / _name)]
_FOR_TRAINING_SECONDS = 90.0
_FOR_SANITIZER_SECONDS = 90.0


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
    parser.add_argument("--parts", help=argparse.SUPPRESS)  # what the process of the checks is started with
    parser.add_argument("--one-process", action="store_true", help="check in this very process, which may break")
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
    """Run everything, and report; what there is is written to the file after every part."""
    began = time.monotonic()
    deadline = began + 60 * given.minutes
    from scripts.gpu_validation import machine
    from scripts.gpu_validation.bench import DTYPES
    from scripts.gpu_validation.parts import FAMILY, Part, Settings, families, runs
    from scripts.gpu_validation.supervisor import Found, Supervisor, run_here

    seed = int.from_bytes(os.urandom(4), "little") if given.seed is None else given.seed
    dtypes, not_run = available_dtypes(chosen(given.dtypes, DTYPES, "dtype"))
    whole = not given.reduced and (given.runtime == "cuda" or given.whole)
    wanted = chosen(given.families, families(), "family")
    partial = given.families is not None
    settings = Settings(given.runtime, seed, tuple(dtypes), whole, given.exact_allocations)
    report = {
        "verdict": "not finished",
        "runtime": given.runtime,
        "when": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "seed": seed,
        "whole": whole and not partial and len(dtypes) == len(DTYPES),
        "machine": machine.facts(given.runtime),
    }
    for name, value in report["machine"].items():
        say(f"{name.replace('_', ' '):<20} {value}")
    say(f"{'seed':<20} {seed}\n")

    found = Found()
    compiled = compile_ahead(dtypes, found) if given.runtime == "cuda" and not partial and whole else {}
    parts = [Part(FAMILY, name) for name in wanted] + ([] if given.no_training else list(runs(settings)))
    sanitizer = machine.find_sanitizer() if given.runtime == "cuda" and not given.no_sanitizer else None
    reserved = 0.0 if given.no_training else _FOR_TRAINING_SECONDS
    reserved += _FOR_SANITIZER_SECONDS if sanitizer else 0.0
    until = {FAMILY: max(began + 1, deadline - reserved)}
    supervisor = None if given.one_process else Supervisor(settings, found)
    run = run_here(settings, found) if supervisor is None else supervisor.run
    checks: list[dict[str, Any]] = []

    def so_far(left: list[Part], why: str) -> dict[str, Any]:
        """The report as it is now."""
        late = [f"{part.title}: the time was over" for part in found.late]
        return report | {
            "seconds": time.monotonic() - began,
            "compiled": compiled,
            "operations": list(found.operations.values()),
            "training": [result for part, result in found.results.items() if part.kind == "training"],
            "captured": [result for part, result in found.results.items() if part.kind == "captured"],
            "sanitizer": checks,
            "not_run": [*not_run, *late, *(f"{part.title}: {why}" for part in left)],
        }

    try:
        for number, part in enumerate(parts):
            ends = until.get(part.kind, deadline)
            if time.monotonic() > ends:
                found.late.append(part)
                continue
            say(f"{part.verb} {part.name} ...")
            from_here = time.monotonic()
            run(part, ends - from_here)
            say(f"  {found.said(part)}, {time.monotonic() - from_here:.1f} s")
            keep(so_far(parts[number + 1 :], "not reached when this was written"), given.output)
    finally:
        if supervisor is not None:
            supervisor.close()
    if sanitizer:
        say("compute-sanitizer ...")
        checks += machine.sanitize(seed, deadline - time.monotonic())
        not_run += [
            f"compute-sanitizer {check['tool']}: {check['output']}" for check in checks if not check["finished"]
        ]
    elif given.runtime == "cuda" and not given.no_sanitizer:
        say("compute-sanitizer is not installed (it comes with the CUDA toolkit): left out")
    whole_report = so_far([], "")
    failed = any(row["failed"] for row in whole_report["operations"])
    failed = failed or not all(result["passed"] for result in found.results.values())
    failed = failed or any(check["finished"] and not check["passed"] for check in checks)
    verdict = "failed" if failed else "not finished" if whole_report["not_run"] else "passed"
    return whole_report | {"verdict": verdict}


def compile_ahead(dtypes: list[str], found: Any) -> dict[str, float]:
    """Compile all kernels, by as many processes as there are cores; how many, and the seconds.

    One that does not compile is a failure, and no reason not to check the others.
    """
    from gpucnn_kernels import catalog
    from gpucnn_kernels.runtime import ahead

    processes = min(ahead.cores(), ahead.MOST_PROCESSES)
    say(f"compiling all kernels, {processes} at a time ...")
    began = time.monotonic()
    compiled: dict[str, float] = {}
    try:
        compiled["modules"] = catalog.warm_up(dtypes, processes=processes)
    except Exception as error:  # CUDA, CuPy and the compiler raise many kinds
        found.fail(("compiling", "all kernels", "", ""), f"{type(error).__name__}: {error}")
        say(f"  FAILED: {type(error).__name__}: {str(error).splitlines()[0]}")
        return {}
    compiled["seconds"] = time.monotonic() - began
    say(f"  {compiled['modules']} modules, {compiled['seconds']:.0f} s")
    return compiled


def keep(found: dict[str, Any], path: Path | None) -> None:
    """Write the report, where it is wanted."""
    from scripts.gpu_validation import report

    if path is not None:
        report.write(found, path)


def main(arguments: list[str]) -> int:
    """Validate; the exit status."""
    given = options(arguments)
    if given.parts is not None:
        from scripts.gpu_validation import parts

        return parts.main(given.parts)
    os.environ["GPUCNN_KERNELS_RUNTIME"] = given.runtime
    missing = requirements(given.runtime)
    if missing is not None:
        print(f"validate_gpu.py: {missing}", file=sys.stderr)
        return 2
    if given.families == "?":
        from scripts.gpu_validation.parts import families

        say("\n".join(families()))
        return 0
    from scripts.gpu_validation import report

    found = validate(given)
    say(f"\n{report.table(found)}\n\n{report.summary(found)}")
    keep(found, given.output)
    if given.output is not None:
        say(f"written: {given.output}")
        if given.output.resolve().parent == ROOT / "docs" / "gpu":
            (ROOT / "docs" / "gpu" / "README.md").write_text(report.page(ROOT / "docs" / "gpu"), encoding="utf-8")
    return {"passed": 0, "failed": 1, "not finished": 3}[found["verdict"]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
