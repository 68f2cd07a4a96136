"""Convolutions on tensor cores, on the host runtime, against float64: values, tiles, layouts."""

from __future__ import annotations

from functools import cache, partial

import numpy
import pytest

from gpucnn_kernels import (
    Conv2dProblem,
    ProblemError,
    conv2d_backward_data,
    conv2d_backward_filter,
    conv2d_forward,
    conv2d_tensor,
    conv_transpose2d_forward,
)
from gpucnn_kernels.conv2d_tiles import (
    TENSOR_FILTER_TILES,
    TENSOR_TILES,
    THREE_PRODUCT_FILTER_TILES,
    THREE_PRODUCT_TILES,
    tensor_filter_tile,
    tensor_tile,
)
from gpucnn_kernels.gpu import H200
from gpucnn_kernels.runtime import current
from gpucnn_kernels.runtime.host import order_independent
from tests.accuracy import channels_last, max_error
from tests.kernel_accuracy import on_the_host
from tests.kernel_arrays import LAYOUTS, cast, error_bound, wide
from tests.oracles import activations, convolution, tf32
from tests.problems import ALL, LARGE, arrays, geometry, options

__all__ = ["on_the_host"]

FORMS = {
    "float16": ("float16", None),
    "bfloat16": ("bfloat16", "bfloat16"),
    "tf32": ("float32", "tf32"),
    "3xtf32": ("float32", None),
}
EVERY_FORM = pytest.mark.parametrize("form", FORMS)
DIRECTIONS = ("forward", "backward_data", "backward_filter")


def shaped(input_shape, weight_shape, **parameters):
    return Conv2dProblem.from_shapes(input_shape, weight_shape, **parameters)


# Several tiles of every size, full and not, in both directions; long sums; groups in whole pieces and not.
WIDE = {
    "outputs-70": shaped((2, 13, 9, 8), (70, 13, 3, 3), stride=2, padding=1),
    "outputs-136-k1": shaped((3, 40, 7, 7), (136, 40, 1, 1)),
    "groups-2-of-24": shaped((1, 48, 6, 9), (80, 24, 3, 2), dilation=2, padding=2, groups=2),
    "wide-image": shaped((1, 34, 5, 150), (66, 34, 1, 3), padding=(0, 1)),
    "k4-s3": shaped((2, 40, 13, 11), (37, 40, 4, 4), stride=3, padding=2),
    "long-sums": shaped((1, 500, 5, 5), (6, 500, 3, 3), padding=1),
    "wide-both": shaped((2, 72, 9, 9), (136, 72, 3, 3), padding=1),
}


def ties_to_even():
    """Whether numbers between two of tf32 become the even one, as from sm_90 on, or the larger."""
    return current().capability(0) >= (9, 0)


@cache
def inputs(problem, dtype):
    """(x, weight, bias, dy) of this dtype."""
    return tuple(cast(array, dtype) for array in arrays(problem))


@cache
def truth_and_plain(problem, form, direction):
    """The sums of the numbers that are multiplied without error, and made plainly in float32."""
    dtype, precision = FORMS[form]
    x, weight, bias, dy = (wide(array) for array in inputs(problem, dtype))
    if precision == "tf32":
        x, weight, dy = (tf32.rounded(array, ties_to_even()) for array in (x, weight, dy))
    where = geometry(problem)
    if direction == "forward":
        return tuple(convolution.plain_forward(x, weight, where, bias, kind) for kind in ("float64", "float32"))
    given = (dy, weight, problem.input_shape) if direction == "backward_data" else (dy, x, problem.weight_shape)
    plain = getattr(convolution, f"plain_{direction}")
    return tuple(plain(*given, where, kind) for kind in ("float64", "float32"))


def run(problem, form, direction, arrange=numpy.ascontiguousarray, arrange_other=None, **more):
    dtype, precision = FORMS[form]
    x, weight, bias, dy = inputs(problem, dtype)
    other = arrange_other or arrange
    more = {"algorithm": "tensor", "precision": precision, **options(problem), **more}
    if direction == "forward":
        return conv2d_forward(arrange(x), other(weight), more.pop("bias", bias), **more)
    if direction == "backward_data":
        return conv2d_backward_data(arrange(dy), other(weight), input_size=(problem.H, problem.W), **more)
    return conv2d_backward_filter(other(dy), arrange(x), kernel_size=(problem.R, problem.S), **more)


def assert_right(result, problem, form, direction, label):
    truth, plain = truth_and_plain(problem, form, direction)
    dtype = FORMS[form][0]
    assert result.shape == truth.shape, label
    assert str(result.dtype) == dtype, label
    error, bound = max_error(wide(result), truth), error_bound(plain, truth, dtype)
    assert error <= bound, f"{direction}, {label}: {error:.3g} > {bound:.3g}"


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("direction", DIRECTIONS)
@EVERY_FORM
def test_every_problem(form, direction):
    for name, problem in ALL.items():
        if name in LARGE:  # the other layout's kernels are the same: only the way there differs
            layout = "channels_last" if name in ("resnet-block", "bottleneck", "resnext-block") else "contiguous"
            assert_right(
                run(problem, form, direction, LAYOUTS[layout]), problem, form, direction, f"{name}, {layout}"
            )
            continue
        for layout, arrange in LAYOUTS.items():
            assert_right(run(problem, form, direction, arrange), problem, form, direction, f"{name}, {layout}")


@pytest.mark.parametrize("tile", ["wide", "large", "medium", "small"])
@EVERY_FORM
def test_every_tile(form, tile, monkeypatch):
    tiles = THREE_PRODUCT_TILES if form == "3xtf32" else TENSOR_TILES
    forced = {each.name: each for each in tiles}[f"conv2d_tensor_{tile}"]
    monkeypatch.setattr(conv2d_tensor, "tensor_tile", lambda *given: forced)
    for name, problem in WIDE.items():
        for layout, arrange in LAYOUTS.items():
            for direction in ("forward", "backward_data"):
                assert_right(
                    run(problem, form, direction, arrange), problem, form, direction, f"{name}, {layout}, {tile}"
                )


@pytest.mark.parametrize("tile", ["large", "broad", "medium", "small"])
@EVERY_FORM
def test_every_tile_of_the_filters_gradient(form, tile, monkeypatch):
    tiles = THREE_PRODUCT_FILTER_TILES if form == "3xtf32" else TENSOR_FILTER_TILES
    forced = {each.name: each for each in tiles}[f"filter_gradient_tensor_{tile}"]
    monkeypatch.setattr(conv2d_tensor, "tensor_filter_tile", lambda *given: forced)
    monkeypatch.setattr(conv2d_tensor, "_LEAST_POSITIONS", 40)  # several parts, also of few positions
    for name, problem in WIDE.items():
        for layout, arrange in LAYOUTS.items():
            dw = run(problem, form, "backward_filter", arrange)
            assert_right(dw, problem, form, "backward_filter", f"{name}, {layout}, {tile}")


def test_the_tile_is_large_where_it_is_filled_and_there_are_enough():
    for dtype, precision in (("float16", None), ("bfloat16", "bfloat16"), ("float32", "tf32"), ("float32", None)):

        def tile(channels, positions, dtype=dtype, precision=precision):
            return tensor_tile(H200, dtype, precision, channels, positions, 1, 576.0).name.rpartition("_")[2]

        three = (dtype, precision) == ("float32", None)  # whose tiles are half as many channels wide
        assert tile(128, 64 * 56 * 56) == "wide"
        assert tile(64, 64 * 56 * 56) == ("wide" if three else "medium")
        assert tile(32, 64 * 56 * 56) == "medium"
        assert tile(512, 49) == "small"
        tile = tensor_filter_tile(H200, dtype, precision, 128, 1152, 1, 256 * 28 * 28)
        assert tile.name == f"filter_gradient_tensor_{'broad' if three else 'large'}"
        tile = tensor_filter_tile(H200, dtype, precision, 64, 576, 1, 256 * 56 * 56)
        assert tile.name == "filter_gradient_tensor_broad"
        tile = tensor_filter_tile(H200, dtype, precision, 64, 27, 1, 256 * 56 * 56)
        assert tile.name == "filter_gradient_tensor_small"


@EVERY_FORM
def test_random_problems(form):
    """Strides, dilations and kernels whose common divisors, gaps and overlaps nobody thought of."""
    generator = numpy.random.default_rng(21)
    done = 0
    while done < 16:
        numbers = {
            "stride": tuple(int(n) for n in generator.integers(1, 5, 2)),
            "dilation": tuple(int(n) for n in generator.integers(1, 5, 2)),
            "padding": tuple(int(n) for n in generator.integers(0, 5, 4)),
            "groups": int(generator.integers(1, 3)),
        }
        size, kernel = generator.integers(1, 13, 2), generator.integers(1, 4, 2)
        outputs, depth = (int(n) for n in generator.integers(1, 18, 2))
        weight_shape = (outputs * numbers["groups"], depth, *map(int, kernel))
        try:
            problem = shaped((2, depth * numbers["groups"], *map(int, size)), weight_shape, **numbers)
        except ProblemError:
            continue
        done += 1
        for direction in DIRECTIONS:
            arrange = LAYOUTS["channels_last" if done % 2 else "contiguous"]
            assert_right(run(problem, form, direction, arrange), problem, form, direction, str(problem))


def test_three_products_are_as_exact_as_float32():
    """The root mean square error of all results, beside that of the kernel that multiplies in float32."""
    squares = {"tensor": 0.0, "implicit_gemm": 0.0, "phases": 0.0}
    for problem in WIDE.values():
        x, weight, bias, dy = inputs(problem, "float32")
        y, dx = (truth_and_plain(problem, "3xtf32", direction)[0] for direction in DIRECTIONS[:2])
        size = problem.H, problem.W
        for forward, backward in (("tensor", "tensor"), ("implicit_gemm", "phases")):
            got = conv2d_forward(x, weight, bias, algorithm=forward, **options(problem))
            squares[forward] += float(((wide(got) - y) ** 2).sum()) / float((y**2).mean())
            got = conv2d_backward_data(dy, weight, input_size=size, algorithm=backward, **options(problem))
            squares[backward] += float(((wide(got) - dx) ** 2).sum()) / float((dx**2).mean())
    plain = squares["implicit_gemm"] + squares["phases"]
    assert plain > 0
    assert squares["tensor"] <= 4 * plain


def test_one_product_rounds_to_nearest_and_three_do_not_round():
    """2049 needs 11 fraction bits, 2051 and 2051.5 more than tf32's 10."""

    def product(number, precision=None):
        x, weight = numpy.full((1, 1, 1, 1), number, numpy.float32), numpy.ones((1, 1, 1, 1), numpy.float32)
        return conv2d_forward(x, weight, algorithm="tensor", precision=precision).item()

    for number, nearest in (
        (2049, 2048 if ties_to_even() else 2050),
        (2051, 2052),
        (2050.5, 2050),
        (2051.5, 2052),
    ):
        assert product(number, "tf32") == nearest
        assert product(-number, "tf32") == -nearest
        assert product(number) == number
    precise = numpy.float32(2049) * numpy.float32(1 + 2.0**-20)
    assert product(precise) == precise


@pytest.mark.parametrize("value", [numpy.inf, numpy.nan])
@EVERY_FORM
def test_infinities_and_nans_reach_only_the_windows_that_hold_them(form, value):
    dtype, precision = FORMS[form]
    problem = ALL["k3-same"]
    x, weight, bias, _ = inputs(problem, dtype)
    x = x.copy()
    x[1, 0, 3, 2] = value
    y = wide(conv2d_forward(x, weight, bias, algorithm="tensor", precision=precision, **options(problem)))
    met = numpy.zeros(y.shape, bool)
    met[1, :, 2:5, 1:4] = True
    assert not numpy.isfinite(y[met]).any()
    assert numpy.isfinite(y[~met]).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_three_products_of_infinities_are_those_of_float32(direction):
    """An infinity times the parts of a number is one of either sign; 3.4e38 rounded to tf32 is infinity itself."""

    def by_name(algorithm, arrange, x, weight, bias, dy):
        more = {"algorithm": algorithm, **options(problem)}
        if direction == "forward":
            return conv2d_forward(arrange(x), arrange(weight), bias, activation="leaky_relu", **more)
        if direction == "backward_filter":
            return conv2d_backward_filter(arrange(dy), arrange(x), kernel_size=3, **more)
        return conv2d_backward_data(arrange(dy), arrange(weight), input_size=(problem.H, problem.W), **more)

    problem = WIDE["outputs-70"]
    for name, arrange in LAYOUTS.items():
        for value in (numpy.inf, -numpy.inf, numpy.nan, 3.4e38):
            x, weight, bias, dy = (array.copy() for array in inputs(problem, "float32"))
            x[1, 3, 2, 4] = dy[1, 3, 2, 3] = value
            weight[5, 2, 1, 1] = 0  # times an infinity it is no number
            weight[6, 2, 1, 1] = value
            given = arrange, x, weight * numpy.float32(0.5), bias, dy
            expected = by_name("phases" if direction == "backward_data" else "implicit_gemm", *given)
            result = by_name("tensor", *given)
            assert not numpy.isfinite(expected).all() or abs(value) < numpy.inf
            numpy.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-4, err_msg=f"{name}, {value}")


def test_three_products_of_large_numbers_do_not_overflow():
    """2^64 less a bit rounds to 2^64 in tf32, whose square is infinite, where its own is not."""
    large = numpy.nextafter(numpy.float32(2.0**64), numpy.float32(0))
    x, weight = numpy.full((1, 1, 1, 1), large), numpy.full((1, 1, 1, 1), large)
    square = large * large
    assert numpy.isfinite(square)
    more = {"algorithm": "tensor"}
    assert conv2d_forward(x, weight, **more).item() == square
    assert conv2d_backward_data(x, weight, input_size=1, **more).item() == square
    assert conv2d_backward_filter(x, weight, kernel_size=1, **more).item() == square


def test_phases_leave_out_the_zeros_between_rows():
    """Zero times infinity is NaN: it shows which products are made."""
    dy, weight = numpy.ones((1, 1, 3, 3), numpy.float16), numpy.ones((1, 1, 3, 3), numpy.float16)
    weight[0, 0, 1, 1] = numpy.inf  # meets input pixels (2p, 2q) at padding 1
    dx = conv2d_backward_data(dy, weight, input_size=(5, 5), stride=2, padding=1, algorithm="tensor")[0, 0]
    met = numpy.zeros((5, 5), bool)
    met[::2, ::2] = True
    assert (dx[met] == numpy.inf).all()
    assert numpy.isfinite(dx[~met]).all()


# ---------------------------------------------------------------- epilogue, layouts, order

ACTIVATIONS = {
    "relu": activations.relu,
    "leaky_relu": lambda x: activations.leaky_relu(x, 0.2),
    "sigmoid": activations.sigmoid,
    "tanh": numpy.tanh,
    "gelu": activations.gelu,
    "gelu_tanh": activations.gelu_tanh,
    "silu": activations.silu,
}


@EVERY_FORM
def test_activations_and_bias(form):
    problem = ALL["resnet-down"]  # 24 channels: written in pieces of 16 bytes where channels-last
    sums, plain_sums = truth_and_plain(problem, form, "forward")
    for function, oracle in ACTIVATIONS.items():
        truth, plain = (activations.elementwise(oracle, array) for array in (sums, plain_sums))
        for arrange in LAYOUTS.values():
            y = run(problem, form, "forward", arrange, activation=function, negative_slope=0.2)
            assert max_error(wide(y), truth) <= error_bound(plain, truth, FORMS[form][0]), function
    bias = inputs(problem, FORMS[form][0])[2]
    bare = run(problem, form, "forward", bias=None)
    numpy.testing.assert_array_equal(bare, run(problem, form, "forward", bias=numpy.zeros_like(bias)))


@pytest.mark.parametrize("direction", DIRECTIONS)
@EVERY_FORM
def test_any_mixture_of_layouts_and_out(form, direction):
    shapes = {"forward": "output_shape", "backward_data": "input_shape", "backward_filter": "weight_shape"}
    for name in ("resnet-block", "k3-s2"):
        problem = ALL[name]
        expected = run(problem, form, direction)
        for one in LAYOUTS.values():
            for other in LAYOUTS.values():
                for target in LAYOUTS.values():
                    poison = numpy.full(getattr(problem, shapes[direction]), numpy.nan)
                    out = target(cast(poison, FORMS[form][0]))
                    assert run(problem, form, direction, one, other, out=out) is out
                    numpy.testing.assert_array_equal(wide(out), wide(expected), name)


def test_arrays_that_do_not_begin_at_16_bytes():
    problem = ALL["resnet-block"]
    x, weight, _, _ = inputs(problem, "float16")

    def shifted(array):
        dense = numpy.ascontiguousarray(array.transpose(0, 2, 3, 1))
        memory = numpy.empty(dense.size + 16, dense.dtype)
        first = (-memory.ctypes.data // 2 + 1) % 8
        moved = memory[first : first + dense.size].reshape(dense.shape)
        moved[...] = dense
        assert moved.ctypes.data % 16 == 2
        return moved.transpose(0, 3, 1, 2)

    out = shifted(numpy.zeros(problem.output_shape, numpy.float16))
    y = conv2d_forward(shifted(x), shifted(weight), algorithm="tensor", out=out, **options(problem))
    aligned = conv2d_forward(x, weight, algorithm="tensor", **options(problem))
    numpy.testing.assert_array_equal(y, aligned)


@EVERY_FORM
def test_contiguous_images_are_packed_in_whole_tiles_and_parts_of_them(form):
    """Rows that begin at multiples of 16 bytes and rows that do not, more channels than a tile has and fewer."""
    for channels, size in (
        (70, (8, 9)),
        (70, (9, 9)),
        (13, (16, 24)),
        (16, (7, 41)),
        (130, (4, 4)),
        (3, (24, 24)),
    ):
        problem = shaped((2, channels, *size), (9, channels, 1, 1))
        given = run(problem, form, "forward", channels_last)
        numpy.testing.assert_array_equal(wide(run(problem, form, "forward")), wide(given), str(problem))
        assert_right(given, problem, form, "forward", str(problem))


@EVERY_FORM
def test_axes_of_length_1_may_have_any_stride(form):
    problem = shaped((2, 8, 1, 5), (8, 8, 3, 3), padding=1)
    x, weight, _, dy = inputs(problem, FORMS[form][0])

    def strange(array):
        last = channels_last(array)
        n, c, _, w = last.strides
        return numpy.lib.stride_tricks.as_strided(last, strides=(n, c, 3 * array.itemsize, w))

    assert_right(run(problem, form, "forward", strange, channels_last), problem, form, "forward", "strange")
    more = {"algorithm": "tensor", "precision": FORMS[form][1], **options(problem)}
    dx = conv2d_backward_data(strange(dy), channels_last(weight), input_size=(1, 5), **more)
    assert_right(dx, problem, form, "backward_data", "strange")
    dw = conv2d_backward_filter(strange(dy), strange(x), kernel_size=3, **more)
    assert_right(dw, problem, form, "backward_filter", "strange")


@EVERY_FORM
@pytest.mark.parametrize("direction", ["forward", "backward_data"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_of_one_column_are_written_as_they_lie(form, direction, layout):
    """The stride of a column that has no neighbour says nothing of the layout: signals are images of width 1."""
    problem = shaped((2, 16, 8, 1), (16, 16, 3, 1), padding=(1, 0))
    x, _, _, dy = inputs(problem, FORMS[form][0])

    def strange(array, column):
        arranged = LAYOUTS[layout](array)
        strides = (*arranged.strides[:3], column * array.itemsize)
        return numpy.lib.stride_tricks.as_strided(arranged, strides=strides)

    for column in (0, 1, 1000):
        out = strange(numpy.zeros_like(x if direction == "backward_data" else dy), column)
        given = partial(strange, column=column)
        label = f"{layout}, column stride {column}"
        assert_right(run(problem, form, direction, given, channels_last), problem, form, direction, label)
        assert run(problem, form, direction, given, channels_last, out=out) is out
        assert_right(out, problem, form, direction, f"{label}, out")


@EVERY_FORM
def test_the_order_of_threads_does_not_matter(form):
    for name, problem in {
        "k3-s2": ALL["k3-s2"],
        "groups-2-d2": ALL["groups-2-d2"],
        "resnet-down": ALL["resnet-down"],
        "outputs-70": WIDE["outputs-70"],
    }.items():
        for direction in DIRECTIONS:
            for arrange in LAYOUTS.values():
                assert order_independent(lambda: run(problem, form, direction, arrange)), f"{name}, {direction}"  # noqa: B023


def test_more_units_than_a_grid_has_blocks_along_y_or_z():
    """Each group of each phase is a unit, and 65,535 is not the end."""
    groups = 17_000
    x = numpy.arange(groups, dtype=numpy.float16).reshape(1, groups, 1, 1) % 100
    weight = numpy.full((groups, 1, 2, 2), 2, numpy.float16)
    dx = conv2d_backward_data(x, weight, input_size=2, stride=2, groups=groups, algorithm="tensor")
    numpy.testing.assert_array_equal(dx, numpy.broadcast_to(2 * x, dx.shape))


@EVERY_FORM
def test_empty_batches(form):
    dtype, precision = FORMS[form]
    problem = ALL["resnet-block"]
    x, weight, bias, dy = inputs(problem, dtype)
    more = {"algorithm": "tensor", "precision": precision, **options(problem)}
    for arrange in LAYOUTS.values():
        none, slopes = arrange(x[:0]), arrange(dy[:0])
        assert conv2d_forward(none, weight, bias, **more).shape == (0, *problem.output_shape[1:])
        dx = conv2d_backward_data(slopes, weight, input_size=(problem.H, problem.W), **more)
        assert dx.shape == (0, *problem.input_shape[1:])
        dw = conv2d_backward_filter(slopes, none, kernel_size=(problem.R, problem.S), **more)
        numpy.testing.assert_array_equal(wide(dw), numpy.zeros(problem.weight_shape))


def test_transposed_convolution():
    problem = shaped((2, 12, 9, 9), (20, 12, 3, 3), stride=2, padding=1)
    _, weight, _, dy = inputs(problem, "float16")
    bias = numpy.linspace(-1, 1, problem.C).astype(numpy.float16)
    y = conv_transpose2d_forward(dy, weight, bias, stride=2, padding=1, algorithm="tensor")
    truth, plain = (sums + bias[:, None, None] for sums in truth_and_plain(problem, "float16", "backward_data"))
    assert max_error(wide(y), truth) <= error_bound(plain, truth, "float16")
