"""Pictures through Matplotlib's object interface: no window system, no global state."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpucnn.errors import MissingDependencyError
from gpucnn.training.storage import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 120

# Okabe and Ito's colours, which people with any kind of colour vision tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches. Raises MissingDependencyError without Matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "pictures need Matplotlib, which is not installed; pip install 'gpucnn[plot]'"
        ) from error
    return Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write ``figure`` as PNG, whole or not at all. Raises StorageError where the disk refuses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)  # whose print_png has no annotations
    with atomic_file(Path(path)) as file:
        canvas.print_png(file)  # savefig would draw everything twice
