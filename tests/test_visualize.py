"""Pictures: written whole, of the right things, and readable at every number of classes."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
from matplotlib.figure import Figure
from PIL import Image

from gpucnn import layers
from gpucnn.errors import ArgumentError, MissingDependencyError, ShapeError, StorageError
from gpucnn.random import manual_seed
from gpucnn.training import EpochRecord, History
from gpucnn.visualize import confusion as confusion_module
from gpucnn.visualize import curves as curves_module
from gpucnn.visualize import draw_confusion, draw_curves, draw_filters, draw_grad_cam, grad_cam
from gpucnn.visualize.filters import filter_tiles
from gpucnn.visualize.gradcam import enlarge


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, to look into."""
    saved: list[Figure] = []
    for module in (confusion_module, curves_module):
        plain = module.save_figure

        def keep(figure: Figure, path: Any, plain: Any = plain) -> None:
            saved.append(figure)
            plain(figure, path)

        monkeypatch.setattr(module, "save_figure", keep)
    return saved


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        low, high = picture.convert("L").getextrema()
        assert low < 100 < 200 < high  # something is drawn
        return picture.size


def record(epoch: int, validation: tuple[float, float] | None) -> EpochRecord:
    loss, accuracy = validation or (None, None)
    return EpochRecord(epoch, epoch, 0.1, 2.0 / epoch, 1 - 0.5 / epoch, loss, accuracy, 1.0, 10.0)


# ---------------------------------------------------------------- curves


def test_curves_show_both_sets_and_mark_the_best(tmp_path: Path, figures: list[Figure]) -> None:
    validation = [(1.5, 0.5), (0.75, 0.875), (1.0, 0.75)]
    history = History([record(epoch, values) for epoch, values in enumerate(validation, start=1)])
    draw_curves(history, tmp_path / "curves.png", title="a run")
    width, height = size_of(tmp_path / "curves.png")
    assert (width, height) == (1200, 480)
    loss, accuracy = figures[0].axes
    for axes, column in ((loss, 0), (accuracy, 1)):
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert list(lines["training"].get_xdata()) == [1, 2, 3]
        assert list(lines["validation"].get_ydata()) == [values[column] for values in validation]
        assert list(lines["best"].get_xdata()) == [2]
        assert list(lines["best"].get_ydata()) == [validation[1][column]]
        low, high = axes.get_ylim()
        for line in (lines["training"], lines["validation"]):
            assert low <= min(line.get_ydata())
            assert max(line.get_ydata()) < high
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training", "validation", "best"]
    assert accuracy.get_title() == "best: 0.8750 in epoch 2"


@pytest.mark.parametrize("epochs", [1, 60])
def test_curves_without_validation(tmp_path: Path, figures: list[Figure], epochs: int) -> None:
    history = History([record(epoch, None) for epoch in range(1, epochs + 1)])
    draw_curves(history, tmp_path / "curves.png")
    size_of(tmp_path / "curves.png")
    assert [line.get_label() for line in figures[0].axes[0].get_lines()] == ["training"]
    assert figures[0].axes[0].get_xlim() == (0.5, epochs + 0.5)


def test_curves_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="the history is empty"):
        draw_curves(History(), tmp_path / "curves.png")
    with pytest.raises(StorageError, match=r"cannot write .*curves\.png: No such file"):
        draw_curves(History([record(1, None)]), tmp_path / "missing" / "curves.png")


def test_without_matplotlib_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'gpucnn\[plot\]'"):
        draw_curves(History([record(1, None)]), tmp_path / "curves.png")


# ---------------------------------------------------------------- confusion


@pytest.mark.parametrize(("classes", "texts"), [(3, 9), (10, 100), (100, 101)])
def test_confusion_at_any_number_of_classes(
    tmp_path: Path, figures: list[Figure], classes: int, texts: int
) -> None:
    matrix = numpy.diag(numpy.arange(10, 10 + classes))
    matrix[0, 1] = 7
    names = [f"class {number}" for number in range(classes)]
    draw_confusion(matrix, names, tmp_path / "confusion.png", "test")
    size_of(tmp_path / "confusion.png")
    axes = figures[0].axes[0]
    written = {text.get_position(): text for text in axes.texts}
    assert len(written) == texts  # above thirty classes, zeros go unwritten
    assert written[1, 0].get_text() == "7"  # column 1, row 0
    assert written[2, 2].get_text() == "12"
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert axes.get_title().startswith(f"test: {matrix.trace()} of {matrix.sum()} right (")
    # Readable: each number lies within its cell, and row labels do not run into one another.
    renderer = figures[0].canvas.get_renderer()  # type: ignore[attr-defined]
    cell = axes.transData.transform([(0, 0), (1, 1)])
    cell_width, cell_height = abs(cell[1] - cell[0])
    for text in axes.texts:
        box = text.get_window_extent(renderer)
        assert box.width < cell_width
        assert box.height < 1.1 * cell_height
        assert box.height >= 6  # pixels
    boxes = [label.get_window_extent(renderer) for label in axes.get_yticklabels()]
    assert all(upper.y0 >= lower.y1 for upper, lower in itertools.pairwise(boxes))
    boxes = [label.get_window_extent(renderer) for label in axes.get_xticklabels()]
    assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(boxes))


def test_confusion_of_large_counts_long_names_and_no_images(tmp_path: Path, figures: list[Figure]) -> None:
    draw_confusion([[123456, 0], [1, 7]], ["a" * 60, "b"], tmp_path / "a.png")
    assert figures[0].axes[0].get_yticklabels()[0].get_text() == "a" * 23 + "…"
    draw_confusion(numpy.zeros((2, 2), int), ["a", "b"], tmp_path / "b.png")
    assert figures[1].axes[0].get_title() == "0 of 0 right"


def test_confusion_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match=r"got shape \(2, 3\)"):
        draw_confusion(numpy.zeros((2, 3)), ["a", "b"], tmp_path / "c.png")
    with pytest.raises(ArgumentError, match="1 class names for a confusion matrix of 2 classes"):
        draw_confusion(numpy.zeros((2, 2)), ["a"], tmp_path / "c.png")


# ---------------------------------------------------------------- Grad-CAM


def network() -> layers.Sequential:
    manual_seed(11)
    model = layers.Sequential(
        layers.Conv2d(1, 4, 3, padding=1),
        layers.BatchNorm2d(4),
        layers.ReLU(inplace=True),
        layers.AvgPool2d(2),  # no ties, at which there is no gradient to compare with
        layers.Conv2d(4, 3, 3, padding=1),
        layers.Dropout2d(0.5),
        layers.AdaptiveAvgPool2d(1),
        layers.Flatten(),
        layers.BatchNorm1d(3),
        layers.Linear(3, 5),
    )
    norm = model[1]
    assert isinstance(norm, layers.BatchNorm2d)
    norm.running_mean[...] = [0.1, -0.2, 0.0, 0.3]
    norm.running_var[...] = [0.5, 2.0, 1.0, 0.25]
    norm.weight.data[...] = [1.5, -0.5, 1.0, 2.0]  # type: ignore[union-attr]
    return model


def expected_heat(model: layers.Sequential, image: Any, class_index: int, split: int) -> Any:
    """Grad-CAM with the gradient by central differences through the layers after ``split``, in float64."""
    model.to(dtype=numpy.float64)
    model.eval()
    activation = image[None].astype(float)
    for layer in list(model)[: split + 1]:
        activation = layer(activation)
    activation = activation.copy()

    def score(values: Any) -> float:
        values = values.copy()  # the next layer may work in place
        for layer in list(model)[split + 1 :]:
            values = layer(values)
        return float(values[0, class_index])

    weights = numpy.zeros(activation.shape[1])
    for channel, row, column in numpy.ndindex(activation.shape[1:]):
        change = numpy.zeros_like(activation)
        change[0, channel, row, column] = 1e-6
        weights[channel] += (score(activation + change) - score(activation - change)) / 2e-6
    weights /= activation.shape[2] * activation.shape[3]
    return numpy.maximum(sum(weight * plane for weight, plane in zip(weights, activation[0], strict=True)), 0)


@pytest.mark.parametrize(("layer_path", "split"), [("1", 1), ("2", 2), ("3", 3), ("4", 4)])
def test_grad_cam_is_its_definition(layer_path: str, split: int) -> None:
    image = numpy.random.default_rng(3).standard_normal((1, 6, 6)).astype(numpy.float32)
    for class_index in range(5):
        heat = expected_heat(network(), image, class_index, split)
        found = grad_cam(network(), image, class_index, layer_path)
        assert found.shape == (6, 6)
        assert found.dtype == numpy.float32
        enlarged = enlarge(heat, (6, 6))
        expected = enlarged / enlarged.max() if enlarged.max() > 0 else enlarged
        assert abs(found - expected).max() <= 1e-3


def test_grad_cam_takes_the_predicted_class_and_the_last_image() -> None:
    model = network()
    image = numpy.random.default_rng(5).standard_normal((1, 1, 6, 6)).astype(numpy.float32)
    predicted = int(model.eval()(image).argmax())
    # The dropout, which does nothing here, is the last to give an image; the pooled one is 1 x 1.
    assert numpy.array_equal(grad_cam(model, image), grad_cam(model, image, predicted, "4"))


def test_grad_cam_leaves_the_model_as_it_was() -> None:
    model = network().train()
    model[1].training = False
    model[4].weight.requires_grad = False  # type: ignore[union-attr]
    for parameter in model.parameters():
        parameter.gradient[...] = 5
    state = model.state_dict()
    keys = [set(vars(layer)) for layer in model]
    grad_cam(model, numpy.ones((1, 6, 6), numpy.float32))
    assert [layer.training for layer in model] == [True, False] + 8 * [True]
    assert [set(vars(layer)) - {"_saved"} for layer in model] == [names - {"_saved"} for names in keys]
    assert [p.requires_grad for p in model.parameters()] == [True] * 4 + [False] + [True] * 5
    assert all((parameter.gradient == 5).all() for parameter in model.parameters())
    assert model[5].p == 0.5  # type: ignore[union-attr]
    for name, array in model.state_dict().items():
        assert numpy.array_equal(array, state[name])


def test_grad_cam_of_a_class_without_evidence_is_dark() -> None:
    model = layers.Sequential(layers.ReLU(), layers.Flatten(), layers.Linear(4, 2))
    model[2].weight.data[...] = -1  # type: ignore[union-attr]
    assert (grad_cam(model, numpy.ones((1, 2, 2), numpy.float32), 0) == 0).all()


def test_grad_cam_that_cannot_be(tmp_path: Path) -> None:
    model, image = network(), numpy.zeros((1, 6, 6), numpy.float32)
    with pytest.raises(ShapeError, match=r"one image.*got shape \(2, 1, 6, 6\)"):
        grad_cam(model, numpy.zeros((2, 1, 6, 6), numpy.float32))
    with pytest.raises(ArgumentError, match="no layer 'conv9'; it has 0, 1, 2"):
        grad_cam(model, image, layer_path="conv9")
    with pytest.raises(ShapeError, match=r"layer '9' gives an output of shape \(1, 5\)"):
        grad_cam(model, image, layer_path="9")
    with pytest.raises(ArgumentError, match="class 5 does not exist: classes go from 0 to 4"):
        grad_cam(model, image, 5)
    flat = layers.Sequential(layers.Flatten(), layers.Linear(36, 2))
    with pytest.raises(ArgumentError, match="no layer of the model gives an image larger than 1 x 1"):
        grad_cam(flat, image)
    aside = _Aside()
    with pytest.raises(ArgumentError, match="the class score does not depend on layer 'other'"):
        grad_cam(aside, image, layer_path="other")


class _Aside(layers.Layer):
    """Computes something that it does not use."""

    def __init__(self) -> None:
        self.other, self.flatten = layers.ReLU(), layers.Flatten()

    def forward(self, x: Any) -> Any:
        self.other(x)
        return self.flatten(x)

    def backward(self, dy: Any) -> Any:
        return self.flatten.backward(dy)


def test_enlarging_interpolates_between_pixel_centres() -> None:
    found = enlarge(numpy.array([[0.0, 4.0], [8.0, 12.0]]), (2, 4))
    assert numpy.array_equal(found, [[0, 1, 3, 4], [8, 9, 11, 12]])
    assert numpy.array_equal(enlarge(numpy.array([[3.0]]), (2, 3)), numpy.full((2, 3), 3.0))


@pytest.mark.parametrize("shape", [(20, 30, 3), (20, 30), (20, 30, 1)])
def test_a_heat_map_over_its_image(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "heat.png"
    image = numpy.random.default_rng(0).integers(0, 256, shape).astype(numpy.uint8)
    draw_grad_cam(image, numpy.linspace(0, 1, 24).reshape(4, 6), path, title="dog 0.93")
    width, height = size_of(path)
    assert width == 960
    assert height < 600


def test_a_heat_map_over_what_is_no_image(tmp_path: Path) -> None:
    heat = numpy.zeros((2, 2))
    with pytest.raises(ShapeError, match=r"got shape \(3, 4, 4\)"):
        draw_grad_cam(numpy.zeros((3, 4, 4), numpy.uint8), heat, tmp_path / "a.png")
    with pytest.raises(ShapeError, match=r"got shape \(4,\)"):
        draw_grad_cam(numpy.zeros(4, numpy.uint8), heat, tmp_path / "a.png")
    with pytest.raises(ArgumentError, match="strength must be from 0 to 1, got 2"):
        draw_grad_cam(numpy.zeros((4, 4), numpy.uint8), heat, tmp_path / "a.png", strength=2)


# ---------------------------------------------------------------- filters


def test_filters_in_colour_and_by_channel() -> None:
    weight = numpy.zeros((2, 3, 1, 2))
    weight[0, 1, 0, 1], weight[0, 2, 0, 0], weight[1, 0, 0, 0] = 4.0, -2.0, 0.5
    tiles, columns, in_colour = filter_tiles(weight)
    assert in_colour
    assert columns == 2
    assert tiles.shape == (2, 1, 2, 3)
    assert tiles[0, 0, 1].tolist() == [0.5, 1.0, 0.5]  # its largest weight is the brightest
    assert tiles[0, 0, 0].tolist() == [0.5, 0.5, 0.25]
    assert tiles[1, 0, 0].tolist() == [1.0, 0.5, 0.5]
    tiles, columns, in_colour = filter_tiles(weight[:, :2])
    assert not in_colour
    assert columns == 2
    assert tiles.tolist() == [[[0, 0]], [[0, 1]], [[1, 0]], [[0, 0]]]
    tiles, columns, _ = filter_tiles(numpy.ones((500, 8, 3, 3)))
    assert len(tiles) == 1024
    assert columns == 8
    assert filter_tiles(numpy.zeros((32, 1, 3, 3)))[1] == 8


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_filters_as_a_picture(tmp_path: Path, channels: int) -> None:
    manual_seed(1)
    model = layers.Sequential(layers.Conv2d(channels, 6, (3, 5)), layers.ReLU(), layers.Conv2d(6, 4, 3))
    draw_filters(model, tmp_path / "first.png")
    draw_filters(model, tmp_path / "second.png", "2")
    draw_filters(layers.Conv2d(channels, 6, 3), tmp_path / "alone.png")
    for name in ("first", "second", "alone"):
        assert min(size_of(tmp_path / f"{name}.png")) >= 100


def test_filters_of_a_layer_that_has_none(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="Linear has no convolution"):
        draw_filters(layers.Linear(2, 2), tmp_path / "a.png")
    model = layers.Sequential(layers.Conv2d(1, 2, 3), layers.ReLU())
    with pytest.raises(ArgumentError, match="'1' is no convolution of the model; it has 0"):
        draw_filters(model, tmp_path / "a.png", "1")
