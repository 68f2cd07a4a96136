"""Learning curves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gpucnn.errors import ArgumentError
from gpucnn.training.history import EpochRecord, History
from gpucnn.visualize.figure import BLUE, GREY, ORANGE, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_curves(history: History, path: str | Path, title: str = "") -> None:
    """Draw loss and accuracy by epoch, of training and validation, with the best epoch marked, as a PNG.

    Args:
        history: at least one epoch.
        path: the file to write.
        title: a heading.

    Raises ArgumentError for an empty history, StorageError where the file cannot be written,
    MissingDependencyError without Matplotlib.
    """
    if not history.records:
        raise ArgumentError("the history is empty: there are no learning curves before the first epoch has ended")
    figure = new_figure(10, 4)
    loss, accuracy = figure.subplots(1, 2)
    _draw(loss, history, lambda record: record.train_loss, lambda record: record.validation_loss)
    _draw(accuracy, history, lambda record: record.train_accuracy, lambda record: record.validation_accuracy)
    loss.set_ylabel("loss")
    accuracy.set_ylabel("accuracy")
    losses = [value for record in history for value in _known(record.train_loss, record.validation_loss)]
    loss.set_ylim(0, 1.08 * max(*losses, 1e-3))
    shares = [value for record in history for value in _known(record.train_accuracy, record.validation_accuracy)]
    margin = 0.05 * (1 - min(shares)) + 1e-3
    accuracy.set_ylim(min(shares) - 2 * margin, 1 + margin)
    best = history.best
    if best is not None and best.validation_accuracy is not None:
        accuracy.set_title(f"best: {best.validation_accuracy:.4f} in epoch {best.epoch}", fontsize=10)
    if title:
        figure.suptitle(title)
    save_figure(figure, path)


def _draw(
    axes: Axes,
    history: History,
    training: Callable[[EpochRecord], float],
    validation: Callable[[EpochRecord], float | None],
) -> None:
    from matplotlib.ticker import MaxNLocator

    epochs = [record.epoch for record in history]
    marker = "o" if len(epochs) <= 30 else ""
    axes.plot(epochs, [training(record) for record in history], color=BLUE, marker=marker, ms=3, label="training")
    known = [(record.epoch, value) for record in history if (value := validation(record)) is not None]
    if known:
        axes.plot(*zip(*known, strict=True), color=ORANGE, marker=marker, ms=3, label="validation")
    best = history.best
    value = None if best is None else validation(best)
    if best is not None and value is not None:
        axes.axvline(best.epoch, color=GREY, lw=1, ls=":")
        axes.plot(
            [best.epoch], [value], color=ORANGE, marker="*", ms=13, mec="black", mew=0.6, ls="", label="best"
        )
    axes.set_xlim(0.5, epochs[-1] + 0.5)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _known(*values: float | None) -> list[float]:
    return [value for value in values if value is not None]
