"""Convolutions, transposed convolutions, and the columns that some of them are made of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import product
from typing import Any

import numpy

import gpucnn_kernels as kernels
from gpucnn_kernels import (
    conv2d_filter,
    conv2d_filter_direct,
    conv2d_first_layer,
    conv2d_first_layer_filter,
    conv2d_pieces,
    conv2d_tensor,
    conv2d_wgmma,
)
from gpucnn_kernels import conv2d_forward_paths as forward_paths
from gpucnn_kernels import conv2d_tiles as tiles
from gpucnn_kernels.conv2d_tiles import Tile
from gpucnn_kernels.gpu import Gpu
from gpucnn_kernels.problem import Conv2dProblem
from scripts.gpu_validation.bench import EPSILON, LAYOUTS, Bench, Numbers, accumulated, by_comparison, rounding
from tests.oracles import convolution as oracle
from tests.oracles.im2col import sources
from tests.problems import ALL, SMALL, geometry, options

Array = numpy.ndarray[Any, Any]

REDUCED = ("k3-same", "k3-d2-s2", "groups-3-s2", "depthwise-s2", "padding-0-1-2-3", "k1-strided")
MIXED = ("k3-s2", "groups-2", "rectangular-2x5", "depthwise-s2", "k1", "resnet-down", "lenet-2")
ATOMIC = ("scatter",)
COLUMN_LIMIT = 300_000  # elements of columns that are followed one by one


# Beside the shared list: they fill enough of the large tiles for those to be taken, and have forms of their own.
WIDE = {
    "many-outputs": Conv2dProblem.from_shapes((5, 5, 31, 30), (136, 5, 3, 3), padding=1),
    "some-outputs": Conv2dProblem.from_shapes((2, 12, 13, 12), (40, 12, 3, 3), padding=1),
    "many-inputs": Conv2dProblem.from_shapes((9, 72, 31, 30), (5, 72, 3, 3), padding=1),
    "sixty-four-outputs": Conv2dProblem.from_shapes((2, 6, 9, 12), (64, 6, 3, 3), padding=1),
    "three-inputs": Conv2dProblem.from_shapes((3, 3, 40, 38), (70, 3, 7, 7), stride=2, padding=3),
    "four-inputs": Conv2dProblem.from_shapes((5, 4, 31, 30), (24, 4, 3, 3), padding=1),
    "groups-2-of-70": Conv2dProblem.from_shapes((2, 140, 21, 33), (140, 70, 3, 2), stride=2, padding=1, groups=2),
    "depthwise-k5": Conv2dProblem.from_shapes((2, 9, 14, 23), (9, 1, 5, 5), padding=2, groups=9),
    "depthwise-k5-s2": Conv2dProblem.from_shapes((2, 9, 15, 22), (9, 1, 5, 5), stride=2, padding=2, groups=9),
    "depthwise-packs": Conv2dProblem.from_shapes((2, 10, 14, 24), (10, 1, 3, 3), padding=1, groups=10),
    "depthwise-packs-s2": Conv2dProblem.from_shapes(
        (2, 10, 15, 24), (10, 1, 3, 3), stride=2, padding=1, groups=10
    ),
    "depthwise-packs-k5": Conv2dProblem.from_shapes((2, 9, 14, 24), (9, 1, 5, 5), padding=2, groups=9),
    "depthwise-packs-k5-s2": Conv2dProblem.from_shapes(
        (2, 9, 15, 24), (9, 1, 5, 5), stride=2, padding=2, groups=9
    ),
}


def problems(bench: Bench) -> dict[str, Conv2dProblem]:
    """The shared list and the wide ones, or for a rehearsal a few of them."""
    every = ALL | WIDE
    return every if bench.whole else {name: every[name] for name in REDUCED}


def takes(algorithm: str, problem: Conv2dProblem, filters: str = "") -> bool:
    """Whether the algorithm is for such a problem; of a filter's gradient for arrays of dtype ``filters``."""
    depth = problem.C // problem.groups
    if filters and algorithm == "direct":
        return conv2d_filter_direct.takes(problem, filters)
    return depth <= {"direct": 8, "depthwise": 1}.get(algorithm, depth)


def layouts(name: str) -> list[tuple[str, str]]:
    """(of the image, of the filter): alike, and for some problems every combination."""
    return list(product(LAYOUTS, LAYOUTS)) if name in MIXED else [(layout, layout) for layout in LAYOUTS]


class Expectations:
    """What a problem's three directions give, exactly and plainly computed."""

    def __init__(self, name: str, problem: Conv2dProblem, numbers: Numbers) -> None:
        self.problem, self.where = problem, geometry(problem)
        self.loops = name in SMALL
        self.x = numbers.normal(*problem.input_shape)
        self.weight = numbers.normal(*problem.weight_shape)
        self.bias = numbers.normal(problem.K)
        self.dy = numbers.normal(*problem.output_shape)

    @cache  # noqa: B019  (an object lives as long as its problem is looked at)
    def truth(self, direction: str) -> Array:
        """In float64, for small problems without any rounding."""
        if direction == "bias":
            return self.dy.sum(axis=(0, 2, 3), dtype=numpy.longdouble).astype(numpy.float64)
        if not self.loops:
            return self.plain(direction, "longdouble").astype(numpy.float64)
        if direction == "forward":
            return oracle.forward_loops(self.x, self.weight, self.where, self.bias)
        if direction == "data":
            return oracle.backward_data_loops(self.dy, self.weight, self.x.shape, self.where)
        return oracle.backward_filter_loops(self.dy, self.x, self.weight.shape, self.where)

    @cache  # noqa: B019
    def plain(self, direction: str, dtype: str) -> Array:
        """One product added after the other, in ``dtype``."""
        if direction == "forward":
            return oracle.plain_forward(self.x, self.weight, self.where, self.bias, dtype)
        if direction == "data":
            return oracle.plain_backward_data(self.dy, self.weight, self.x.shape, self.where, dtype)
        if direction == "filter":
            return oracle.plain_backward_filter(self.dy, self.x, self.weight.shape, self.where, dtype)
        terms = self.dy.astype(dtype).transpose(1, 0, 2, 3).reshape(self.dy.shape[1], -1)
        return numpy.cumsum(terms, axis=1, dtype=dtype)[:, -1]

    def bound(self, direction: str, dtype: str) -> float:
        """Twice the error of the plain sum."""
        plain = self.plain(direction, accumulated(dtype))
        return by_comparison(dtype, self.truth(direction), plain, self.terms(direction))

    def terms(self, direction: str) -> int:
        """Products of a sum."""
        problem, places = self.problem, self.problem.P * self.problem.Q
        taps = problem.R * problem.S
        return {
            "forward": problem.C // problem.groups * taps,
            "data": problem.K // problem.groups * taps,
            "filter": problem.N * places,
            "bias": problem.N * places,
        }[direction]


def check_convolution(bench: Bench) -> None:
    """Every algorithm of every direction; of the wide problems also with the largest tiles."""
    for numbers in bench.numbers():
        for name, problem in problems(bench).items():
            wanted = Expectations(name, problem, numbers)
            for dtype, (layout, filter_layout) in product(numbers.dtypes, layouts(name)):
                check_directions(bench, name, wanted, dtype, layout, filter_layout)
                if name in WIDE:
                    with largest_tiles():
                        check_directions(bench, f"{name}, large tiles", wanted, dtype, layout, filter_layout)


def check_directions(
    bench: Bench, name: str, wanted: Expectations, dtype: str, layout: str, filter_layout: str
) -> None:
    """The four functions on one problem, dtype and layout."""
    problem = wanted.problem
    given, size = options(problem), (problem.H, problem.W)
    where = f"{name}, {layout}" + (f", filter {filter_layout}" if filter_layout != layout else "")

    def put(values: Array, which: str = layout) -> Any:
        return bench.put(values, dtype, which)

    def check(direction: str, operation: str, algorithm: str, run: Any) -> None:
        bench.check(
            operation, where, dtype, run, [wanted.truth(direction)], [wanted.bound(direction, dtype)],
            algorithm=algorithm, repeatable=algorithm not in ATOMIC,
        )  # fmt: skip

    for algorithm in ("auto", *kernels.conv2d_algorithms("forward")):
        if takes(algorithm, problem):
            check(
                "forward", "conv2d_forward", algorithm,
                lambda: kernels.conv2d_forward(
                    put(wanted.x), put(wanted.weight, filter_layout), bench.put(wanted.bias, dtype),
                    algorithm=algorithm, **given,
                ),
            )  # fmt: skip
    for algorithm in ("auto", *kernels.conv2d_algorithms("backward_data")):
        if takes(algorithm, problem):
            check(
                "data", "conv2d_backward_data", algorithm,
                lambda: kernels.conv2d_backward_data(
                    put(wanted.dy), put(wanted.weight, filter_layout), input_size=size, algorithm=algorithm,
                    **given,
                ),
            )  # fmt: skip

    def filter_and_bias(algorithm: str) -> tuple[Any, Any]:
        db = bench.put(numpy.full(problem.K, numpy.nan), dtype)
        dw = kernels.conv2d_backward_filter(
            put(wanted.dy), put(wanted.x, filter_layout), kernel_size=(problem.R, problem.S), algorithm=algorithm,
            bias_out=db, **given,
        )  # fmt: skip
        return dw, db

    for algorithm in ("auto", *kernels.conv2d_algorithms("backward_filter")):
        if takes(algorithm, problem, dtype):
            bench.check(
                "conv2d_backward_filter", where, dtype, lambda: filter_and_bias(algorithm),
                [wanted.truth("filter"), wanted.truth("bias")],
                [wanted.bound("filter", dtype), wanted.bound("bias", dtype)],
                algorithm=algorithm, repeatable=True,
            )  # fmt: skip
    check("bias", "conv2d_backward_bias", "", lambda: kernels.conv2d_backward_bias(put(wanted.dy)))


def check_tensor_cores(bench: Bench) -> None:
    """Tensor cores in every precision, with every size of tile: large ones even where they leave few blocks."""
    with largest_tiles():
        for numbers in bench.numbers():
            forms = [(dtype, None) for dtype in numbers.dtypes if dtype in conv2d_pieces.DTYPES]
            if numbers.half and "float32" in bench.dtypes:
                forms.append(("float32", "tf32"))  # which has all digits of these numbers
            ways = [("tensor", *form) for form in forms]
            ways += [("wgmma", *form) for form in forms if form[0] in conv2d_wgmma.DTYPES]
            for name, problem in problems(bench).items():
                wanted = Expectations(name, problem, numbers)
                for (algorithm, dtype, precision), layout in product(ways, LAYOUTS):
                    check_tensor_directions(bench, name, wanted, algorithm, dtype, precision, layout)


@contextlib.contextmanager
def largest_tiles() -> Iterator[None]:
    """Inside, the largest tile is taken of whose channels more than half are used, whatever blocks it leaves.

    Tiles of as many channels have their turns.
    """

    def filled(tiles: Sequence[Tile], channels: int) -> Tile:
        most = next((tile for tile in tiles if channels > tile.channels / 2), tiles[-1])
        alike = [tile for tile in tiles if tile.channels == most.channels]
        return alike[channels // 64 % len(alike)]

    def plain(wide: Sequence[Tile], narrow: Sequence[Tile]) -> Callable[..., Tile]:
        return lambda gpu, dtype, channels, *others: filled(narrow if dtype == "float64" else wide, channels)

    def tensor(one: Sequence[Tile], three: Sequence[Tile]) -> Callable[..., Tile]:
        return lambda gpu, dtype, precision, channels, *others: filled(
            three if tiles.products(dtype, precision) == 3 else one, channels
        )

    def planned(module: Any) -> Callable[..., Any]:
        plan = module.plan

        def first_layer(problem: Conv2dProblem, dtype: str, gpu: Gpu) -> Any:
            every = module.KERNELS
            most = next((kernel for kernel in every if kernel.outputs / 2 < problem.K), every[-1])
            return plan(problem, dtype, gpu, (most,))

        return first_layer

    places: list[tuple[Any, str, Callable[..., Any]]] = [
        (conv2d_first_layer, "plan", planned(conv2d_first_layer)),
        (conv2d_first_layer_filter, "plan", planned(conv2d_first_layer_filter)),
        (forward_paths, "implicit_tile", plain(tiles.IMPLICIT_TILES, tiles.IMPLICIT_TILES_FLOAT64)),
        (conv2d_filter, "filter_tile", plain(tiles.FILTER_TILES, tiles.FILTER_TILES_FLOAT64)),
        (conv2d_tensor, "tensor_tile", tensor(tiles.TENSOR_TILES, tiles.THREE_PRODUCT_TILES)),
        (
            conv2d_tensor,
            "tensor_filter_tile",
            tensor(tiles.TENSOR_FILTER_TILES, tiles.THREE_PRODUCT_FILTER_TILES),
        ),
        (conv2d_wgmma, "wgmma_tile", plain(tiles.WGMMA_TILES, tiles.WGMMA_TILES)),
    ]
    chosen = [getattr(module, name) for module, name, _ in places]
    try:
        for module, name, choose in places:
            setattr(module, name, choose)
        yield
    finally:
        for (module, name, _), before in zip(places, chosen, strict=True):
            setattr(module, name, before)


def check_tensor_directions(
    bench: Bench, name: str, wanted: Expectations, algorithm: str, dtype: str, precision: str | None, layout: str
) -> None:
    """The directions that the algorithm has on one problem, dtype, precision and layout."""
    problem = wanted.problem
    given = {**options(problem), "algorithm": algorithm, "precision": precision}
    x, weight, dy = ((part, dtype, layout) for part in (wanted.x, wanted.weight, wanted.dy))
    runs = {
        "forward": lambda: kernels.conv2d_forward(
            bench.put(*x), bench.put(*weight), bench.put(wanted.bias, dtype), **given
        ),
        "data": lambda: kernels.conv2d_backward_data(
            bench.put(*dy), bench.put(*weight), input_size=(problem.H, problem.W), **given
        ),
        "filter": lambda: kernels.conv2d_backward_filter(
            bench.put(*dy), bench.put(*x), kernel_size=(problem.R, problem.S), **given
        ),
    }
    if algorithm == "wgmma":
        del runs["filter"]
    for direction, run in runs.items():
        operation = "forward" if direction == "forward" else f"backward_{direction}"
        truth = wanted.truth(direction)
        # A tensor core cuts off where float32 arithmetic rounds, once for each 8 products of a sum.
        cut = wanted.terms(direction) / 8 * EPSILON["float32"] * float(numpy.abs(truth).max(initial=0.0))
        bench.check(
            f"conv2d_{operation}, tensor cores", f"{name}, {layout}", dtype, run,
            [truth], [wanted.bound(direction, dtype) + cut], algorithm=f"{algorithm} {precision or dtype}",
        )  # fmt: skip


TRANSPOSED = {
    "k2-s2": ((2, 3, 4, 5), (3, 4, 2, 2), {"stride": 2}),
    "k4-s2-p1": ((2, 4, 5, 4), (4, 3, 4, 4), {"stride": 2, "padding": 1}),
    "k3-s2-output-padding": ((1, 4, 5, 6), (4, 2, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    "k3-d2-groups-2": ((2, 4, 5, 5), (4, 3, 3, 3), {"dilation": 2, "padding": (1, 2), "groups": 2}),
    "k3x2-s1x3": ((2, 2, 4, 4), (2, 5, 3, 2), {"stride": (1, 3)}),
}


def check_transposed(bench: Bench) -> None:
    """Transposed convolution: the input gradient of the convolution from its output to its input."""
    for numbers, (name, (x_shape, weight_shape, given)) in product(bench.numbers(), TRANSPOSED.items()):
        outputs = weight_shape[1] * given.get("groups", 1)
        extra = given.get("output_padding", 0)
        pairs = {key: value if isinstance(value, tuple) else (value, value) for key, value in given.items()}
        stride, dilation = pairs.get("stride", (1, 1)), pairs.get("dilation", (1, 1))
        pad_h, pad_w = pairs.get("padding", (0, 0))
        height, width = (
            (x_shape[2 + axis] - 1) * stride[axis]
            - 2 * (pad_h, pad_w)[axis]
            + dilation[axis] * (weight_shape[2 + axis] - 1)
            + extra
            + 1
            for axis in (0, 1)
        )
        where = oracle.Geometry(stride, (pad_h, pad_h, pad_w, pad_w), dilation, given.get("groups", 1))
        x, weight, bias = numbers.normal(*x_shape), numbers.normal(*weight_shape), numbers.normal(outputs)
        shape = (x_shape[0], outputs, height, width)
        dy = numbers.normal(*shape)
        y = oracle.backward_data_loops(x, weight, shape, where) + bias[:, None, None]
        dx = oracle.forward_loops(dy, weight, where)
        dweight = oracle.backward_filter_loops(x, dy, weight_shape, where)
        plain = {key: value for key, value in given.items() if key != "output_padding"}
        for dtype, layout in product(numbers.dtypes, LAYOUTS):
            as_computed = accumulated(dtype)
            sums = {
                "forward": oracle.plain_backward_data(x, weight, shape, where, as_computed)
                + bias[:, None, None].astype(as_computed),
                "data": oracle.plain_forward(dy, weight, where, None, as_computed),
                "filter": oracle.plain_backward_filter(x, dy, weight_shape, where, as_computed),
            }

            def put(values: Array, dtype: str = dtype, layout: str = layout) -> Any:
                return bench.put(values, dtype, layout)

            for operation, direction, expected, run in (
                (
                    "conv_transpose2d_forward", "forward", y,
                    lambda: kernels.conv_transpose2d_forward(put(x), put(weight), put(bias), **given),
                ),
                (
                    "conv_transpose2d_backward_data", "data", dx,
                    lambda: kernels.conv_transpose2d_backward_data(put(dy), put(weight), **plain),
                ),
                (
                    "conv_transpose2d_backward_filter", "filter", dweight,
                    lambda: kernels.conv_transpose2d_backward_filter(
                        put(dy), put(x), kernel_size=weight_shape[2:], **plain
                    ),
                ),
            ):  # fmt: skip
                bound = by_comparison(dtype, expected, sums[direction], max(weight.size, dy.size / outputs))
                bench.check(operation, f"{name}, {layout}", dtype, run, [expected], [bound])


def check_columns(bench: Bench) -> None:
    """im2col exactly; col2im by gathering, and by atomics."""
    for numbers, (name, problem) in product(bench.numbers(), problems(bench).items()):
        places = problem.P * problem.Q
        rows = problem.C * problem.R * problem.S
        if problem.N * rows * places > COLUMN_LIMIT:
            continue
        origin = sources(problem.input_shape, (problem.R, problem.S), (problem.P, problem.Q), geometry(problem))
        x, values = numbers.normal(*problem.input_shape), numbers.normal(problem.N, rows, places)
        expected = numpy.append(x.ravel(), 0.0)[origin]  # the index -1 is the 0 at the end
        inside = origin >= 0
        size = x.size
        image, magnitude = (
            numpy.bincount(origin[inside], terms[inside], size).reshape(x.shape)
            for terms in (values, numpy.abs(values))
        )
        windows = {
            "kernel_size": (problem.R, problem.S),
            "stride": problem.stride,
            "padding": problem.padding,
            "dilation": problem.dilation,
        }
        for dtype in numbers.dtypes:
            for layout in LAYOUTS:
                bench.check(
                    "im2col", f"{name}, {layout}", dtype,
                    lambda: kernels.im2col(bench.put(x, dtype, layout), **windows),
                    [expected], [0.0],
                )  # fmt: skip
            for algorithm in ("gather", "scatter"):
                bench.check(
                    "col2im", name, dtype,
                    lambda: kernels.col2im(
                        bench.put(values, dtype), input_size=(problem.H, problem.W), algorithm=algorithm, **windows
                    ),
                    [image], [rounding(dtype, image, magnitude, problem.R * problem.S)],
                    algorithm=algorithm, repeatable=algorithm not in ATOMIC,
                )  # fmt: skip


CHECKS = {
    "convolution": check_convolution,
    "convolution on tensor cores": check_tensor_cores,
    "transposed convolution": check_transposed,
    "columns": check_columns,
}
