"""Writes docs/results.md from run folders: each number in it is read from a run, none is typed.

    .venv/bin/python scripts/document_results.py RUN [RUN ...]

A run takes the place of the row and section that bear its folder's name, or is added at the end; what the page has
of other runs stays. Curves, confusion matrices, histories and summaries are copied to docs/results/, one folder a
run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from gpucnn.errors import CheckpointError
from gpucnn.training import RunFolder

DOCS = Path(__file__).resolve().parent.parent / "docs"
KEPT = ("curves.png", "confusion.png", "history.jsonl", "summary.json")
INTRODUCTION = """# Results

What the commands reach, with the defaults of each data set (`gpucnn/cli/recipes.py`) unless a flag says otherwise.
This page is written by `scripts/document_results.py` from the folders of the runs; the histories and summaries
that it was made of are in `docs/results/`.

Accuracy is that of the best epoch's weights (of the last epoch's, where there is no validation part) on the part
named. Times are wall-clock and of a shared machine with two processor cores, often busy with other work: an upper
limit, not a measurement of speed.

| data | model | parameters | epochs | images | accuracy | training time |
|---|---|---|---|---|---|---|
"""


def command_of(config: dict[str, Any]) -> str:
    """The command that made the run, without what only concerns the machine: folders and threads."""
    words, arguments = ["gpucnn"], iter(config["command"])
    for word in arguments:
        if word in ("-o", "--output", "--workers"):
            next(arguments)
        else:
            words.append(f"{Path(word).name}/" if os.path.isabs(word) else word)
    return " ".join(words)


def minutes(seconds: float) -> str:
    """A time to be read: "41 s", "12 min"."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def section(run: RunFolder) -> tuple[str, str]:
    """(row of the table, section) of a finished run; its files are copied."""
    config, summary, history = run.read_config(), run.read_summary(), run.read_history()
    evaluation, name = summary["evaluation"], run.path.name
    target = DOCS / "results" / name
    target.mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        shutil.copyfile(run.path / file, target / file)
    data = Path(summary["data"]).name
    images = f"{evaluation['images']:,} {summary['split']}"
    precision = config["settings"].get("precision", "float32")
    model = summary["model"] if precision == "float32" else f"{summary['model']}, {precision}"
    row = (
        f"| {data} | [{model}](#{name}) | {summary['parameters']:,} | {summary['epochs']} | {images} "
        f"| **{evaluation['accuracy']:.4f}** | {minutes(summary['seconds'])} |"
    )
    last = history[len(history) - 1]
    lines = [
        f"## {name}",
        "",
        "```",
        command_of(config),
        "```",
        "",
        f"{data}, `{summary['model']}`: {images} images, accuracy {evaluation['accuracy']:.4f}, loss "
        f"{evaluation['loss']:.4f}. Best epoch {summary['best_epoch']} of {summary['epochs']}; training loss "
        f"{last.train_loss:.4f} in the last. {minutes(summary['seconds'])}, "
        f"{summary['images_per_second']:.0f} images a second, with Python {config['machine']['python']} and NumPy "
        f"{config['machine']['numpy']}.",
        "",
        f"![learning curves of {name}](results/{name}/curves.png)",
        "",
        "| class | images | accuracy | precision | F1 |",
        "|---|---|---|---|---|",
    ]
    for entry in evaluation["per_class"]:
        shares = " | ".join(f"{entry[key]:.4f}" for key in ("accuracy", "precision", "f1"))
        lines.append(f"| {entry['class']} | {entry['images']:,} | {shares} |")
    lines += ["", f"![confusion matrix of {name}](results/{name}/confusion.png)", ""]
    return row, "\n".join(lines)


def documented(page: str) -> dict[str, tuple[str, str]]:
    """By run, the (row, section) that the page has."""
    sections = {text.partition("\n")[0]: f"## {text}" for text in page.split("\n## ")[1:]}
    rows = {match[1]: match[0] for match in re.finditer(r"^\| .*\]\(#([^)]+)\).*$", page, re.MULTILINE)}
    return {name: (row, sections[name].rstrip("\n") + "\n") for name, row in rows.items()}


def main(folders: list[str]) -> int:
    """Write the page; the exit status."""
    if not folders:
        print(__doc__, file=sys.stderr)
        return 2
    page = DOCS / "results.md"
    try:
        parts = documented(page.read_text(encoding="utf-8") if page.exists() else "")
        for folder in folders:
            parts[RunFolder(folder).path.name] = section(RunFolder(folder))
    except (CheckpointError, OSError, KeyError, json.JSONDecodeError) as error:
        print(f"document_results: {error}", file=sys.stderr)
        return 2
    rows, sections = zip(*parts.values(), strict=True)
    page.write_text(INTRODUCTION + "\n".join(rows) + "\n\n" + "\n".join(sections), encoding="utf-8")
    print(f"wrote {page} and {DOCS / 'results'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
