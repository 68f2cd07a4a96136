"""The first layer's filters as pictures."""

from __future__ import annotations

from pathlib import Path

import numpy
from numpy.typing import NDArray

from gpucnn.device import to_cpu
from gpucnn.errors import ArgumentError
from gpucnn.layers import Conv2d, Layer
from gpucnn.visualize.figure import new_figure, save_figure

_MOST_TILES = 1024


def draw_filters(model: Layer, path: str | Path, layer_path: str | None = None) -> None:
    """Draw the filters of a convolution, as a PNG.

    A layer that reads three channels shows each filter in colour, mid-grey being zero and each filter stretched
    to its own largest weight; any other a row for each filter and a column for each channel, blue below zero and
    red above.

    Args:
        model: the network.
        path: the file to write.
        layer_path: which convolution; the first unless given.

    Raises ArgumentError where there is no such convolution, StorageError where the file cannot be written,
    MissingDependencyError without Matplotlib.
    """
    convolutions = {name: layer for name, layer in model.named_layers() if isinstance(layer, Conv2d)}
    if not convolutions:
        raise ArgumentError(f"{type(model).__name__} has no convolution whose filters could be drawn")
    name = next(iter(convolutions)) if layer_path is None else layer_path
    if name not in convolutions:
        raise ArgumentError(f"'{name}' is no convolution of the model; it has {', '.join(convolutions)}")
    weight = to_cpu(convolutions[name].weight.data).astype(numpy.float64)
    tiles, columns, in_colour = filter_tiles(weight)
    rows = -(-len(tiles) // columns)
    height, width = tiles.shape[1:3]
    tile_inches = min(0.9, 12 / columns, 40 / rows)
    figure = new_figure(max(columns * tile_inches, 3), max(rows * tile_inches * height / width, 0.6) + 0.5)
    axes = figure.subplots()
    shape = (rows * (height + 1) - 1, columns * (width + 1) - 1)
    canvas = numpy.full((*shape, *tiles.shape[3:]), 1.0 if in_colour else numpy.nan)
    for number, tile in enumerate(tiles):
        top, left = number // columns * (height + 1), number % columns * (width + 1)
        canvas[top : top + height, left : left + width] = tile
    if in_colour:
        axes.imshow(canvas, interpolation="nearest")
    else:
        axes.imshow(canvas, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(f"{name or type(model).__name__}: {len(weight)} filters of {height}x{width}", fontsize=10)
    save_figure(figure, path)


def filter_tiles(weight: NDArray[numpy.float64]) -> tuple[NDArray[numpy.float64], int, bool]:
    """(tiles, tiles in a row, whether they are in colour) for weights (K, C, R, S).

    Colour tiles are (K, R, S, 3), 0 .. 1 with 0.5 for zero; the others (K * C, R, S), -1 .. 1. At most 1024 tiles,
    whole filters of them, the first ones.
    """
    filters, channels = weight.shape[:2]
    largest = numpy.maximum(abs(weight).max(axis=(1, 2, 3), keepdims=True), 1e-12)
    scaled = weight / largest
    if channels == 3:
        colour = scaled[:_MOST_TILES].transpose(0, 2, 3, 1)
        return 0.5 + colour / 2, _columns(len(colour)), True
    shown = max(1, min(filters, _MOST_TILES // channels))
    tiles = scaled[:shown].reshape(shown * channels, *weight.shape[2:])[:_MOST_TILES]
    return tiles, _columns(shown) if channels == 1 else min(channels, len(tiles)), False


def _columns(tiles: int) -> int:
    """Tiles in a row: up to twice as many as there are rows."""
    return max(1, min(tiles, int(numpy.ceil(numpy.sqrt(2 * tiles)))))
