"""Batch norm kernels on the host runtime against exactly rounded sums; a large mean over a small variance too."""

from __future__ import annotations

import itertools
from functools import cache
from itertools import product

import numpy
import pytest

import gpucnn_kernels as kernels
from gpucnn_kernels import runtime
from gpucnn_kernels.activations import FUNCTIONS
from gpucnn_kernels.errors import ArgumentError, DtypeError, LayoutError
from gpucnn_kernels.launch import Call
from gpucnn_kernels.problem import ProblemError
from gpucnn_kernels.runtime import host
from tests.accuracy import awkward, channels_last, max_error
from tests.kernel_accuracy import flushes_subnormals, placed
from tests.kernel_arrays import DTYPES, EPSILON, accumulated, cast, error_bound, wide
from tests.oracles import normalization as oracle

TINY = 1e-5  # the default epsilon
SHAPES = [
    (2, 1),
    (5, 3),
    (300, 7),
    (9000, 3),  # channels apart from each other, in several parts
    (2, 3, 1, 1),
    (1, 2, 1, 2),
    (4, 3, 5, 7),
    (3, 2, 16, 16),
    (17, 5, 9, 8),
    (2, 40, 3, 3),  # more channels than a tile of 32
    (16, 2, 20, 20),  # almost as many numbers a channel as one launch makes
    (31, 2, 20, 20),  # channels together, in several parts
    (150, 40, 3, 3),  # more channels than a tile of 32, channels-last in several parts
    (46, 136, 5, 5),  # more packs of channels than a tile of 32; planes that packs do not fill
]
MANY_PARTS = [(1, 1, 370, 370), (4300, 17)]  # more parts than a warp has lanes


@pytest.fixture(autouse=True)
def host_runtime():
    with runtime.using("host"):
        yield


@cache
def inputs(shape, mean=0.3, spread=2.0, seed=0):
    """x, weight, bias, dy in float64, of numbers that all four dtypes have."""
    random = numpy.random.default_rng(seed)
    x = mean + spread * random.standard_normal(shape)
    weight = 1 + 0.5 * random.standard_normal(shape[1])
    arrays = x, weight, random.standard_normal(shape[1]), random.standard_normal(shape)
    return tuple(wide(cast(array, "bfloat16")) for array in arrays)


@cache
def exact_forward(shape):
    x, weight, bias, _ = inputs(shape)
    return oracle.batch_norm(x, weight, bias, TINY)


@cache
def exact_backward(shape):
    x, weight, _, dy = inputs(shape)
    return oracle.batch_norm_backward(dy, x, weight, TINY)


def per_channel(values, x):
    return values.reshape((1, -1) + (1,) * (x.ndim - 2))


def plain_forward(x, weight, bias):
    """The textbook two-pass computation in the dtype of its arguments."""
    axes = (0, *range(2, x.ndim))
    mean, variance = x.mean(axes), x.var(axes)
    inverse_std = 1 / numpy.sqrt(variance + x.dtype.type(TINY))
    y = (x - per_channel(mean, x)) * per_channel(inverse_std, x) * per_channel(weight, x) + per_channel(bias, x)
    return y, mean, inverse_std


def plain_backward(dy, x, weight):
    axes = (0, *range(2, x.ndim))
    _, mean, inverse_std = plain_forward(x, weight, weight)
    normal = (x - per_channel(mean, x)) * per_channel(inverse_std, x)
    count = x.dtype.type(x.size // x.shape[1])
    dbias, dweight = dy.sum(axes), (dy * normal).sum(axes)
    rest = dy - per_channel(dbias / count, x) - normal * per_channel(dweight / count, x)
    return rest * per_channel(weight * inverse_std, x), dweight, dbias


def steps(array):
    """Its strides, but of axes of length 1, which say nothing."""
    return [stride for stride, length in zip(array.strides, array.shape, strict=True) if length > 1]


def layouts(x):
    return (numpy.ascontiguousarray, channels_last) if x.ndim == 4 else (numpy.ascontiguousarray,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(dtype):
    acc = accumulated(dtype)
    for shape in [*SHAPES, *(MANY_PARTS if dtype == "float32" else ())]:
        numbers = inputs(shape)[:3]
        x, (weight, bias) = cast(numbers[0], dtype), (array.astype(acc) for array in numbers[1:])
        expected, plain = exact_forward(shape), plain_forward(*(array.astype(acc) for array in numbers))
        for layout in layouts(x):
            given = layout(x)
            where = f"{shape} {layout.__name__}"
            results = kernels.batch_norm_forward(given, weight, bias)
            assert steps(results[0]) == steps(given), where
            for result, wanted, simple, kept in zip(results, expected, plain, (dtype, acc, acc), strict=True):
                assert str(result.dtype) == kept, where
                # y is a sum that cancels, of terms of some 10.
                bound = error_bound(simple, wanted, kept) + 10 * EPSILON[acc]
                assert max_error(wide(result), wanted) <= bound, where
            out = numpy.full_like(given, numpy.nan)
            assert kernels.batch_norm_forward(given, weight, bias, out=out)[0] is out, where
            numpy.testing.assert_array_equal(out, results[0], err_msg=where)
            out = given.copy(order="K")
            assert kernels.batch_norm_forward(out, weight, bias, out=out)[0] is out, where
            numpy.testing.assert_array_equal(out, results[0], err_msg=where)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_without_parameters(dtype):
    acc = accumulated(dtype)
    for shape in [(5, 3), (4, 3, 5, 7)]:
        x = cast(inputs(shape)[0], dtype)
        ones, zeros = numpy.ones(shape[1], acc), numpy.zeros(shape[1], acc)
        for arguments in ((None, None), (ones, None), (None, zeros)):
            y, mean, inverse_std = kernels.batch_norm_forward(x, *arguments)
            for result, wanted in zip(
                (y, mean, inverse_std), kernels.batch_norm_forward(x, ones, zeros), strict=True
            ):
                numpy.testing.assert_array_equal(result, wanted, err_msg=f"{shape}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(dtype):
    acc = accumulated(dtype)
    for shape in [*SHAPES, *(MANY_PARTS if dtype == "float32" else ())]:
        numbers, expected = inputs(shape), exact_backward(shape)
        weight = numbers[1].astype(acc)
        mean, inverse_std = (array.astype(acc) for array in exact_forward(shape)[1:])
        plain = plain_backward(*(numbers[i].astype(acc) for i in (3, 0, 1)))
        # dx is a difference of terms of the size of dy * weight / std; the sums have terms of the size of dy.
        scale = float(abs(numbers[3]).max() * abs(weight).max() * inverse_std.max())
        sums = float(abs(numbers[3]).sum()) / shape[1]
        for layout in layouts(numbers[0]):
            dy, x = layout(cast(numbers[3], dtype)), layout(cast(numbers[0], dtype))
            where = f"{shape} {layout.__name__}"
            results = kernels.batch_norm_backward(dy, x, weight, mean, inverse_std)
            assert steps(results[0]) == steps(x), where
            for result, wanted, simple, kept, terms in zip(
                results, expected, plain, (dtype, acc, acc), (scale, sums, sums), strict=True
            ):
                assert str(result.dtype) == kept, where
                bound = error_bound(simple, wanted, kept) + 4 * EPSILON[acc] * terms
                assert max_error(wide(result), wanted) <= bound, where
            for index in (0, 1):  # in place of either input
                arguments = [dy.copy(order="K"), x.copy(order="K")]
                out = arguments[index]
                again = kernels.batch_norm_backward(*arguments, weight, mean, inverse_std, out=out)
                assert again[0] is out, where
                for result, wanted in zip(again, results, strict=True):
                    numpy.testing.assert_array_equal(result, wanted, err_msg=where)
            bare = kernels.batch_norm_backward(dy, x, None, mean, inverse_std)
            ones = kernels.batch_norm_backward(dy, x, numpy.ones_like(weight), mean, inverse_std)
            for result, wanted in zip(bare, ones, strict=True):
                numpy.testing.assert_array_equal(result, wanted, err_msg=where)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_for_given_statistics(dtype):
    acc = accumulated(dtype)
    for shape in [*SHAPES, *(MANY_PARTS if dtype == "float32" else ())]:
        numbers, random = inputs(shape), numpy.random.default_rng(7)
        weight, mean = (array.astype(acc) for array in (numbers[1], random.uniform(-1, 1, shape[1])))
        variance = random.uniform(0.1, 3, shape[1]).astype(acc)
        expected = oracle.batch_norm_inference_backward(numbers[3], numbers[0], weight, mean, variance, TINY)
        axes = (0, *range(2, len(shape)))
        sums = abs(numbers[3]).sum(axes), (abs(numbers[3]) * (abs(numbers[0]) + 1)).sum(axes) * 4
        bounds = (
            abs(expected[0]) * (EPSILON[dtype] / 2 + 4 * EPSILON[acc]) + 2.0**-25 * (dtype == "float16"),
            *(8 * EPSILON[acc] * terms for terms in reversed(sums)),
        )
        for layout, offset in product(layouts(numbers[0]), (0, 1)):
            dy, x = (placed(layout(cast(numbers[place], dtype)), offset) for place in (3, 0))
            where = f"{shape} {layout.__name__} {offset}"
            results = kernels.batch_norm_inference_backward(dy, x, weight, mean, variance)
            assert steps(results[0]) == steps(x), where
            for result, wanted, kept, bound in zip(results, expected, (dtype, acc, acc), bounds, strict=True):
                assert str(result.dtype) == kept, where
                assert numpy.all(abs(wide(result) - wanted) <= bound), where
            alone = kernels.batch_norm_inference_backward(dy, None, weight, mean, variance)
            numpy.testing.assert_array_equal(alone[0], results[0], err_msg=where)
            assert alone[1:] == (None, None), where
            places = numpy.full((2, shape[1]), numpy.nan, acc)
            again = kernels.batch_norm_inference_backward(
                dy, x, weight, mean, variance, out=x, out_weight=places[0], out_bias=places[1]
            )
            assert again[0] is x, where
            for result, wanted in zip((x, *places), results, strict=True):
                numpy.testing.assert_array_equal(result, wanted, err_msg=where)
            bare = kernels.batch_norm_inference_backward(dy, None, None, mean, variance)
            ones = kernels.batch_norm_inference_backward(dy, None, numpy.ones_like(weight), mean, variance)
            numpy.testing.assert_array_equal(bare[0], ones[0], err_msg=where)


def test_the_gradient_for_given_statistics_in_any_order_and_of_nothing():
    dy, x = (inputs((31, 2, 20, 20))[place].astype(numpy.float32) for place in (3, 0))
    row = numpy.ones(2, numpy.float32)
    assert host.order_independent(lambda: list(kernels.batch_norm_inference_backward(dy, x, row, row, row)))
    x[0, 0] = numpy.inf  # says nothing about dx, which is made of dy alone
    assert numpy.isfinite(kernels.batch_norm_inference_backward(dy, x, row, row, row)[0]).all()
    dx, dweight, dbias = kernels.batch_norm_inference_backward(dy[:0], x[:0], row, row, row)
    assert (dx.shape, dweight.tolist(), dbias.tolist()) == ((0, 2, 20, 20), [0, 0], [0, 0])
    with pytest.raises(LayoutError, match=r"x has strides .*, but dy has"):
        kernels.batch_norm_inference_backward(dy, channels_last(x), row, row, row)
    with pytest.raises(DtypeError, match="running_var must be float32 where dy is float32"):
        kernels.batch_norm_inference_backward(dy, x, row, row, row.astype(float))
    for name in ("out_weight", "out_bias"):
        with pytest.raises(ArgumentError, match=f"{name} shares memory with weight"):
            kernels.batch_norm_inference_backward(dy, x, row, row + 0, row + 0, **{name: row})
    both = row.copy()
    with pytest.raises(ArgumentError, match="out_bias shares memory with out_weight"):
        kernels.batch_norm_inference_backward(dy, x, row, row, row, out_weight=both, out_bias=both)
    with pytest.raises(ProblemError, match="got dy of shape"):
        kernels.batch_norm_inference_backward(dy[0], None, row, row, row)


@pytest.mark.parametrize(("mean", "spread"), [(1e4, 1.0), (-3e5, 1.0), (1e3, 1e-3), (0.0, 1e-20), (1e15, 1e16)])
def test_large_means_and_extreme_spreads(mean, spread):
    random = numpy.random.default_rng(2)
    x = (mean + spread * random.standard_normal((16, 2, 17, 17))).astype(numpy.float32)
    weight, bias = (1 + 0.5 * random.standard_normal((2, 2))).astype(numpy.float32)
    dy = random.standard_normal(x.shape).astype(numpy.float32)
    expected = oracle.batch_norm(x, weight, bias, TINY)
    wanted = oracle.batch_norm_backward(dy, x, weight, TINY)
    for layout in layouts(x):
        y, found_mean, inverse_std = kernels.batch_norm_forward(layout(x), weight, bias)
        assert max_error(y, expected[0]) <= 2e-6
        assert numpy.all(abs(found_mean - expected[1]) <= 1e-7 * (abs(expected[1]) + spread))
        assert numpy.all(abs(inverse_std - expected[2]) <= 1e-6 * expected[2])
        results = kernels.batch_norm_backward(layout(dy), layout(x), weight, found_mean, inverse_std)
        for result, reference in zip(results, wanted, strict=True):
            assert max_error(result, reference) <= 1e-5 * (float(abs(reference).max()) + 1e-30)


@pytest.mark.parametrize("outlier", [1e2, 1e6])
def test_a_first_number_far_from_the_others(outlier):
    x = inputs((16, 2, 20, 20))[0].astype(numpy.float32)
    x[0, :, 0, 0] = outlier
    ones, zeros = numpy.ones(2, numpy.float32), numpy.zeros(2, numpy.float32)
    expected, plain = oracle.batch_norm(x, ones, zeros, TINY), plain_forward(x, ones, zeros)
    for layout in layouts(x):
        results = kernels.batch_norm_forward(layout(x))
        for result, wanted, simple in zip(results, expected, plain, strict=True):
            assert max_error(result, wanted) <= error_bound(simple, wanted, "float32")


def test_constant_channels():
    x = numpy.full((4, 2, 3, 3), 123456.78, numpy.float32)
    y, mean, inverse_std = kernels.batch_norm_forward(x)
    assert numpy.all(y == 0)
    assert numpy.all(mean == x[0, 0, 0, 0])
    assert numpy.all(abs(inverse_std - 1 / numpy.sqrt(TINY)) <= 1e-4)
    dx, _, _ = kernels.batch_norm_backward(numpy.ones_like(x), x, None, mean, inverse_std)
    assert numpy.all(dx == 0)


def test_a_nan_stays_in_its_channel():
    for shape in ((3, 3, 4, 4), (20, 3)):
        clean = inputs(shape)[0].astype(numpy.float32)
        for layout in layouts(clean):
            x = layout(clean).copy(order="K")
            expected = kernels.batch_norm_forward(x)[0]
            x[(1, 1) + (2,) * (x.ndim - 2)] = numpy.nan
            y = kernels.batch_norm_forward(x)[0]
            assert numpy.isnan(y[:, 1]).all()
            numpy.testing.assert_array_equal(y[:, ::2], expected[:, ::2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_running_statistics(dtype, momentum):
    acc = accumulated(dtype)
    x = cast(inputs((6, 4, 3, 5))[0], dtype)
    running_mean, running_var = numpy.full(4, 0.5, acc), numpy.full(4, 2.0, acc)
    kernels.batch_norm_forward(x, None, None, running_mean, running_var, momentum=momentum)
    mean, variance = oracle.statistics(wide(x))
    count = x.size // 4
    expected_mean = (1 - momentum) * 0.5 + momentum * mean
    expected_var = (1 - momentum) * 2 + momentum * variance * count / (count - 1)
    assert max_error(running_mean, expected_mean) <= 4 * EPSILON[acc] * abs(expected_mean).max()
    assert max_error(running_var, expected_var) <= 4 * EPSILON[acc] * abs(expected_var).max()
    only_mean, only_var = numpy.zeros(4, acc), numpy.zeros(4, acc)
    kernels.batch_norm_forward(x, running_mean=only_mean, momentum=momentum)
    kernels.batch_norm_forward(x, running_var=only_var, momentum=momentum)
    assert max_error(only_mean, momentum * mean) <= 4 * EPSILON[acc] * abs(mean).max()
    assert max_error(only_var, momentum * variance * count / (count - 1)) <= 4 * EPSILON[acc] * variance.max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_inference(dtype):
    acc = accumulated(dtype)
    for shape in [(1, 3), (6, 3), (1, 3, 1, 1), (4, 3, 5, 7), (2, 40, 3, 3), (1, 1, 40, 130)]:
        numbers, weight, bias, _ = inputs(shape)
        random = numpy.random.default_rng(4)
        running_mean = wide(cast(random.standard_normal(shape[1]), "bfloat16"))
        running_var = wide(cast(random.uniform(1e-3, 50, shape[1]), "bfloat16"))
        vectors = [array.astype(acc) for array in (weight, bias, running_mean, running_var)]
        expected = oracle.batch_norm_inference(numbers, weight, bias, running_mean, running_var, TINY)
        x = numbers.astype(acc)
        w, b, m, v = (per_channel(array, x) for array in vectors)
        plain = (x - m) / numpy.sqrt(v + x.dtype.type(TINY)) * w + b
        for layout in layouts(x):
            given = layout(cast(numbers, dtype))
            where = f"{shape} {layout.__name__}"
            y = kernels.batch_norm_inference(given, *vectors)
            assert y.dtype == given.dtype, where
            assert steps(y) == steps(given), where
            bound = error_bound(plain, expected, dtype)
            assert max_error(wide(y), expected) <= bound, where
            assert kernels.batch_norm_inference(given, *vectors, out=given) is given, where
            numpy.testing.assert_array_equal(given, y, err_msg=where)
        bare = kernels.batch_norm_inference(cast(numbers, dtype), None, None, *vectors[2:])
        ones, zeros = numpy.ones(shape[1]), numpy.zeros(shape[1])
        wanted = oracle.batch_norm_inference(numbers, ones, zeros, running_mean, running_var, TINY)
        plain = (x - m) / numpy.sqrt(v + x.dtype.type(TINY))
        assert max_error(wide(bare), wanted) <= error_bound(plain, wanted, dtype), shape


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


def ending_inputs(shape, layout, dtype):
    """(x, residual, dy) in ``dtype``, (weight, bias) in what it accumulates in."""
    x, weight, bias, dy = inputs(shape)
    arrays = [layout(cast(array, dtype)) for array in (x, inputs(shape, seed=1)[0], dy)]
    return arrays, [array.astype(accumulated(dtype)) for array in (weight, bias)]


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


@pytest.mark.parametrize(
    ("shape", "layout", "count"),
    [
        ((16, 2, 20, 20), numpy.ascontiguousarray, 1),
        ((21, 2, 20, 20), numpy.ascontiguousarray, 3),
        ((4, 64, 16, 16), channels_last, 1),
        ((5, 64, 16, 16), channels_last, 3),
    ],
)
def test_few_numbers_a_channel_take_one_launch(monkeypatch, shape, layout, count):
    started = []
    launch = Call.launch
    monkeypatch.setattr(Call, "launch", lambda self, *given, **more: started.append(launch(self, *given, **more)))
    x = layout(numpy.zeros(shape, numpy.float32))
    y, *statistics = kernels.batch_norm_forward(x, activation="relu", residual=x)
    assert len(started) == count
    kernels.batch_norm_backward(x, x, None, *statistics, y=y, activation="relu")
    assert len(started) == 2 * count


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_off_the_boundaries_of_packs(monkeypatch, dtype):
    started = []
    launch = Call.launch

    def record(self, source, kernel, *given, **more):
        started.append((source, kernel.rpartition("_")[2]))
        return launch(self, source, kernel, *given, **more)

    monkeypatch.setattr(Call, "launch", record)
    acc = accumulated(dtype)
    for shape, layout, form in (
        ((31, 2, 20, 20), numpy.ascontiguousarray, "along"),
        ((150, 40, 3, 3), channels_last, "across"),
        ((2000, 16), numpy.ascontiguousarray, "across"),
    ):
        (x, residual, dy), (weight, bias) = ending_inputs(shape, layout, dtype)
        options = {"activation": "relu", "negative_slope": 0.3}
        results = []
        for where in range(5):  # none is off, or one of them
            at = [placed(array, int(where == number)) for number, array in enumerate((x, residual, dy), 1)]
            y, dx, passed = (placed(numpy.zeros_like(x), int(where == 4)) for _ in range(3))
            started.clear()
            _, *statistics = kernels.batch_norm_forward(at[0], weight, bias, residual=at[1], out=y, **options)
            packed = ("batch_norm_packs", form) in started
            assert packed == (where in (0, 3))
            started.clear()
            more = {"y": y, "out": dx, "out_residual": passed, **options}
            vectors = kernels.batch_norm_backward(at[2], at[0], weight, *statistics, **more)[1:]
            assert (("batch_norm_packs", form) in started) == (where in (0, 2))
            started.clear()
            inferred = kernels.batch_norm_inference(at[0], weight, bias, statistics[0], 1 / statistics[1] ** 2)
            assert (("batch_norm_packs", form) in started) == (where != 1)
            results.append([*statistics, *vectors, y, dx, passed, inferred])
        for other in results[1:]:
            for result, expected in zip(other, results[0], strict=True):
                scale = max(abs(wide(expected)).max(), 1)
                spare = 40 * EPSILON[acc] + (EPSILON[dtype] if result.dtype == x.dtype else 0)
                assert max_error(wide(result), wide(expected)) <= spare * scale


def test_empty_batches():
    for shape in ((0, 3), (0, 3, 4, 5), (2, 3, 0, 5)):
        x = numpy.zeros(shape, numpy.float16)
        three = numpy.ones(3, numpy.float32)
        assert kernels.batch_norm_inference(x, None, None, three, three).shape == shape
        dx, dweight, dbias = kernels.batch_norm_backward(x, x, three, three, three)
        assert dx.shape == shape
        numpy.testing.assert_array_equal(dweight, [0, 0, 0])
        numpy.testing.assert_array_equal(dbias, [0, 0, 0])
        with pytest.raises(ProblemError, match="at least two values a channel, got 0"):
            kernels.batch_norm_forward(x)
    nothing = numpy.zeros((4, 0, 2, 2), numpy.float32)
    y, mean, inverse_std = kernels.batch_norm_forward(nothing)
    assert (y.shape, mean.shape, inverse_std.shape) == ((4, 0, 2, 2), (0,), (0,))


def test_the_order_of_threads_changes_nothing():
    for shape in [(300, 7), (9000, 3), (4, 3, 5, 7), (31, 2, 20, 20), (130, 20, 3, 3)]:
        x, weight, bias, dy = (array.astype(numpy.float32) for array in inputs(shape))
        for layout in layouts(x):

            def run(x=x, dy=dy, weight=weight, bias=bias, layout=layout):
                x, dy = layout(x), layout(dy)
                mean_kept, var_kept = numpy.zeros((2, len(weight)), numpy.float32)
                y, mean, inverse_std = kernels.batch_norm_forward(x, weight, bias, mean_kept, var_kept)
                gradients = kernels.batch_norm_backward(dy, x, weight, mean, inverse_std)
                ended = kernels.batch_norm_forward(x, weight, bias, residual=dy, activation="relu")[0]
                passed = numpy.empty_like(dy)
                more = {"y": ended, "activation": "relu", "out_residual": passed}
                gradients += kernels.batch_norm_backward(dy, x, weight, mean, inverse_std, **more)
                masked = kernels.batch_norm_forward(x, weight, bias, activation="relu", with_mask=True)
                more = {"y": masked[0], "mask": masked[3], "activation": "relu"}
                gradients += kernels.batch_norm_backward(dy, x, weight, mean, inverse_std, **more)
                gradients += (ended, passed, *(part for part in masked if part is not None))
                inference = kernels.batch_norm_inference(x, weight, bias, mean, abs(weight))
                return [y, mean, inverse_std, mean_kept, var_kept, *gradients, inference]

            assert host.order_independent(run, (0, -1, 5)), f"{shape} {layout.__name__}"


def test_errors():
    x, three = numpy.zeros((1, 3, 1, 1), numpy.float32), numpy.ones(3, numpy.float32)
    with pytest.raises(ProblemError, match=r"at least two values a channel, got 1 .*batch of one"):
        kernels.batch_norm_forward(x)
    with pytest.raises(ProblemError, match=r"\(N, C\) or \(N, C, H, W\), got x of shape \(2, 3, 4\)"):
        kernels.batch_norm_forward(numpy.zeros((2, 3, 4)))
    with pytest.raises(ArgumentError, match=r"weight must have shape \(3,\), got \(2,\)"):
        kernels.batch_norm_forward(numpy.zeros((2, 3), numpy.float32), three[:2])
    half = numpy.zeros((2, 3), numpy.float16)
    with pytest.raises(DtypeError, match=r"bias must be float32 where x is float16: .*got float16, convert it"):
        kernels.batch_norm_forward(half, None, half[0])
    with pytest.raises(DtypeError, match="running_var must be float64 where x is float64"):
        kernels.batch_norm_inference(numpy.zeros((2, 3)), None, None, numpy.ones(3), three)
    with pytest.raises(DtypeError, match=r"x must be one of .*, got int32"):
        kernels.batch_norm_forward(numpy.zeros((2, 3), numpy.int32))
    images = numpy.zeros((2, 3, 4, 4), numpy.float32)
    for wrong in (awkward(images), images.transpose(0, 1, 3, 2), numpy.asfortranarray(numpy.zeros((4, 3), "f4"))):
        with pytest.raises(LayoutError, match="x of shape"):
            kernels.batch_norm_forward(wrong)
    with pytest.raises(LayoutError, match=r"running_mean of shape \(3,\)"):
        kernels.batch_norm_forward(images, running_mean=numpy.zeros(6, numpy.float32)[::2])
    with pytest.raises(LayoutError, match="out has strides"):
        kernels.batch_norm_forward(images, out=channels_last(images))
    with pytest.raises(LayoutError, match="dy has strides"):
        kernels.batch_norm_backward(channels_last(images), images, None, three, three)
    with pytest.raises(ArgumentError, match=r"dy has shape \(1, 3, 1, 1\), but x has shape \(2, 3, 4, 4\)"):
        kernels.batch_norm_backward(x, images, None, three, three)
    with pytest.raises(DtypeError, match="out is float64, but x is float32"):
        kernels.batch_norm_inference(images, None, None, three, three, out=numpy.zeros((2, 3, 4, 4)))
    with pytest.raises(DtypeError, match="mean must be an array, got None"):
        kernels.batch_norm_backward(images, images, None, None, three)
    with pytest.raises(ArgumentError, match=r"activation must be one of identity, relu, .*, got 'softmax'"):
        kernels.batch_norm_forward(images, activation="softmax")
    with pytest.raises(ArgumentError, match=r"goes back through identity, relu, leaky_relu, relu6, got .*'tanh'"):
        kernels.batch_norm_backward(images, images, None, three, three, y=images, activation="tanh")
    with pytest.raises(ArgumentError, match="goes back through relu by its result: give it as y"):
        kernels.batch_norm_backward(images, images, None, three, three, activation="relu")
    level = {"activation": "leaky_relu", "negative_slope": 0}
    with pytest.raises(ArgumentError, match="where negative_slope is above 0, got 0"):
        kernels.batch_norm_backward(images, images, None, three, three, y=images, **level)
    bits = numpy.zeros(96 * 4 // 16, numpy.uint8)
    for mask, error in (
        (bits[:-1], r"mask must have shape \(24,\), got \(23,\)"),
        (bits.astype("i4"), "mask must be uint8"),
    ):
        with pytest.raises((ArgumentError, DtypeError), match=error):
            kernels.batch_norm_backward(images, images, None, three, three, y=images, mask=mask, activation="relu")
    with pytest.raises(LayoutError, match="residual has strides"):
        kernels.batch_norm_forward(images, residual=channels_last(images))
    with pytest.raises(ArgumentError, match=r"out_bias must have shape \(3,\), got \(2,\)"):
        kernels.batch_norm_backward(images, images, None, three, three, out_bias=three[:2].copy())
    # A larger image is read twice: written between, x would be the gradient.
    for wrong, name in (
        ({"out_residual": images}, "x"),
        ({"out_weight": three}, "mean"),
        ({"out_bias": three}, "mean"),
    ):
        with pytest.raises(ArgumentError, match=f"shares memory with {name}"):
            kernels.batch_norm_backward(images + 0, images, None, three, three, **wrong)
    both = three.copy()
    with pytest.raises(ArgumentError, match="out_bias shares memory with out_weight"):
        kernels.batch_norm_backward(images, images, None, three, three, out_weight=both, out_bias=both)
    three.flags.writeable = False
    with pytest.raises(DtypeError, match="running_mean is read-only"):
        kernels.batch_norm_forward(images, running_mean=three)
