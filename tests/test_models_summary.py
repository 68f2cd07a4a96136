"""The table of layers: shapes, parameters, operations, and that looking changes nothing."""

from __future__ import annotations

import numpy
import pytest

from gpucnn.errors import ArgumentError, ShapeError
from gpucnn.layers import BatchNorm2d, Conv2d, ConvTranspose2d, Flatten, Layer, Linear, ReLU, Sequential
from gpucnn.models import LeNet5, summary


def test_lenet5_by_hand():
    table = summary(LeNet5())
    assert [
        (row.path, row.kind, row.output_shape, row.parameter_count, row.flops) for row in table.layers[:3]
    ] == [
        ("features.0", "Conv2d", (1, 6, 28, 28), 6 * 25 + 6, 2 * 6 * 28 * 28 * 25),
        ("features.1", "ReLU", (1, 6, 28, 28), 0, 0),
        ("features.2", "MaxPool2d", (1, 6, 14, 14), 0, 0),
    ]
    assert table.parameter_count == sum(row.parameter_count for row in table.layers) == 61_706
    convolutions = 6 * 28 * 28 * 25 + 16 * 10 * 10 * 6 * 25
    assert table.flops == 2 * (convolutions + 400 * 120 + 120 * 84 + 84 * 10)


def test_table_reads():
    lines = str(summary(LeNet5())).splitlines()
    assert lines[0] == "lenet5, input 1 x 28 x 28"
    assert lines[2].split() == ["layer", "kind", "output", "parameters", "FLOPs"]
    assert lines[4].split() == ["features.0", "Conv2d", "6", "x", "28", "x", "28", "156", "235,200"]
    assert lines[-1].split() == ["total", "61,706", "833,040"]
    assert len({len(line) for line in lines if line.startswith("-")}) == 1


def test_grouped_and_transposed_convolutions():
    model = Sequential(Conv2d(4, 8, 3, groups=2, padding=1), ConvTranspose2d(8, 2, 2, stride=2, bias=False))
    table = summary(model, (4, 5, 6))
    assert table.name == "Sequential"
    assert [row.output_shape for row in table.layers] == [(1, 8, 5, 6), (1, 2, 10, 12)]
    assert [row.flops for row in table.layers] == [2 * 8 * 5 * 6 * 2 * 9, 2 * 8 * 5 * 6 * 2 * 2 * 2]


def test_looking_changes_nothing():
    model = Sequential(Conv2d(1, 2, 3), BatchNorm2d(2), ReLU(), Flatten(), Linear(8, 3))
    model[1].eval()
    before = model.state_dict()
    summary(model, (1, 4, 4))
    assert [layer.training for _, layer in model.named_layers()] == [True, True, False, True, True, True]
    after = model.state_dict()
    assert all(numpy.array_equal(before[key], after[key]) for key in before)
    assert all("forward" not in vars(layer) for _, layer in model.named_layers())


def test_model_of_float64_and_a_single_layer():
    table = summary(Linear(3, 2).to(dtype=numpy.float64), (3,))
    assert [(row.path, row.output_shape, row.flops) for row in table.layers] == [("(itself)", (1, 2), 12)]
    assert summary(ReLU(), (3, 4, 4)).parameter_count == 0


class TwoHeads(Layer):
    def __init__(self):
        self.used, self.spare = Linear(3, 2), Linear(3, 2)

    def forward(self, x):
        return self.used(x) + self.used(x)


def test_layers_used_twice_or_not_at_all():
    table = summary(TwoHeads(), (3,))
    assert [(row.output_shape, row.flops) for row in table.layers] == [((1, 2), 24), (None, 0)]
    assert "not used" in str(table)


def test_input_shape_is_needed_and_has_to_fit():
    with pytest.raises(ArgumentError, match="pass input_shape"):
        summary(Linear(3, 2))
    model = LeNet5()
    with pytest.raises(ShapeError, match="do not fit"):
        summary(model, (1, 30, 30))
    assert model.training
    assert all("forward" not in vars(layer) for _, layer in model.named_layers())
