"""Results as a table and as JSON: medians, spread, the ratio to the best peer, the share of the measured limit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

OURS = "gpucnn"


def spread(samples: Sequence[float]) -> float:
    """Half the distance between the quartiles, as a share of the median."""
    ordered = sorted(samples)
    quarter = len(ordered) // 4
    return (ordered[-1 - quarter] - ordered[quarter]) / 2 / median(ordered)


def summarize(entry: dict[str, Any], limits: dict[str, float]) -> None:
    """Add ``best_peer``, ``ratio`` (our time over the best peer's) and ``limit_share`` to a row's entry."""
    medians = {peer: median(samples) for peer, samples in entry["seconds"].items() if samples}
    entry["median"] = medians
    entry["spread"] = {peer: spread(entry["seconds"][peer]) for peer in medians}
    others = {peer: value for peer, value in medians.items() if peer != OURS}
    if others:
        entry["best_peer"] = min(others, key=lambda peer: others[peer])
    if OURS in medians:
        if others:
            entry["ratio"] = medians[OURS] / others[entry["best_peer"]]
        least = max(
            entry["flops"] / limits["flops"] if entry["flops"] else 0.0,
            entry["bytes"] / limits["bytes"] if entry["bytes"] else 0.0,
        )
        if least:
            entry["limit_share"] = least / medians[OURS]


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean logarithm; NaN of none."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else math.nan


def shown(seconds: float | None) -> str:
    """A time to be read: "12.3 us", "4.56 ms", "1.20 s"; a dash for none."""
    if seconds is None:
        return "-"
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError


def row_table(entries: Sequence[dict[str, Any]], peers: Sequence[str]) -> str:
    """A Markdown table of timed rows."""
    header = ["row", "pass", *peers, "spread", "ratio", "limit"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for entry in entries:
        ratio, share = entry.get("ratio"), entry.get("limit_share")
        cells = [entry["name"], entry["direction"]]
        cells += [shown(entry["median"].get(peer)) for peer in peers]
        cells += [
            f"{max(entry['spread'].values(), default=0.0):.0%}",
            "-" if ratio is None else f"**{ratio:.2f}**" if ratio > 1 else f"{ratio:.2f}",
            "-" if share is None else f"{share:.0%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    ratios = [entry["ratio"] for entry in entries if "ratio" in entry]
    if ratios:
        lines += [
            "",
            f"Geometric mean of the ratios {geometric_mean(ratios):.3f}; largest {max(ratios):.2f}; "
            f"{sum(ratio <= 1 for ratio in ratios)} of {len(ratios)} rows at 1 or below.",
        ]
    return "\n".join(lines)


def memory_table(entries: Sequence[dict[str, Any]], peers: Sequence[str]) -> str:
    """A Markdown table of peak memory."""
    lines = ["| training step | " + " | ".join(peers) + " | ratio |", "|" + "---|" * (len(peers) + 2)]
    for entry in entries:
        found = {peer: entry["memory"][peer]["bytes"] for peer in peers if peer in entry["memory"]}
        others = [value for peer, value in found.items() if peer != OURS]
        ratio = f"{found[OURS] / min(others):.2f}" if OURS in found and others else "-"
        cells = [f"{found[peer] / 2**20:.0f} MiB" if peer in found else "-" for peer in peers]
        lines.append("| " + " | ".join([entry["name"], *cells, ratio]) + " |")
    return "\n".join(lines)


def page(results: dict[str, Any]) -> str:
    """The whole report in Markdown."""
    machine, limits, peers = results["machine"], results["limits"], results["peers"]
    lines = [
        f"# Benchmark: {results['device']}",
        "",
        f"{results['date']}, {machine['processor']}, {machine['threads']} threads, Python {machine['python']}; "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        + ".",
        "",
        "Written by `scripts/benchmark.py`, every number measured in this run. Each library runs in a process of "
        f"its own; they take turns, {results['rounds']} rounds, and the medians are shown. Ratio is our time over "
        "the best peer's: below 1 we are faster. Limit is the share of what the machine was measured to do: "
        f"{limits['flops'] / 1e9:.0f} GFLOP/s in a matrix product, {limits['bytes'] / 1e9:.1f} GB/s in a copy. "
        "Spread is half the distance between the quartiles, the largest of the row.",
        "",
    ]
    for suite, title in (("operations", "Operations"), ("steps", "Training steps"), ("end-to-end", "End to end")):
        timed = [entry for entry in results["rows"] if entry["suite"] == suite and "memory" not in entry]
        held = [entry for entry in results["rows"] if entry["suite"] == suite and "memory" in entry]
        if timed or held:
            lines += [f"## {title}", ""]
        if timed:
            lines += [row_table(timed, peers), ""]
        if held:
            lines += [
                "Peak resident memory of five training steps, beyond what the process held before:",
                "",
                memory_table(held, peers),
                "",
            ]
    blanks = [
        f"- {entry['name']} {entry['direction']}, {peer}: {reason}"
        for entry in results["rows"]
        for peer, reason in entry["blank"].items()
    ]
    blanks += [f"- {peer}: {reason}" for peer, reason in results["missing"].items()]
    if blanks:
        lines += ["## Blanks", "", *blanks, ""]
    return "\n".join(lines)
