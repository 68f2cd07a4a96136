"""What is captured as a CUDA graph: its kernels beside the plain ones, and runs whose bits must be a plain run's.

The host runtime's graphs show that nothing is left behind or read too early. That CUDA takes part, that memory
lies where it did, and that cuBLAS adds up alike inside a graph, a GPU alone can show.
"""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy

import gpucnn_kernels as kernels
from gpucnn_kernels import training_step
from gpucnn_kernels.optimizer_step import adam_schedule, rmsprop_schedule, sgd_schedule
from scripts.gpu_validation.bench import Bench, accumulated
from scripts.gpu_validation.training import Run, create, digits, patterns

Array = numpy.ndarray[Any, Any]
LENGTH = 1037

# ------------------------------------------------------------ kernels


def check_scheduled(bench: Bench) -> None:
    """Optimizer steps, factors and masks whose numbers are read from memory: the bits of those with arguments."""
    for numbers in bench.numbers():
        start, gradient = numbers.normal(LENGTH), numbers.normal(LENGTH)
        for dtype in numbers.dtypes:
            check_steps(bench, dtype, start, gradient)
            check_factors(bench, dtype, start)
            check_masks(bench, dtype, start)


def check_steps(bench: Bench, dtype: str, start: Array, gradient: Array) -> None:
    """Each optimizer, told to go on and told not to."""
    adam = {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "decoupled": True}
    cases = {
        "sgd_step": (1, {"momentum": 0.9, "weight_decay": 0.02}, {"lr": 0.03}, sgd_schedule(0.03, False)),
        "adam_step": (2, adam, {"lr": 0.02, "step": 7}, adam_schedule(0.02, 0.9, 0.99, 0.1, True, 7)),
        "rmsprop_step": (3, {"momentum": 0.8}, {"lr": 0.01}, rmsprop_schedule(0.01)),
    }
    for name, (buffers, options, changing, schedule) in cases.items():
        stale = {key: type(value)(1) for key, value in changing.items()}

        def run(proceed: float | None, name: str = name, buffers: int = buffers, given: Any = None) -> Any:
            arrays = [bench.put(start, dtype), bench.put(gradient, dtype)]
            arrays += [bench.put(0.5 + numpy.abs(start), accumulated(dtype)) for _ in range(buffers)]
            memory = {}
            if proceed is not None:
                memory = {
                    "schedule": bench.put(numpy.array(schedule)),
                    "proceed": bench.put(numpy.array([proceed])),
                }
            getattr(kernels, name)(*arrays, **given, **memory)
            return tuple(arrays)

        plain, untouched = run(None, given=options | changing), [start, gradient]
        untouched += [(0.5 + numpy.abs(start)).astype(accumulated(dtype))] * buffers
        bits = [bench.get(array).astype(numpy.float64) for array in plain]
        for proceed, expected in ((1.0, bits), (0.0, untouched)):
            bench.check(
                f"{name}, scheduled", f"proceed {proceed:g}", dtype,
                lambda proceed=proceed, run=run, given=options | stale: run(proceed, given=given),
                expected, [0.0] * len(expected),
            )  # fmt: skip


def check_factors(bench: Bench, dtype: str, values: Array) -> None:
    """A factor from memory; a norm over several arrays, clipping by it, an average that moves."""

    def scaled(factor: Any) -> Any:
        array = bench.put(values, dtype)
        kernels.scale(array, factor)
        return array

    plain = bench.get(scaled(0.3)).astype(numpy.float64)
    bench.check("scale, scheduled", "by 0.3", dtype, lambda: scaled(bench.put(numpy.array([0.3]))), [plain], [0.0])
    parts, wide = [values[:400], values[400:]], accumulated(dtype)
    squares = [float(kernels.sum_of_squares(bench.put(part, dtype))) for part in parts]
    total = math.fsum(squares)

    def judged_together() -> Any:
        sums, verdict = bench.put(numpy.zeros(2)), bench.put(numpy.zeros(5))
        done = bench.put([0], "int32")
        loss, correct = bench.put([0.75], wide), bench.put([9], "int64")
        given = {"loss": loss.reshape(()), "correct": correct.reshape(()), "verdict": verdict}
        for place, part in enumerate(parts):
            training_step.judge_gradient(bench.put(part, wide), sums, place, done=done, **(given if place else {}))
        return verdict, done

    def judged() -> Any:
        sums, verdict = bench.put(numpy.zeros(2)), bench.put(numpy.zeros(5))
        for number, part in enumerate(parts):
            kernels.sum_of_squares(bench.put(part, dtype), out=sums[number : number + 1])
        loss, correct = bench.put([0.75], accumulated(dtype)), bench.put([9], "int64")
        return training_step.judge_step(sums, loss.reshape(()), correct.reshape(()), verdict=verdict)

    verdict = [1.0, 0.75, math.sqrt(total), 9.0, total]
    bench.check("sum_of_squares, judged", "two arrays", dtype, judged, [verdict], [0.0])
    if dtype == wide:
        together = "sum_of_squares, judged in one launch"
        bench.check(together, "two arrays", dtype, judged_together, [verdict, [0]], [0.0, 0.0])

    def clipped(by_total: bool) -> Any:
        array = bench.put(values, dtype)
        if by_total:
            training_step.clip_by_total(array, bench.put(numpy.array([total])), max_norm=2.0)
        else:
            kernels.scale(array, 2.0 / (math.sqrt(total) + 1e-6))
        return array

    plain = bench.get(clipped(False)).astype(numpy.float64)
    bench.check("clip_by_norm, of several", "to 2", dtype, lambda: clipped(True), [plain], [0.0])
    live, before = values.astype(wide), numpy.flip(values).astype(wide)
    difference = (live - before) * live.dtype.type(0.0123)

    def averaged() -> Any:
        array = bench.put(before, wide)
        training_step.average_step(bench.put(live, wide), array, share=bench.put(numpy.array([0.0123])))
        return array

    bench.check("scale, averaged", "0.0123 of the way", dtype, averaged, [before + difference], [0.0])


def check_masks(bench: Bench, dtype: str, values: Array) -> None:
    """Dropout whose place in the stream is read from memory."""
    x = values[:1000].reshape(5, 4, 5, 10)
    for per_channel in (False, True):
        options = {"probability": 0.3, "seed": 77, "per_channel": per_channel}
        plain = kernels.dropout_forward(bench.put(x, dtype), offset=(1 << 40) + 24, **options)
        bench.check(
            "dropout_forward, scheduled", "per channel" if per_channel else "all", dtype,
            lambda options=options: kernels.dropout_forward(
                bench.put(x, dtype), offset=8, start=bench.put(numpy.array([(1 << 40) + 16], "uint64")), **options
            ),
            [bench.get(part).astype(numpy.float64) for part in plain], [0.0, 0.0],
        )  # fmt: skip


CHECKS = {"captured steps": check_scheduled}

# ------------------------------------------------------------ whole runs


@dataclass(frozen=True)
class Recipe:
    """A training run that is captured, and not."""

    network: str
    options: dict[str, Any] = field(default_factory=dict)
    precision: str | None = None

    @property
    def title(self) -> str:
        """In a line."""
        parts = [f"{key} {value}" for key, value in self.options.items()]
        return ", ".join([self.network, *([self.precision] if self.precision else []), *parts])


RECIPES = (
    Recipe("lenet5", {"optimizer": "sgd", "nesterov": True, "clip_norm": 0.5}),
    Recipe("lenet5", {"optimizer": "adam", "ema_decay": 0.9}),
    Recipe("lenet5", {"optimizer": "adamw", "class_weights": "balanced"}),
    Recipe("lenet5", {"optimizer": "rmsprop", "label_smoothing": 0.1}),
    Recipe("lenet5", {"optimizer": "adamw", "clip_norm": 0.5}, "float16"),
    Recipe("lenet5", {"optimizer": "adamw"}, "float64"),
    Recipe("animalnet", {"optimizer": "sgd", "clip_norm": 0.5}),
    Recipe("animalnet", {"optimizer": "adam", "ema_decay": 0.9}),
    Recipe("animalnet", {"optimizer": "adamw", "clip_norm": 0.5}, "float16"),
    Recipe("animalnet", {"optimizer": "rmsprop"}, "tf32"),
)
"""With dropout and every optimizer; on GPUs that lack a precision, its runs say so and are left out."""

REHEARSED = RECIPES[:2]


def compare(recipe: Recipe, seed: int, whole: bool) -> dict[str, Any]:
    """Two epochs with a last batch that is smaller, captured and kernel by kernel: the same bits in the end."""
    from gpucnn.errors import ArgumentError, DeviceError

    began = time.monotonic()
    result: dict[str, Any] = {"recipe": recipe.title, "network": recipe.network, "passed": False, "failures": []}
    try:
        plain, plain_rate, _ = _train(recipe, seed, whole, "off")
        captured, captured_rate, said = _train(recipe, seed, whole, "on")
    except (ArgumentError, DeviceError) as error:
        result["passed"] = "compute capability" in str(error)
        result["failures"] = [str(error)]
        return result | {"seconds": time.monotonic() - began}
    different = [key for key in plain if plain[key] != captured.get(key)]
    if different:
        result["failures"].append(f"other bits than kernel by kernel in {', '.join(different[:5])}")
    if not any("is launched as one CUDA graph" in line for line in said):
        result["failures"].append("nothing was captured: " + ("; ".join(said) or "and nothing was said"))
    return result | {
        "passed": not result["failures"],
        "images_per_second": captured_rate,
        "images_per_second_plain": plain_rate,
        "seconds": time.monotonic() - began,
    }


@functools.cache
def _data(network: str, seed: int, whole: bool) -> tuple[Array, Array, int]:
    """(images, labels, batch size): some batches, the last one smaller."""
    size = 28 if network == "lenet5" else 224
    batches, batch = ((12, 64) if network == "lenet5" else (6, 16)) if whole else (3, 4)
    run = Run(network, size, batches, batch, 0.0, False)
    random = numpy.random.default_rng([seed, *network.encode()])
    images, labels = digits(run, random) if network == "lenet5" else patterns(run, random)
    count = batch * batches - batch // 2 - 1
    return images.reshape(-1, *images.shape[2:])[:count], labels.reshape(-1)[:count], batch


def _train(recipe: Recipe, seed: int, whole: bool, capture: str) -> tuple[dict[str, bytes], float, list[str]]:
    """(what the run leaves, by name; images a second in its last epoch; what it said)."""
    from gpucnn.data import TensorDataset
    from gpucnn.random import manual_seed
    from gpucnn.training import Progress, Trainer, TrainingOptions

    images, labels, batch = _data(recipe.network, seed, whole)
    dtype = numpy.float64 if recipe.precision == "float64" else numpy.float32
    manual_seed(seed)
    model = create(Run(recipe.network, images.shape[-1], 0, batch, 0.0, False))
    data = TensorDataset(images.astype(dtype), labels, classes=[str(n) for n in range(model.num_classes)])
    lines: list[str] = []

    class Said(Progress):
        def message(self, text: str) -> None:
            lines.append(text)

    options = TrainingOptions(epochs=2, batch_size=batch, lr=0.005, capture=capture, **recipe.options)
    trainer = Trainer(
        model, data, data, options=options, device="cuda", precision=recipe.precision, progress=Said()
    )
    trainer.fit()
    left = {key: value.tobytes() for key, value in model.state_dict().items()}
    left |= {f"optimizer {key}": value.tobytes() for key, value in trainer.optimizer.state_dict().items()}
    for record in trainer.history:
        numbers = record.train_loss, record.validation_loss, record.skipped_steps, record.train_accuracy
        left[f"history of epoch {record.epoch}"] = repr(numbers).encode()
    return left, trainer.history[-1].images_per_second, lines
