"""What the commands print: lines for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gpucnn.cli.streams import write_error
from gpucnn.data import DataSplits
from gpucnn.models import Model
from gpucnn.training import EvaluationResult


def note(message: str, *, quiet: bool = False) -> None:
    """A line on standard error, beside the results."""
    if not quiet:
        write_error(f"{message}\n")


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on standard output."""
    print(json.dumps(value, indent=2, allow_nan=False))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns, the first one to the left and the others to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def describe_data(splits: DataSplits) -> str:
    """A data set in a line."""
    height, width, channels = splits.image_shape
    sizes = ", ".join(f"{len(part):,} {name}" for name, part in splits.parts().items())
    return f"{splits.name}: {sizes} images of {height}x{width}x{channels}, {len(splits.classes)} classes"


def describe_model(model: Model) -> str:
    """A model in a line."""
    shape = "x".join(str(size) for size in model.input_shape or ())
    return f"{model.name}, {model.parameter_count:,} parameters, input {shape}"


def describe_result(split: str, result: EvaluationResult) -> str:
    """An evaluation: the accuracy, then a table of the classes."""
    shares = ("accuracy", "precision", "f1")
    rows = [
        (entry["class"], f"{entry['images']:,}", *(_share(entry[name]) for name in shares))
        for entry in result.to_dict()["per_class"]
    ]
    headline = f"{split} accuracy {result.accuracy:.4f}, loss {result.loss:.4f} ({len(result.labels):,} images)"
    return f"{headline}\n\n{table(('class', 'images', *shares), rows)}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
