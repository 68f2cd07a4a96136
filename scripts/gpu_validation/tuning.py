"""Autotuning where it is meant to be: measured by a GPU's own events, remembered, with results that stay right."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy

import gpucnn_kernels as kernels
from gpucnn_kernels import Conv2dProblem, tuning, tuning_memory
from scripts.gpu_validation.bench import Bench, accumulated, by_comparison
from tests.oracles import convolution as oracle
from tests.problems import geometry

PROBLEMS = {
    "3x3": Conv2dProblem.from_shapes((4, 64, 20, 20), (96, 64, 3, 3), padding=1),
    "few channels, stride 2": Conv2dProblem.from_shapes((4, 3, 33, 33), (32, 3, 7, 7), stride=2, padding=3),
    "1x1": Conv2dProblem.from_shapes((4, 64, 14, 14), (128, 64, 1, 1)),
}


def check_tuning(bench: Bench) -> None:
    """The three directions, tuned: right, the same bits again, and the same choice from the file alone."""
    plain = tuning_memory.cache_folder, dict(tuning._used)
    with tempfile.TemporaryDirectory() as folder:
        try:
            tuning_memory.cache_folder = lambda kind: Path(folder)
            _forget()
            for dtype in bench.dtypes:
                for name, problem in PROBLEMS.items():
                    _check_problem(bench, name, problem, dtype)
            chosen = tuning.used()
            _forget()
            memory = tuning_memory.memory_of(bench.name, 0)
            same = numpy.array([memory.get(key) == choice for key, choice in chosen.items()], "float32")
            everything = numpy.ones(same.shape)
            bench.check(
                "tuning", "what the file remembers", "float32", lambda: bench.put(same), [everything], [0.0]
            )
        finally:
            tuning_memory.cache_folder = plain[0]
            _forget()
            tuning._used.update(plain[1])


def _forget() -> None:
    tuning._used.clear()
    tuning_memory.memory_of.cache_clear()


def _check_problem(bench: Bench, name: str, problem: Conv2dProblem, dtype: str) -> None:
    random = numpy.random.default_rng([bench.seed, *name.encode()])
    # Eighths, which every dtype has.
    x, weight, dy = (
        numpy.round(random.standard_normal(shape) * 8) / 8
        for shape in (problem.input_shape, problem.weight_shape, problem.output_shape)
    )
    where, size = geometry(problem), (problem.R, problem.S)
    options: dict[str, Any] = {"stride": problem.stride, "padding": problem.padding}
    if dtype in ("float16", "bfloat16"):
        options["precision"] = dtype
    given = {"x": x, "weight": weight, "dy": dy}

    def put(label: str) -> Any:
        return bench.put(given[label], dtype)

    directions: dict[str, tuple[Callable[[], Any], Callable[[str], Any], int]] = {
        "forward": (
            lambda: kernels.conv2d_forward(put("x"), put("weight"), **options),
            lambda wide: oracle.plain_forward(x, weight, where, None, wide),
            problem.C * problem.R * problem.S,
        ),
        "data": (
            lambda: kernels.conv2d_backward_data(put("dy"), put("weight"), input_size=x.shape[2:], **options),
            lambda wide: oracle.plain_backward_data(dy, weight, x.shape, where, wide),
            problem.K * problem.R * problem.S,
        ),
        "filter": (
            lambda: kernels.conv2d_backward_filter(put("dy"), put("x"), kernel_size=size, **options),
            lambda wide: oracle.plain_backward_filter(dy, x, weight.shape, where, wide),
            problem.N * problem.P * problem.Q,
        ),
    }
    for direction, (call, sum_in, terms) in directions.items():

        def run(call: Callable[[], Any] = call) -> Any:
            with kernels.autotune():
                return call()

        expected = sum_in("longdouble").astype(numpy.float64)
        bound = by_comparison(dtype, expected, sum_in(accumulated(dtype)), terms)
        bench.check(f"tuned {direction}", name, dtype, run, [expected], [bound])
