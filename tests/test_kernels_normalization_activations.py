"""Batch norm kernels that end with a residual and an activation, and go back through these, by a mask too."""

from __future__ import annotations

import itertools

import numpy
import pytest

import gpucnn_kernels as kernels
from gpucnn_kernels.activations import FUNCTIONS
from gpucnn_kernels.launch import Call
from tests.accuracy import channels_last
from tests.batch_norm_inputs import ending_inputs, inputs, layouts
from tests.kernel_accuracy import flushes_subnormals, on_the_host, placed
from tests.kernel_arrays import DTYPES, EPSILON, accumulated, cast, wide

__all__ = ["on_the_host"]


def activated(name, y, slope):
    if name == "identity":
        return y
    options = {"leaky_relu": {"negative_slope": slope}, "gelu_tanh": {"approximate": "tanh"}}.get(name, {})
    return getattr(kernels, f"{name.removesuffix('_tanh')}_forward")(y, **options)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activations(name):
    numbers, weight, bias, _ = inputs((4, 3, 5, 7))
    weight, bias = weight.astype(numpy.float32), bias.astype(numpy.float32)
    mean, variance = numpy.array([[0.1, -0.5, 1], [1, 0.2, 4]], numpy.float32)
    options = {"activation": name, "negative_slope": 0.3}
    for layout in layouts(numbers):
        for dtype in ("float32", "float16"):
            x = layout(cast(numbers, dtype))
            # Rounded to half precision once, after the activation: so compare with single precision, rounded.
            single = layout(numbers.astype(numpy.float32))
            plain = kernels.batch_norm_forward(single, weight, bias)[0]
            y = kernels.batch_norm_forward(x, weight, bias, **options)[0]
            numpy.testing.assert_array_equal(y, cast(activated(name, plain, 0.3), dtype))
            plain = kernels.batch_norm_inference(single, weight, bias, mean, variance)
            y = kernels.batch_norm_inference(x, weight, bias, mean, variance, **options)
            numpy.testing.assert_array_equal(y, cast(activated(name, plain, 0.3), dtype))


def assert_rounded_once(y, exact, dtype, where=""):
    """Whether y is ``exact``, in what dtype accumulates in, rounded: to the bit where nothing is rounded.

    In 16 bits a pack has twice the numbers, so statistics are summed in another order, a few roundings away.
    """
    if dtype == accumulated(dtype):
        numpy.testing.assert_array_equal(y, exact, err_msg=where)
    else:
        error = abs(wide(y) - wide(exact))
        spare = 20 * EPSILON[accumulated(dtype)] * abs(wide(exact)).max()
        assert (error <= EPSILON[dtype] / 2 * abs(wide(exact)) + spare).all(), where


ENDING_SHAPES = [(300, 7), (9000, 3), (4, 3, 5, 7), (31, 2, 20, 20), (150, 40, 3, 3)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_residual_is_added_before_the_activation(dtype):
    acc = accumulated(dtype)
    for shape in ENDING_SHAPES:
        for layout in layouts(inputs(shape)[0]):
            (x, residual, _), vectors = ending_inputs(shape, layout, dtype)
            # Rounded once, at the end: so compare with what it accumulates in, rounded.
            plain = kernels.batch_norm_forward(x.astype(acc), *vectors)[0] + residual.astype(acc)
            for name in ("identity", "relu", "leaky_relu", "relu6", "tanh"):
                options = {"residual": residual, "activation": name, "negative_slope": 0.3}
                y = kernels.batch_norm_forward(x, *vectors, **options)[0]
                assert_rounded_once(y, activated(name, plain, 0.3), dtype, f"{shape} {layout.__name__} {name}")
            for into in (x.copy(order="K"), residual.copy(order="K")):
                given = {"residual": residual if into.tobytes("A") == x.tobytes("A") else into, "out": into}
                source = into if given["residual"] is residual else x
                assert kernels.batch_norm_forward(source, *vectors, **given)[0] is into
                assert_rounded_once(into, plain, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("name", ["relu", "leaky_relu", "relu6"])
def test_backward_through_an_activation_has_the_bits_of_two_launches(dtype, name):
    slope = {"negative_slope": 0.25} if name == "leaky_relu" else {}  # exact: it may be rounded in between
    through = getattr(kernels, f"{name}_backward")
    for shape in ENDING_SHAPES:
        for layout in layouts(inputs(shape)[0]):
            (x, _, dy), vectors = ending_inputs(shape, layout, dtype)
            vectors = [4 * vector for vector in vectors]  # so that some results are above 6
            y, *statistics = kernels.batch_norm_forward(x, *vectors, activation=name, **slope)
            before = through(dy, y, **slope)
            wanted = kernels.batch_norm_backward(before, x, vectors[0], *statistics)
            given = (x, vectors[0], *statistics)
            where = f"{shape} {layout.__name__}"
            for result, expected in zip(
                kernels.batch_norm_backward(dy, *given, y=y, activation=name, **slope), wanted, strict=True
            ):
                numpy.testing.assert_array_equal(result, expected, err_msg=where)
            passed = numpy.full_like(dy, numpy.nan)
            out = {"out_weight": numpy.empty_like(vectors[0]), "out_bias": numpy.empty_like(vectors[0])}
            results = kernels.batch_norm_backward(
                dy, *given, y=y, activation=name, **slope, **out, out_residual=passed
            )
            numpy.testing.assert_array_equal(passed, before, err_msg=where)
            assert results[1] is out["out_weight"]
            assert results[2] is out["out_bias"]
            for result, expected in zip(results, wanted, strict=True):
                numpy.testing.assert_array_equal(result, expected, err_msg=where)
            again = dy.copy(order="K")  # the residual's gradient in the place of dy
            results = kernels.batch_norm_backward(again, *given, y=y, activation=name, **slope, out_residual=again)
            numpy.testing.assert_array_equal(again, before, err_msg=where)
            numpy.testing.assert_array_equal(results[0], wanted[0], err_msg=where)


def mask_of(y, layout, name):
    """A byte for each 16 bytes of y in the order of memory; its bits: where the gradient passes the activation."""
    rows = wide(y).transpose(0, 2, 3, 1) if y.ndim == 4 and layout is channels_last else wide(y)
    passes = (rows > 0) & (rows < 6) if name == "relu6" else rows > 0
    return numpy.packbits(passes.reshape(-1, 16 // y.itemsize), axis=1, bitorder="little")[:, 0]


MASKED = [((31, 2, 20, 20), numpy.ascontiguousarray), ((150, 40, 3, 3), channels_last), ((2000, 16), numpy.array)]


def awkward_inputs(shape, layout, dtype):
    """(x, residual, dy), (weight, bias) with what is hard to compare with 0.

    Channel 0 is constant, so that its result is the residual, of numbers around the least that float16 has;
    channel 1 has a NaN and infinities in the residual and in dy.
    """
    (x, residual, dy), vectors = ending_inputs(shape, layout, dtype)
    tiny = numpy.array([2**-24, 2**-25, 2**-26, 1.5 * 2**-25, -(2**-24), -(2**-26), 0, -0.0])
    x[:, 0] = x.dtype.type(2)
    residual[:, 0] = cast(numpy.resize(tiny, residual[:, 0].shape), dtype)
    vectors[1][0] = 0
    for image, value in enumerate((numpy.nan, numpy.inf, -numpy.inf)):
        place = (1,) * (len(shape) - 1)
        residual[(image + 3, *place)] = dy[(image + 7, *place)] = value
    return (x, residual, dy), vectors


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_by_the_mask_has_the_bits_of_that_by_the_result(monkeypatch, dtype):
    read = []
    launch = Call.launch

    def record(self, source, kernel, *given, **more):
        read.append((kernel.removeprefix("batch_norm_"), more.get("y") is not None, more.get("mask") is not None))
        return launch(self, source, kernel, *given, **more)

    monkeypatch.setattr(Call, "launch", record)
    for (shape, layout), name, added in itertools.product(MASKED, ("relu", "leaky_relu", "relu6"), (True, False)):
        (x, residual, dy), vectors = awkward_inputs(shape, layout, dtype)
        options = {"activation": name, "negative_slope": 0.25}
        more = {"residual": residual} if added else {}
        plain, *_ = kernels.batch_norm_forward(x, *vectors, **options, **more)
        y, mean, inverse_std, mask = kernels.batch_norm_forward(x, *vectors, with_mask=True, **options, **more)
        where = f"{shape} {name} {added}"
        assert y.tobytes("A") == plain.tobytes("A"), where
        numpy.testing.assert_array_equal(mask, mask_of(y, layout, name), err_msg=where)
        given = (x, vectors[0], mean, inverse_std)
        for passed in (None, numpy.full_like(dy, numpy.nan)):
            into = {} if passed is None else {"out_residual": passed}
            wanted = kernels.batch_norm_backward(dy, *given, y=y, **options, **into)
            before = None
            if passed is not None:
                before = passed.tobytes("A")
                passed.fill(numpy.nan)
            read.clear()
            results = kernels.batch_norm_backward(dy, *given, y=y, mask=mask, **options, **into)
            form = "across" if layout is not numpy.ascontiguousarray else "along"
            assert read == [
                (f"backward_sums_{form}", False, True),
                ("backward_combine", False, False),
                (f"backward_data_{form}", False, passed is None),
            ], where
            assert [result.tobytes("A") for result in results] == [part.tobytes("A") for part in wanted], where
            assert passed is None or passed.tobytes("A") == before, where


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mask_is_of_what_is_stored(dtype):
    """16 bits round half of their least number to 0, and half of the distance to 6 to 6."""
    least, below = {
        "float16": (2.0**-24, 2.0**-8),
        "bfloat16": (2.0**-133, 2.0**-5),
        "float32": (2.0**-149, 2.0**-21),
        "float64": (5e-324, 2.0**-50),
    }[dtype]
    halves = numpy.array([0.5, 0.5 + 2**-9] if dtype in ("float16", "bfloat16") else [0, 1])
    x = numpy.zeros((300, 8, 6, 8), accumulated(dtype))
    bias = numpy.zeros(8, x.dtype)
    bias[:2], bias[2:4] = least * halves, 6 - below * halves
    bias[4:] = -least, 6.5, 1, 0
    subnormal = dtype in ("float32", "bfloat16") and flushes_subnormals()
    stored = [False, not subnormal, False, True, False, False, True, False]
    for layout in (numpy.ascontiguousarray, channels_last):
        given = layout(cast(x, dtype))
        for name in ("relu", "leaky_relu", "relu6"):
            y, *_, mask = kernels.batch_norm_forward(given, None, bias, activation=name, with_mask=True)
            if name == "relu6":
                assert ((wide(y) > 0) & (wide(y) < 6))[7, :, 3, 3].tolist() == stored
            numpy.testing.assert_array_equal(mask, mask_of(y, layout, name))


def test_masks_that_there_are_not():
    x = inputs((31, 2, 20, 20))[0].astype(numpy.float32)
    few, odd = x[:4].copy(), inputs((130, 3, 9, 9))[0].astype(numpy.float32)
    for given, activation in ((x, "identity"), (x, "tanh"), (few, "relu"), (odd, "relu"), (placed(x, 1), "relu")):
        results = kernels.batch_norm_forward(given, activation=activation, with_mask=True)
        assert len(results) == 4
        assert results[3] is None
    assert len(kernels.batch_norm_forward(x, activation="relu")) == 3


def test_a_mask_that_cannot_be_read_leaves_the_result_to_be():
    (x, _, dy), (weight, bias) = ending_inputs((31, 2, 20, 20), numpy.ascontiguousarray, "float32")
    y, *statistics, mask = kernels.batch_norm_forward(x, weight, bias, activation="relu", with_mask=True)
    wanted = kernels.batch_norm_backward(placed(dy, 1), x, weight, *statistics, y=y, activation="relu")
    results = kernels.batch_norm_backward(placed(dy, 1), x, weight, *statistics, y=y, mask=mask, activation="relu")
    for result, expected in zip(results, wanted, strict=True):
        numpy.testing.assert_array_equal(result, expected)
    # Where the result lies off the boundaries, the mask is read all the same.
    by_mask = kernels.batch_norm_backward(dy, x, weight, *statistics, y=y, mask=mask, activation="relu")
    again = kernels.batch_norm_backward(dy, x, weight, *statistics, y=placed(y, 1), mask=mask, activation="relu")
    plain = kernels.batch_norm_backward(dy, x, weight, *statistics, y=y, mask=mask)
    apart = kernels.batch_norm_backward(dy, x, weight, *statistics)
    for result, expected in zip((*again, *plain), (*by_mask, *apart), strict=True):
        numpy.testing.assert_array_equal(result, expected)


def test_relu_stops_what_is_not_finite():
    """An infinite gradient vanishes where the result was not positive, and a NaN there lets nothing through."""
    x = inputs((4, 3, 5, 7))[0].astype(numpy.float32)
    y, *statistics = kernels.batch_norm_forward(x, activation="relu")
    dy = numpy.where(y > 0, numpy.float32(1), numpy.float32(numpy.inf))
    results = kernels.batch_norm_backward(dy, x, None, *statistics, y=y, activation="relu")
    assert all(numpy.isfinite(result).all() for result in results)
    y[y == 0] = numpy.nan
    again = kernels.batch_norm_backward(dy, x, None, *statistics, y=y, activation="relu")
    for result, expected in zip(again, results, strict=True):
        numpy.testing.assert_array_equal(result, expected)
