"""The confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.device import to_cpu
from gpucnn.errors import ArgumentError, ShapeError
from gpucnn.visualize.figure import new_figure, save_figure

_LONGEST_NAME = 24
_MANY = 30  # above this, zeros go unwritten and the figures shrink


def draw_confusion(matrix: Any, classes: Sequence[str], path: str | Path, title: str = "") -> None:
    """Draw how often each true class (row) was taken for each class (column), as a PNG.

    The colour is the share of the row, the number the count. The picture grows with the number of classes.

    Args:
        matrix: (classes, classes) counts.
        classes: their names.
        path: the file to write.
        title: a heading.

    Raises ShapeError for a matrix that is not square, ArgumentError where the names are not as many, StorageError
    where the file cannot be written, MissingDependencyError without Matplotlib.
    """
    counts: NDArray[Any] = to_cpu(matrix)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.size:
        raise ShapeError(f"a confusion matrix is (classes, classes), got shape {counts.shape}")
    number = len(counts)
    if len(classes) != number:
        raise ArgumentError(f"{len(classes)} class names for a confusion matrix of {number} classes")
    names = [name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…" for name in classes]
    many = number > _MANY
    digits = len(str(int(counts.max())))
    cell = max(0.2, 0.055 * digits) if many else min(1.0, max(0.42, 0.1 * digits, 4.0 / number))
    margin = 1.1 + 0.085 * max(len(name) for name in names)
    figure = new_figure(number * cell + margin, number * cell + margin)
    axes = figure.subplots()
    images = counts.sum(axis=1, keepdims=True)
    shares = counts / numpy.maximum(images, 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    size = 5 if many else min(12, 60 * cell / max(digits, 2))
    for row, column in numpy.ndindex(number, number):
        count = int(counts[row, column])
        if count or not many:
            color = "white" if shares[row, column] > 0.55 else "black" if count else "#999999"
            text = axes.text(column, row, f"{count}", ha="center", va="center", color=color, fontsize=size)
            text.set_in_layout(False)  # it lies within the axes; measuring thousands takes seconds
    label_size = 6 if many else 10
    upright = not many and max(len(name) for name in names) * 0.085 < cell
    axes.set_xticks(range(number), names, rotation=0 if upright else 90, fontsize=label_size)
    axes.set_yticks(range(number), names, fontsize=label_size)
    if many:
        edges = numpy.arange(1, number) - 0.5
        axes.hlines(edges, -0.5, number - 0.5, color="#dddddd", lw=0.3)
        axes.vlines(edges, -0.5, number - 0.5, color="#dddddd", lw=0.3)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    total = int(counts.sum())
    share = f"{int(counts.trace())} of {total} right" + (f" ({counts.trace() / total:.2%})" if total else "")
    axes.set_title(f"{title}: {share}" if title else share)
    save_figure(figure, path)
