"""The results of a GPU as a page: times, speed beside the best peer's, goals, and the share of the limit."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarking.gpu_rows import COMPILED, GOALS, LIBRARIES, NETWORKS, PRECISIONS, measurements
from benchmarking.report import geometric_mean, shown, spread

OURS = ("gpucnn", "gpucnn channels-last", "gpucnn captured")
"""What a user gets without asking for an algorithm, in either memory format; and steps as ``fit`` takes them."""

CACHED_BYTES = 128e6
"""What a row moves at least for little of it to lie in a GPU's second-level cache: an H200's has 50 MB."""

PREDICTIONS = Path(__file__).resolve().parents[2] / "docs" / "kernels" / "predictions.json"
"""Seconds of rows, by key, that an H200 is reckoned to take."""


def best(entry: dict[str, Any], ours: bool) -> tuple[str, float] | None:
    """(the column, its median seconds) of our best layout, or of the best peer; None where there is none.

    JAX is timed with a warm cache, where the others' is cold: it is no peer of a row that fits into one.
    """
    warm = () if (entry.get("bytes") or 0) > CACHED_BYTES else ("jax",)
    found = {
        column: median(samples)
        for column, samples in entry["seconds"].items()
        if samples and (column in OURS if ours else not column.startswith("gpucnn") and column not in warm)
    }
    if not found:
        return None
    column = min(found, key=lambda name: found[name])
    return column, found[column]


def speed(entry: dict[str, Any]) -> float | None:
    """The best peer's time over ours: above 1 we are faster."""
    ours, peer = best(entry, True), best(entry, False)
    return None if ours is None or peer is None else peer[1] / ours[1]


def limit_seconds(entry: dict[str, Any], ceilings: dict[str, float]) -> float | None:
    """The least time by the measured ceilings: operations at the precision's rate, or bytes at a copy's."""
    least = [
        entry[work] / ceilings[name]
        for work, name in (("flops", entry["precision"]), ("bytes", "copy"))
        if entry[work] and ceilings.get(name)
    ]
    return max(least, default=None)


def share(entry: dict[str, Any], results: dict[str, Any]) -> float | None:
    """Of the limit that was measured in the same call."""
    ours = best(entry, True)
    least = limit_seconds(entry, results["calls"][entry["call"]]["ceilings"])
    return None if ours is None or least is None else least / ours[1]


def goal_reached(entry: dict[str, Any]) -> str:
    """The last of first, then and goal that the speed reaches; a dash where there is none to reach."""
    ratio, speeds = speed(entry), GOALS[entry["goal"]].speeds
    if ratio is None or not any(speeds):
        return "-"
    reached = [
        name
        for name, least in zip(("first", "then", "goal"), speeds, strict=True)
        if least is not None and ratio >= least
    ]
    return reached[-1] if reached else "none yet"


def line(key: str, entry: dict[str, Any], results: dict[str, Any]) -> str:
    """A row in a line, for the terminal."""
    ours, peer, ratio, part = best(entry, True), best(entry, False), speed(entry), share(entry, results)
    words = [f"{key}: {'-' if ours is None else f'{ours[0]} {shown(ours[1])}'}"]
    if peer is not None:
        words.append(f"{peer[0]} {shown(peer[1])}")
    if ratio is not None:
        words.append(f"speed {ratio:.2f} ({goal_reached(entry)})")
    if part is not None:
        words.append(f"{part:.0%} of the limit")
    return ", ".join(words)


@functools.cache
def predictions() -> dict[str, float]:
    """What was predicted of our times before anything was measured, by the row's key."""
    if not PREDICTIONS.exists():
        return {}
    rows = json.loads(PREDICTIONS.read_text(encoding="utf-8"))["rows"]
    return {key: entry["seconds"] for key, entry in rows.items() if "seconds" in entry}


def predicted(entry: dict[str, Any], results: dict[str, Any]) -> float | None:
    """The prediction for a row on an H200; None for other rows and other GPUs, which it is not for."""
    if "H200" not in str(results["gpu"]):
        return None
    key = f"{entry['name']} {entry['direction']}, {entry['precision']}, {entry['against']}"
    return predictions().get(key)


def _goals(name: str) -> str:
    goal = GOALS[name]
    cells = []
    for least, part in zip(goal.speeds, goal.shares, strict=True):
        cells.append(" ".join([*([f"{least:g}"] if least else []), *([f"({part:.0%})"] if part else [])]) or "-")
    return " / ".join(cells) if any(goal.speeds) else "-"


def _rows_there(name: str, speeds: Sequence[float]) -> str:
    """How many of the rows are as fast as each goal of a class: "7 / 3 / 0"."""
    goals = GOALS[name].speeds
    if not any(goals):
        return "-"
    return " / ".join("-" if least is None else str(sum(ratio >= least for ratio in speeds)) for least in goals)


def table(entries: Sequence[dict[str, Any]], results: dict[str, Any]) -> str:
    """A Markdown table of rows of one precision."""
    columns = [column for entry in entries for column in entry["seconds"]]
    columns = sorted(set(columns), key=lambda column: (not column.startswith("gpucnn"), column))
    foreseen = any(predicted(entry, results) is not None for entry in entries)
    header = ["row", "pass", *columns, *["predicted"] * foreseen]
    header += ["spread", "speed", "first / then / goal", "reached", "limit"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for entry in entries:
        ratio, part = speed(entry), share(entry, results)
        samples = entry["seconds"]
        cells = [entry["name"], entry["direction"]]
        cells += [shown(median(samples[column]) if samples.get(column) else None) for column in columns]
        cells += [shown(predicted(entry, results))] * foreseen
        cells += [
            f"{max((spread(values) for values in samples.values() if values), default=0.0):.0%}",
            "-" if ratio is None else f"{ratio:.2f}",
            _goals(entry["goal"]),
            goal_reached(entry),
            "-" if part is None else f"{part:.0%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(entries: Sequence[dict[str, Any]]) -> str:
    """The geometric mean of the speeds of each class and precision, and how many rows reached which goal."""
    lines = [
        "| class | precision | against | rows | speed, mean | least | first / then / goal | rows there |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in GOALS:
        for precision in PRECISIONS:
            for against in (LIBRARIES, COMPILED):
                speeds = [
                    ratio
                    for entry in entries
                    if (entry["goal"], entry["precision"], entry["against"]) == (name, precision, against)
                    and (ratio := speed(entry)) is not None
                ]
                if speeds:
                    lines.append(
                        f"| {name} | {precision} | {against} | {len(speeds)} | {geometric_mean(speeds):.2f} | "
                        f"{min(speeds):.2f} | {_goals(name)} | {_rows_there(name, speeds)} |"
                    )
    return "\n".join(lines) if len(lines) > 2 else "No row has a peer's time yet."


@functools.cache
def _places() -> dict[str, int]:
    return {measurement.key: place for place, measurement in enumerate(measurements())}


def _place(key: str) -> int:
    """Where a row stands on the page, whenever it was measured; one that there is no more, last."""
    return _places().get(key, len(_places()))


def page(results: dict[str, Any]) -> str:
    """The whole report in Markdown."""
    machine = results["machine"]
    results = {**results, "rows": {key: results["rows"][key] for key in sorted(results["rows"], key=_place)}}
    rows = list(results["rows"].values())
    rehearsal = results["runtime"] == "host"
    dates = sorted({call["date"] for call in results["calls"]})
    facts = ", ".join(f"{name} {value}" for name, value in machine.items() if name not in ("gpu", "driver"))
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"# Benchmark: {results['gpu']}",
        "",
        *(["**A rehearsal without a GPU, of tiny sizes: its times mean nothing.**", ""] if rehearsal else []),
        f"{', '.join(dates)}; driver {results['driver']}; {versions}; kernels {results['kernels']}."
        + (f" {facts}." if facts else ""),
        "",
        "Written by `scripts/benchmark.py --device cuda`, every number measured; [README.md](README.md) says how. "
        f"Each library runs in a process of its own; they take turns, {results['rounds']} rounds a row, and "
        "medians are shown. Speed is the best peer's time over ours, of either memory format, at equal precision: "
        "above 1 we are faster. Limit is the share of what was measured to be possible in the same call. Spread "
        "is half the distance between the quartiles, the largest of the row.",
        "",
        "## Ceilings",
        "",
        "| call | copy | " + " | ".join(f"matrix product, {name}" for name in PRECISIONS) + " |",
        "|" + "---|" * (len(PRECISIONS) + 2),
    ]
    for number, call in enumerate(results["calls"], 1):
        found = call["ceilings"]
        cells = [f"{found['copy'] / 1e9:.0f} GB/s" if "copy" in found else "-"]
        cells += [f"{found[name] / 1e12:.1f} TFLOP/s" if name in found else "-" for name in PRECISIONS]
        lines.append(f"| {number} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Relative errors of a convolution of 576 terms against float64, which show the precision at work:",
    ]
    lines += ["", "| library | " + " | ".join(PRECISIONS) + " |", "|" + "---|" * (len(PRECISIONS) + 1)]
    for library, proofs in (results["calls"][-1]["proofs"] if results["calls"] else {}).items():
        cells = [f"{found:.1e}" if isinstance(found, float) else "-" for found in map(proofs.get, PRECISIONS)]
        lines.append(f"| {library} | " + " | ".join(cells) + " |")
    lines += ["", "## Summary", "", summary(rows), ""]
    for against, title in ((LIBRARIES, ""), (COMPILED, ", beside compiled programs")):
        for precision in PRECISIONS:
            for kind, what in ((True, "Networks"), (False, "Operations")):
                entries = [
                    entry
                    for entry in rows
                    if (entry["against"], entry["precision"]) == (against, precision)
                    and (entry["kind"] in NETWORKS) == kind
                ]
                if entries:
                    lines += [f"## {what}, {precision}{title}", "", table(entries, results), ""]
    ways = []
    for key, entry in results["rows"].items():
        taken = {column: chosen["way"] for column, chosen in entry["settings"].items() if "way" in chosen}
        if taken:
            ways.append(f"- {key}: " + ", ".join(f"{column}: {way}" for column, way in taken.items()))
    if ways:
        lines += ["## The ways that our convolutions took", "", *ways, ""]
    blanks = [f"- {library}: {why}" for library, why in results["missing"].items()]
    for key, entry in results["rows"].items():
        blanks += [f"- {key}: {column}: {why}" for column, why in entry["blank"].items()]
    if blanks:
        lines += ["## Blanks", "", *blanks, ""]
    return "\n".join(lines)
