"""What a finished run leaves behind: the test's result, the summary and the pictures."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import gpucnn
from gpucnn.cli.report import describe_result, note
from gpucnn.cli.settings import Settings
from gpucnn.data import DataSplits
from gpucnn.errors import MissingDependencyError
from gpucnn.models import Model
from gpucnn.training import Callback, EpochRecord, History, RunFolder, Trainer, evaluate
from gpucnn.visualize import draw_confusion, draw_curves

_DRAWING_SECONDS = 30.0  # between drawings while it trains: each takes half a second


class CurvesCallback(Callback):
    """Draws the learning curves now and then, so that a long run can be watched; nothing without Matplotlib."""

    def __init__(self, folder: RunFolder, seconds: float = _DRAWING_SECONDS) -> None:
        self._folder, self._seconds = folder, seconds
        self._drawn = time.monotonic()

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        """Draw where the last drawing is some time ago."""
        if time.monotonic() - self._drawn >= self._seconds:
            draw(lambda: draw_curves(trainer.history, self._folder.curves_path))
            self._drawn = time.monotonic()


def draw(picture: Callable[[], object]) -> bool:
    """Draw a picture; whether there was Matplotlib to do it."""
    try:
        picture()
    except MissingDependencyError:
        return False
    return True


def finish(settings: Settings, splits: DataSplits, model: Model, trainer: Trainer, folder: RunFolder) -> int:
    """Evaluate the best epoch's weights on what was held out; write and print the results; the exit status.

    They are written first: whatever becomes of the output, the run's folder has them.
    """
    history = trainer.history
    model.load_state_dict(folder.read_best().evaluation_state)
    summary = summarize(splits, model, history)
    files = [folder.summary_path, folder.best_path, folder.curves_path]
    pictures: list[Callable[[], object]] = [lambda: draw_curves(history, folder.curves_path)]
    held_out = [name for name in splits.parts() if name != "train"]
    if held_out:
        split = held_out[-1]  # the test part, or the validation part where there is none
        result = evaluate(
            model,
            splits.parts()[split],
            trainer.preprocessing,
            trainer.options.resolved_evaluation_batch_size,
            workers=settings["workers"],
        )
        report = describe_result(split, result)
        summary |= {"split": split, "evaluation": result.to_dict()}
        pictures.append(lambda: draw_confusion(result.confusion, result.classes, folder.confusion_path))
        files.append(folder.confusion_path)
    else:
        report = "no images were held out to test on; see --validation-fraction and --test-fraction"
    folder.write_summary(summary)
    drawn = all(draw(picture) for picture in pictures)
    print(report, flush=True)
    written = ", ".join(file.name for file in files if drawn or file.suffix != ".png")
    note(f"\nwritten to {folder.path}: {written}", quiet=settings["quiet"])
    if not drawn:
        note("pictures of the curves and the confusion matrix need Matplotlib: pip install 'gpucnn[plot]'")
    return 0


def summarize(splits: DataSplits, model: Model, history: History) -> dict[str, Any]:
    """The summary of a run, but for the evaluation."""
    best = history.best
    return {
        "gpucnn": gpucnn.__version__,
        "data": splits.name,
        "model": model.name,
        "parameters": model.parameter_count,
        "epochs": len(history),
        "best_epoch": None if best is None else best.epoch,
        "best_validation_accuracy": None if best is None else best.validation_accuracy,
        "stopped_early": history.stopped_early,
        "seconds": sum(record.seconds for record in history),
        "images_per_second": sum(record.images_per_second for record in history) / max(len(history), 1),
    }
