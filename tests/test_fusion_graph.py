"""How many nodes the graph of a training step has where neighbouring layers train as one."""

from __future__ import annotations

import numpy
import pytest

from gpucnn import device, losses, models, optimizers
from gpucnn.training.buffers import BufferCopy
from gpucnn.training.captured_step import make_step
from gpucnn.training.random_state import RandomState
from gpucnn.training.steps import StepParts
from gpucnn_kernels.runtime.host_graph import HostGraph
from tests.kernel_accuracy import on_the_host

__all__ = ["on_the_host"]


def nodes(name, channels, size, n, precision, monkeypatch, **options):
    """How many nodes the graph of a training step has."""
    found = []
    launch = HostGraph.launch
    monkeypatch.setattr(HostGraph, "launch", lambda graph: found.append(len(graph)) or launch(graph))
    model = models.create(name, num_classes=4, in_channels=channels, image_size=size, **options).to("cuda")
    model.compute_in(precision).train()
    model.skip_input_gradient()
    loss = losses.CrossEntropyLoss(ignore_index=None)
    loss.check_targets = False
    optimizer = optimizers.SGD(model.parameters(), lr=0.01, momentum=0.9)
    parts = StepParts(model, loss, optimizer, BufferCopy(model), RandomState(model), None, None, None)
    step = make_step(parts, "on", n, lambda line: None)
    x = numpy.random.default_rng(0).standard_normal((n, channels, size, size), numpy.float32)
    labels = device.to_device(numpy.arange(n) % 4, "cuda")
    for number in (1, 2):
        step.take(device.to_device(x, "cuda"), labels, number)
    return found[-1]


@pytest.mark.parametrize(
    ("name", "channels", "size", "n", "precision", "options", "most"),
    [
        ("lenet5", 1, 28, 8, "float32", {}, 20),
        ("animalnet", 3, 63, 4, "float32", {}, 34),
        ("vgg-small", 1, 16, 4, "float32", {"width": 16}, 55),
        ("resnet18", 3, 8, 2, "float32", {"width": 8, "stem": "small"}, 138),
    ],
)
def test_a_step_has_no_more_nodes_than(name, channels, size, n, precision, options, most, monkeypatch):
    """Each waits for the one before it: of a small network they are most of the time. Fewer are welcome."""
    assert nodes(name, channels, size, n, precision, monkeypatch, **options) <= most
