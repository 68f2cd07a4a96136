"""What is measured on a GPU: every row in every precision that it exists in, and small ones for a rehearsal.

A measurement is a row, the precision of its arithmetic, and against whom: libraries that are called as they are,
or compiled programs, which take minutes to compile and are asked for less.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarking.rows import Row, convolution_rows, other_rows, step_rows
from gpucnn_kernels.problem import Conv2dProblem

PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
"""float32 is float32-accurate. tf32 rounds the factors of products; in the others arrays have 16 bits, and in
training steps the weights, the optimizer and the loss stay float32."""

LIBRARIES, COMPILED = "libraries", "compiled"

NETWORKS = ("step", "inference", "time_to_accuracy")
"""The kinds of rows that are of whole networks: by the wall clock, Python's time counted."""


@dataclass(frozen=True)
class Goal:
    """A class of rows: how many times the best peer's speed is the first, the next and the last goal.

    ``shares`` are the shares of the limit that go with them. None: there is none.
    """

    name: str
    speeds: tuple[float | None, float | None, float | None]
    shares: tuple[float | None, float | None, float | None] = (None, None, None)


GOALS = {
    goal.name: goal
    for goal in (
        Goal("first layer", (1.0, 1.5, 2.0), (None, None, 0.75)),
        Goal("dense float32", (0.8, 1.3, 1.8)),
        Goal("dense tf32", (0.5, 0.8, 1.05), (None, None, 0.60)),
        Goal("dense 16-bit", (None, 0.6, 1.0), (None, None, 0.55)),
        Goal("1x1", (0.6, 0.9, 1.05), (None, None, 0.80)),
        Goal("strided input gradient", (1.0, 1.2, 1.5)),
        Goal("filter gradient", (0.5, 0.8, 1.0)),
        Goal("depthwise", (1.0, 1.5, 2.5), (None, None, 0.70)),
        Goal("memory-bound", (1.0, 1.2, None), (0.60, 0.80, 0.85)),
        Goal("small step, eager", (2.0, 5.0, 8.0)),
        Goal("small step, compiled", (0.7, 1.2, 1.5)),
        Goal("none", (None, None, None)),
    )
}
"""The table of goals that the project set itself before the first kernel was written."""

FIRST_LAYER_CHANNELS = 4
_SMALL_MODELS = ("lenet5", "animalnet")
_SMALL_ENOUGH_TO_COMPILE = ("lenet5", "animalnet", "vgg-small")
_TIED_TO_PRECISION = ("convolution", "chain", "step")  # whose products a precision rounds


@dataclass(frozen=True)
class Measurement:
    """A row in a precision against some peers. ``key`` is its identity in a file of results."""

    row: Row
    precision: str
    against: str = LIBRARIES

    @property
    def key(self) -> str:
        """Such as "vgg 64->64 k3 224 N64 forward, tf32, libraries"."""
        return f"{self.row.key}, {self.precision}, {self.against}"

    @property
    def goal(self) -> Goal:
        """The class that it belongs to."""
        return GOALS[_goal(self)]

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the arrays."""
        return 2 if self.precision in ("bfloat16", "float16") else 4


def _goal(measurement: Measurement) -> str:
    row, sizes = measurement.row, measurement.row.sizes
    if row.kind == "step":
        if sizes["model"] not in _SMALL_MODELS:
            return "none"
        return "small step, compiled" if measurement.against == COMPILED else "small step, eager"
    if row.kind in ("chain", "inference", "time_to_accuracy"):
        return "none"
    if row.kind != "convolution":
        return "memory-bound"
    if sizes["groups"] > 1:
        return "depthwise"
    if row.direction == "filter gradient":
        return "filter gradient"
    if row.direction == "input gradient" and sizes["stride"] > 1:
        return "strided input gradient"
    if sizes["c"] <= FIRST_LAYER_CHANNELS:
        return "first layer"
    if sizes["kernel"] == 1:
        return "1x1"
    return f"dense {measurement.precision}" if measurement.precision in ("float32", "tf32") else "dense 16-bit"


# ---------------------------------------------------------------- the rows


def chain_rows() -> Iterator[Row]:
    """Convolution, bias, ReLU and max-pooling as a caller who does not train would write them.

    What has to be moved is the image and the pooled result: what lies between need never reach memory.
    """
    for row in convolution_rows("cuda"):
        if row.direction != "forward" or not row.name.startswith(("seed c1", "lenet c1", "vgg 64->64")):
            continue
        s = row.sizes
        out = (s["size"] + 2 * s["padding"] - s["kernel"]) // s["stride"] + 1
        image, pooled = s["n"] * s["c"] * s["size"] ** 2, s["n"] * s["k"] * (out // 2) ** 2
        moved = 4.0 * (image + s["k"] * s["c"] * s["kernel"] ** 2 + s["k"] + pooled)
        yield Row(row.name, "chain", "conv + bias + relu + pool", s, row.flops, moved)


def column_rows() -> Iterator[Row]:
    """Windows to columns and back."""
    sizes = {"n": 64, "c": 64, "size": 56, "kernel": 3, "padding": 1}
    image = 4.0 * sizes["n"] * sizes["c"] * sizes["size"] ** 2
    for direction in ("im2col", "col2im"):
        yield Row(f"{direction} k3 64x56 N64", "columns", direction, sizes, 0, image * (1 + 9))


def inference_rows() -> Iterator[Row]:
    """What somebody waits for: one image, from the call of a trained network to the result."""
    for model in ("resnet18", "resnet50"):
        sizes = {"model": model, "n": 1, "c": 3, "size": 224, "classes": 1000, "options": {"stem": "imagenet"}}
        yield Row(f"{model} 224 N1", "inference", "latency", sizes)


def accuracy_rows() -> Iterator[Row]:
    """From new weights to an accuracy on images that were not trained on, with the data on the GPU."""
    sizes = {"data": "fashion-mnist", "model": "vgg-small", "n": 128, "c": 1, "size": 28, "classes": 10}
    yield Row("vgg-small on Fashion-MNIST to 0.92", "time_to_accuracy", "training", {**sizes, "accuracy": 0.92})


def measurements() -> list[Measurement]:
    """All, by precision, those that have to be compiled last: as a page lists them."""
    convolutions = [*convolution_rows("cuda"), *chain_rows()]
    others = [*other_rows("cuda"), *column_rows()]
    steps, inference = list(step_rows("cuda")), list(inference_rows())
    found = [Measurement(row, "float32") for row in (*steps, *inference, *convolutions, *others)]
    for precision in PRECISIONS[1:]:
        found += [Measurement(row, precision) for row in (*steps, *inference, *convolutions)]
    found += [Measurement(row, precision) for row in accuracy_rows() for precision in ("float32", "bfloat16")]
    found += [Measurement(row, "bfloat16") for row in others if _exists_in_16_bits(row)]
    compiled = [row for row in steps if row.sizes["model"] in _SMALL_ENOUGH_TO_COMPILE]
    for precision in ("float32", "bfloat16"):
        found += [Measurement(row, precision, COMPILED) for row in (*compiled, *chain_rows(), *inference)]
    found += [Measurement(row, "float32", COMPILED) for row in others if _gains_by_fusion(row)]
    found += [Measurement(row, "bfloat16", COMPILED) for row in steps if row not in compiled]
    return [dataclasses.replace(each, row=_scaled(each)) for each in found]


def in_turns(found: Iterable[Measurement]) -> list[Measurement]:
    """The most telling first: one row of each class of goals in each precision, then another of each, and so on.

    So a file that is not done has something of everything. Of a class the largest convolutions come first, whose
    times say most of a kernel. Later come compiled programs, which take minutes each, but for the small networks'
    that have a goal, and float16, which seldom differs from bfloat16.
    """
    classes: dict[tuple[str, str, str], list[Measurement]] = {}
    for each in found:
        classes.setdefault((each.against, each.goal.name, each.precision), []).append(each)
    turns: list[tuple[int, int, Measurement]] = []
    for members in classes.values():
        members.sort(key=lambda each: -each.row.flops if each.row.kind == "convolution" else 0.0)
        turns += [(_stage(each), turn, each) for turn, each in enumerate(members)]
    return [each for _, _, each in sorted(turns, key=lambda place: place[:2])]


def _stage(measurement: Measurement) -> int:
    if measurement.against == COMPILED:
        if measurement.goal.name != "small step, compiled":
            return 3
        return 0 if measurement.precision == "float32" else 1
    return 2 if measurement.precision == "float16" else 0


def _exists_in_16_bits(row: Row) -> bool:
    """Optimizers and losses stay float32 in training of any precision."""
    return "count" not in row.sizes and row.kind != "cross_entropy"


def _gains_by_fusion(row: Row) -> bool:
    """What a compiler writes a kernel of its own for, once of each kind."""
    return row.kind in ("batch_norm", "cross_entropy", "gelu")


def _scaled(measurement: Measurement) -> Row:
    """The row with the bytes of arrays of this precision."""
    row = measurement.row
    return dataclasses.replace(row, bytes=row.bytes * measurement.itemsize / 4)


# ---------------------------------------------------------------- a rehearsal's


def tiny(measurement: Measurement) -> Measurement:
    """The same measurement of a size that the host runtime takes a moment for.

    The least work of a convolution is counted anew; of other rows it is 0, not known.
    """
    sizes = _tiny(measurement.row)
    flops, moved = convolution_work(sizes) if measurement.row.kind == "convolution" else (0.0, 0.0)
    row = dataclasses.replace(measurement.row, sizes=sizes, flops=flops, bytes=moved * measurement.itemsize / 4)
    return dataclasses.replace(measurement, row=row)


def convolution_work(sizes: dict[str, int]) -> tuple[float, float]:
    """(floating-point operations, bytes of float32 arrays that have to be moved) of a convolution's row."""
    problem = Conv2dProblem.from_shapes(
        (sizes["n"], sizes["c"], sizes["size"], sizes["size"]),
        (sizes["k"], sizes["c"] // sizes["groups"], sizes["kernel"], sizes["kernel"]),
        stride=sizes["stride"],
        padding=sizes["padding"],
        groups=sizes["groups"],
    )
    arrays = (problem.input_shape, problem.weight_shape, problem.output_shape)
    return float(problem.flops), 4.0 * sum(math.prod(shape) for shape in arrays)


def _tiny(row: Row) -> dict[str, Any]:
    sizes = dict(row.sizes)
    if "count" in sizes:
        return {"count": 1000}
    if "classes" in sizes and "model" not in sizes:
        return {"n": 4, "classes": 10}
    sizes["n"] = 2
    if row.kind == "inference":
        return sizes | {"model": "lenet5", "c": 1, "size": 28, "classes": 10, "options": {}}
    if row.kind == "time_to_accuracy":
        return sizes | {"data": "digits", "model": "lenet5", "n": 32, "images": 64, "accuracy": 0.0}
    if row.kind == "step":
        # The others have linear layers that fix the size of an image.
        return sizes | ({"size": 32} if sizes["model"].startswith("resnet") else {}) | {"classes": 10}
    if sizes.get("groups", 1) > 1:
        return sizes | {"c": 4, "k": 4, "groups": 4, "size": 6}
    if "k" in sizes:
        sizes["k"] = min(sizes["k"], 8)
    sizes["c"] = min(sizes["c"], 8)
    sizes["size"] = min(sizes["size"], sizes.get("kernel", 1) + 4)
    return sizes
