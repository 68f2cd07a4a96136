"""Forward passes of compiled models in memory that is planned once, on the host runtime."""

from __future__ import annotations

import numpy
import pytest

import gpucnn
from gpucnn import layers
from gpucnn.device import to_cpu, to_device
from gpucnn.errors import ArgumentError, ShapeError, StateError
from gpucnn.models import create
from gpucnn.models.model import Sequential
from gpucnn_kernels.runtime import current, host_launch
from tests.test_inference import SMALL, lived_in
from tests.test_kernels_arena import least_size


@pytest.fixture(autouse=True)
def host_runtime(monkeypatch):
    monkeypatch.setenv("GPUCNN_KERNELS_RUNTIME", "host")


@pytest.mark.parametrize("name", SMALL)
def test_planned_passes_give_the_models_outputs_and_take_no_memory(name, monkeypatch):
    gpucnn.manual_seed(0)
    model = lived_in(create(name, num_classes=4, in_channels=3, **SMALL[name])).to("cuda").compile_for_inference()
    shape = (2, 3, *model.input_shape[1:])
    plan = model.plan(shape)
    assert 0 < plan.size < plan.separate_size
    lifetimes = plan._arena.lifetimes
    assert plan.size <= 1.25 * least_size(lifetimes)
    generator = numpy.random.default_rng(1)
    taken = []
    empty = numpy.empty
    for _ in range(3):
        x = to_device(generator.standard_normal(shape).astype("f4"), "cuda")
        expected = to_cpu(model(x))
        with monkeypatch.context() as patch:
            patch.setattr(
                host_launch.numpy, "empty", lambda *shape, **more: (taken.append(shape), empty(*shape, **more))[1]
            )
            logits = plan(x)
        assert logits is plan.output
        numpy.testing.assert_array_equal(to_cpu(logits), expected)
    assert not [shape for shape in taken if numpy.prod(shape[0]) > 64], "the runtime took memory beside the plan's"


def test_a_plan_in_sixteen_bits():
    gpucnn.manual_seed(1)
    model = lived_in(create("animalnet", num_classes=3, image_size=63)).to("cuda").compute_in("bfloat16")
    compiled = model.compile_for_inference()
    x = to_device(numpy.random.default_rng(2).standard_normal((2, 3, 63, 63)).astype("f4"), "cuda")
    plan = compiled.plan(x.shape)
    assert str(plan.input.dtype) == "bfloat16"
    assert str(plan.output.dtype) == "float32"
    from gpucnn.layers.precision import forward_pass

    numpy.testing.assert_array_equal(to_cpu(plan(x)), to_cpu(forward_pass(compiled, x)))


def test_a_plan_is_captured_as_a_graph():
    """All memory is the plan's: the strict recorder finds nothing that it does not know."""
    gpucnn.manual_seed(2)
    model = lived_in(create("resnet18", num_classes=4, in_channels=3, **SMALL["resnet18"])).to("cuda")
    compiled = model.compile_for_inference()
    plan = compiled.plan((2, 3, 9, 9))
    graph, _ = current().capture(plan.run, plan.arrays(), 0)
    generator = numpy.random.default_rng(3)
    for _ in range(2):
        x = to_device(generator.standard_normal((2, 3, 9, 9)).astype("f4"), "cuda")
        expected = to_cpu(compiled(x))
        plan.input[...] = x
        graph.launch()
        numpy.testing.assert_array_equal(to_cpu(plan.output), expected)


def test_what_does_not_fit():
    model = Sequential(layers.Conv2d(2, 3, 3), layers.ReLU()).eval()
    compiled = model.compile_for_inference()
    with pytest.raises(ArgumentError, match="a plan is of a GPU's memory, and the model is on the CPU"):
        compiled.plan((1, 2, 5, 5))
    compiled = model.to("cuda").compile_for_inference()
    with pytest.raises(ShapeError, match="expected 2 input channels, got 3"):
        compiled.plan((1, 3, 5, 5))
    plan = compiled.plan((1, 2, 5, 5))
    with pytest.raises(ShapeError, match=r"takes inputs of shape \(1, 2, 5, 5\), got \(2, 2, 5, 5\)"):
        plan(to_device(numpy.zeros((2, 2, 5, 5), "f4"), "cuda"))
    compiled.to(dtype="float64")
    with pytest.raises(StateError, match="weights were moved since this plan was made; make another"):
        plan.run()
