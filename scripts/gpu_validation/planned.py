"""Compiled models and plans of their memory: the outputs of the models, from the same memory every time.

On the host runtime a plan holds what kernels' functions make; on a GPU it holds all that CuPy makes. Only there
does it show that CuPy's pool is left alone, and that a graph of a plan works in the memory it was made with.
"""

from __future__ import annotations

from typing import Any

import numpy

from gpucnn import manual_seed
from gpucnn.device import to_cpu, to_device
from gpucnn.layers.precision import forward_pass
from gpucnn.models import create
from gpucnn_kernels.runtime import current
from scripts.gpu_validation.bench import Bench

Array = numpy.ndarray[Any, Any]

MODELS: dict[str, dict[str, Any]] = {
    "lenet5": {},
    "animalnet": {"image_size": 63},
    "resnet18": {"image_size": 32, "stem": "small"},
    "mobilenet_v2": {"image_size": 32, "stem": "small"},
}
_REDUCED = ("lenet5",)
_ROUNDINGS = {"float32": 2.0**-18, "float16": 2.0**-6, "bfloat16": 2.0**-3}
"""How far a folded model may be from its original, as a share of the largest output."""


def check_plans(bench: Bench) -> None:
    """A model's outputs, its compiled copy's, a plan's and a captured plan's; the last three bit for bit."""
    for name, options in MODELS.items():
        if not bench.whole and name not in _REDUCED:
            continue
        for precision in bench.dtypes:
            if precision in _ROUNDINGS:
                check_plan(bench, name, options, precision)


def check_plan(bench: Bench, name: str, options: dict[str, Any], precision: str) -> None:
    """One model in one precision."""
    manual_seed(bench.seed)
    model = create(name, num_classes=10, **options).eval().to("cuda").compute_in(precision)
    assert model.input_shape is not None
    numbers = numpy.random.default_rng([bench.seed, 5])
    x = to_device(numbers.standard_normal((3, *model.input_shape)).astype("float32"), "cuda")
    compiled = model.compile_for_inference()
    expected, truth = to_cpu(forward_pass(compiled, x)), to_cpu(forward_pass(model, x))
    largest = float(numpy.abs(truth).max())
    bench.check(
        "compile_for_inference", name, precision, lambda: forward_pass(compiled, x),
        [truth], [_ROUNDINGS[precision] * largest],
    )  # fmt: skip
    plan = compiled.plan(x.shape)
    bench.check("InferencePlan", name, precision, lambda: _by_itself(bench, plan, x), [expected], [0.0])
    graph, _ = current().capture(plan.run, plan.arrays(), 0)

    def launched() -> Any:
        plan.input[...] = x
        graph.launch()
        return plan.output

    bench.check("InferencePlan, captured", name, precision, launched, [expected], [0.0])


def _by_itself(bench: Bench, plan: Any, x: Any) -> Any:
    """A pass of the plan. Raises RuntimeError where CuPy took memory for it."""
    if bench.name != "cuda":
        return plan(x)
    import cupy

    pool = cupy.get_default_memory_pool()
    plan.input[...] = x
    before = pool.used_bytes(), pool.total_bytes()
    plan.run()
    after = pool.used_bytes(), pool.total_bytes()
    if any(now > then for now, then in zip(after, before, strict=True)):  # a collector may free others' meanwhile
        raise RuntimeError(
            f"CuPy's pool had {before} bytes used and held before the pass, and has {after} after it"
        )
    return plan.output


CHECKS = {"planned inference": check_plans}
