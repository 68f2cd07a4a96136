"""Fills the table of a GPU, a row at a time, in as many calls as it takes.

Results are kept in a file that is whole after every row. A call goes on where the last one stopped, stops in
time, and says what is left. What belongs together is measured together: of a row all libraries and variants, in
turns, in one call; and the machine's ceilings at the start of each.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import random
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarking import gpu_report
from benchmarking.gpu_process import Library, TooLateError
from benchmarking.gpu_rows import COMPILED, NETWORKS, PRECISIONS, Measurement, in_turns, measurements, tiny
from benchmarking.gpu_worker import LIBRARY_NAMES

OURS = "gpucnn"
FORMAT = 1
PATIENCE_SECONDS = 150.0  # for one library's preparation of one row: compiled networks take long
ANSWER_SECONDS = 60.0  # for one measurement, which takes moments
# Of a call: a row is not begun with less left. Large networks take long to build, compiled ones to compile.
_RESERVE_SECONDS = {"operation": 10.0, "step": 40.0, COMPILED: PATIENCE_SECONDS}
_CEILINGS = {"copy": 1 << 30, "float32": 8192, "tf32": 8192, "bfloat16": 16384, "float16": 16384}
_TINY_CEILINGS = {"copy": 1 << 16, "float32": 64, "tf32": 64, "bfloat16": 64, "float16": 64}
# The relative error that a convolution of 576 terms may have against float64: float32's is some 3e-7, tf32's 3e-4;
# in 16 bits it is the rounding of the result.
_PROOFS = {"float32": 5e-6, "tf32": 2e-3, "bfloat16": 5e-3, "float16": 1e-3}
_SAME = ("gpu", "format", "runtime", "kernels")


class Mismatch(Exception):
    """A file of results that this call cannot go on with."""


def fingerprint() -> str:
    """Of all the kernels' text: results of other kernels are not to be mixed with."""
    from gpucnn_kernels import source

    texts = sorted(path.read_bytes() for path in source.FOLDER.iterdir() if path.suffix in (".cu", ".cuh"))
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def read(path: Path | None, about: dict[str, Any]) -> dict[str, Any]:
    """The results so far, or new ones. Raises Mismatch where they are of another machine or other kernels."""
    if path is None or not path.exists():
        return {**about, "calls": [], "rows": {}}
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        before, now = ({**{name: each[name] for name in _SAME}, **each["versions"]} for each in (results, about))
        # A library that is missing in one call, or was not asked for, is no other one.
        different = [name for name in before if name in now and before[name] != now[name]]
        if not isinstance(results["calls"], list) or not isinstance(results["rows"], dict):
            raise TypeError("no calls and rows")
    except (ValueError, KeyError, TypeError) as error:
        raise Mismatch(f"{path} is no file of results: {error!r}; name another") from error
    if different:
        name = different[0]
        raise Mismatch(
            f"{path} holds results of another {name}: {before[name]}, now {now[name]}; name another file, or "
            "delete it to begin anew"
        )
    missing = {name: why for name, why in results["missing"].items() if name not in about["libraries"]}
    versions = results["versions"] | about["versions"]
    return results | {
        "versions": versions, "missing": missing | about["missing"], "libraries": about["libraries"]
    }  # fmt: skip


def write(path: Path, results: dict[str, Any]) -> None:
    """Replace the file at once: a call that is killed leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A call, and a row, a line: what a call adds is what a diff shows.
    head = {name: value for name, value in results.items() if name not in ("calls", "rows")}
    text = json.dumps(head, indent=1)[:-2] + ',\n "calls": [\n  '
    text += ",\n  ".join(json.dumps(call) for call in results["calls"]) + '\n ],\n "rows": {\n  '
    text += ",\n  ".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in results["rows"].items())
    text += "\n }\n}\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


class Session:
    """One call: the libraries that work here, the time there is, and the results."""

    def __init__(self, libraries: list[Library], deadline: float, rounds: int) -> None:
        self.libraries, self.deadline, self.rounds = libraries, deadline, rounds
        self.unproved: dict[str, dict[str, str]] = {}
        """By library and precision, why its convolutions do not count as such."""

    @property
    def left(self) -> float:
        """Seconds that this call still has."""
        return self.deadline - time.monotonic()

    def start(self, ours: Library, sizes: dict[str, int]) -> dict[str, Any]:
        """The call's entry: when, the ceilings and each library's proof of its precisions."""
        entry: dict[str, Any] = {"date": datetime.date.today().isoformat(), "ceilings": {}, "proofs": {}}
        for name, size in sizes.items():
            answer = self._ask(ours, PATIENCE_SECONDS, "ceiling", name=name, size=size)
            if "error" not in answer:
                work = 2.0 * size if name == "copy" else 2.0 * size**3
                entry["ceilings"][name] = work / median(answer["seconds"])
        for library in self.libraries:
            proofs = entry["proofs"][library.name] = {}
            for precision in PRECISIONS:
                answer = self._ask(library, PATIENCE_SECONDS, "proof", precision=precision)
                if "late" in answer:
                    self.unproved[library.name] = dict.fromkeys(PRECISIONS, answer["error"])
                    break
                found = answer.get("error_ratio")
                proofs[precision] = answer.get("error", found)
                if "error" not in answer and found is not None and not found <= _PROOFS[precision]:
                    self.unproved.setdefault(library.name, {})[precision] = (
                        f"its {precision} convolutions have a relative error of {found:.1e}; {precision}'s is "
                        f"{_PROOFS[precision]:.0e} at most"
                    )
        return entry

    def _ask(self, library: Library, patience: float, do: str, **what: Any) -> dict[str, Any]:
        """The answer, "late" where it does not come; raises TooLateError where the call's time is over."""
        try:
            return library.ask(min(self.deadline, time.monotonic() + patience), do, **what)
        except TooLateError:
            if self.left <= 0:
                raise
            return {"error": f"its {do} was not ready after {patience:.0f} s", "late": True}

    def measure(self, measurement: Measurement) -> dict[str, Any] | None:
        """A row's entry; None where the call's time was over before it was whole."""
        precision = measurement.precision
        entry: dict[str, Any] = {"seconds": {}, "blank": {}, "settings": {}}
        ready: list[tuple[Library, str]] = []
        for library in self.libraries:
            if not _takes_part(library.name, measurement):
                continue
            if precision in self.unproved.get(library.name, {}):
                entry["blank"][library.name] = self.unproved[library.name][precision]
                continue
            answer = self._prepare(library, measurement, entry["blank"])
            if answer is None:
                return None
            for variant in answer["variants"]:
                ready.append((library, variant))
                entry["seconds"][_column(library.name, variant)] = []
            entry["settings"].update({
                _column(library.name, variant): value for variant, value in answer["settings"].items() if value
            })  # fmt: skip
        order = random.Random(measurement.key)
        for _ in range(self.rounds):
            for library, variant in order.sample(ready, len(ready)):
                column = _column(library.name, variant)
                if column in entry["blank"]:
                    continue
                try:
                    answer = self._ask(library, ANSWER_SECONDS, "measure", variant=variant)
                except TooLateError:
                    return None
                if "error" in answer:
                    entry["blank"][column] = answer["error"]
                    if not entry["seconds"][column]:
                        entry["seconds"].pop(column)
                else:
                    entry["seconds"][column] += [float(f"{seconds:.4g}") for seconds in answer["seconds"]]
        return entry

    def _prepare(self, library: Library, measurement: Measurement, blank: dict[str, str]) -> dict[str, Any] | None:
        """The library's answer, with the variants that are ready; None where the call's time is over.

        Why others are not is put into ``blank``. One that ends the process, or is not ready in time, is left out
        when the process after it is asked.
        """
        without: list[str] = []
        nothing: dict[str, Any] = {"variants": [], "failed": {}, "settings": {}}
        while True:
            until = min(self.deadline, time.monotonic() + PATIENCE_SECONDS)
            what = {"row": measurement.row.as_json(), "precision": measurement.precision, "without": without}
            try:
                answer = library.ask(until, "prepare", **what)
            except TooLateError:
                if self.left <= 0:
                    return None
                answer = {"error": f"not ready after {PATIENCE_SECONDS:.0f} s"}
                if library.name == OURS and library.at is not None:  # others' would not be ready a second time
                    answer["lost"] = library.at
            for variant, why in answer.get("failed", {}).items():
                blank[_column(library.name, variant)] = why
            if "error" not in answer:
                return answer
            lost = answer.get("lost")
            blank[_column(library.name, lost or "")] = answer["error"]
            if lost is None or lost in without:
                return nothing
            without.append(lost)


def _takes_part(library: str, measurement: Measurement) -> bool:
    """Ours always; compiled programs only where they are asked for, the others only elsewhere."""
    return library == OURS or (library == "torch compile") == (measurement.against == COMPILED)


def _column(library: str, variant: str) -> str:
    return f"{library} {variant}".strip()


def planned(options: argparse.Namespace) -> list[Measurement]:
    """The measurements that the command line asks for, in their order."""
    found = in_turns(measurements())
    if options.precisions:
        found = [each for each in found if each.precision in options.precisions.split(",")]
    found = [each for each in found if options.rows in each.key]
    if options.suite != "all":
        found = [each for each in found if (each.row.kind in NETWORKS) == (options.suite == "steps")]
    return [tiny(each) for each in found] if options.runtime == "host" else found


def main(options: argparse.Namespace, names: list[str]) -> int:
    """Measure what is missing until it is done or the time is over; the exit status."""
    os.environ["GPUCNN_KERNELS_RUNTIME"] = options.runtime  # also for what this process asks of the kernels
    deadline = time.monotonic() + 60 * options.minutes
    unknown = set((options.precisions or "float32").split(",")) - set(PRECISIONS)
    if unknown:
        return _refuse(f"unknown precisions {sorted(unknown)}; there are {', '.join(PRECISIONS)}")
    if set(names) - set(LIBRARY_NAMES):
        missing = sorted(set(names) - set(LIBRARY_NAMES))
        return _refuse(f"unknown peers {missing}; there are {', '.join(LIBRARY_NAMES[1:])}")
    started = [Library(name, options.runtime) for name in (OURS, *names)]
    try:
        return _fill(options, started, deadline)
    except TooLateError:
        print("benchmark: the time was over before the first row; give it more --minutes", file=sys.stderr)
        return 3
    except Mismatch as error:
        return _refuse(str(error))
    finally:
        for library in started:
            library.close()


def compile_ahead(options: argparse.Namespace) -> None:
    """Compile our kernels by a process a core, while the libraries are imported: rows need not wait for it."""
    if options.runtime == "host":  # of its tiny rows each takes few
        return
    from gpucnn_kernels import catalog
    from gpucnn_kernels.errors import DeviceError
    from gpucnn_kernels.runtime import ahead

    wanted = set((options.precisions or ",".join(PRECISIONS)).split(","))
    dtypes = ["float32", *sorted(wanted & {"bfloat16", "float16"})]
    began = time.monotonic()
    try:
        count = catalog.warm_up(dtypes, processes=min(ahead.cores(), ahead.MOST_PROCESSES))
    except DeviceError:
        return  # gpucnn's own process says why
    except Exception as error:  # the rows that need it are blank, with this reason; the others are measured
        print(f"benchmark: not all kernels compile: {error}", file=sys.stderr)
    else:
        print(f"{count} modules compiled in {time.monotonic() - began:.0f} s", flush=True)


def _fill(options: argparse.Namespace, started: list[Library], deadline: float) -> int:
    for library in started:
        library.launch()
    compile_ahead(options)
    for library in started:
        try:
            library.start(min(deadline, time.monotonic() + PATIENCE_SECONDS))
        except TooLateError:
            if time.monotonic() >= deadline:
                raise
            library.hello = {"error": f"not there after {PATIENCE_SECONDS:.0f} s"}
    ours = started[0]
    if not ours.works:
        return _refuse(f"gpucnn cannot run here: {ours.hello['error']}")
    libraries = [library for library in started if library.works]
    facts = ours.hello["facts"]
    about = {
        "format": FORMAT,
        "runtime": options.runtime,
        **{name: facts.get(name) for name in ("gpu", "driver")},
        "machine": facts,
        "kernels": fingerprint(),
        "versions": {name: version for each in libraries for name, version in each.hello["versions"].items()},
        "libraries": [each.name for each in libraries],
        "missing": {each.name: each.hello["error"] for each in started if not each.works},
        "rounds": options.rounds,
    }
    results = read(options.json, about)
    for name, why in about["missing"].items():
        print(f"left blank: {name}: {why}", file=sys.stderr)
    plan = planned(options)
    left = [each for each in plan if _is_left(results["rows"].get(each.key), options.retry_blanks)]
    session = Session(libraries, deadline, options.rounds)
    if left:
        sizes = _TINY_CEILINGS if options.runtime == "host" else _CEILINGS
        results["calls"].append({**session.start(ours, sizes), "driver": facts.get("driver")})
    while fitting := [each for each in left if session.left > _reserve(each)]:
        measurement = fitting[0]
        entry = session.measure(measurement)
        if entry is None:
            break
        entry = {**describe(measurement), "call": len(results["calls"]) - 1, **entry}
        results["rows"][measurement.key] = entry
        left.remove(measurement)
        if options.json is not None:
            write(options.json, results)
            _write_page(options.json, results)
        print(gpu_report.line(measurement.key, entry, results), flush=True)
    if options.json is None:
        print(gpu_report.page(results))
    else:
        write(options.json, results)
        page = _write_page(options.json, results)
        print(f"\n{gpu_report.summary(list(results['rows'].values()))}\n\nwritten: {options.json} and {page}")
    if left:
        print(
            f"{len(left)} of {len(plan)} rows are left, from '{left[0].key}' on: call this again with the same "
            f"--json FILE" + ("" if options.json is not None else ", which keeps what is there"),
            file=sys.stderr,
        )
        return 3
    return 0


def _is_left(entry: dict[str, Any] | None, retry_blanks: bool) -> bool:
    """Whether a row is to be measured, or once more because a column of it stayed blank."""
    return entry is None or (retry_blanks and bool(entry["blank"]))


def _reserve(measurement: Measurement) -> float:
    """Seconds that a call must have left for the row."""
    if measurement.against == COMPILED:
        return _RESERVE_SECONDS[COMPILED]
    return _RESERVE_SECONDS["step" if measurement.row.kind in NETWORKS else "operation"]


def _write_page(path: Path, results: dict[str, Any]) -> Path:
    """The page beside the results; where it is."""
    page = path.with_suffix(".md")
    page.write_text(gpu_report.page(results), encoding="utf-8")
    return page


def describe(measurement: Measurement) -> dict[str, Any]:
    """What a file of results says of a row."""
    row = measurement.row
    return {
        "name": row.name,
        "kind": row.kind,
        "direction": row.direction,
        "precision": measurement.precision,
        "against": measurement.against,
        "goal": measurement.goal.name,
        "flops": row.flops,
        "bytes": row.bytes,
        "sizes": row.sizes,
    }


def _refuse(why: str) -> int:
    print(f"benchmark: {why}", file=sys.stderr)
    return 2
